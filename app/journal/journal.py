"""The engine's journal in SQLite.

One thread writes, another one reads, each with a connection of its own, so the event loop never waits for the disk. A
write is one hop to its thread with a whole transaction in it. Writes wait their turn without a bound of their own: each
has a caller that waits for it, so there are as many as there are callers.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from app.core.images import Image, ImageUse, InvalidMark
from app.core.job import Job
from app.core.machine.step import StoredVersion
from app.engine.ports.clock import Clock
from app.engine.ports.events import DomainEvent, EventFilter, StoredEvent
from app.engine.ports.journal import IdempotencyKey, JobFilter, JournalError, NewJob, Registration, StoredAnswer
from app.engine.ports.uses import DiskUses, MarkChange
from app.engine.views import Render
from app.journal import reserve
from app.journal.codec import encode_registration
from app.journal.connections import Connections, Executors
from app.journal.database import BUSY_S, FILE, connect, connect_to_read, damage, damaged, transaction
from app.journal.epoch import begin
from app.journal.failures import reading
from app.journal.health import Health
from app.journal.held import HeldFiles
from app.journal.images import change_marks, every_use, marks_of, replace_uses
from app.journal.pruning import prune, reckon
from app.journal.reading import Reading
from app.journal.writing import Transaction

NAMED: Final = 4096
"""Processes whose names of devices are kept."""

WAIT_MS: Final = 50
"""The fewest ms that a write waits for another process that is writing."""

CHECK_S: Final = 5.0
"""Seconds after which a journal that does not answer counts as one that can't be written."""

FREE_WARNED: Final = 64 << 20
"""Bytes of free space inside the file from which on they are told, where they are more than half of it."""

log = structlog.get_logger("blockjobd.journal")

T = TypeVar("T")
Publish = Callable[[Sequence[StoredEvent]], None]
Wake = Callable[[Collection[str]], None]


