-- Everything is in STRICT tables. A job's body is JSON, and the columns to search by are computed from it, so that
-- they can't disagree with it.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO meta (key, value) VALUES
    ('pruned', 0),  -- the highest event id that has ever been deleted
    ('checks', 0);  -- how often it was tried whether the journal can be written

CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL,
    version INTEGER NOT NULL GENERATED ALWAYS AS (body ->> '$.version') STORED,
    domain TEXT NOT NULL GENERATED ALWAYS AS (body ->> '$.domain') STORED,
    disk TEXT NOT NULL GENERATED ALWAYS AS (body ->> '$.disk') STORED,
    state TEXT NOT NULL GENERATED ALWAYS AS (body ->> '$.state') STORED,
    data_state TEXT NOT NULL GENERATED ALWAYS AS (body ->> '$.data_state') STORED,
    intent TEXT NOT NULL GENERATED ALWAYS AS (body ->> '$.intent') STORED,
    finished_at INTEGER GENERATED ALWAYS AS (body ->> '$.finished_at') STORED,
    ended INTEGER NOT NULL
        GENERATED ALWAYS AS ((body ->> '$.state') IN ('completed', 'failed', 'canceled', 'lost')) STORED,
    CHECK (id = (body ->> '$.id')),
    CHECK (ended = (finished_at IS NOT NULL))
) STRICT;

CREATE UNIQUE INDEX jobs_unfinished ON jobs (domain, disk) WHERE ended = 0;
CREATE INDEX jobs_by_disk ON jobs (domain, disk, seq);
CREATE INDEX jobs_by_end ON jobs (finished_at) WHERE ended = 1;

CREATE TRIGGER jobs_versions BEFORE UPDATE ON jobs
WHEN OLD.ended = 1 OR NEW.id <> OLD.id OR (NEW.body ->> '$.version') IS NOT OLD.version + 1
BEGIN
    SELECT RAISE(ABORT, 'a job changes one version at a time, and not after its end');
END;

CREATE TRIGGER jobs_kept BEFORE DELETE ON jobs WHEN OLD.ended = 0
BEGIN
    SELECT RAISE(ABORT, 'an unfinished job is not deleted');
END;

CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- so that no id is given twice, not even after the last was pruned
    type TEXT NOT NULL CHECK (type <> 'job.progress'),
    time INTEGER NOT NULL,
    domain TEXT NOT NULL,
    disk TEXT,
    job_id TEXT REFERENCES jobs (id) ON DELETE CASCADE,
    data TEXT NOT NULL CHECK (json_valid(data))
) STRICT;

CREATE INDEX events_by_job ON events (job_id, id) WHERE job_id IS NOT NULL;
CREATE INDEX events_by_domain ON events (domain, id);
CREATE INDEX events_of_domains_by_time ON events (time) WHERE job_id IS NULL;

CREATE TRIGGER events_kept BEFORE UPDATE ON events
BEGIN
    SELECT RAISE(ABORT, 'an event does not change');
END;

CREATE TRIGGER events_pruned AFTER DELETE ON events
BEGIN
    UPDATE meta SET value = max(value, OLD.id) WHERE key = 'pruned';
END;

CREATE TABLE domains (
    id TEXT PRIMARY KEY,
    body TEXT NOT NULL,
    CHECK (id = (body ->> '$.id'))
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
    hash TEXT PRIMARY KEY CHECK (length(hash) = 64),
    name TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL CHECK (role IN ('read', 'operate', 'admin')),
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
