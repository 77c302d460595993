"""What is kept over restarts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from app.core.errors import Code
from app.core.images import Claim, Image, Resource
from app.core.job import Job
from app.core.machine.step import StoredVersion
from app.core.states import State
from app.engine.ports.driver import Address
from app.engine.ports.events import DomainEvent, EventFilter, StoredEvent
from app.engine.ports.outbox import Webhook
from app.engine.ports.uses import DiskUses, ImageRecords, MarkChange


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A domain as it was registered (or found: then `discovered`). `disks` maps target names to image paths.

    `driver` is the name of the one that carries the domain's jobs out.
    """

    id: str
    address: Address | None = None
    disks: Mapping[str, str] = field(default_factory=dict[str, str])
    allow_managed: bool = False
    discovered: bool = False
    driver: str = "qmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs to list. None: any. `before` is a cursor from an earlier page, `parent` a job with steps."""

    domain: str | None = None
    disk: str | None = None
    state: State | None = None
    active: bool | None = None
    parent: str | None = None
    before: int | None = None
    limit: int = 100


class JournalError(Exception):
    """The journal can't be written or read; the text says why, for a person.

    A write has stored nothing, but with `Code.JOURNAL_UNCERTAIN`: then a power failure could bring back what was to be
    stored. The other codes are `JOURNAL_FULL`, `JOURNAL_BUSY`, `JOURNAL_REPLACED`, `JOURNAL_DAMAGED` and, for reads,
    `JOURNAL_UNREADABLE`.
    """

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class JobConflict(Exception):
    """An unfinished job has a claim that excludes the new job; nothing was stored. `job_id` names the unfinished job.

    `resource` is what both jobs have claims on.
    """

    def __init__(self, job_id: str, resource: Resource) -> None:
        what = f"the image {resource.path}" if isinstance(resource, Image) else f"the disk {resource.disk}"
        super().__init__(f"the unfinished job {job_id} works on {what}")
        self.job_id = job_id
        self.resource = resource


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyKey:
    """A request's Idempotency-Key: a client's (`who` is the name of its token), and the digest of what it asks for."""

    who: str
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    """What a request under a key has led to. Without an answer the service ended before there was one."""

    fingerprint: str
    job_id: str
    status: int | None
    body: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be stored for the first time.

    `versions` are its versions so far, the first one first. `claims` hold until the job ends. `key` is the key of the
    request that asked for the job, and `callback` the webhook for this job alone.
    """

    versions: Sequence[StoredVersion]
    claims: tuple[Claim, ...]
    key: IdempotencyKey | None = None
    callback: Webhook | None = None


class Journal(ImageRecords, Protocol):
    """What is kept over restarts. Each write is one transaction, and durable when the call returns.

    Writes and reads raise `JournalError`.
    """

    def listen(self, publish: Callable[[Sequence[StoredEvent]], None]) -> None:
        """Have `publish` called on the event loop with the events of each transaction, in the order of their ids.

        That order can't be had from the writes' return values: tasks that wait for them may be resumed, or canceled,
        in any order.
        """
        ...

    async def add_jobs(self, new: Sequence[NewJob]) -> None:
        """Store new jobs, all or none of them; a job comes after its parent.

        Raises `JobConflict` where a claim of an unfinished job excludes a claim of a new job, or where two new jobs
        exclude each other.
        """
        ...

    async def kept(self, key: IdempotencyKey, *, since: int) -> StoredAnswer | None:
        """What a key of that name led to, if it was stored at `since` (ms since 1970) or later."""
        ...

    async def keep_answer(self, key: IdempotencyKey, status: int, body: str) -> None:
        """Store the answer to the request that a key came with."""
        ...

    async def store(
        self,
        told: Sequence[StoredVersion],
        *,
        uses: DiskUses | None = None,
        marks: MarkChange | None = None,
        registration: Registration | None = None,
    ) -> None:
        """Store versions of jobs, in order, each with its event if it has one.

        What the change means for images is stored with it: `uses` in place of what was known of those disks, `marks`,
        and a `registration` in place of the one of its domain. The claims of a job end with the version that ends it.
        """
        ...

    async def tell_domain(self, type_: DomainEvent, domain: str, data: str) -> None:
        """Store an event of a domain; `data` is the JSON text of its data."""
        ...

    async def job(self, job_id: str) -> Job | None:
        """The last stored version of a job."""
        ...

    async def unfinished(self) -> Sequence[Job]:
        """Every job that has not ended, oldest first."""
        ...

    async def jobs(self, wanted: JobFilter) -> tuple[Sequence[Job], int | None]:
        """Jobs, newest first, and the cursor of the next page (None: there is none)."""
        ...

    async def jobs_of(self, parent: str) -> Sequence[Job]:
        """The jobs that are steps of another one, oldest first."""
        ...

    async def events(self, wanted: EventFilter, *, after: int, limit: int) -> Sequence[StoredEvent]:
        """Stored events with an id above `after`, oldest first."""
        ...

    async def event_bounds(self) -> tuple[int, int]:
        """(id of the last event that was pruned, id of the last event); 0 where there is none."""
        ...

    async def registrations(self) -> Sequence[Registration]:
        """The domains that were registered with PUT."""
        ...

    async def register(self, registration: Registration, told: str | None = None) -> None:
        """Keep a registration, in place of an earlier one of the same id.

        `told` is the data of `domain.added`, which is stored with it; None: it is not told.
        """
        ...

    async def unregister(self, domain: str, told: str) -> None:
        """Forget a registration, and all uses of images by the domain's disks; `told`: of `domain.removed`."""
        ...

    async def prune(self, before: int) -> None:
        """Delete ended jobs and events from before that time (ms since 1970)."""
        ...

    async def check(self) -> str | None:
        """None if the journal can be written, else why not. Writes only where nothing was written of late."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of the journal's `file`, of its `log`, and of what is `free` in the file, as last seen."""
        ...