class SqliteJournal:
    """The `Journal` of a state directory.

    A write that was asked for is done even if the task that waits for it is canceled. Reads see every write that has
    returned. What is raised beside the port's errors is a mistake of ours (`LostUpdate`, `sqlite3.IntegrityError`) or a
    file that can't be read (`sqlite3.Error`).
    """

    def __init__(self, connections: Connections, render: Render, clock: Clock, state_dir: Path | None = None) -> None:
        self._connections = connections
        self._state_dir = state_dir
        self._files = HeldFiles(state_dir) if state_dir else None
        self._health = Health()
        self._asked: asyncio.Task[None] | None = None
        self._render = render
        self._clock = clock
        self._publish: Publish | None = None
        self._wake: Wake | None = None
        self._reading = Reading(self.read)

    @classmethod
    def open(cls, state_dir: Path, render: Render, clock: Clock, executors: Executors | None = None) -> SqliteJournal:
        """The journal in `state_dir`, which is made if it is missing; `executors` stand in for its two threads.

        Blocks while the schema is brought up to date and the whole file is checked. Raises as
        `app.journal.database.connect` does, and `JournalUnusable` for a file that is damaged. The caller holds
        `app.journal.lock.locked`.
        """
        with ExitStack() as stack:
            writing = stack.enter_context(closing(connect(state_dir)))
            if (found := damage(writing)) is not None:
                raise damaged(state_dir / FILE, found)
            begin(state_dir, writing)
            reserve.keep(state_dir)
            reading = stack.enter_context(closing(connect_to_read(state_dir)))
            # The files that SQLite opens at the first read are there from then on.
            reading.execute("SELECT 1 FROM meta").fetchone()
            made = cls(Connections(writing, reading, executors or Executors.threads()), render, clock, state_dir)
            stack.pop_all()
            return made

    def close(self) -> None:
        """Finish the writes that were asked for, and let go of the file; blocks until then."""
        self._connections.close()

    def listen(self, publish: Publish) -> None:
        """Have `publish` called on the event loop with each transaction's events, in the order of their ids."""
        self._publish = publish

    def wake(self, wake: Wake) -> None:
        """Have `wake` called on the event loop with the webhooks for which a transaction has stored deliveries."""
        self._wake = wake

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Do `work` in one transaction; the events that it tells are published after that.

        All that wait while another program has the file locked wait for the same second. Raises `JournalError`.
        """
        loop = asyncio.get_running_loop()
        asked = time.monotonic()

        def hop(connection: sqlite3.Connection) -> T:
            writing = Transaction(connection, self._render, self._clock)
            try:
                self._health.check()
                if self._files is not None:
                    self._health.grown(self._files.check())
                # What has waited behind a slow disk waits a moment for others, too.
                wait_ms = max(WAIT_MS, round((asked + BUSY_S - time.monotonic()) * 1000))
                connection.execute(f"PRAGMA busy_timeout = {wait_ms}")
                with transaction(connection):
                    done = work(writing)
            except JournalError as error:
                self._health.note(error)
                raise
            self._health.note(None)
            # From this thread, so that the loop hears of transactions in the order of their commits. A loop that has
            # ended meanwhile has no subscribers left.
            with suppress(RuntimeError):
                if writing.events and self._publish:
                    loop.call_soon_threadsafe(self._publish, writing.events)
                if writing.woken and self._wake:
                    loop.call_soon_threadsafe(self._wake, writing.woken)
            return done

        return await self._connections.write(hop)

    async def execute(self, statement: str, values: tuple[object, ...]) -> int:
        """Do one statement in a transaction of its own; how many rows it has changed."""
        return await self.write(lambda writing: writing.connection.execute(statement, values).rowcount)  # pyright: ignore[reportArgumentType]

    async def read(self, query: str, values: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """All rows of a query; raises `JournalError`."""
        return await self._look(lambda connection: connection.execute(query, values or {}).fetchall())

    async def _look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def hop(connection: sqlite3.Connection) -> T:
            try:
                with reading():
                    return work(connection)
            except JournalError as error:
                self._health.note(error, wrote=False)
                raise

        return await self._connections.read(hop)

    # Writes -----------------------------------------------------------------------------------------------------------

    async def add_jobs(self, new: Sequence[NewJob]) -> None:
        """Store new jobs, all or none of them; a job comes after its parent. Raises `JobConflict`."""

        def work(writing: Transaction) -> None:
            for each in new:
                writing.add(each)

        await self.write(work)

    async def store(
        self,
        told: Sequence[StoredVersion],
        *,
        uses: DiskUses | None = None,
        marks: MarkChange | None = None,
        registration: Registration | None = None,
    ) -> None:
        """Store versions of jobs, in order, each with its event if it has one, and what they mean for images.

        Raises `LostUpdate` where a version is not the one after the stored version; nothing is stored then.
        """

        def work(writing: Transaction) -> None:
            writing.update(told)
            replace_uses(writing.connection, uses or {})
            change_marks(writing.connection, marks or MarkChange())
            if registration is not None:
                _keep(writing, registration)

        await self.write(work)

    async def keep_answer(self, key: IdempotencyKey, status: int, body: str) -> None:
        """Store the answer to the request that a key came with; the first one stays."""
        await self.execute(
            "UPDATE idempotency_keys SET status = ?, body = ? WHERE who = ? AND key = ? AND status IS NULL",
            (status, body, key.who, key.key),
        )

    async def tell_domain(self, type_: DomainEvent, domain: str, data: str) -> None:
        """Store an event of a domain; `data` is the JSON text of its data."""
        await self.write(lambda writing: writing.tell(type_.value, domain=domain, disk=None, job_id=None, data=data))

    async def register(self, registration: Registration, told: str | None = None) -> None:
        """Keep a registration, in place of an earlier one of the same id; `told` is the data of `domain.added`."""

        def work(writing: Transaction) -> None:
            _keep(writing, registration)
            if told is not None:
                writing.tell(DomainEvent.ADDED.value, domain=registration.id, disk=None, job_id=None, data=told)

        await self.write(work)

    async def unregister(self, domain: str, told: str) -> None:
        """Forget a registration, and the uses of images by its disks; a domain that is not there is no error.

        `told` is the data of `domain.removed`.
        """

        def work(writing: Transaction) -> None:
            writing.connection.execute("DELETE FROM domains WHERE id = ?", (domain,))
            writing.connection.execute("DELETE FROM image_uses WHERE domain = ?", (domain,))
            writing.tell(DomainEvent.REMOVED.value, domain=domain, disk=None, job_id=None, data=told)

        await self.write(work)

    async def record_uses(self, domain: str, disks: Mapping[str, Sequence[ImageUse]]) -> None:
        """Keep what the chains of these disks were read to be, in place of what was known of them."""
        named = {(domain, disk): uses for disk, uses in disks.items()}
        await self.write(lambda writing: replace_uses(writing.connection, named))

    async def change_marks(self, change: MarkChange) -> None:
        """Set and end marks where no job changes."""
        await self.write(lambda writing: change_marks(writing.connection, change))

    async def keep_names(self, process: str, names: Mapping[str, str]) -> None:
        """Keep what the devices of a process are called; of the processes seen longest ago nothing is kept."""

        def work(writing: Transaction) -> None:
            writing.connection.execute(
                "INSERT OR REPLACE INTO device_names (process, names, seen_at) VALUES (?, ?, ?)",
                (process, json.dumps(names), self._clock.now()),
            )
            writing.connection.execute(
                "DELETE FROM device_names WHERE process IN"
                " (SELECT process FROM device_names ORDER BY seen_at DESC LIMIT -1 OFFSET ?)",
                (NAMED,),
            )

        await self.write(work)

    async def prune(self, before: int) -> None:
        """Delete what is from before that time (ms since 1970): jobs that ended, with their events; events of domains.

        An event of a job goes with its job, so events that are older than the last pruned one may be left.
        A job stays as long as the key of its request, and what a webhook is still to be sent stays too. Done in many
        short transactions, between which others write. A clock that has jumped ahead since the last time counts for a
        day at most: what it would delete by mistake is gone for good.
        """
        now = self._clock.now()
        reckoned = await self.write(lambda writing: reckon(writing.connection, now))
        await prune(self.execute, now=reckoned, before=before - (now - reckoned))
        self._reading.forget()
        if self._state_dir is not None:
            reserve.keep(self._state_dir)
        await self._look(self._measure)

    def _measure(self, connection: sqlite3.Connection) -> None:
        size, pages, free = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_size", "page_count", "freelist_count")
        )
        self._health.grown({"free": free * size})
        if free * size > FREE_WARNED and 2 * free > pages:
            log.warning("more than half of the journal's file is free space", bytes=pages * size, free=free * size)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of the journal's `file`, of its `log`, and of what is `free` in the file, as last seen."""
        return self._health.sizes

    async def check(self) -> str | None:
        """None if the journal can be written, else its code and why not.

        A write is only tried where none was of late, and once for all who ask at the same time.
        """
        recent, failure = self._health.known()
        if not recent or (failure is None and self._files is not None and self._files.is_cramped()):
            if self._asked is None or self._asked.done():
                self._asked = asyncio.create_task(self._try())
            try:
                await asyncio.wait_for(asyncio.shield(self._asked), CHECK_S)
            except TimeoutError:
                return f"the journal has not answered for {CHECK_S:g} s"
            _, failure = self._health.known()
        if failure is None and self._files is not None:
            try:
                self._files.check()
            except JournalError as error:
                failure = error
        return None if failure is None else f"{failure.code.value}: {failure}"

    async def _try(self) -> None:
        with suppress(JournalError):
            # A value that changes each time: SQLite writes nothing for an update that changes nothing.
            await self.execute("UPDATE meta SET value = value + 1 WHERE key = 'checks'", ())

    async def _told(self, found: Awaitable[T]) -> T:
        try:
            return await found
        except JournalError as error:
            # What can be read of the file and makes no sense is damage, too.
            self._health.note(error, wrote=False)
            raise

    # Reads ------------------------------------------------------------------------------------------------------------

    async def job(self, job_id: str) -> Job | None:
        """The last stored version of a job."""
        return await self._told(self._reading.job(job_id))

    async def kept(self, key: IdempotencyKey, *, since: int) -> StoredAnswer | None:
        """What a key of that name led to, if it was stored at `since` or later."""
        return await self._reading.kept(key, since=since)

    async def unfinished(self) -> Sequence[Job]:
        """Every job that has not ended, oldest first."""
        return await self._told(self._reading.unfinished())

    async def jobs(self, wanted: JobFilter) -> tuple[Sequence[Job], int | None]:
        """Jobs, newest first, and the cursor of the next page (None: there is none)."""
        return await self._told(self._reading.jobs(wanted))

    async def jobs_of(self, parent: str) -> Sequence[Job]:
        """The jobs that are steps of another one, oldest first."""
        return await self._told(self._reading.jobs_of(parent))

    async def events(self, wanted: EventFilter, *, after: int, limit: int) -> Sequence[StoredEvent]:
        """Stored events with an id above `after`, oldest first."""
        return await self._reading.events(wanted, after=after, limit=limit)

    async def event_bounds(self) -> tuple[int, int]:
        """(id of the last event that was pruned, id of the last event); 0 where there is none."""
        return await self._reading.event_bounds()

    async def registrations(self) -> Sequence[Registration]:
        """The domains that were registered, by id."""
        return await self._told(self._reading.registrations())

    async def names_of(self, process: str) -> Mapping[str, str]:
        """What the devices of a process were called; empty where it was never seen."""
        rows = await self.read("SELECT names FROM device_names WHERE process = :process", {"process": process})
        return {str(device): str(name) for (text,) in rows for device, name in json.loads(text).items()}

    async def uses(self) -> Sequence[ImageUse]:
        """Every use of an image, by domain, disk and place."""
        return await self._look(every_use)

    async def invalid_marks(self, images: Iterable[Image]) -> Sequence[InvalidMark]:
        """The marks of these images, or of what may be one of them, oldest job first."""
        asked = tuple(images)
        return await self._look(lambda connection: marks_of(connection, asked))


def _keep(writing: Transaction, registration: Registration) -> None:
    writing.connection.execute(
        "INSERT INTO domains (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
        (registration.id, encode_registration(registration)),
    )
