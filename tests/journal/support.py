"""Jobs to store, and the small adapters that the journal is plugged into."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from app.core.images import Access, Claim, DiskChain, Image
from app.core.job import Job, Result
from app.core.kinds.base import DiskRecord, LayerRecord
from app.core.kinds.commit import CommitFlag, CommitSpec
from app.core.machine.step import StoredVersion
from app.core.states import EventType, OnError, OnReady, State
from app.engine.ports.events import StoredEvent
from app.engine.ports.journal import IdempotencyKey, Journal, NewJob
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
    layers = (
        LayerRecord(file="/images/s1.qcow2", node="disk0"),
        LayerRecord(file="/images/base.qcow2", node="base0"),
    )
    return Job(
        id=id_,
        state=State.QUEUED,
        domain=domain,
        disk=disk,
        on_ready=OnReady.WAIT,
        on_error=OnError.REPORT,
        bandwidth=0,
        requested_by="ci",
        created_at=1_000,
        spec=CommitSpec(
            disk=DiskRecord(node="disk0", qdev="virtio0", backend=None, digest="sha256:00", layers=layers),
            top_index=0,
            base_index=1,
            flags=CommitFlag.ACTIVE | CommitFlag.DELETE,
            release=("disk0",),
            invalidates=("/images/s1.qcow2",),
        ),
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
    result = Result(chain=job.spec.disk.files)
    return StoredVersion(type_, replace(job, state=state, finished_at=at, result=result, version=job.version + 1))


def claim(*paths: str, access: Access = Access.WRITE) -> tuple[Claim, ...]:
    """Claims on images that the service could not see."""
    return tuple(Claim(Image(path), access) for path in paths)


def new(job: Job, *claims: Claim, key: IdempotencyKey | None = None, callback: Webhook | None = None) -> NewJob:
    """A queued job, to be stored with these claims."""
    return NewJob(versions=queued(job), claims=claims, key=key, callback=callback)


async def add_job(
    journal: Journal,
    versions: Sequence[StoredVersion],
    key: IdempotencyKey | None = None,
    callback: Webhook | None = None,
    claims: tuple[Claim, ...] | None = None,
) -> None:
    """Store one new job; without `claims` it has a write claim on its disk's chain."""
    if claims is None:
        job = versions[0].job
        claims = (Claim(DiskChain(job.domain, job.disk), Access.WRITE),)
    await journal.add_jobs([NewJob(versions=versions, claims=claims, key=key, callback=callback)])


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
