"""The engine's journal in SQLite.

One thread writes, another one reads, each with a connection of its own, so the event loop never waits for the disk. A
write is one hop to its thread with a whole transaction in it. Writes wait their turn without a bound of their own: each
has a caller that waits for it, so there are as many as there are callers.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from app.core.images import Image, ImageUse, InvalidMark
from app.core.job import Job
from app.core.machine.step import StoredVersion
from app.engine.ports.clock import Clock
from app.engine.ports.events import DomainEvent, EventFilter, StoredEvent
from app.engine.ports.journal import IdempotencyKey, JobFilter, JournalFull, NewJob, Registration, StoredAnswer
from app.engine.ports.uses import DiskUses, MarkChange
from app.engine.views import Render
from app.journal.codec import encode_registration
from app.journal.connections import Connections, Executors
from app.journal.database import connect, connect_to_read, transaction
from app.journal.images import change_marks, every_use, marks_of, replace_uses
from app.journal.pruning import prune
from app.journal.reading import Reading
from app.journal.writing import Transaction

T = TypeVar("T")
Publish = Callable[[Sequence[StoredEvent]], None]
Wake = Callable[[Collection[str]], None]


class SqliteJournal:
    """The `Journal` of a state directory.

    A write that was asked for is done even if the task that waits for it is canceled. Reads see every write that has
    returned. What is raised beside the port's errors is a mistake of ours (`LostUpdate`, `sqlite3.IntegrityError`) or a
    file that can't be read (`sqlite3.Error`).
    """

    def __init__(self, connections: Connections, render: Render, clock: Clock) -> None:
        self._connections = connections
        self._render = render
        self._clock = clock
        self._publish: Publish | None = None
        self._wake: Wake | None = None
        self._reading = Reading(self.read)

    @classmethod
    def open(cls, state_dir: Path, render: Render, clock: Clock, executors: Executors | None = None) -> SqliteJournal:
        """The journal in `state_dir`, which is made if it is missing; `executors` stand in for its two threads.

        Blocks while the schema is brought up to date. Raises as `app.journal.database.connect` does. The caller holds
        `app.journal.lock.locked`.
        """
        writing = connect(state_dir)
        try:
            reading = connect_to_read(state_dir)
        except BaseException:
            writing.close()
            raise
        return cls(Connections(writing, reading, executors or Executors.threads()), render, clock)

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
        """Do `work` in one transaction; the events that it tells are published after that."""
        loop = asyncio.get_running_loop()

        def hop(connection: sqlite3.Connection) -> T:
            writing = Transaction(connection, self._render, self._clock)
            with transaction(connection):
                done = work(writing)
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
        """All rows of a query."""
        return await self._connections.read(lambda connection: connection.execute(query, values or {}).fetchall())

    # Writes -----------------------------------------------------------------------------------------------------------

    async def add_jobs(self, new: Sequence[NewJob]) -> None:
        """Store new jobs, all or none of them; a job comes after its parent. Raises `JobConflict`."""

        def work(writing: Transaction) -> None:
            for each in new:
                writing.add(each)

        await self.write(work)

    async def store(
        self, told: Sequence[StoredVersion], *, uses: DiskUses | None = None, marks: MarkChange | None = None
    ) -> None:
        """Store versions of jobs, in order, each with its event if it has one, and what they mean for images.

        Raises `LostUpdate` where a version is not the one after the stored version; nothing is stored then.
        """

        def work(writing: Transaction) -> None:
            writing.update(told)
            replace_uses(writing.connection, uses or {})
            change_marks(writing.connection, marks or MarkChange())

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

    async def register(self, registration: Registration) -> None:
        """Keep a registration, in place of an earlier one of the same id."""
        await self.execute(
            "INSERT INTO domains (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (registration.id, encode_registration(registration)),
        )

    async def unregister(self, domain: str) -> None:
        """Forget a registration, and the uses of images by its disks; a domain that is not there is no error."""

        def work(writing: Transaction) -> None:
            writing.connection.execute("DELETE FROM domains WHERE id = ?", (domain,))
            writing.connection.execute("DELETE FROM image_uses WHERE domain = ?", (domain,))

        await self.write(work)

    async def record_uses(self, domain: str, disks: Mapping[str, Sequence[ImageUse]]) -> None:
        """Keep what the chains of these disks were read to be, in place of what was known of them."""
        named = {(domain, disk): uses for disk, uses in disks.items()}
        await self.write(lambda writing: replace_uses(writing.connection, named))

    async def change_marks(self, change: MarkChange) -> None:
        """Set and end marks where no job changes."""
        await self.write(lambda writing: change_marks(writing.connection, change))

    async def prune(self, before: int) -> None:
        """Delete what is from before that time (ms since 1970): jobs that ended, with their events; events of domains.

        An event of a job goes with its job, so events that are older than the last pruned one may be left.
        A job stays as long as the key of its request, and what a webhook is still to be sent stays too. Done in many
        short transactions, between which others write.
        """
        await prune(self.execute, now=self._clock.now(), before=before)
        self._reading.forget()

    async def check(self) -> str | None:
        """None if the journal can be written, which is tried, else why not."""
        try:
            # A value that changes each time: SQLite writes nothing for an update that changes nothing.
            await self.execute("UPDATE meta SET value = value + 1 WHERE key = 'checks'", ())
        except JournalFull as error:
            return str(error)
        return None

    # Reads ------------------------------------------------------------------------------------------------------------

    async def job(self, job_id: str) -> Job | None:
        """The last stored version of a job."""
        return await self._reading.job(job_id)

    async def kept(self, key: IdempotencyKey, *, since: int) -> StoredAnswer | None:
        """What a key of that name led to, if it was stored at `since` or later."""
        return await self._reading.kept(key, since=since)

    async def unfinished(self) -> Sequence[Job]:
        """Every job that has not ended, oldest first."""
        return await self._reading.unfinished()

    async def jobs(self, wanted: JobFilter) -> tuple[Sequence[Job], int | None]:
        """Jobs, newest first, and the cursor of the next page (None: there is none)."""
        return await self._reading.jobs(wanted)

    async def jobs_of(self, parent: str) -> Sequence[Job]:
        """The jobs that are steps of another one, oldest first."""
        return await self._reading.jobs_of(parent)

    async def events(self, wanted: EventFilter, *, after: int, limit: int) -> Sequence[StoredEvent]:
        """Stored events with an id above `after`, oldest first."""
        return await self._reading.events(wanted, after=after, limit=limit)

    async def event_bounds(self) -> tuple[int, int]:
        """(id of the last event that was pruned, id of the last event); 0 where there is none."""
        return await self._reading.event_bounds()

    async def registrations(self) -> Sequence[Registration]:
        """The domains that were registered, by id."""
        return await self._reading.registrations()

    async def uses(self) -> Sequence[ImageUse]:
        """Every use of an image, by domain, disk and place."""
        return await self._connections.read(every_use)

    async def invalid_marks(self, images: Iterable[Image]) -> Sequence[InvalidMark]:
        """The marks of these images, or of what may be one of them, oldest job first."""
        asked = tuple(images)
        return await self._connections.read(lambda connection: marks_of(connection, asked))
