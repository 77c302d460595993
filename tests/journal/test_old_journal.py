"""A journal that an older release has left is read by this one, without loss."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from app.api.render import JsonRender
from app.core.job import Job
from app.engine.ports.driver import Address
from app.engine.ports.events import EventFilter
from app.engine.ports.journal import IdempotencyKey, JobFilter, Registration
from app.engine.ports.tokens import Role
from app.journal.database import FILE
from app.journal.journal import SqliteJournal
from app.journal.outbox import SqliteOutbox
from app.journal.tokens import Tokens
from tests.core.samples import commit_spec

from .support import SetClock, run

UNFINISHED = {
    "bj-queued": ("queued", "untouched"),
    "bj-starting": ("starting", "untouched"),
    "bj-running": ("running", "base-modified"),
    "bj-pausing": ("running", "base-modified"),
    "bj-paused": ("paused", "base-modified"),
    "bj-ready": ("ready", "base-modified"),
    "bj-pivoting": ("pivoting", "base-modified"),
    "bj-aborting": ("aborting", "base-modified"),
    "bj-forcing": ("aborting", "base-modified"),
    "bj-concluding": ("concluding", "merged"),
    "bj-unjudged": ("concluding", "base-modified"),
    "bj-keeping": ("ready", "base-modified"),
    "bj-adopted": ("running", "base-modified"),
}
ENDED = {
    "bj-merged": ("completed", "merged"),
    "bj-partly": ("completed", "merged"),
    "bj-kept": ("completed", "merged"),
    "bj-full": ("failed", "base-modified"),
    "bj-refused": ("failed", "untouched"),
    "bj-canceled": ("canceled", "base-modified"),
    "bj-dropped": ("canceled", "untouched"),
    "bj-lost": ("lost", "base-modified"),
    "bj-found": ("completed", "merged"),
    "bj-given-up": ("failed", "base-modified"),
    "bj-gone": ("failed", "base-modified"),
    "bj-again-1": ("failed", "base-modified"),
    "bj-again-2": ("completed", "merged"),
}


def rows(state_dir: Path, query: str) -> list[Any]:
    """What the file itself holds."""
    with closing(sqlite3.connect(state_dir / FILE)) as connection:
        return connection.execute(query).fetchall()


def bodies(state_dir: Path) -> dict[str, Any]:
    """Each job's body, as the older release has written it."""
    return {id_: json.loads(body) for id_, body in rows(state_dir, "SELECT id, body FROM jobs ORDER BY seq")}


async def every_job(journal: SqliteJournal) -> dict[str, Job]:
    jobs, _ = await journal.jobs(JobFilter(limit=100))
    return {job.id: job for job in jobs}


def own(job: Job) -> dict[str, object]:
    """What the service keeps of a job for itself and shows nobody, under the names of the older release."""
    control, spec = job.control, commit_spec(job)
    layers = spec.disk.layers
    return {
        "intent": control.intent,
        "pivot_asked": control.pivot_asked,
        "pause_wanted": control.pause_wanted,
        "unconfirmed": list(control.unconfirmed),
        "complete_taken": control.pivot_taken,
        "complete_attempts": control.pivot_attempts,
        "verdict": control.verdict,
        "verdict_error": control.verdict_error,
        "ending": control.judgement and control.judgement.state,
        "process": control.process and {name: getattr(control.process, name) for name in ("pid", "started", "uuid")},
        "work": {
            "disk_node": spec.disk.node,
            "qdev": spec.disk.qdev,
            "backend": spec.disk.backend,
            "chain": list(spec.disk.files),
            "nodes": list(spec.disk.nodes),
            "top": spec.top_index,
            "base": spec.base_index,
            "release": list(spec.release),
            "backing_file": spec.backing_file,
            "digest": spec.disk.digest,
            "invalidates": list(spec.invalidates),
            "deletes": list(spec.deletes),
            "undeletable": [{"file": each.file, "reason": each.reason} for each in spec.undeletable],
            "identities": [layer.identity and list(layer.identity) for layer in layers],
        },
    }


def test_the_fixture_is_of_an_older_schema(old: Path) -> None:
    """It holds jobs in every state, and is brought up to date when it is opened."""
    assert rows(old, "PRAGMA user_version") == [(5,)]
    states = {id_: (body["state"], body["data_state"]) for id_, body in bodies(old).items()}
    assert states == UNFINISHED | ENDED


