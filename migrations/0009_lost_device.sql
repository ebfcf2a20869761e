-- A job whose device was lost goes elsewhere: its device may be gone for good, and would meet the job
-- again at once while every other device is busy.

ALTER TABLE job_lease
    ADD COLUMN lost_on text,         -- host and device that the last loss was on
    ADD COLUMN lost_at timestamptz;

-- Which device a worker computes on, told apart from those of other hosts.
CREATE FUNCTION worker_place(p_worker text) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT boot_id || ' ' || device FROM worker WHERE id = p_worker;
$$;
REVOKE ALL ON FUNCTION worker_place(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION worker_place(text) TO graft_worker;

-- As before, but where another device's train worker is alive, a job is left to it that lost this
-- worker's device: for 4, 16, 64 … minutes, since that one may be busy for hours and ours be well.
CREATE OR REPLACE FUNCTION lease_claim(p_worker text, p_seconds integer)
RETURNS TABLE (tenant_id uuid, job_id text, attempt_number bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    -- Materialized: a plan that ran this more than once would lock more than one row.
    WITH here AS MATERIALIZED (
        SELECT worker_place(p_worker) AS place,
               EXISTS (SELECT 1 FROM worker o
                        WHERE o.role = 'train' AND o.seen_at > now() - interval '1 minute'
                          AND worker_place(o.id) <> worker_place(p_worker)) AS others),
    next AS MATERIALIZED (
        SELECT w.tenant, w.job FROM job_lease w, here
         WHERE w.worker IS NULL AND w.run_after < 'infinity' AND w.run_after <= now()
           AND NOT (here.others AND w.lost_on IS NOT NULL AND w.lost_on = here.place
                    AND w.lost_at + interval '1 minute' * power(4, least(w.device_losses, 5)) > now())
         ORDER BY w.ordinal LIMIT 1 FOR UPDATE OF w SKIP LOCKED)
    UPDATE job_lease l
       SET worker = p_worker, attempt = l.attempt + 1, claim_step = l.recovery_step,
           lease_until = clock_timestamp() + make_interval(secs => p_seconds)
      FROM next
     WHERE l.tenant = next.tenant AND l.job = next.job
    RETURNING l.tenant, l.job, l.attempt;
$$;

-- As before, and it says where the device was.
CREATE OR REPLACE FUNCTION lease_let_go(p_worker text, p_poison integer, p_device boolean DEFAULT false)
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
           lost_on = CASE WHEN p_device THEN worker_place(p_worker) ELSE l.lost_on END,
           lost_at = CASE WHEN p_device THEN now() ELSE l.lost_at END,
           run_after = CASE
               WHEN p_poison > 0 AND counted.crashes >= p_poison THEN 'infinity'
               WHEN p_poison > 0 AND counted.crashes > 0 AND NOT counted.forgiven THEN now()
                   + interval '1 second' * (ARRAY[1, 5, 25])[least(counted.crashes, 3)] * (0.5 + random())
               ELSE now() END
      FROM counted
     WHERE l.tenant = counted.tenant AND l.job = counted.job
    RETURNING l.tenant, l.job, l.attempt, p_poison > 0 AND l.crashes >= p_poison;
$$;
