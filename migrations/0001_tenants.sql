-- Organizations, projects (a project is a tenant) and keys.
--
-- Every table with a `tenant` column has row-level security, enabled and FORCED: graft_app and
-- graft_worker see the rows of the project named by app.tenant, nothing without one. After a
-- transaction that set it locally a custom setting reads '', not NULL: hence nullif. The owner sees
-- nothing either, but inside the SECURITY DEFINER functions, which begin by setting app.system; that
-- setting means nothing to any other role.

CREATE TABLE organization (
    id         text PRIMARY KEY CHECK (id ~ '^org-[0-9A-Za-z]{24}$'),
    name       text NOT NULL UNIQUE CHECK (octet_length(name) BETWEEN 1 AND 64),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE project (
    tenant       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organization text NOT NULL REFERENCES organization,
    name         text NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 64),
    created_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (organization, name)
);

CREATE TABLE api_key (
    tenant       uuid NOT NULL REFERENCES project,
    id           text NOT NULL,
    sha256       text NOT NULL UNIQUE CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    prefix       text NOT NULL, -- for display: the first characters and the last four
    last4        text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    revoked_at   timestamptz,
    last_used_at timestamptz,
    PRIMARY KEY (tenant, id)
);

-- The three statements that isolate a table. Migrations use it; nobody else may.
CREATE FUNCTION isolate(p_table regclass) RETURNS void
LANGUAGE plpgsql SET search_path = graft, pg_temp AS $$
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', p_table);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', p_table);
    EXECUTE format($p$CREATE POLICY tenant ON %s TO graft_app, graft_worker
        USING (tenant = nullif(current_setting('app.tenant', true), '')::uuid)
        WITH CHECK (tenant = nullif(current_setting('app.tenant', true), '')::uuid)$p$, p_table);
    EXECUTE format($p$CREATE POLICY system ON %s TO graft_owner
        USING (current_setting('app.system', true) = 'on')
        WITH CHECK (current_setting('app.system', true) = 'on')$p$, p_table);
END $$;
REVOKE ALL ON FUNCTION isolate(regclass) FROM PUBLIC;

SELECT isolate('project'), isolate('api_key');

-- An organization is seen by its projects: the subquery is under project's own policy.
ALTER TABLE organization ENABLE ROW LEVEL SECURITY;
ALTER TABLE organization FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON organization FOR SELECT TO graft_app, graft_worker
    USING (id IN (SELECT organization FROM project));
CREATE POLICY system ON organization TO graft_owner
    USING (current_setting('app.system', true) = 'on')
    WITH CHECK (current_setting('app.system', true) = 'on');

GRANT SELECT ON organization, project TO graft_app, graft_worker;

-- Whom a key speaks for. Runs before the tenant is known, so it sees all keys and tells one.
CREATE FUNCTION key_find(p_sha256 text)
RETURNS TABLE (key_id text, organization_id text, organization_name text, tenant_id uuid,
               project_name text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = graft, pg_temp AS $$
BEGIN
    PERFORM set_config('app.system', 'on', true);
    UPDATE api_key SET last_used_at = now()
     WHERE sha256 = p_sha256 AND revoked_at IS NULL
       AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute');
    RETURN QUERY
    SELECT k.id, o.id, o.name, p.tenant, p.name
      FROM api_key k JOIN project p ON p.tenant = k.tenant
      JOIN organization o ON o.id = p.organization
     WHERE k.sha256 = p_sha256 AND k.revoked_at IS NULL;
END $$;
REVOKE ALL ON FUNCTION key_find(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION key_find(text) TO graft_app;

-- For the operator's command. Ids come from the caller; where the organization is there already,
-- its own id stays.
CREATE FUNCTION key_create(p_organization_id text, p_organization text, p_project text,
                           p_key_id text, p_sha256 text, p_prefix text, p_last4 text)
RETURNS TABLE (organization_id text, tenant_id uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = graft, pg_temp AS $$
DECLARE
    v_organization text;
    v_tenant uuid;
BEGIN
    PERFORM set_config('app.system', 'on', true);
    INSERT INTO organization (id, name) VALUES (p_organization_id, p_organization)
        ON CONFLICT (name) DO NOTHING;
    SELECT o.id INTO STRICT v_organization FROM organization o WHERE o.name = p_organization;
    INSERT INTO project (organization, name) VALUES (v_organization, p_project)
        ON CONFLICT (organization, name) DO NOTHING;
    SELECT p.tenant INTO STRICT v_tenant FROM project p
     WHERE p.organization = v_organization AND p.name = p_project;
    INSERT INTO api_key (tenant, id, sha256, prefix, last4)
        VALUES (v_tenant, p_key_id, p_sha256, p_prefix, p_last4);
    RETURN QUERY SELECT v_organization, v_tenant;
END $$;
REVOKE ALL ON FUNCTION key_create(text, text, text, text, text, text, text) FROM PUBLIC;

CREATE FUNCTION key_revoke(p_key_id text, p_sha256 text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = graft, pg_temp AS $$
DECLARE
    v_count bigint;
BEGIN
    PERFORM set_config('app.system', 'on', true);
    UPDATE api_key SET revoked_at = now()
     WHERE (id = p_key_id OR sha256 = p_sha256) AND revoked_at IS NULL;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END $$;
REVOKE ALL ON FUNCTION key_revoke(text, text) FROM PUBLIC;
