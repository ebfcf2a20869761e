-- A row of the outbox is gone a week after what it tells of, delivered or not: whoever sends it has given up
-- long before. What is told once stays told once, since a job does not pass the same state twice.
DROP FUNCTION collect_expired();
CREATE FUNCTION collect_expired() RETURNS TABLE (files bigint, idempotency_keys bigint, outbox_rows bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = graft, pg_temp AS $$
    SELECT set_config('app.system', 'on', true);
    WITH gone_files AS (DELETE FROM file WHERE expires_at <= now() RETURNING 1),
         gone_keys AS (DELETE FROM idempotency_key
                        WHERE created_at < now() - interval '24 hours' RETURNING 1),
         gone_rows AS (DELETE FROM outbox WHERE created_at < now() - interval '7 days' RETURNING 1)
    SELECT (SELECT count(*) FROM gone_files), (SELECT count(*) FROM gone_keys),
           (SELECT count(*) FROM gone_rows);
$$;
REVOKE ALL ON FUNCTION collect_expired() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION collect_expired() TO graft_worker;
