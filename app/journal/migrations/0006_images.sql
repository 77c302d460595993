-- Images by identity: which disk uses them, which job has a claim on them, and which show a mixture.
-- Claims and marks of the jobs that are there already are filled in by app.journal.upgrade.
--
-- An image is a path, (st_dev, st_ino) of the file, and st_rdev of a block device; numbers that are not known are NULL.
-- They are unsigned in the kernel and signed here, with the same bits.

CREATE TABLE image_uses (
    domain TEXT NOT NULL,
    disk TEXT NOT NULL,
    place INTEGER NOT NULL CHECK (place >= 0),  -- in the chain; 0 is the active layer
    path TEXT,  -- NULL: the chain goes on here, with an image that nobody could find out
    dev INTEGER,
    ino INTEGER,
    rdev INTEGER,
    seen_at INTEGER NOT NULL,
    CHECK ((dev IS NULL) = (ino IS NULL)),
    CHECK (path IS NOT NULL OR (dev IS NULL AND rdev IS NULL)),
    PRIMARY KEY (domain, disk, place)
) STRICT, WITHOUT ROWID;

-- What unfinished jobs do, to the shape of a disk's chain or to an image.
CREATE TABLE claims (
    seq INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL REFERENCES jobs (id),
    access TEXT NOT NULL CHECK (access IN ('read', 'write', 'delete')),
    domain TEXT,
    disk TEXT,
    path TEXT,
    dev INTEGER,
    ino INTEGER,
    rdev INTEGER,
    CHECK ((domain IS NULL) = (disk IS NULL)),
    CHECK ((path IS NULL) <> (disk IS NULL)),
    CHECK ((dev IS NULL) = (ino IS NULL)),
    CHECK (path IS NOT NULL OR (dev IS NULL AND rdev IS NULL))
) STRICT;

CREATE INDEX claims_by_job ON claims (job_id);
CREATE INDEX claims_by_disk ON claims (domain, disk);
CREATE INDEX claims_by_path ON claims (path);
CREATE INDEX claims_by_file ON claims (dev, ino);
CREATE INDEX claims_by_device ON claims (rdev);

CREATE TRIGGER claims_made BEFORE INSERT ON claims
WHEN (SELECT ended FROM jobs WHERE id = NEW.job_id) IS NOT 0
BEGIN
    SELECT RAISE(ABORT, 'only an unfinished job has claims');
END;

CREATE TRIGGER claims_ended AFTER UPDATE ON jobs WHEN NEW.ended = 1
BEGIN
    DELETE FROM claims WHERE job_id = NEW.id;
END;

-- Images whose content can't be relied on. A mark outlives its job, so it does not refer to it.
CREATE TABLE invalid_marks (
    job_id TEXT NOT NULL,
    path TEXT NOT NULL,
    dev INTEGER,
    ino INTEGER,
    rdev INTEGER,
    domain TEXT NOT NULL,
    reason TEXT NOT NULL,
    CHECK ((dev IS NULL) = (ino IS NULL)),
    PRIMARY KEY (job_id, path)
) STRICT, WITHOUT ROWID;

CREATE INDEX invalid_marks_by_path ON invalid_marks (path);
CREATE INDEX invalid_marks_by_file ON invalid_marks (dev, ino);
CREATE INDEX invalid_marks_by_device ON invalid_marks (rdev);

-- A claim on the disk's chain stands in for the first index, and the marks for the second.
DROP INDEX jobs_unfinished;
DROP INDEX jobs_modified;

ALTER TABLE jobs ADD COLUMN parent TEXT GENERATED ALWAYS AS (body ->> '$.parent') VIRTUAL;
CREATE INDEX jobs_by_parent ON jobs (parent, seq) WHERE parent IS NOT NULL;

-- The intent moves to another place in a job's body, and nothing asks for the column any more. To drop a stored column
-- is to write every row anew: for a million jobs that takes 40 seconds and 2 GB beside the file. So the column stays,
-- and may be NULL from now on. This is the way that SQLite documents for taking a constraint away without writing the
-- rows (https://www.sqlite.org/lang_altertable.html, "Making Other Kinds Of Table Schema Changes").
PRAGMA writable_schema = ON;
UPDATE sqlite_schema SET sql = replace(sql, 'intent TEXT NOT NULL GENERATED', 'intent TEXT GENERATED')
WHERE type = 'table' AND name = 'jobs';
PRAGMA writable_schema = RESET;
