-- Jobs: states, what a job is, who works on it, what it told, what it left behind.

-- The same rows as storage/job_state.def; a unit test compares them.
CREATE TABLE job_state (
    name     text PRIMARY KEY,
    wire     text NOT NULL,
    terminal boolean NOT NULL
);
INSERT INTO job_state VALUES
    ('validating', 'validating_files', false),
    ('queued', 'queued', false),
    ('running', 'running', false),
    ('compressing', 'running', false),
    ('succeeded', 'succeeded', true),
    ('failed', 'failed', true),
    ('cancelled', 'cancelled', true);

CREATE TABLE job_move (
    before text NOT NULL REFERENCES job_state,
    after  text NOT NULL REFERENCES job_state,
    PRIMARY KEY (before, after)
);
INSERT INTO job_move VALUES
    ('validating', 'queued'), ('validating', 'failed'), ('validating', 'cancelled'),
    ('queued', 'running'), ('queued', 'failed'), ('queued', 'cancelled'),
    ('running', 'compressing'), ('running', 'succeeded'), ('running', 'failed'),
    ('running', 'cancelled'),
    ('compressing', 'running'), ('compressing', 'succeeded'), ('compressing', 'failed'),
    ('compressing', 'cancelled');
GRANT SELECT ON job_state, job_move TO graft_app, graft_worker;

CREATE TABLE job (
    tenant            uuid NOT NULL REFERENCES project,
    id                text NOT NULL,
    ordinal           bigint GENERATED ALWAYS AS IDENTITY,
    state             text NOT NULL DEFAULT 'validating' REFERENCES job_state,
    created_at        timestamptz NOT NULL DEFAULT now(),
    started_at        timestamptz,
    finished_at       timestamptz,
    model             text NOT NULL,
    model_name        text NOT NULL,
    suffix            text,
    -- Ids without a foreign key: a client may delete a file; the digests keep the bytes alive until
    -- the job has ended.
    training_file     text NOT NULL,
    validation_file   text,
    training_sha256   text NOT NULL,
    validation_sha256 text,
    base_name         text NOT NULL REFERENCES base_model,
    base_digest       text NOT NULL,
    base_sha256       text NOT NULL,
    start_sha256      text,
    seed              bigint NOT NULL CHECK (seed BETWEEN 0 AND 2147483647),
    method_type       text NOT NULL,
    method            json,
    metadata          jsonb,
    integrations      json,
    extension         json,
    train_embeddings  boolean NOT NULL,
    schedule          text NOT NULL CHECK (schedule IN ('linear', 'cosine')),
    -- As chosen (NULL: auto), and as numbers since the job runs.
    chosen_n_epochs                   integer,
    chosen_batch_size                 integer,
    chosen_learning_rate_multiplier   double precision,
    resolved_n_epochs                 integer,
    resolved_batch_size               integer,
    resolved_learning_rate_multiplier double precision,
    total_steps           integer,
    trained_tokens        bigint,
    result_file           text,
    error_code            text,
    error_message         text,
    error_param           text,
    dataset_examples      bigint,
    dataset_tokens        bigint,
    dataset_trained       bigint,
    dataset_truncated     bigint,
    dataset_untrained     bigint,
    recall_base           double precision,
    recall_tuned          double precision,
    recall_served         double precision,
    delta_codec           text,
    delta_bytes           bigint,
    delta_ratio           double precision,
    delta_relative_error  double precision,
    PRIMARY KEY (tenant, id),
    UNIQUE (tenant, model_name),
    CHECK ((finished_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))),
    CHECK ((error_code IS NOT NULL) = (state = 'failed'))
);
CREATE INDEX job_order ON job (tenant, ordinal);
CREATE INDEX job_unfinished ON job (tenant, state)
    WHERE state NOT IN ('succeeded', 'failed', 'cancelled');
SELECT isolate('job');

-- A state changes along job_move only, and a job begins as 'validating'.
CREATE FUNCTION job_check_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = graft, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state <> 'validating' THEN
            RAISE EXCEPTION 'a job begins as validating, not %', NEW.state USING ERRCODE = 'GR002';
        END IF;
    ELSIF NEW.state <> OLD.state
          AND NOT EXISTS (SELECT 1 FROM job_move WHERE before = OLD.state AND after = NEW.state) THEN
        RAISE EXCEPTION 'a job does not go from % to %', OLD.state, NEW.state
            USING ERRCODE = 'GR002';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER job_move BEFORE INSERT OR UPDATE ON job
    FOR EACH ROW EXECUTE FUNCTION job_check_move();

GRANT SELECT, INSERT ON job TO graft_app;
GRANT UPDATE (state, finished_at) ON job TO graft_app;
GRANT SELECT ON job TO graft_worker;
GRANT UPDATE (state, started_at, finished_at, resolved_n_epochs, resolved_batch_size,
              resolved_learning_rate_multiplier, total_steps, trained_tokens, result_file,
              error_code, error_message, error_param, dataset_examples, dataset_tokens,
              dataset_trained, dataset_truncated, dataset_untrained, recall_base, recall_tuned,
              recall_served, delta_codec, delta_bytes, delta_ratio, delta_relative_error)
    ON job TO graft_worker;

