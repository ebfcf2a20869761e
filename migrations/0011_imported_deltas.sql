-- A fine-tuned model without a job: a delta that was made elsewhere and imported through the API.
ALTER TABLE model ALTER COLUMN job DROP NOT NULL;
GRANT INSERT ON model TO graft_app;