def test_every_job_is_read(old: Path) -> None:
    """Jobs are what they were: the unfinished ones, all that is shown of any, and what the service keeps for itself."""
    written = bodies(old)
    jobs = run(old, every_job)
    assert {id_: (job.state, job.data_state) for id_, job in jobs.items()} == UNFINISHED | ENDED
    unfinished = run(old, lambda journal: journal.unfinished())
    assert [job.id for job in unfinished] == list(UNFINISHED)
    for id_, job in jobs.items():
        body = written[id_]
        assert {name: body[name] for name in own(job)} == own(job)
        assert (job.version, job.domain, job.disk) == (body["version"], body["domain"], body["disk"])


def test_jobs_are_shown_as_they_were(old: Path) -> None:
    """What a job's last event told of it is what is answered of it now, as far as it was told."""
    told = dict(rows(old, "SELECT job_id, data FROM events WHERE job_id IS NOT NULL ORDER BY id"))
    for id_, job in run(old, every_job).items():
        shown, before = json.loads(JsonRender().job(job)), json.loads(told[id_])
        if before["version"] == shown["version"]:
            assert {name: shown[name] for name in before} == before


def test_words_of_qemu_are_kept(old: Path) -> None:
    """Errors keep their code and what QEMU has said; a result keeps what was not deleted, and why."""
    jobs = run(old, every_job)
    full, refused, partly = jobs["bj-full"], jobs["bj-refused"], jobs["bj-partly"]
    assert full.error
    assert full.error.code == "insufficient-storage"
    assert full.error.extra["qmp"] == {"class": "GenericError", "desc": "No space left on device"}
    assert refused.error
    assert refused.error.extra["qmp"] == {"class": "GenericError", "desc": "Block node 'vdd-n3' is read-only"}
    assert partly.result
    assert [(each.file, each.reason) for each in partly.result.not_deleted] == [
        ("/images/db1/vda/s2.qcow2", "it is no regular file")
    ]
    assert jobs["bj-given-up"].resolved
    assert jobs["bj-given-up"].resolved.by == "admin"


def test_what_is_kept_beside_the_jobs_is_read(old: Path) -> None:
    """Registrations, events, keys, webhooks, deliveries and tokens are there as before."""
    events = rows(old, "SELECT id, type, data FROM events ORDER BY id")
    assert len(events) == 85

    async def story(journal: SqliteJournal) -> None:
        assert await journal.registrations() == [
            Registration(id="db1", address=Address(tcp=("::1", 4444)), discovered=True),
            Registration(id="off1", disks={"vda": "/images/off1/vda/s1.qcow2", "vdb": "/dev/vg/data"}),
            Registration(
                id="web1",
                address=Address(unix="/run/qmp/web1.sock"),
                disks={"vda": "/images/web1/vda/s3.qcow2"},
                allow_managed=True,
            ),
        ]
        read = await journal.events(EventFilter(), after=0, limit=1000)
        assert [(event.id, event.type, event.data) for event in read] == events
        assert await journal.event_bounds() == (0, 85)
        kept = await journal.kept(IdempotencyKey(who="ci", key="first", fingerprint="f1"), since=0)
        assert kept
        assert (kept.job_id, kept.status, kept.body) == ("bj-queued", 202, '{"id":"bj-queued"}')
        outbox = SqliteOutbox(journal, SetClock())
        webhooks, _ = await outbox.webhooks(job_id=None, after=None, limit=10)
        assert [(each.id, each.disabled_because) for each in webhooks] == [
            ("wh-all", None),
            ("wh-ends", "it has failed too often"),
        ]
        callbacks, _ = await outbox.webhooks(job_id="bj-queued", after=None, limit=10)
        assert [each.id for each in callbacks] == ["wh-call"]
        head = await outbox.head("wh-all")
        assert head
        assert head[1].event_id == 4

    run(old, story)
    with Tokens.open(old, SetClock()) as tokens:
        found = tokens.find("bjt_" + "c" * 43)
        assert found
        assert (found.name, found.role) == ("ci", Role.OPERATE)
