"""Copies of a journal, and the epochs of those that were put back."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from app.engine.hub import RESET, Hub
from app.engine.ports.events import DomainEvent, EventFilter
from app.journal import epoch
from app.journal.backup import KEPT, BackupError, backup, restore
from app.journal.database import RESTORED, connect, damage
from app.journal.journal import SqliteJournal
from app.journal.lock import StateDirInUse, locked

from .support import SetClock, add_job, make_job, queued, run

ROOT = Path(__file__).parents[2]
FILE = "journal.sqlite3"


async def tell(journal: SqliteJournal, times: int = 1) -> None:
    """Store some events."""
    for _ in range(times):
        await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")


def ids(state_dir: Path) -> list[int]:
    """The ids of the events of a journal that nobody has open."""
    with closing(sqlite3.connect(state_dir / FILE)) as found:
        return [id_ for (id_,) in found.execute("SELECT id FROM events ORDER BY id")]


def replayed(state_dir: Path, after: int) -> list[tuple[str, int | None]]:
    """What a subscriber gets first that comes back with an id."""

    async def story(journal: SqliteJournal) -> list[tuple[str, int | None]]:
        hub = Hub(journal, SetClock())
        stream = hub.stream(EventFilter(), after=after)
        got: list[tuple[str, int | None]] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                async for event in stream:
                    assert event is not None
                    got += [(event.type, event.id)]
        await stream.aclose()
        return got

    return run(state_dir, story)


def test_a_copy_is_made_while_a_service_writes(tmp_path: Path) -> None:
    """The copy is one file for its owner only, and shows one moment."""
    state_dir, target = tmp_path / "state", tmp_path / "copy"
    run(state_dir, lambda journal: add_job(journal, queued(make_job())))
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.journal.endless_writer", str(state_dir), "bj-1"], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(0.2)
        assert backup(state_dir, target) == target.stat().st_size
    finally:
        writer.kill()
        writer.communicate()
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "state"]
    with closing(sqlite3.connect(target)) as copy:
        assert damage(copy) is None
        (version,) = copy.execute("SELECT version FROM jobs").fetchone()
        assert copy.execute("SELECT count(*) FROM events").fetchone() == (version,)
    with pytest.raises(BackupError, match="is there already"):
        backup(state_dir, target)


def test_a_restore_begins_an_epoch(tmp_path: Path) -> None:
    """Ids go on above all that were ever given, and who comes with one of before reads everything anew."""
    state_dir, target = tmp_path / "state", tmp_path / "copy"
    run(state_dir, lambda journal: tell(journal, 5))
    backup(state_dir, target)
    run(state_dir, lambda journal: tell(journal, 5))
    assert restore(state_dir, target) == state_dir / KEPT
    run(state_dir, lambda journal: tell(journal, 2))
    assert ids(state_dir) == [1, 2, 3, 4, 5, epoch.IDS + 1, epoch.IDS + 2]
    for known in (3, 5, 8, 10, 999):
        assert replayed(state_dir, known) == [
            (RESET, epoch.IDS),
            ("domain.added", epoch.IDS + 1),
            ("domain.added", epoch.IDS + 2),
        ]
    assert replayed(state_dir, epoch.IDS + 1) == [("domain.added", epoch.IDS + 2)]
    with closing(sqlite3.connect(state_dir / KEPT)) as before:
        assert before.execute("SELECT max(id) FROM events").fetchone() == (10,)
    # Once more, with the same copy.
    restore(state_dir, target)
    run(state_dir, tell)
    assert ids(state_dir)[-1] == 2 * epoch.IDS + 1


def test_a_copy_that_was_put_back_by_hand_begins_an_epoch(tmp_path: Path) -> None:
    """No command was used, so only the numbers of the starts tell."""
    state_dir = tmp_path / "state"
    run(state_dir, lambda journal: tell(journal, 3))
    shutil.copy(state_dir / FILE, tmp_path / "copy")
    run(state_dir, lambda journal: tell(journal, 3))
    shutil.copy(tmp_path / "copy", state_dir / FILE)
    run(state_dir, tell)
    assert ids(state_dir)[-1] == epoch.IDS + 1


def test_a_backup_of_the_same_run_that_was_put_back_by_hand(tmp_path: Path) -> None:
    """The service was not started in between, and yet it is known for a copy."""
    state_dir = tmp_path / "state"

    async def story(journal: SqliteJournal) -> None:
        await tell(journal, 3)
        backup(state_dir, tmp_path / "copy")
        await tell(journal, 3)

    run(state_dir, story)
    shutil.copy(tmp_path / "copy", state_dir / FILE)
    run(state_dir, tell)
    assert ids(state_dir) == [1, 2, 3, epoch.IDS + 1]


def test_a_journal_that_was_removed_begins_an_epoch(tmp_path: Path) -> None:
    """The new one gives no id again."""
    state_dir = tmp_path / "state"
    run(state_dir, lambda journal: tell(journal, 3))
    (state_dir / FILE).unlink()
    run(state_dir, tell)
    assert ids(state_dir) == [epoch.IDS + 1]
    assert replayed(state_dir, 2)[0] == (RESET, epoch.IDS)


def test_starts_begin_no_epoch(tmp_path: Path) -> None:
    """Not one after the other, nor one that was killed between its steps, nor one that finds no file."""
    state_dir = tmp_path / "state"
    run(state_dir, tell)
    before = (state_dir / "epoch").read_bytes()
    run(state_dir, tell)
    after = (state_dir / "epoch").read_bytes()
    assert before != after
    old = epoch.load(state_dir)
    assert old is not None
    # Killed after the file has the next number, and before the journal has it.
    epoch.store(state_dir, epoch.Epoch(number=0, starts=(*old.starts, 7)))
    run(state_dir, tell)
    # Killed after the journal has it, and before the file has it alone.
    now = epoch.load(state_dir)
    assert now is not None
    epoch.store(state_dir, epoch.Epoch(number=0, starts=(7, *now.starts)))
    run(state_dir, tell)
    (state_dir / "epoch").unlink()
    run(state_dir, tell)
    assert ids(state_dir) == [1, 2, 3, 4, 5]
    assert replayed(state_dir, 3) == [("domain.added", 4), ("domain.added", 5)]


def test_what_can_t_be_restored(tmp_path: Path) -> None:
    """Each is refused in words, and the journal stays as it was."""
    state_dir, target = tmp_path / "state", tmp_path / "copy"
    run(state_dir, lambda journal: tell(journal, 50))
    before = (state_dir / FILE).read_bytes()
    backup(state_dir, target)
    with locked(state_dir), pytest.raises(StateDirInUse):
        restore(state_dir, target)
    newer, noise, other, damaged, live = (tmp_path / name for name in ("newer", "noise", "other", "damaged", "live"))
    shutil.copy(target, newer)
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 99")
    noise.write_bytes(os.urandom(9000))
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE t (x)")
    content = bytearray(target.read_bytes())
    for page in range(8, len(content) // 4096, 2):
        content[page * 4096 : page * 4096 + 4096] = os.urandom(4096)
    damaged.write_bytes(content)
    shutil.copy(target, live)
    (tmp_path / "live-wal").write_bytes(b"x")
    for source, why in (
        (newer, "has schema 99"),
        (noise, "is no journal"),
        (other, "is no journal"),
        (damaged, "is damaged"),
        (live, "has a log beside it"),
    ):
        with pytest.raises(BackupError, match=why):
            restore(state_dir, source)
    with pytest.raises(FileNotFoundError):
        restore(state_dir, tmp_path / "nowhere")
    assert (state_dir / FILE).read_bytes() == before
    assert sorted(path.name for path in state_dir.iterdir()) == ["epoch", FILE, "lock", "reserve"]


def test_a_restore_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    """The copy has its last name but one: whoever opens the journal next finishes it, and removes the old log first."""
    state_dir, target = tmp_path / "state", tmp_path / "copy"
    run(state_dir, tell)
    backup(state_dir, target)
    connection = connect(state_dir)
    connection.execute("INSERT INTO events (type, time, domain, data) VALUES ('x', 1, '', '{}')")
    left = {path.name: path.read_bytes() for path in state_dir.iterdir()}
    connection.close()
    for name, content in left.items():
        (state_dir / name).write_bytes(content)
    epoch.store(state_dir, epoch.Epoch(number=0, starts=()))
    shutil.copy(target, state_dir / RESTORED)
    run(state_dir, tell)
    assert ids(state_dir) == [1, epoch.IDS + 1]
    assert not (state_dir / RESTORED).exists()
