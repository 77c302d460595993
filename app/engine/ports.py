"""What the engine needs from the world, in the engine's words. `app.wiring` plugs the real things in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from app.core.adopt import OrphanJob
from app.core.chain import Disk, Identity
from app.core.errors import Problem
from app.core.job import Job, NotDeleted, Process, State
from app.core.machine.inputs import Observed
from app.core.machine.reports import StoredVersion
from app.core.outgoing import Answer, DeliveryState
from app.core.plan import Selection


class MonitorError(Exception):
    """The monitor could not do what was asked."""


class Unreachable(MonitorError):
    """Nobody answers at the monitor's address, or the connection broke: whether a command took effect is unknown."""


class Busy(MonitorError):
    """Connected, but no greeting came: another client holds the monitor."""


class Unanswered(MonitorError):
    """No reply in time: whether the command took effect is unknown."""


class Declined(MonitorError):
    """QEMU refused; nothing has changed. `problem` has its words."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a monitor listens: the path of a unix socket, or host and port."""

    unix: str | None = None
    tcp: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A domain as it was registered (or found: then `discovered`). `disks` maps target names to image paths."""

    id: str
    address: Address | None = None
    disks: Mapping[str, str] = field(default_factory=dict[str, str])
    allow_managed: bool = False
    discovered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuFacts:
    """Who answers at a monitor.

    `managed_by` is `libvirt` or None; `missing` are commands that a commit needs and this program does not have, so it
    is no QEMU system emulator.
    """

    name: str | None
    uuid: str | None
    version: str
    process: Process
    managed_by: str | None
    missing: tuple[str, ...] = ()


class Monitor(Protocol):
    """A live connection to one QEMU.

    Every call is time-boxed by the connection itself and raises `Unanswered`, `Unreachable` or `Declined`.
    """

    facts: QemuFacts

    @property
    def connected(self) -> bool:
        """Whether the connection stands. It may be false long before a call finds out."""
        ...

    @property
    def last_words(self) -> Mapping[str, Observed]:
        """How jobs ended, by QEMU's events, by id; all that is left to go by once QEMU has ended itself."""
        ...

    async def guest_running(self) -> bool:
        """Whether the guest's processors run (QAPI `query-status`); also the heartbeat."""
        ...

    async def disks(self) -> tuple[Disk, ...]:
        """The domain's disks and their chains, as they are now."""
        ...

    async def jobs(self) -> Mapping[str, Observed]:
        """Every job that QEMU has, anybody's, by id."""
        ...

    async def stray(self, job_id: str) -> OrphanJob | None:
        """What a job works on of which there is no record; None where QEMU's graph does not tell."""
        ...

    async def start(self, job: Job) -> None:
        """Start the block job (QAPI `block-commit`)."""
        ...

    async def complete(self, job_id: str) -> None:
        """Ask a ready job to pivot (QAPI `job-complete`)."""
        ...

    async def cancel(self, job_id: str, *, force: bool) -> None:
        """Cancel (QAPI `block-job-cancel`, or `job-cancel`, which is always by force)."""
        ...

    async def pause(self, job_id: str) -> None:
        """Pause at the next possible point; being paused already is no error."""
        ...

    async def resume(self, job_id: str) -> None:
        """Go on; not being paused is no error."""
        ...

    async def set_speed(self, job_id: str, bandwidth: int) -> None:
        """Change the speed, in bytes/s; 0 is no limit."""
        ...

    async def finalize(self, job_id: str) -> None:
        """Let a pending job take effect (QAPI `job-finalize`); one that is not pending is no error."""
        ...

    async def flush(self, node: str) -> None:
        """Have QEMU write to the disk what it holds back of the node's data; a read-only node has nothing to write."""
        ...

    async def dismiss(self, job_id: str, nodes: Sequence[str] = ()) -> None:
        """Let QEMU forget a concluded job; one that it does not know is no error.

        Then delete the nodes that are left of the layers that it has merged, in this order; nor is one of them that has
        gone already.
        """
        ...

    async def close(self) -> None:
        """End the connection; never raises."""
        ...


class Connector(Protocol):
    """Opens monitors."""

    async def connect(self, address: Address, hint: Callable[[], None]) -> Monitor:
        """A connection to the monitor at `address`; raises `Unreachable` or `Busy`.

        `hint` is called, from the event loop, when something may have changed: a job or device event of QEMU, or the
        end of the connection. What changed is for the caller to ask.
        """
        ...

    def alive(self, process: Process) -> bool | None:
        """Whether that very process still runs; None where it can't be seen from here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """From the images' own maps, in bytes: what a commit copies, and how much of it is new to the base."""

    bytes_to_copy: int
    new_bytes: int


