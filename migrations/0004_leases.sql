-- Workers, and the few functions that must see the leases of all tenants.

CREATE TABLE worker (
    id            text PRIMARY KEY,
    role          text NOT NULL CHECK (role IN ('train', 'infer')),
    boot_id       text NOT NULL,
    pid_namespace text NOT NULL,
    pid           bigint NOT NULL,
    start_time    bigint NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX worker_host ON worker (boot_id, pid_namespace);
GRANT SELECT, INSERT, DELETE ON worker TO graft_worker;

-- The oldest waiting job becomes p_worker's, with a new attempt number. Whether a job waits is in the
-- lease row alone, so the row that is locked is the row that decides.
CREATE FUNCTION lease_claim(p_worker text, p_seconds integer)
RETURNS TABLE (tenant_id uuid, job_id text, attempt_number bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    -- Materialized: a plan that ran this more than once would lock more than one row.
    WITH next AS MATERIALIZED (
        SELECT w.tenant, w.job FROM job_lease w
         WHERE w.worker IS NULL AND w.run_after < 'infinity' AND w.run_after <= now()
         ORDER BY w.ordinal LIMIT 1 FOR UPDATE SKIP LOCKED)
    UPDATE job_lease l
       SET worker = p_worker, attempt = l.attempt + 1, claim_step = l.recovery_step,
           lease_until = clock_timestamp() + make_interval(secs => p_seconds)
      FROM next
     WHERE l.tenant = next.tenant AND l.job = next.job
    RETURNING l.tenant, l.job, l.attempt;
$$;
REVOKE ALL ON FUNCTION lease_claim(text, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lease_claim(text, integer) TO graft_worker;

-- Lets go of leases whose holder is dead (p_worker) or silent (p_worker NULL: those that ran out).
-- p_poison > 0: an attempt that saved no further recovery checkpoint counts as a crash, and at that
-- many in a row the job is not claimable any more: `poisoned`, and the caller fails it in the same
-- transaction. p_poison 0: nobody's fault.
CREATE FUNCTION lease_let_go(p_worker text, p_poison integer)
RETURNS TABLE (tenant_id uuid, job_id text, attempt_number bigint, poisoned boolean)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    WITH dead AS MATERIALIZED (
        SELECT d.tenant, d.job,
               CASE WHEN p_poison <= 0 THEN d.crashes
                    WHEN d.recovery_step > d.claim_step THEN 0
                    ELSE d.crashes + 1 END AS crashes
          FROM job_lease d
         WHERE d.worker IS NOT NULL
           AND CASE WHEN p_worker IS NULL THEN d.lease_until < now() ELSE d.worker = p_worker END
           FOR UPDATE SKIP LOCKED)
    UPDATE job_lease l
       SET worker = NULL, lease_until = NULL, crashes = dead.crashes,
           run_after = CASE
               WHEN p_poison > 0 AND dead.crashes >= p_poison THEN 'infinity'
               WHEN p_poison > 0 AND dead.crashes > 0 THEN now() + interval '1 second'
                   * (ARRAY[1, 5, 25])[least(dead.crashes, 3)] * (0.5 + random())
               ELSE now() END
      FROM dead
     WHERE l.tenant = dead.tenant AND l.job = dead.job
    RETURNING l.tenant, l.job, l.attempt, p_poison > 0 AND l.crashes >= p_poison;
$$;
REVOKE ALL ON FUNCTION lease_let_go(text, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lease_let_go(text, integer) TO graft_worker;

-- How many jobs are in which state, over all tenants: numbers only.
CREATE FUNCTION job_count() RETURNS TABLE (state_name text, jobs bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    SELECT j.state, count(*) FROM job j GROUP BY j.state;
$$;
REVOKE ALL ON FUNCTION job_count() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION job_count() TO graft_app, graft_worker;
