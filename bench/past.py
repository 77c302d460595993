"""A journal with a long past, made of one real merge."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from app.journal.database import connect
from bench.small import disk
from bench.stage import MIB, image
from tests.support.qemu import Qemu
from tests.support.service import Service

DAY = 86_400_000
DOMAINS = 200
FAILED = 100
"""One job in so many has failed."""


def _merge_once(folder: Path) -> Service:
    """A service, stopped, whose journal has one real merge below the active layer."""
    template = folder / "chain"
    template.mkdir()
    base = image(template / "base.qcow2", 4 * MIB, data=MIB)
    middle = image(template / "s1.qcow2", 4 * MIB, backing=base, data=MIB)
    active = image(template / "s2.qcow2", 4 * MIB, backing=middle)
    service = Service(folder)
    with service, Qemu(service.qmp_dir / "domain-of-old.qmp", disk(active, ("base", "s1", "s2"))):
        service.wait_for_domain("domain-of-old")
        job = service.commit("domain-of-old", top="vda[1]").json()
        ended = service.client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=30"}).json()
        assert ended["state"] == "completed", ended
    return Service(folder)


def job_id(number: int) -> str:
    """The id of the job of that number, from 1 on."""
    return f"bj-{number:026d}"


def service_with_past(folder: Path, count: int, *, old: int = 0) -> Service:
    """A service, not started, that finds `count` finished jobs and their events; the first `old` are 40 days old."""
    service = _merge_once(folder)
    with closing(connect(service.state_dir)) as connection:
        _fill(connection, count, old)
    shutil.rmtree(folder / "chain")
    return service


def _fill(connection: sqlite3.Connection, count: int, old: int) -> None:
    # Only while it is being made; the service opens it anew.
    for quickly in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -1000000"):
        connection.execute(f"PRAGMA {quickly}").fetchall()
    (body, seen, finished) = connection.execute("SELECT body, id, finished_at FROM jobs").fetchone()
    events = connection.execute("SELECT type, data FROM events WHERE job_id = ? ORDER BY id", (seen,)).fetchall()
    now = time.time_ns() // 1_000_000
    connection.execute("BEGIN")
    connection.execute(
        "CREATE TEMP TABLE past (number INTEGER PRIMARY KEY, id TEXT, domain TEXT, ended INTEGER, state TEXT)"
    )
    connection.execute(
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)"
        " INSERT INTO past SELECT n, printf('bj-%026d', n), printf('m%d', n % :domains),"
        " :now - CASE WHEN n <= :old THEN 40 * :day ELSE 20 * :day END + n,"
        " iif(n % :failed = 0, 'failed', 'completed') FROM numbers",
        {"count": count, "domains": DOMAINS, "now": now, "old": old, "day": DAY, "failed": FAILED},
    )
    told = "replace(replace(replace({}, :seen, past.id), 'domain-of-old', past.domain), ':\"completed\"', :quoted)"
    told = told.replace(":quoted", "':\"' || past.state || '\"'")
    connection.execute(
        "INSERT INTO jobs (id, body) SELECT past.id, replace("
        + told.format(":body")
        + ", :finished, past.ended) FROM past ORDER BY number",
        {"body": body, "seen": seen, "finished": f"{finished}"},
    )
    connection.execute("CREATE TEMP TABLE story (step INTEGER PRIMARY KEY, type TEXT, data TEXT)")
    connection.executemany("INSERT INTO story (type, data) VALUES (?, ?)", events)
    connection.execute(
        "INSERT INTO events (type, time, domain, disk, job_id, data)"
        " SELECT replace(story.type, 'completed', past.state), past.ended, past.domain, 'vda', past.id, "
        + told.format("story.data")
        + " FROM past CROSS JOIN story ORDER BY past.number, story.step",
        {"seen": seen},
    )
    connection.execute("COMMIT")
