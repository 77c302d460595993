"""No question that is asked again and again reads all of a long journal."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from app.core.images import Access, Claim, DiskChain, Image
from app.core.states import State
from app.engine.ports.events import DomainEvent, EventFilter
from app.engine.ports.journal import IdempotencyKey, JobFilter
from app.engine.ports.outbox import Webhook
from app.journal import journal as module
from app.journal.database import connect, connect_to_read
from app.journal.journal import SqliteJournal
from app.journal.outbox import SqliteOutbox

from .support import DAY, SetClock, add_job, ended, make_job, queued, run

PARTIAL = ("USING INDEX jobs_active", "INDEX deliveries_undelivered", "json_each")
"""What may be read whole: indexes that hold but what is asked for, and a list of types."""

KEY = IdempotencyKey(who="ci", key="k", fingerprint="f")

CLAIMS = (Claim(DiskChain("web1", "vda"), Access.WRITE), Claim(Image("/a", (1, 2), 3), Access.READ))

WEBHOOK = Webhook(id="wh-1", url="http://a", types=frozenset(), secret="s", created_at=1, created_by="admin")


def outbox(journal: SqliteJournal) -> SqliteOutbox:
    return SqliteOutbox(journal, SetClock())


Ask = Callable[[SqliteJournal], Awaitable[object]]

ASKED: dict[str, Ask] = {
    "a job": lambda journal: journal.job("bj-1"),
    "unfinished jobs": lambda journal: journal.unfinished(),
    "jobs of a domain": lambda journal: journal.jobs(JobFilter(domain="web1")),
    "jobs of a disk": lambda journal: journal.jobs(JobFilter(domain="web1", disk="vda")),
    "jobs on disks of that name": lambda journal: journal.jobs(JobFilter(disk="vdz")),
    "jobs in a state": lambda journal: journal.jobs(JobFilter(state=State.LOST)),
    "jobs of a domain in a state": lambda journal: journal.jobs(JobFilter(domain="web1", state=State.FAILED)),
    "active jobs": lambda journal: journal.jobs(JobFilter(active=True)),
    "active jobs of a domain": lambda journal: journal.jobs(JobFilter(active=True, domain="web1")),
    "a page far down": lambda journal: journal.jobs(JobFilter(before=1_000)),
    "jobs that are steps": lambda journal: journal.jobs(JobFilter(parent="bj-1")),
    "steps of a job": lambda journal: journal.jobs_of("bj-1"),
    "marks of images": lambda journal: journal.invalid_marks([Image("/a", (1, 2), 3)]),
    "whether jobs conflict": lambda journal: add_job(journal, queued(make_job("bj-2")), claims=CLAIMS),
    "events from an id on": lambda journal: journal.events(EventFilter(), after=7, limit=100),
    "events of a job": lambda journal: journal.events(EventFilter(job_id="bj-1"), after=0, limit=100),
    "events of a domain": lambda journal: journal.events(EventFilter(domain="web1"), after=7, limit=100),
    "a key": lambda journal: journal.kept(KEY, since=0),
    "bounds": lambda journal: journal.event_bounds(),
    "webhooks that have something to be sent": lambda journal: outbox(journal).waiting(),
    "what a webhook is to be sent next": lambda journal: outbox(journal).head(WEBHOOK.id),
    "what a webhook was sent": lambda journal: outbox(journal).deliveries(WEBHOOK.id, before=9, limit=5),
    "webhooks": lambda journal: outbox(journal).webhooks(job_id=None, after=7, limit=5),
    "callbacks of a job": lambda journal: outbox(journal).webhooks(job_id="bj-1", after=7, limit=5),
    "who is to be told of an event": lambda journal: journal.tell_domain(DomainEvent.ADDED, "web1", "{}"),
    "what is to be pruned": lambda journal: journal.prune(DAY),
}


def statements(state_dir: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> list[str]:
    """The statements that SQLite is given for a question, with their values in them."""
    said: list[str] = []

    def writing(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.set_trace_callback(said.append)
        return connection

    def reading(path: Path) -> sqlite3.Connection:
        connection = connect_to_read(path)
        connection.set_trace_callback(said.append)
        return connection

    monkeypatch.setattr(module, "connect", writing)
    monkeypatch.setattr(module, "connect_to_read", reading)

    async def story(journal: SqliteJournal) -> None:
        said.clear()
        await ask(journal)

    run(state_dir, story)
    return [text for text in said if text.startswith(("SELECT", "DELETE", "INSERT INTO deliveries"))]


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_it_is_answered_from_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    """SQLite's own plan for each statement, on a journal with something in it."""

    async def fill(journal: SqliteJournal) -> None:
        job = make_job()
        await outbox(journal).add(WEBHOOK)
        await add_job(journal, [*queued(job), ended(job, at=2 * DAY, state=State.FAILED)], KEY)
        await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")

    run(tmp_path, fill)
    asked = statements(tmp_path, monkeypatch, ask)
    assert asked
    with closing(connect(tmp_path)) as connection:
        for text in asked:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}")]
            scans = [step for step in plan if step.startswith("SCAN") and not any(name in step for name in PARTIAL)]
            assert scans == [], (text, plan)
            # To sort is to read all that was found before the first page.
            assert not any("TEMP B-TREE" in step for step in plan), (text, plan)
