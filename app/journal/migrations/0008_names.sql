-- What the devices of a QEMU were called: a name stays with its device, also over a restart of the service.
CREATE TABLE device_names (
    process TEXT PRIMARY KEY,  -- boot, pid and start time
    names TEXT NOT NULL CHECK (json_valid(names)),  -- an object: device -> target name
    seen_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX device_names_by_time ON device_names (seen_at);
