"""The engine's journal in SQLite.

One thread writes, another one reads, each with a connection of its own, so the event loop never waits for the disk. A
write is one hop to its thread with a whole transaction in it. Writes wait their turn without a bound of their own: each
has a caller that waits for it, so there are as many as there are callers.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from app.core.job import Job, State
from app.core.machine.reports import StoredVersion
from app.engine.idempotency import DELIVERY_KEPT_FOR, HOOK, KEPT_FOR
from app.engine.ports.clock import Clock
from app.engine.ports.events import DomainEvent, EventFilter, StoredEvent
from app.engine.ports.journal import IdempotencyKey, JobConflict, JobFilter, JournalFull, Registration, StoredAnswer
from app.engine.ports.outbox import Webhook
from app.engine.views import Render
from app.journal.codec import decode_job, decode_registration, encode_job, encode_registration
from app.journal.database import connect, connect_to_read, transaction
from app.journal.outbox import UNDELIVERED, enqueue, insert

PRUNED_EVENTS: Final = 500
"""Events of domains that one transaction deletes, so that no other write waits long."""

PRUNED_JOBS: Final = 25
"""Jobs that one transaction deletes, each with its handful of events."""

KEPT_JOBS: Final = 256
"""Ended jobs that are kept in memory, the last that were asked for: an outcome is often asked for more than once."""

T = TypeVar("T")
Publish = Callable[[Sequence[StoredEvent]], None]
Wake = Callable[[Collection[str]], None]


class LostUpdate(Exception):
    """A version of a job does not follow the stored one: two writers worked on it, or one on an old copy."""


class SqliteJournal:
    """The `Journal` of a state directory.

    A write that was asked for is done even if the task that waits for it is canceled. Reads see every write that has
    returned. What is raised beside the port's errors is a mistake of ours (`LostUpdate`, `sqlite3.IntegrityError`) or a
    file that can't be read (`sqlite3.Error`).
    """

    def __init__(self, writing: sqlite3.Connection, reading: sqlite3.Connection, render: Render, clock: Clock) -> None:
        self._writing = writing
        self._reading = reading
        self._render = render
        self._clock = clock
        self._publish: Publish | None = None
        self._wake: Wake | None = None
        self._woken: set[str] = set()
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal-write")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal-read")

    @classmethod
    def open(cls, state_dir: Path, render: Render, clock: Clock) -> SqliteJournal:
        """The journal in `state_dir`, which is made if it is missing.

        Blocks while the schema is brought up to date. Raises as `app.journal.database.connect` does. The caller holds
        `app.journal.lock.locked`.
        """
        writing = connect(state_dir)
        try:
            return cls(writing, connect_to_read(state_dir), render, clock)
        except BaseException:
            writing.close()
            raise

    def close(self) -> None:
        """Finish the writes that were asked for, and let go of the file; blocks until then."""
        self._writer.shutdown()
        self._reader.shutdown()
        self._reading.close()
        with suppress(sqlite3.Error):
            # So that what is left is one file. Where there is no room for it, the next start does it.
            self._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writing.close()

    def listen(self, publish: Publish) -> None:
        """Have `publish` called on the event loop with each transaction's events, in the order of their ids."""
        self._publish = publish

    def wake(self, wake: Wake) -> None:
        """Have `wake` called on the event loop with the webhooks for which a transaction has stored deliveries."""
        self._wake = wake

    # Writes -------------------------------------------------------------------------------------------------------

    async def add_job(
        self, told: Sequence[StoredVersion], key: IdempotencyKey | None = None, callback: Webhook | None = None
    ) -> None:
        """Store a new job, version by version, with the key of the request that asked for it, and its callback.

        Raises `JobConflict` where the disk has an unfinished one.
        """
        first = told[0]

        def add(connection: sqlite3.Connection, events: list[StoredEvent]) -> None:
            try:
                connection.execute("INSERT INTO jobs (id, body) VALUES (?, ?)", (first.job.id, encode_job(first.job)))
            except sqlite3.IntegrityError as error:
                row = connection.execute(
                    "SELECT id FROM jobs WHERE domain = ? AND disk = ? AND ended = 0",
                    (first.job.domain, first.job.disk),
                ).fetchone()
                if row is None:
                    raise
                raise JobConflict(row[0]) from error
            if callback is not None:
                # Before the events, which are for it already.
                insert(connection, callback)
            self._tell(connection, first, events)
            self._update(connection, told[1:], events)
            if key is not None:
                # In place of one that is too old to be found.
                connection.execute(
                    "INSERT OR REPLACE INTO idempotency_keys (who, key, fingerprint, job_id, created_at)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (key.who, key.key, key.fingerprint, first.job.id, self._clock.now()),
                )

        await self.write(add)

    async def keep_answer(self, key: IdempotencyKey, status: int, body: str) -> None:
        """Store the answer to the request that a key came with; the first one stays."""
        await self.write(
            lambda connection, _events: connection.execute(
                "UPDATE idempotency_keys SET status = ?, body = ? WHERE who = ? AND key = ? AND status IS NULL",
                (status, body, key.who, key.key),
            )
        )

    async def store(self, told: Sequence[StoredVersion]) -> None:
        """Store versions of one job, in order, each with its event if it has one.

        Raises `LostUpdate` where the first is not the one after the stored version; nothing is stored then.
        """
        await self.write(lambda connection, events: self._update(connection, told, events))

    async def tell_domain(self, type_: DomainEvent, domain: str, data: str) -> None:
        """Store an event of a domain; `data` is the JSON text of its data."""
        await self.write(
            lambda connection, events: events.append(
                self.tell(connection, type_.value, domain=domain, disk=None, job_id=None, data=data)
            )
        )

    async def register(self, registration: Registration) -> None:
        """Keep a registration, in place of an earlier one of the same id."""
        await self.write(
            lambda connection, _events: connection.execute(
                "INSERT INTO domains (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                (registration.id, encode_registration(registration)),
            )
        )

    async def unregister(self, domain: str) -> None:
        """Forget a registration; one that is not there is no error."""
        await self.write(lambda connection, _events: connection.execute("DELETE FROM domains WHERE id = ?", (domain,)))

    async def prune(self, before: int) -> None:
        """Delete what is from before that time (ms since 1970): jobs that ended, with their events; events of domains.

        An event of a job goes with its job, so events that are older than the last pruned one may be left.
        A job stays as long as the key of its request, and what a webhook is still to be sent stays too. Done in many
        short transactions, between which others write.
        """
        await self.write(
            lambda connection, _events: connection.execute(
                "DELETE FROM idempotency_keys WHERE created_at < ? AND (created_at < ? OR substr(who, 1, 5) <> ?)",
                (self._clock.now() - KEPT_FOR, self._clock.now() - DELIVERY_KEPT_FOR, HOOK),
            )
        )
        while await self.write(
            lambda connection, _events: (
                connection.execute(
                    "DELETE FROM events WHERE id IN"  # noqa: S608  # constants only
                    " (SELECT id FROM events WHERE job_id IS NULL AND time < ?"
                    f" AND NOT EXISTS ({UNDELIVERED} AND event_id = events.id) ORDER BY time LIMIT ?)",
                    (before, PRUNED_EVENTS),
                ).rowcount
            )
        ):
            pass
        while await self.write(
            lambda connection, _events: (
                connection.execute(
                    "DELETE FROM jobs WHERE seq IN"  # noqa: S608  # constants only
                    " (SELECT seq FROM jobs WHERE ended = 1 AND finished_at < ?"
                    " AND NOT EXISTS (SELECT 1 FROM idempotency_keys WHERE job_id = jobs.id)"
                    f" AND NOT EXISTS ({UNDELIVERED} AND event_id IN (SELECT id FROM events WHERE job_id = jobs.id))"
                    " ORDER BY finished_at LIMIT ?)",
                    (before, PRUNED_JOBS),
                ).rowcount
            )
        ):
            pass
        # A new one: a read that began before puts what it found into the old one.
        self._ended = OrderedDict()

    async def check(self) -> str | None:
        """None if the journal can be written, which is tried, else why not."""
        try:
            # A value that changes each time: SQLite writes nothing for an update that changes nothing.
            await self.write(
                lambda connection, _events: connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'checks'")
            )
        except JournalFull as error:
            return str(error)
        return None

    # Reads --------------------------------------------------------------------------------------------------------

    async def job(self, job_id: str) -> Job | None:
        """The last stored version of a job."""
        kept = self._ended
        job = kept.get(job_id)
        if job is not None:
            kept.move_to_end(job_id)
            return job
        rows = await self.read("SELECT body FROM jobs WHERE id = :id", {"id": job_id})
        return self._keep(kept, decode_job(rows[0][0])) if rows else None

    @staticmethod
    def _keep(kept: OrderedDict[str, Job], job: Job) -> Job:
        # A job that was lost may still be resolved; any other that has ended changes no more, it is only pruned.
        if job.ended and job.state is not State.LOST:
            kept[job.id] = job
            if len(kept) > KEPT_JOBS:
                kept.popitem(last=False)
        return job

    async def kept(self, key: IdempotencyKey, *, since: int) -> StoredAnswer | None:
        """What a key of that name led to, if it was stored at `since` or later."""
        rows = await self.read(
            "SELECT fingerprint, job_id, status, body FROM idempotency_keys"
            " WHERE who = :who AND key = :key AND created_at >= :since",
            {"who": key.who, "key": key.key, "since": since},
        )
        for fingerprint, job_id, status, body in rows:
            return StoredAnswer(fingerprint=fingerprint, job_id=job_id, status=status, body=body)
        return None

    async def unfinished(self) -> Sequence[Job]:
        """Every job that has not ended, oldest first."""
        return [decode_job(body) for (body,) in await self.read("SELECT body FROM jobs WHERE ended = 0 ORDER BY seq")]

    async def jobs(self, wanted: JobFilter) -> tuple[Sequence[Job], int | None]:
        """Jobs, newest first, and the cursor of the next page (None: there is none)."""
        where = _where(
            {
                "domain = :domain": wanted.domain is not None,
                "disk = :disk": wanted.disk is not None,
                "state = :state": wanted.state is not None,
                # Not bound: SQLite takes an index with a condition only where it can see that the condition holds.
                "ended = 0": wanted.active is True,
                "ended = 1": wanted.active is False,
                "seq < :before": wanted.before is not None,
            }
        )
        kept = self._ended
        rows = await self.read(
            f"SELECT seq, id, body FROM jobs {where} ORDER BY seq DESC LIMIT :limit + 1",  # noqa: S608  # constants only
            {
                "domain": wanted.domain,
                "disk": wanted.disk,
                "state": wanted.state,
                "before": wanted.before,
                "limit": wanted.limit,
            },
        )
        page = rows[: wanted.limit]
        jobs = [kept.get(id_) or self._keep(kept, decode_job(body)) for _, id_, body in page]
        return jobs, page[-1][0] if len(rows) > len(page) else None

    async def modified_chains(self, domain: str, disk: str) -> Sequence[Job]:
        """Ended jobs on this disk that left a base modified (failed, canceled, lost, or `keep`), oldest first."""
        rows = await self.read(
            "SELECT body FROM jobs WHERE domain = :domain AND disk = :disk AND ended = 1"
            " AND (data_state = 'base-modified' OR (state = 'completed' AND intent = 'keep')) ORDER BY seq",
            {"domain": domain, "disk": disk},
        )
        return [decode_job(body) for (body,) in rows]

    async def events(self, wanted: EventFilter, *, after: int, limit: int) -> Sequence[StoredEvent]:
        """Stored events with an id above `after`, oldest first."""
        where = _where(
            {
                "id > :after": True,
                "job_id = :job_id": wanted.job_id is not None,
                "domain = :domain": wanted.domain is not None,
                "type IN (SELECT value FROM json_each(:types))": bool(wanted.types),
            }
        )
        columns = "id, type, time, domain, disk, job_id, data"
        rows = await self.read(
            f"SELECT {columns} FROM events {where} ORDER BY id LIMIT :limit",  # noqa: S608  # constants only
            {
                "after": after,
                "job_id": wanted.job_id,
                "domain": wanted.domain,
                "types": json.dumps(sorted(wanted.types)),
                "limit": limit,
            },
        )
        return [
            StoredEvent(id=id_, type=type_, time=time, domain=domain, disk=disk, job_id=job_id, data=data)
            for id_, type_, time, domain, disk, job_id, data in rows
        ]

    async def event_bounds(self) -> tuple[int, int]:
        """(id of the last event that was pruned, id of the last event); 0 where there is none."""
        ((pruned, last),) = await self.read(
            "SELECT value, max(value, (SELECT coalesce(max(id), 0) FROM events)) FROM meta WHERE key = 'pruned'"
        )
        return pruned, last

    async def registrations(self) -> Sequence[Registration]:
        """The domains that were registered, by id."""
        return [decode_registration(body) for (body,) in await self.read("SELECT body FROM domains ORDER BY id")]

    # How ----------------------------------------------------------------------------------------------------------

    def _update(self, connection: sqlite3.Connection, told: Sequence[StoredVersion], events: list[StoredEvent]) -> None:
        for each in told:
            job = each.job
            changed = connection.execute(
                "UPDATE jobs SET body = ? WHERE id = ? AND version = ? AND (ended = 0 OR state = 'lost')",
                (encode_job(job), job.id, job.version - 1),
            ).rowcount
            if not changed:
                raise LostUpdate(f"version {job.version} of the job {job.id} does not follow the stored one")
            self._tell(connection, each, events)

    def _tell(self, connection: sqlite3.Connection, told: StoredVersion, events: list[StoredEvent]) -> None:
        if told.type is not None:
            job = told.job
            data = self._render.job(job)
            event = self.tell(connection, told.type.value, domain=job.domain, disk=job.disk, job_id=job.id, data=data)
            events.append(event)

    def tell(
        self,
        connection: sqlite3.Connection,
        type_: str,
        *,
        domain: str,
        disk: str | None,
        job_id: str | None,
        data: str,
    ) -> StoredEvent:
        """Store an event in a transaction, and what webhooks are to be sent of it."""
        time = self._clock.now()
        id_ = connection.execute(
            "INSERT INTO events (type, time, domain, disk, job_id, data) VALUES (?, ?, ?, ?, ?, ?)",
            (type_, time, domain, disk, job_id, data),
        ).lastrowid
        event = StoredEvent(id=id_, type=type_, time=time, domain=domain, disk=disk, job_id=job_id, data=data)
        self._woken.update(enqueue(connection, event))
        return event

    async def write(self, work: Callable[[sqlite3.Connection, list[StoredEvent]], T]) -> T:
        """Do `work` in one transaction; the events that it adds to its list are published after that."""
        loop = asyncio.get_running_loop()

        def hop() -> T:
            events: list[StoredEvent] = []
            self._woken = set()
            with transaction(self._writing):
                done = work(self._writing, events)
            # From this thread, so that the loop hears of transactions in the order of their commits. A loop that has
            # ended meanwhile has no subscribers left.
            with suppress(RuntimeError):
                if events and self._publish:
                    loop.call_soon_threadsafe(self._publish, events)
                if self._woken and self._wake:
                    loop.call_soon_threadsafe(self._wake, self._woken)
            return done

        return await asyncio.shield(loop.run_in_executor(self._writer, hop))

    async def read(self, query: str, values: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """All rows of a query."""

        def hop() -> list[tuple[Any, ...]]:
            return self._reading.execute(query, values or {}).fetchall()

        return await asyncio.get_running_loop().run_in_executor(self._reader, hop)


def _where(conditions: Mapping[str, bool]) -> str:
    """The conditions that apply, as SQL, so that each query finds its index."""
    chosen = [text for text, applies in conditions.items() if applies]
    return f"WHERE {' AND '.join(chosen)}" if chosen else ""
