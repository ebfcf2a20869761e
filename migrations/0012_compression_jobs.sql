-- A job may compress what a model that was tuned elsewhere differs by from its base, without training: then it
-- names that model (an imported one, of no tenant). Its training_file is what it is calibrated with, '' for none.
ALTER TABLE job
    ADD COLUMN tuned_model  text,
    ADD COLUMN tuned_sha256 text,
    ADD CHECK ((tuned_model IS NULL) = (tuned_sha256 IS NULL)),
    ADD CHECK (training_file <> '' OR tuned_model IS NOT NULL);
