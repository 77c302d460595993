"""The real journal on a database in memory, which can be full, and at whose commits the service can be killed."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from app.core.errors import Code
from app.core.job import Job
from app.engine.ports.clock import Clock
from app.engine.ports.journal import JournalError
from app.engine.views import DomainView
from app.journal import database
from app.journal.connections import Connections, Executors
from app.journal.journal import SqliteJournal
from app.journal.writing import Transaction
from tests.engine.simulation.life import Life

T = TypeVar("T")

WRITE_S = 0.001
"""Seconds until it shows that the journal can't be written."""


class PlainRender:
    """The `Render` port, with little text."""

    def job(self, job: Job) -> str:
        """The JSON of a job."""
        return json.dumps({"id": job.id, "state": job.state.value, "version": job.version})

    def domain(self, view: DomainView) -> str:
        """The JSON of a domain."""
        return json.dumps({"id": view.id, "state": view.state.value})


@cache
def _template() -> sqlite3.Connection:
    """A database with the real schema, made by the real code once for each process."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with closing(database.connect(place)) as made:
            made.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            made.execute("PRAGMA journal_mode = DELETE")
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            made.backup(memory)
    return memory


def new_database() -> sqlite3.Connection:
    """A database in memory that no service has written to."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _template().backup(connection)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


class Inline(Executor):
    """Does its work at once, in the thread of the event loop."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Do it."""
        done: Future[T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it is the waiting task's to see
            done.set_exception(error)
        return done


class JournalFaults:
    """What the next writes meet: `full`, `kill before` or `kill after` their commit; and for how long it is full."""

    def __init__(self) -> None:
        self.next: deque[str] = deque()
        self.full_until = 0.0


class SimJournal(SqliteJournal):
    """The journal of one service. Both of its connections are one, as nothing here runs at the same time."""

    def __init__(
        self,
        *,
        connection: sqlite3.Connection,
        clock: Clock,
        life: Life,
        faults: JournalFaults,
        kill: Callable[[], None],
        note_call: Callable[[str, str], None],
    ) -> None:
        super().__init__(Connections(connection, connection, Executors(Inline(), Inline())), PlainRender(), clock)
        self._life = life
        self._faults = faults
        self._kill = kill
        self._note_call = note_call
        self._seconds = clock.monotonic

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Do `work` in one transaction, unless something goes wrong."""
        self._life.check()
        fault = self._faults.next.popleft() if self._faults.next else None
        if fault == "full" or self._faults.full_until > self._seconds():
            self._note_call("write", "failed writes")
            # That it can't be written is found by the writing thread, on its way there and back.
            await asyncio.sleep(WRITE_S)
            raise JournalError(Code.JOURNAL_FULL, "the simulated file system is full")
        if fault == "kill before":
            self._kill()
            raise asyncio.CancelledError
        if fault == "kill after":
            # The commit is made before `super` waits for the first time; this comes right after it.
            asyncio.get_running_loop().call_soon(self._kill)
        return await super().write(work)

    async def read(self, query: str, values: Mapping[str, object] | None = None) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        self._life.check()
        return await super().read(query, values)