class Images(Protocol):
    """Image files, seen from the service. Blocking work is done off the event loop.

    `process` is the QEMU whose view of the file system the paths are in; None: the service's own.
    """

    async def identities(self, names: Iterable[str], process: Process | None) -> Mapping[str, Identity]:
        """The identities of those of the `names` that are paths of files that can be seen."""
        ...

    async def free_bytes(self, path: str, process: Process | None) -> int | None:
        """Free bytes of the file system that holds `path`; None where it can't be seen."""
        ...

    async def is_device(self, path: str, process: Process | None) -> bool:
        """Whether `path` is a block device, which does not grow."""
        ...

    async def locked(self, path: str, process: Process | None) -> bool:
        """Whether a process other than `process` holds an image lock on `path`."""
        ...

    async def measure(self, chosen: Selection, process: Process | None) -> Measure | None:
        """Read the maps of the chosen layers; None where the tool or the files can't be had in time."""
        ...

    async def undeletable(self, files: Mapping[str, Identity | None], process: Process | None) -> Mapping[str, str]:
        """Those of the `files` that must not or can't be unlinked (not a regular file, outside the roots), and why."""
        ...

    async def unlink(
        self,
        files: Mapping[str, Identity | None],
        process: Process | None,
        in_use: Callable[[str, Identity | None], str | None],
    ) -> tuple[tuple[str, ...], tuple[NotDeleted, ...]]:
        """Unlink files: (deleted, not deleted). One that is gone already counts as deleted.

        A file whose identity is another than the one given, or not known, is left. `in_use` names who still uses a
        file, or returns None; it is asked right before each unlink.
        """
        ...

    async def backing_of(self, overlay: str, identity: Identity | None) -> tuple[str, Identity | None] | None:
        """The path to which the header of an image leads, and the file there; None where it can't be read or has none.

        Nor is it read where another file than that of `identity` is called `overlay` by now.
        """
        ...

    async def offline_disk(self, name: str, image: str) -> Disk:
        """A disk of a domain that is off, from the headers; raises `Refused` where an image can't be read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """An event as the journal holds it.

    `subject` and `source` are as in a CloudEvent; `data` is the JSON text of the event's data. `job_id` and `domain`
    are what streams are filtered by. A `job.progress` event has no id and is never stored.
    """

    id: int | None
    type: str
    time: int
    domain: str
    disk: str | None
    job_id: str | None
    data: str


class DomainEvent(StrEnum):
    """What subscribers are told of a domain."""

    ADDED = "domain.added"
    REMOVED = "domain.removed"
    CONNECTED = "domain.connected"
    DISCONNECTED = "domain.disconnected"


WEBHOOK_DISABLED: Final = "webhook.disabled"
"""The type of the event that tells that a webhook is sent nothing more."""


class Role(StrEnum):
    """What a token may do; each role includes those before it."""

    READ = "read"
    OPERATE = "operate"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """An API token, without its text, which is not kept. `created_at` in ms since 1970."""

    name: str
    role: Role
    created_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs to list. None: any. `before` is a cursor from an earlier page."""

    domain: str | None = None
    disk: str | None = None
    state: State | None = None
    active: bool | None = None
    before: int | None = None
    limit: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which events a stream wants. None or empty: any."""

    domain: str | None = None
    job_id: str | None = None
    types: frozenset[str] = frozenset()

    def wants(self, event: StoredEvent) -> bool:
        """Whether `event` belongs into the stream."""
        return (
            (self.domain is None or event.domain == self.domain)
            and (self.job_id is None or event.job_id == self.job_id)
            and (not self.types or event.type in self.types)
        )


class JournalFull(Exception):
    """The journal can't be written (its file system is full, or it failed); nothing was stored."""


class JobConflict(Exception):
    """The disk has an unfinished job already; nothing was stored. `job_id` names it."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the disk has the unfinished job {job_id}")
        self.job_id = job_id


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
class Webhook:
    """Where events are sent to. Times in ms since 1970.

    No `types`: events of every type. With a `job_id` it is that job's callback. The `previous` secret signs as well
    until `previous_until`. While `disabled_at` is set nothing is sent; `disabled_because` says why.
    """

    id: str
    url: str
    types: frozenset[str]
    job_id: str | None = None
    secret: str
    previous: str | None = None
    previous_until: int = 0
    created_at: int
    created_by: str
    disabled_at: int | None = None
    disabled_because: str | None = None
    pending: int = 0
    """How many deliveries are not delivered yet."""

    def secrets(self, now: int) -> tuple[str, ...]:
        """Those that sign at that time, the newest first."""
        old = self.previous if self.previous is not None and now < self.previous_until else None
        return (self.secret,) if old is None else (self.secret, old)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event that a webhook is sent, and what came of that so far. Times in ms since 1970.

    `seq` orders all deliveries; `id` is the same for each attempt. `due_at` is when the next attempt is due.
    """

    seq: int
    id: str
    webhook_id: str
    event_id: int
    event_type: str
    state: DeliveryState
    attempts: int
    created_at: int
    due_at: int
    attempted_at: int | None
    answer: Answer | None


