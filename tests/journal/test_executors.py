"""The journal's threads may be stood in for by something that runs its work at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from threading import get_ident
from typing import ParamSpec, TypeVar

import pytest

from app.engine.ports.events import EventFilter
from app.engine.ports.journal import JobConflict
from app.journal.connections import Executors
from app.journal.journal import SqliteJournal

from .support import DAY, add_job, ended, heard_by, make_job, opened, queued, started

P = ParamSpec("P")
T = TypeVar("T")


class Inline(Executor):
    """Runs its work at once, in the thread that asks for it."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that is done."""
        self.threads.add(get_ident())
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - the caller's to see
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - as any executor
        """Take no more work."""
        self.closed = True


def test_a_journal_works_without_threads(tmp_path: Path) -> None:
    """Writes, reads, refusals and events are the same, and all of it is done in the thread of the event loop."""
    writing, reading = Inline(), Inline()
    job = make_job()

    async def story(journal: SqliteJournal) -> None:
        heard = heard_by(journal)
        await add_job(journal, [*queued(job), started(job)])
        with pytest.raises(JobConflict):
            await add_job(journal, queued(make_job("bj-2")))
        await asyncio.gather(journal.store([ended(started(job).job, at=5)]), journal.unfinished())
        assert [event.id for event in heard] == [1, 2, 3]
        assert await journal.events(EventFilter(), after=0, limit=10) == heard
        await journal.prune(DAY)
        assert await journal.job(job.id) is None

    with opened(tmp_path, executors=Executors(writing, reading)) as journal:
        asyncio.run(story(journal))
        assert not writing.closed
    assert writing.threads == reading.threads == {get_ident()}
    assert writing.closed
    assert reading.closed