-- What changes often, in a narrow row of its own with room for HOT updates: the lease, progress, and
-- the number of the last event. One row for each job, made with it. Whoever changes a job locks
-- this row first, so that all take locks in one order.
--   waiting:  worker NULL, run_after in the past     held: worker and lease_until set
--   ended:    run_after = infinity
CREATE TABLE job_lease (
    tenant           uuid NOT NULL,
    job              text NOT NULL,
    ordinal          bigint NOT NULL,
    attempt          bigint NOT NULL DEFAULT 0,
    worker           text,
    lease_until      timestamptz,
    run_after        timestamptz NOT NULL DEFAULT now(),
    crashes          integer NOT NULL DEFAULT 0,
    event_sequence   bigint NOT NULL DEFAULT 0,
    step             integer NOT NULL DEFAULT 0,
    estimated_finish timestamptz,
    recovery_name    text,
    recovery_step    bigint NOT NULL DEFAULT 0,
    recovery_bytes   bigint NOT NULL DEFAULT 0,
    claim_step       bigint NOT NULL DEFAULT 0, -- recovery_step when the attempt began
    PRIMARY KEY (tenant, job),
    FOREIGN KEY (tenant, job) REFERENCES job (tenant, id),
    CHECK ((worker IS NULL) = (lease_until IS NULL))
) WITH (fillfactor = 50);
-- Neither index holds a column that a heartbeat changes, or HOT would be lost.
CREATE INDEX job_lease_waiting ON job_lease (ordinal)
    WHERE worker IS NULL AND run_after < 'infinity';
CREATE INDEX job_lease_held ON job_lease (worker) WHERE worker IS NOT NULL;
SELECT isolate('job_lease');
GRANT SELECT, INSERT ON job_lease TO graft_app;
GRANT UPDATE (worker, lease_until, run_after, event_sequence, estimated_finish, recovery_name)
    ON job_lease TO graft_app;
GRANT SELECT, UPDATE ON job_lease TO graft_worker;

CREATE TABLE job_event (
    tenant     uuid NOT NULL,
    job        text NOT NULL,
    sequence   bigint NOT NULL CHECK (sequence > 0),
    id         text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    level      text NOT NULL CHECK (level IN ('info', 'warn', 'error')),
    type       text NOT NULL CHECK (type IN ('message', 'metrics')),
    message    text NOT NULL,
    data       json NOT NULL DEFAULT '{}',
    key        text,
    PRIMARY KEY (tenant, job, sequence),
    UNIQUE (tenant, id),
    FOREIGN KEY (tenant, job) REFERENCES job (tenant, id)
);
CREATE UNIQUE INDEX job_event_key ON job_event (tenant, job, key) WHERE key IS NOT NULL;
SELECT isolate('job_event');
GRANT SELECT, INSERT ON job_event TO graft_app, graft_worker;

CREATE TABLE checkpoint (
    tenant          uuid NOT NULL,
    id              text NOT NULL,
    job             text NOT NULL,
    step            integer NOT NULL CHECK (step > 0),
    model           text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    artifact_sha256 text NOT NULL CHECK (artifact_sha256 ~ '^[0-9a-f]{64}$'),
    artifact_bytes  bigint NOT NULL,
    train_loss                     double precision,
    train_mean_token_accuracy      double precision,
    valid_loss                     double precision,
    valid_mean_token_accuracy      double precision,
    full_valid_loss                double precision,
    full_valid_mean_token_accuracy double precision,
    PRIMARY KEY (tenant, id),
    UNIQUE (tenant, job, step),
    UNIQUE (tenant, model),
    FOREIGN KEY (tenant, job) REFERENCES job (tenant, id)
);
CREATE INDEX checkpoint_blob ON checkpoint (tenant, artifact_sha256);
SELECT isolate('checkpoint');
GRANT SELECT, DELETE ON checkpoint TO graft_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON checkpoint TO graft_worker;

-- Fine-tuned models. The base is the root base, also when a fine-tune was continued.
CREATE TABLE model (
    tenant          uuid NOT NULL,
    name            text NOT NULL,
    ordinal         bigint GENERATED ALWAYS AS IDENTITY,
    job             text NOT NULL,
    base_name       text NOT NULL REFERENCES base_model,
    base_digest     text NOT NULL,
    artifact_sha256 text NOT NULL CHECK (artifact_sha256 ~ '^[0-9a-f]{64}$'),
    artifact_bytes  bigint NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, name),
    UNIQUE (tenant, job), -- exactly one result
    FOREIGN KEY (tenant, job) REFERENCES job (tenant, id)
);
CREATE INDEX model_blob ON model (tenant, artifact_sha256);
SELECT isolate('model');
GRANT SELECT, DELETE ON model TO graft_app;
GRANT SELECT, INSERT ON model TO graft_worker;

-- What must be told to the outside, written with the change that it tells of. The sender comes with
-- webhooks; `id` is then the stable webhook-id.
CREATE TABLE outbox (
    tenant       uuid NOT NULL REFERENCES project,
    id           text NOT NULL,
    ordinal      bigint GENERATED ALWAYS AS IDENTITY,
    type         text NOT NULL,
    object_id    text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    delivered_at timestamptz,
    PRIMARY KEY (tenant, id),
    UNIQUE (tenant, type, object_id)
);
CREATE INDEX outbox_waiting ON outbox (ordinal) WHERE delivered_at IS NULL;
SELECT isolate('outbox');
GRANT INSERT ON outbox TO graft_app, graft_worker;
