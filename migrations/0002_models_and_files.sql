-- Base models (no tenant, readable by all), files, and the answers to repeated requests.

CREATE TABLE base_model (
    name              text PRIMARY KEY CHECK (name ~ '^[0-9A-Za-z][0-9A-Za-z._/-]{0,63}$'),
    digest            text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
    sha256            text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    bytes             bigint NOT NULL CHECK (bytes >= 0),
    architecture      text NOT NULL,
    parameters        bigint NOT NULL,
    linear_parameters bigint NOT NULL,
    bytes_16bit       bigint NOT NULL,
    layers            integer NOT NULL,
    hidden            integer NOT NULL,
    intermediate      integer NOT NULL,
    heads             integer NOT NULL,
    kv_heads          integer NOT NULL,
    vocabulary        integer NOT NULL,
    context           integer NOT NULL,
    tied_embeddings   boolean NOT NULL,
    created_at        timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT ON base_model TO graft_app, graft_worker;

CREATE TABLE file (
    tenant     uuid NOT NULL REFERENCES project,
    id         text NOT NULL,
    ordinal    bigint GENERATED ALWAYS AS IDENTITY, -- order of creation, whatever the clock did
    filename   text NOT NULL CHECK (octet_length(filename) BETWEEN 1 AND 512),
    purpose    text NOT NULL,
    status     text NOT NULL DEFAULT 'processed' CHECK (status IN ('uploaded', 'processed', 'error')),
    bytes      bigint NOT NULL CHECK (bytes >= 0),
    sha256     text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    PRIMARY KEY (tenant, id)
);
CREATE INDEX file_order ON file (tenant, ordinal);
CREATE INDEX file_blob ON file (tenant, sha256);
CREATE INDEX file_expiry ON file (expires_at) WHERE expires_at IS NOT NULL;
SELECT isolate('file');
GRANT SELECT, INSERT, DELETE ON file TO graft_app;
GRANT SELECT, INSERT ON file TO graft_worker;

CREATE TABLE idempotency_key (
    tenant     uuid NOT NULL REFERENCES project,
    key        text NOT NULL CHECK (octet_length(key) BETWEEN 1 AND 255),
    digest     text NOT NULL,
    status     integer, -- NULL only inside the transaction that makes the row
    body       text,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, key)
);
CREATE INDEX idempotency_key_age ON idempotency_key (created_at);
SELECT isolate('idempotency_key');
GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_key TO graft_app;
