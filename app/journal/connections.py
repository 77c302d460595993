"""The journal's two connections to its file, each with a thread of its own."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Executors:
    """Where writes and reads are done, one at a time each. The journal shuts both down when it is closed.

    An executor that runs its work at once, in the thread of the event loop, will do as well.
    """

    writing: Executor
    reading: Executor

    @classmethod
    def threads(cls) -> Executors:
        """A thread each."""
        return cls(
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal-write"),
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal-read"),
        )


class Connections:
    """One connection that writes and one that reads, so that neither the event loop nor a reader waits for a write."""

    def __init__(self, writing: sqlite3.Connection, reading: sqlite3.Connection, executors: Executors) -> None:
        self._writing = writing
        self._reading = reading
        self._executors = executors

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` on the connection that writes, also if the task that waits for it is canceled."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._executors.writing, work, self._writing))

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` on the connection that reads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executors.reading, work, self._reading)

    def close(self) -> None:
        """Finish what was asked for, and let go of the file; blocks until then."""
        self._executors.writing.shutdown()
        self._executors.reading.shutdown()
        self._reading.close()
        with suppress(sqlite3.Error):
            # So that what is left is one file. Where there is no room for it, the next start does it.
            self._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writing.close()
