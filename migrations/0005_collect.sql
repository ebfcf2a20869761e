-- The collector's questions. Each takes what lies in the store and tells which of it nobody owns.

-- Pairs (owner, sha256) without a row. A job that has not ended owns its files' bytes and the delta
-- it starts from, even when the client has deleted those.
CREATE FUNCTION collect_blobs(p_owners text[], p_sha256s text[])
RETURNS TABLE (owner_name text, sha256_hex text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    SELECT b.owner, b.sha256
      FROM unnest(p_owners, p_sha256s) AS b (owner, sha256)
     WHERE CASE WHEN b.owner = 'base' THEN
               NOT EXISTS (SELECT 1 FROM base_model m WHERE m.sha256 = b.sha256)
               AND NOT EXISTS (SELECT 1 FROM job j WHERE j.base_sha256 = b.sha256
                                AND j.state NOT IN ('succeeded', 'failed', 'cancelled'))
           ELSE
               NOT EXISTS (SELECT 1 FROM file f
                            WHERE f.tenant = b.owner::uuid AND f.sha256 = b.sha256)
               AND NOT EXISTS (SELECT 1 FROM model m
                                WHERE m.tenant = b.owner::uuid AND m.artifact_sha256 = b.sha256)
               AND NOT EXISTS (SELECT 1 FROM checkpoint c
                                WHERE c.tenant = b.owner::uuid AND c.artifact_sha256 = b.sha256)
               AND NOT EXISTS (SELECT 1 FROM job j
                                WHERE j.tenant = b.owner::uuid
                                  AND j.state NOT IN ('succeeded', 'failed', 'cancelled')
                                  AND b.sha256 IN (j.training_sha256, j.validation_sha256,
                                                   j.start_sha256))
           END;
$$;
REVOKE ALL ON FUNCTION collect_blobs(text[], text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION collect_blobs(text[], text[]) TO graft_worker;

-- Pairs (job, attempt) that nobody holds now.
CREATE FUNCTION collect_attempts(p_jobs text[], p_attempts bigint[])
RETURNS TABLE (job_id text, attempt_number bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    SELECT s.job, s.attempt FROM unnest(p_jobs, p_attempts) AS s (job, attempt)
     WHERE NOT EXISTS (SELECT 1 FROM job_lease l
                        WHERE l.job = s.job AND l.attempt = s.attempt AND l.worker IS NOT NULL);
$$;
REVOKE ALL ON FUNCTION collect_attempts(text[], bigint[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION collect_attempts(text[], bigint[]) TO graft_worker;

-- Recovery checkpoints from which no job will resume.
CREATE FUNCTION collect_recovery(p_names text[]) RETURNS TABLE (recovery_file text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    SELECT r.name FROM unnest(p_names) AS r (name)
     WHERE NOT EXISTS (SELECT 1 FROM job_lease l
                        WHERE l.recovery_name = r.name AND l.run_after < 'infinity');
$$;
REVOKE ALL ON FUNCTION collect_recovery(text[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION collect_recovery(text[]) TO graft_worker;

CREATE FUNCTION collect_expired() RETURNS TABLE (files bigint, idempotency_keys bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    WITH gone_files AS (DELETE FROM file WHERE expires_at <= now() RETURNING 1),
         gone_keys AS (DELETE FROM idempotency_key
                        WHERE created_at < now() - interval '24 hours' RETURNING 1)
    SELECT (SELECT count(*) FROM gone_files), (SELECT count(*) FROM gone_keys);
$$;
REVOKE ALL ON FUNCTION collect_expired() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION collect_expired() TO graft_worker;
