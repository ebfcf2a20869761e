-- What each worker's device is and does, told by the worker with its heartbeats; and what a lost device
-- means for the job it was computing.

ALTER TABLE worker
    ADD COLUMN device       text NOT NULL DEFAULT 'cpu',
    ADD COLUMN description  text NOT NULL DEFAULT '',
    ADD COLUMN memory_bytes bigint NOT NULL DEFAULT 0, -- 0: not known
    ADD COLUMN memory_free  bigint NOT NULL DEFAULT 0,
    ADD COLUMN utilization  double precision NOT NULL DEFAULT 0, -- of the last minute, 0..1
    ADD COLUMN seen_at      timestamptz NOT NULL DEFAULT now();
GRANT UPDATE (device, description, memory_bytes, memory_free, utilization, seen_at) ON worker
    TO graft_worker;

-- Every worker there is. The job it is at is told to the job's own project only.
CREATE FUNCTION worker_list()
RETURNS TABLE (worker_id text, role_name text, device_name text, device_description text,
               bytes bigint, bytes_free bigint, share double precision, seen bigint,
               boot text, namespace text, process bigint, busy boolean, job_id text)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    SELECT w.id, w.role, w.device, w.description, w.memory_bytes, w.memory_free, w.utilization,
           extract(epoch FROM w.seen_at)::bigint, w.boot_id, w.pid_namespace, w.pid,
           EXISTS (SELECT 1 FROM job_lease b WHERE b.worker = w.id),
           (SELECT l.job FROM job_lease l
             WHERE l.worker = w.id
               AND l.tenant = nullif(current_setting('app.tenant', true), '')::uuid LIMIT 1)
      FROM worker w ORDER BY w.created_at, w.id;
$$;
REVOKE ALL ON FUNCTION worker_list() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION worker_list() TO graft_app, graft_worker;

ALTER TABLE job_lease ADD COLUMN device_losses integer NOT NULL DEFAULT 0; -- since the last progress

-- As before, and: where p_worker's device was lost (p_device), the first time is nobody's fault. The job
-- is claimable at once and no crash is counted; from the second loss on, without a further recovery
-- checkpoint between, it counts as any crash does, or a job that kills devices would go on for ever.
DROP FUNCTION lease_let_go(text, integer);
CREATE FUNCTION lease_let_go(p_worker text, p_poison integer, p_device boolean DEFAULT false)
RETURNS TABLE (tenant_id uuid, job_id text, attempt_number bigint, poisoned boolean)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    WITH dead AS MATERIALIZED (
        SELECT d.tenant, d.job,
               d.recovery_step > d.claim_step AS further,
               p_device AND (d.device_losses = 0 OR d.recovery_step > d.claim_step) AS forgiven,
               d.crashes, d.device_losses
          FROM job_lease d
         WHERE d.worker IS NOT NULL
           AND CASE WHEN p_worker IS NULL THEN d.lease_until < now() ELSE d.worker = p_worker END
           FOR UPDATE SKIP LOCKED),
    counted AS (
        SELECT dead.tenant, dead.job, dead.forgiven,
               CASE WHEN p_poison <= 0 THEN dead.crashes
                    WHEN dead.further THEN 0
                    WHEN dead.forgiven THEN dead.crashes
                    ELSE dead.crashes + 1 END AS crashes,
               CASE WHEN dead.further THEN 0 ELSE dead.device_losses END + p_device::integer AS losses
          FROM dead)
    UPDATE job_lease l
       SET worker = NULL, lease_until = NULL, crashes = counted.crashes, device_losses = counted.losses,
           run_after = CASE
               WHEN p_poison > 0 AND counted.crashes >= p_poison THEN 'infinity'
               WHEN p_poison > 0 AND counted.crashes > 0 AND NOT counted.forgiven THEN now()
                   + interval '1 second' * (ARRAY[1, 5, 25])[least(counted.crashes, 3)] * (0.5 + random())
               ELSE now() END
      FROM counted
     WHERE l.tenant = counted.tenant AND l.job = counted.job
    RETURNING l.tenant, l.job, l.attempt, p_poison > 0 AND l.crashes >= p_poison;
$$;
REVOKE ALL ON FUNCTION lease_let_go(text, integer, boolean) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lease_let_go(text, integer, boolean) TO graft_worker;
