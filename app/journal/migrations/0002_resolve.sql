-- A job that was lost may get a person's verdict, and changes no more after that.

DROP TRIGGER jobs_versions;

CREATE TRIGGER jobs_versions BEFORE UPDATE ON jobs
WHEN (OLD.ended = 1 AND (OLD.state <> 'lost' OR (NEW.body ->> '$.state') NOT IN ('completed', 'failed', 'canceled')))
    OR NEW.id <> OLD.id
    OR (NEW.body ->> '$.version') IS NOT OLD.version + 1
BEGIN
    SELECT RAISE(ABORT, 'a job changes one version at a time, and not after its end unless it was lost');
END;
