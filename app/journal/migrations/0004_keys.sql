-- The keys under which requests are repeated, stored with the job that the first of them made, and its answer.

CREATE TABLE idempotency_keys (
    who TEXT NOT NULL,  -- the name of the client's token
    key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,  -- a digest of what was asked for
    job_id TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    status INTEGER,
    body TEXT,
    CHECK ((status IS NULL) = (body IS NULL)),
    PRIMARY KEY (who, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_keys_by_time ON idempotency_keys (created_at);
CREATE INDEX idempotency_keys_by_job ON idempotency_keys (job_id);
