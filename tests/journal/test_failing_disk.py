"""The journal on a disk that fails: what was answered is true, also after a crash and after a power cut."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from app.core.errors import Code
from app.engine.ports.events import DomainEvent
from app.engine.ports.journal import JournalError
from app.journal.database import connect, damage
from app.journal.journal import SqliteJournal
from tests.journal.power import cut_while_writing
from tests.support.disk import Disk

from .support import add_job, heard_by, make_job, opened, queued, run, started

FILES = ("journal.sqlite3", "journal.sqlite3-wal")


@pytest.fixture
def disk() -> Generator[Disk]:
    """The disk below this process's databases."""
    failing = Disk()
    failing.install()
    yield failing
    failing.remove()


def jobs_after(folder: Path) -> set[str]:
    """The ids of the jobs that a recovery finds in a folder."""
    with closing(connect(folder)) as found:
        assert damage(found) is None
        return {id_ for (id_,) in found.execute("SELECT id FROM jobs")}


def copied(state_dir: Path, to: Path) -> Path:
    """What a process that is killed leaves."""
    to.mkdir()
    for name in FILES:
        shutil.copy(state_dir / name, to / name)
    return to


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_sync_that_fails(tmp_path: Path, disk: Disk, failures: int) -> None:
    """A job that was refused is not there after a crash, although SQLite had written all of it into its log."""
    state_dir = tmp_path / "state"
    answers: list[Code] = []

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(make_job("bj-kept")))
        disk.only, disk.fail_sync = "-wal", failures
        with pytest.raises(JournalError) as refused:
            await add_job(journal, queued(make_job("bj-refused", disk="vdb")))
        answers.append(refused.value.code)
        copied(state_dir, tmp_path / "killed")
        cuts = [tmp_path / f"cut{seed}" for seed in range(30)]
        for seed, cut in enumerate(cuts):
            cut.mkdir()
            disk.cut(state_dir, cut, random.Random(seed))
        # Where a power cut could bring it back, that is what was said.
        back = [cut.name for cut in cuts if "bj-refused" in jobs_after(cut)]
        assert not back or answers == [Code.JOURNAL_UNCERTAIN]
        disk.fail_sync = 0
        await add_job(journal, queued(make_job("bj-next", disk="vdc")))
        copied(state_dir, tmp_path / "later")

    run(state_dir, story)
    assert answers == [Code.JOURNAL_FULL if failures == 1 else Code.JOURNAL_UNCERTAIN]
    assert jobs_after(tmp_path / "killed") == {"bj-kept"}
    assert jobs_after(tmp_path / "later") == {"bj-kept", "bj-next"}


def test_reads_that_fail_are_told_as_that(tmp_path: Path, disk: Disk) -> None:
    """A read that fails is no missing job, and no end of anything."""

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(make_job()))
        # What SQLite has at hand it does not read again.
        await journal.read("PRAGMA shrink_memory")
        disk.fail_read = 1000
        with pytest.raises(JournalError, match="can't be read") as failed:
            await journal.job("bj-1")
        assert failed.value.code is Code.JOURNAL_UNREADABLE
        disk.fail_read = 0
        assert await journal.job("bj-1") == make_job()
        await journal.store([started(make_job())])
        assert await journal.check() is None

    with opened(tmp_path) as journal:
        asyncio.run(story(journal))


def test_writes_that_fail_leave_no_event(tmp_path: Path, disk: Disk) -> None:
    """A write that failed in the middle has told nobody anything."""

    async def story(journal: SqliteJournal) -> None:
        heard = heard_by(journal)
        disk.only, disk.fail_write = "-wal", 1
        with pytest.raises(JournalError) as failed:
            await add_job(journal, queued(make_job()))
        assert failed.value.code is Code.JOURNAL_FULL
        await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")
        await asyncio.sleep(0)
        assert [event.type for event in heard] == ["domain.added"]

    run(tmp_path, story)


def test_power_cuts(tmp_path: Path, disk: Disk) -> None:
    """After a power cut at any moment all that was acknowledged is there, and nothing in part."""
    cut_while_writing(tmp_path, disk, cuts=60, seed=1)
