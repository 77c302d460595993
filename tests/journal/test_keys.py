"""The keys of requests: stored with their job or not at all, found for a day, and kept from pruning their job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app.engine.idempotency import KEPT_FOR
from app.engine.ports.journal import IdempotencyKey, JobConflict, JobFilter, StoredAnswer
from app.journal.journal import SqliteJournal

from .support import DAY, SetClock, add_job, ended, make_job, queued, run

KEY = IdempotencyKey(who="ci", key="k-1", fingerprint="f1")
NONE = StoredAnswer(fingerprint="f1", job_id="bj-1", status=None, body=None)


def test_a_key_is_stored_with_its_job(tmp_path: Path) -> None:
    """It is there after a restart, for its own client only, and gets an answer once."""

    async def ask(journal: SqliteJournal) -> None:
        assert await journal.kept(KEY, since=0) is None
        await add_job(journal, queued(make_job()), KEY)

    async def later(journal: SqliteJournal) -> None:
        assert await journal.kept(KEY, since=0) == NONE
        assert await journal.kept(replace(KEY, who="else"), since=0) is None
        assert await journal.kept(replace(KEY, key="k-2"), since=0) is None
        await journal.keep_answer(KEY, 202, '{"version": 2}')
        await journal.keep_answer(KEY, 502, "{}")
        assert await journal.kept(KEY, since=0) == replace(NONE, status=202, body='{"version": 2}')

    run(tmp_path, ask)
    run(tmp_path, later)


def test_no_job_no_key(tmp_path: Path) -> None:
    """What can't be stored leaves nothing behind, neither way round."""

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(make_job()))
        with pytest.raises(JobConflict):
            await add_job(journal, queued(make_job("bj-2")), KEY)
        assert await journal.kept(KEY, since=0) is None

    run(tmp_path, story)


def test_a_key_ends_after_a_day(tmp_path: Path) -> None:
    """Then it can be had anew, with another request; its old job is not pruned before, and is after that."""
    clock = SetClock()
    job = make_job()

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, [*queued(job), ended(job, at=1_500)], KEY)
        clock.time += KEPT_FOR
        await journal.prune(DAY * 2)
        assert await journal.job(job.id) is not None
        assert await journal.kept(KEY, since=clock.time - KEPT_FOR) is not None
        clock.time += 1
        assert await journal.kept(KEY, since=clock.time - KEPT_FOR) is None
        another = make_job("bj-2")
        await add_job(journal, queued(another), replace(KEY, fingerprint="f2"))
        found = await journal.kept(KEY, since=clock.time - KEPT_FOR)
        assert found == StoredAnswer(fingerprint="f2", job_id="bj-2", status=None, body=None)
        await journal.prune(DAY * 3)
        jobs, _ = await journal.jobs(JobFilter())
        assert [left.id for left in jobs] == ["bj-2"]

    run(tmp_path, story, clock)
