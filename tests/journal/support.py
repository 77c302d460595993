"""Jobs to store, and the small adapters that the journal is plugged into."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from app.core.flags import CommitFlag
from app.core.images import Access, Claim, Image
from app.core.job import EventType, Job, JobType, OnError, OnReady, Result, State, Work
from app.core.machine.reports import StoredVersion
from app.engine.ports.events import StoredEvent
from app.engine.ports.journal import IdempotencyKey, NewJob
from app.engine.ports.outbox import Webhook
from app.engine.views import DomainView
from app.journal.connections import Executors
from app.journal.journal import SqliteJournal

T = TypeVar("T")
DAY = 86_400_000


@dataclass
class SetClock:
    """A clock that stands until it is set; in ms since 1970."""

    time: int = 1_000

    def now(self) -> int:
        """What it was set to."""
        return self.time

    def monotonic(self) -> float:
        """The same, in seconds."""
        return self.time / 1000


class PlainRender:
    """Writes of a job what the tests look at."""

    def job(self, job: Job) -> str:
        """Which job it is, and how far it is."""
        return json.dumps({"id": job.id, "state": job.state, "version": job.version})

    def domain(self, view: DomainView) -> str:
        """Which domain it is."""
        return json.dumps({"id": view.id})


def make_job(id_: str = "bj-1", *, domain: str = "web1", disk: str = "vda") -> Job:
    """A queued active commit of one layer."""
    work = Work(
        disk_node="disk0",
        qdev="virtio0",
        backend=None,
        chain=("/images/s1.qcow2", "/images/base.qcow2"),
        nodes=("disk0", "base0"),
        top=0,
        base=1,
        release=("disk0",),
        backing_file=None,
        digest="sha256:00",
        invalidates=("/images/s1.qcow2",),
        deletes=(),
    )
    return Job(
        id=id_,
        type=JobType.ACTIVE_COMMIT,
        state=State.QUEUED,
        domain=domain,
        disk=disk,
        top="/images/s1.qcow2",
        base="/images/base.qcow2",
        overlay=None,
        flags=CommitFlag.ACTIVE | CommitFlag.DELETE,
        on_ready=OnReady.WAIT,
        on_error=OnError.REPORT,
        bandwidth=0,
        requested_by="ci",
        created_at=1_000,
        work=work,
    )


def queued(job: Job) -> list[StoredVersion]:
    """A new job as the engine stores it."""
    return [StoredVersion(EventType.QUEUED, job)]


def started(job: Job) -> StoredVersion:
    """The job's next version, in which it runs."""
    return StoredVersion(EventType.STARTED, replace(job, state=State.RUNNING, version=job.version + 1))


def ended(job: Job, at: int, state: State = State.CANCELED) -> StoredVersion:
    """The job's next version, in which it ended at the time `at`."""
    type_ = EventType(f"job.{state}")
    result = Result(chain=job.work.chain)
    return StoredVersion(type_, replace(job, state=state, finished_at=at, result=result, version=job.version + 1))


def claim(*paths: str, access: Access = Access.WRITE) -> tuple[Claim, ...]:
    """Claims on images that the service could not see."""
    return tuple(Claim(Image(path), access) for path in paths)


def new(job: Job, *claims: Claim, key: IdempotencyKey | None = None, callback: Webhook | None = None) -> NewJob:
    """A queued job, to be stored with these claims."""
    return NewJob(versions=queued(job), claims=claims, key=key, callback=callback)


@contextmanager
def opened(
    state_dir: Path, clock: SetClock | None = None, executors: Executors | None = None
) -> Generator[SqliteJournal]:
    """A journal that is closed again."""
    journal = SqliteJournal.open(state_dir, PlainRender(), clock or SetClock(), executors)
    try:
        yield journal
    finally:
        journal.close()


def run(state_dir: Path, story: Callable[[SqliteJournal], Awaitable[T]], clock: SetClock | None = None) -> T:
    """What `story` gives on the journal in `state_dir`."""

    async def tell() -> T:
        with opened(state_dir, clock) as journal:
            return await story(journal)

    return asyncio.run(tell())


def heard_by(journal: SqliteJournal) -> list[StoredEvent]:
    """The events that the journal hands on, as they come."""
    heard: list[StoredEvent] = []
    journal.listen(heard.extend)
    return heard
