"""A journal whose files are taken away, replaced, cut off or damaged is noticed before anything is written."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from app.core.errors import Code
from app.engine.ports.events import DomainEvent
from app.engine.ports.journal import JournalError
from app.journal import reserve
from app.journal.database import JournalUnusable, connect
from app.journal.journal import SqliteJournal
from app.journal.lock import StateDirInUse, locked

from .support import add_job, make_job, opened, queued, run, started
from .test_lock import HOLD

FILE = "journal.sqlite3"


def replace_with_a_copy(path: Path) -> None:
    """A file of the same content in the place of another, as editors and restores leave it."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


@pytest.mark.parametrize("name", [FILE, f"{FILE}-wal", f"{FILE}-shm", "lock"])
@pytest.mark.parametrize("take", [Path.unlink, replace_with_a_copy])
def test_what_was_taken_away_is_written_to_no_more(tmp_path: Path, name: str, take: Callable[[Path], None]) -> None:
    """Writes are refused under a code of their own, and who asks for the journal's health is told at once."""

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(make_job()))
        assert await journal.check() is None
        take(tmp_path / name)
        assert f"journal-replaced: {tmp_path / name}" in (await journal.check() or "")
        with pytest.raises(JournalError) as refused:
            await journal.store([started(make_job())])
        assert refused.value.code is Code.JOURNAL_REPLACED
        assert await journal.job("bj-1") == make_job()

    with locked(tmp_path), opened(tmp_path) as journal:
        asyncio.run(story(journal))


def test_a_second_service_is_kept_out_without_the_lock_s_file(tmp_path: Path) -> None:
    """Somebody has removed the lock: the journal itself is locked as well."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        (tmp_path / "lock").unlink()
        with pytest.raises(StateDirInUse):
            locked(tmp_path).__enter__()
        holder.kill()


def test_a_journal_without_a_byte_is_no_new_one(tmp_path: Path) -> None:
    """Something has cut it off: a start on it would forget every job."""
    run(tmp_path, lambda journal: add_job(journal, queued(make_job())))
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(JournalUnusable, match="has no byte"):
        connect(tmp_path)
    assert (tmp_path / FILE).read_bytes() == b""


def test_a_first_start_that_was_killed_leaves_no_journal(tmp_path: Path) -> None:
    """A draft is no journal, and the next start makes its own."""
    (tmp_path / f".{FILE}.new").write_bytes(b"half a page")
    run(tmp_path, lambda journal: add_job(journal, queued(make_job())))
    assert not (tmp_path / f".{FILE}.new").exists()


def broken(tmp_path: Path) -> Path:
    """A journal with some jobs, some pages of which hold nothing but noise."""

    async def fill(journal: SqliteJournal) -> None:
        for number in range(60):
            await add_job(journal, queued(make_job(f"bj-{number}", domain=f"vm{number}")))

    run(tmp_path, fill)
    path = tmp_path / FILE
    content = bytearray(path.read_bytes())
    for page in range(8, len(content) // 4096, 3):
        content[page * 4096 : page * 4096 + 200] = os.urandom(200)
    path.write_bytes(content)
    return path


def test_damage_is_found_at_the_start(tmp_path: Path) -> None:
    """One line for a person, with the way out; nothing is written to the file."""
    path = broken(tmp_path)
    before = path.read_bytes()
    with pytest.raises(JournalUnusable, match=r"journal-damaged: .*blockjobd journal restore FILE") as refused:
        SqliteJournal.open(tmp_path, None, None)  # pyright: ignore[reportArgumentType] - it does not come that far
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == before


def test_damage_that_shows_later_stops_all_writing(tmp_path: Path) -> None:
    """A read that meets it is refused as that, later writes are too, and so says the journal's health."""

    async def story(journal: SqliteJournal) -> None:
        for number in range(60):
            await add_job(journal, queued(make_job(f"bj-{number}", domain=f"vm{number}")))
        await journal.execute("PRAGMA user_version", ())
        with closing(sqlite3.connect(tmp_path / FILE)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with (tmp_path / FILE).open("r+b") as file:
            for page in range(8, (tmp_path / FILE).stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(os.urandom(4096))
        await journal.read("PRAGMA shrink_memory")
        with pytest.raises(JournalError) as met:
            await journal.unfinished()
        assert met.value.code is Code.JOURNAL_DAMAGED
        with pytest.raises(JournalError) as refused:
            await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")
        assert refused.value.code is Code.JOURNAL_DAMAGED
        assert (await journal.check() or "").startswith("journal-damaged: ")

    with opened(tmp_path) as journal:
        asyncio.run(story(journal))


@pytest.mark.parametrize("body", ['{"id": "bj-1"}', '{"id": "bj-1", "work": 5}', '{"id": "bj-1", "spec": []}'])
def test_a_record_that_makes_no_sense_is_damage(tmp_path: Path, body: str) -> None:
    """The file is whole for SQLite, and holds what no release has written."""

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(make_job()))
        await journal.execute("DROP TRIGGER jobs_versions", ())
        await journal.execute("UPDATE jobs SET body = json_remove(json_patch(body, ?), '$.created_at')", (body,))
        with pytest.raises(JournalError) as met:
            await journal.job("bj-1")
        assert met.value.code is Code.JOURNAL_DAMAGED
        assert (await journal.check() or "").startswith("journal-damaged: ")

    run(tmp_path, story)


HOLD_THE_FILE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


def test_another_program_s_lock(tmp_path: Path) -> None:
    """All that wait do so for the same short time, hear whose fault it is, and the journal can be closed meanwhile."""

    async def story(journal: SqliteJournal) -> None:
        began = time.monotonic()
        events = [journal.tell_domain(DomainEvent.ADDED, f"vm{number}", "{}") for number in range(12)]
        refused = await asyncio.gather(*events, return_exceptions=True)
        assert time.monotonic() - began < 3
        assert {each.code for each in refused if isinstance(each, JournalError)} == {Code.JOURNAL_BUSY}
        assert len(refused) == 12
        assert "another program has the journal locked" in str(refused[0])
        assert await journal.job("bj-1") == make_job()
        began = time.monotonic()
        journal.close()
        assert time.monotonic() - began < 3

    run(tmp_path, lambda journal: add_job(journal, queued(make_job())))
    with opened(tmp_path) as journal:
        command = [sys.executable, "-c", HOLD_THE_FILE, str(tmp_path / FILE)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == "held\n"
            asyncio.run(story(journal))
            holder.kill()


def test_health_is_known_without_a_write(tmp_path: Path) -> None:
    """Who asks whether the journal can be written does not make it grow; what was written of late tells."""

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(make_job()))
        before = (tmp_path / f"{FILE}-wal").stat().st_size
        for _ in range(50):
            assert await journal.check() is None
        assert (tmp_path / f"{FILE}-wal").stat().st_size == before
        assert journal.sizes["log"] > 0
        assert journal.sizes["file"] > 0

    run(tmp_path, story)


def test_the_reserve_is_there_again(tmp_path: Path) -> None:
    """It is kept at each start, and given up where SQLite finds no room."""
    run(tmp_path, lambda journal: journal.check())
    assert (tmp_path / reserve.FILE).stat().st_blocks * 512 >= reserve.BYTES
    assert reserve.give_up(tmp_path)
    assert not reserve.give_up(tmp_path)
    run(tmp_path, lambda journal: journal.check())
    assert (tmp_path / reserve.FILE).exists()
