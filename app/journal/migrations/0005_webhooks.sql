-- Webhooks, and the events that each is to be sent: a row for each, in the transaction of the event.

CREATE TABLE webhooks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    url TEXT NOT NULL,
    types TEXT NOT NULL CHECK (json_valid(types)),  -- an array; empty: all types
    job_id TEXT REFERENCES jobs (id) ON DELETE CASCADE,  -- a callback: for this job alone
    secret TEXT NOT NULL,
    previous TEXT,
    previous_until INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    created_by TEXT NOT NULL,
    disabled_at INTEGER,
    disabled_because TEXT,
    CHECK ((disabled_at IS NULL) = (disabled_because IS NULL))
) STRICT;

CREATE INDEX webhooks_of_jobs ON webhooks (job_id, seq);

CREATE TABLE deliveries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,  -- the same for each attempt, and never given to another event
    webhook_id TEXT NOT NULL REFERENCES webhooks (id) ON DELETE CASCADE,
    event_id INTEGER NOT NULL REFERENCES events (id) ON DELETE CASCADE,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    attempted_at INTEGER,
    answer TEXT CHECK (answer IS NULL OR json_valid(answer))
) STRICT;

CREATE INDEX deliveries_by_webhook ON deliveries (webhook_id, seq);
CREATE INDEX deliveries_by_event ON deliveries (event_id);
CREATE INDEX deliveries_undelivered ON deliveries (webhook_id, seq) WHERE state <> 'delivered';