class Sender(Protocol):
    """Takes deliveries to their receivers."""

    async def check(self, url: str) -> str | None:
        """None if deliveries may go to `url` as far as can be told now, else why not. Never raises."""
        ...

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One attempt, bounded in time and in what is read of the answer. Never raises."""
        ...


class Outbox(Protocol):
    """The webhooks, and what they are to be sent; written by the journal with each event, in its transaction.

    Each write is one transaction, and durable when the call returns; writes raise `JournalFull`.
    """

    def listen(self, wake: Callable[[Collection[str]], None]) -> None:
        """Have `wake` called on the event loop with the ids of the webhooks that an event was stored for."""
        ...

    async def add(self, webhook: Webhook) -> None:
        """Store a new webhook. The events after this are for it too."""
        ...

    async def webhook(self, webhook_id: str) -> Webhook | None:
        """A webhook."""
        ...

    async def webhooks(
        self, *, job_id: str | None, after: int | None, limit: int
    ) -> tuple[Sequence[Webhook], int | None]:
        """The webhooks for all jobs, or the callbacks of one; oldest first, and the cursor of the next page."""
        ...

    async def remove(self, webhook_id: str) -> bool:
        """Delete a webhook with its deliveries; whether it was there."""
        ...

    async def rotate(self, webhook_id: str, secret: str, *, until: int) -> bool:
        """Give a webhook a new secret, beside which the one before signs until then; whether it was there."""
        ...

    async def enable(self, webhook_id: str, *, now: int) -> bool:
        """Have a webhook sent everything that it has missed, from now on; whether it was there."""
        ...

    async def waiting(self) -> Sequence[str]:
        """The ids of the webhooks that are enabled and have something to be sent."""
        ...

    async def head(self, webhook_id: str) -> tuple[Webhook, Delivery, StoredEvent] | None:
        """The oldest delivery that is still to be made; None where there is none, or the webhook is disabled."""
        ...

    async def note(self, delivery: Delivery, *, disabled: str | None, data: Callable[[Webhook], str]) -> None:
        """Store what came of an attempt.

        `disabled` says why the webhook is disabled by it; the event that tells so has the text that `data` gives of the
        webhook as it is then.
        """
        ...

    async def deliveries(
        self, webhook_id: str, *, before: int | None, limit: int
    ) -> tuple[Sequence[Delivery], int | None]:
        """A webhook's deliveries, newest first, and the cursor of the next page."""
        ...

    async def redeliver(self, webhook_id: str, delivery_id: str, *, now: int) -> Delivery | None:
        """Have a delivery made once more, or now if it waits; None where there is none of that id."""
        ...


class Journal(Protocol):
    """What is kept over restarts. Each write is one transaction, and durable when the call returns.

    Writes raise `JournalFull`.
    """

    def listen(self, publish: Callable[[Sequence[StoredEvent]], None]) -> None:
        """Have `publish` called on the event loop with the events of each transaction, in the order of their ids.

        That order can't be had from the writes' return values: tasks that wait for them may be resumed, or canceled,
        in any order.
        """
        ...

    async def add_job(
        self, told: Sequence[StoredVersion], key: IdempotencyKey | None = None, callback: Webhook | None = None
    ) -> None:
        """Store a new job, version by version, with the key of the request that asked for it, and its callback.

        Raises `JobConflict` where the disk has an unfinished one.
        """
        ...

    async def kept(self, key: IdempotencyKey, *, since: int) -> StoredAnswer | None:
        """What a key of that name led to, if it was stored at `since` (ms since 1970) or later."""
        ...

    async def keep_answer(self, key: IdempotencyKey, status: int, body: str) -> None:
        """Store the answer to the request that a key came with."""
        ...

    async def store(self, told: Sequence[StoredVersion]) -> None:
        """Store versions of one job, in order, each with its event if it has one."""
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

    async def modified_chains(self, domain: str, disk: str) -> Sequence[Job]:
        """Ended jobs on this disk that left a base modified (failed, canceled, lost, or `keep`)."""
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

    async def register(self, registration: Registration) -> None:
        """Keep a registration, in place of an earlier one of the same id."""
        ...

    async def unregister(self, domain: str) -> None:
        """Forget a registration."""
        ...

    async def prune(self, before: int) -> None:
        """Delete ended jobs and events from before that time (ms since 1970)."""
        ...

    async def check(self) -> str | None:
        """None if the journal can be written, else why not."""
        ...


class Clock(Protocol):
    """The time."""

    def now(self) -> int:
        """Milliseconds since 1970, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds, for durations."""
        ...
