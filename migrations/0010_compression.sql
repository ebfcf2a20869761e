-- How a job's difference is to be compressed (NULL: the engine's choice), and the report of how it was.
ALTER TABLE job
    ADD COLUMN compression_codec         text,
    ADD COLUMN compression_ratio         double precision,
    ADD COLUMN compression_max_kl        double precision,
    ADD COLUMN compression_distill_steps integer,
    ADD COLUMN delta_report              json,
    ADD CHECK (compression_ratio IS NULL OR compression_max_kl IS NULL);
GRANT UPDATE (delta_report) ON job TO graft_worker;
