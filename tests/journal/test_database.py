"""The journal's file: who may read it, what a crash leaves, what happens when there is no room."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from app.engine.ports.events import DomainEvent, EventFilter
from app.engine.ports.journal import JournalError
from app.journal.database import JournalUnusable, connect
from app.journal.health import AGAIN_S
from app.journal.journal import SqliteJournal

from .support import add_job, heard_by, make_job, opened, queued, run, started

ROOT = Path(__file__).parents[2]
ANY = EventFilter()


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o777)


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    """The state directory is made with mode 0700, and SQLite's files in it have mode 0600, whatever the umask."""
    before = os.umask(0)
    try:
        state_dir = tmp_path / "var" / "blockjobd"
        with opened(state_dir) as journal:
            asyncio.run(add_job(journal, queued(make_job())))
            assert mode(state_dir) == "0o700"
            files = {path.name: mode(path) for path in state_dir.iterdir()}
            assert files == {
                "journal.sqlite3": "0o600",
                "journal.sqlite3-shm": "0o600",
                "journal.sqlite3-wal": "0o600",
                "epoch": "0o600",
                "reserve": "0o600",
            }
    finally:
        os.umask(before)


def test_closing_leaves_one_file(tmp_path: Path) -> None:
    """After an orderly end the database file holds everything; closing again is no error."""
    with opened(tmp_path) as journal:
        asyncio.run(add_job(journal, queued(make_job())))
        journal.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch", "journal.sqlite3", "reserve"]


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A file of a newer release is left alone, with a message that says so."""
    with opened(tmp_path):
        pass
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = (tmp_path / "journal.sqlite3").read_bytes()
    with pytest.raises(JournalUnusable, match=r"journal\.sqlite3 has schema 99.*a newer blockjobd wrote it"):
        connect(tmp_path)
    assert (tmp_path / "journal.sqlite3").read_bytes() == before


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    """Something else under the journal's name gives an error that names the file."""
    (tmp_path / "journal.sqlite3").write_text("something else " * 100)
    with pytest.raises(JournalUnusable, match=r"journal\.sqlite3 is damaged \(file is not a database\)"):
        connect(tmp_path)


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A schema is brought up to date as a whole or not at all."""
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as connection:
        connection.execute("CREATE TABLE tokens (x)")
    with pytest.raises(JournalUnusable, match="table tokens already exists"):
        connect(tmp_path)
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as connection:
        assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("tokens",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (0,)


def test_processes_that_make_the_file_at_the_same_time_agree(tmp_path: Path) -> None:
    """The first start and the first token command may come at once: each finds the whole schema."""
    program = (
        "import sys; from pathlib import Path; from app.journal.database import connect; sys.stdin.read();"
        "print(connect(Path(sys.argv[1])).execute('SELECT count(*) FROM meta').fetchone())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "state")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    time.sleep(1)
    for process in processes:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
    answers = [process.communicate(timeout=30) for process in processes]
    assert answers == [("(2,)\n", "")] * 4


def test_a_killed_service_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    """After kill -9 between any two instructions, every acknowledged version and event is there, without gap."""
    job = make_job()
    run(tmp_path, lambda journal: add_job(journal, queued(job)))
    last_event = 1
    for lifetime in (0.2, 0.25, 0.31, 0.4):
        version, last_event, stored = kill_a_writer(tmp_path, job.id, lifetime, last_event)
        events = run(tmp_path, lambda journal: journal.events(ANY, after=0, limit=1_000_000))
        assert [event.id for event in events] == list(range(1, len(events) + 1))
        assert [json.loads(event.data)["version"] for event in events] == list(range(1, len(events) + 1))
        # A transaction may have been committed of which the writer could not tell any more, but no part of one.
        assert stored in (version, version + 2)
        assert len(events) in (last_event, last_event + 2)
        last_event = len(events)


def kill_a_writer(state_dir: Path, job_id: str, lifetime: float, last_event: int) -> tuple[int, int, int]:
    """The writer's last acknowledged version and event id, and the stored version; `lifetime` in seconds."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.journal.endless_writer", str(state_dir), job_id],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout
    first = writer.stdout.readline()
    time.sleep(lifetime)
    writer.kill()
    rest, _ = writer.communicate(timeout=30)
    # The last line may be cut off.
    lines = [line for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
    assert lines
    version, event = map(int, lines[-1].split())
    assert event > last_event
    job = run(state_dir, lambda journal: journal.job(job_id))
    assert job
    return version, event, job.version


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount(8)")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes up all the room that is left."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast


def test_a_full_disk_refuses_and_recovers(small_disk: Path) -> None:
    """On a full file system writes raise `JournalError` and store nothing, reads go on; with room again all is well."""

    def free() -> None:
        (small_disk / "ballast").unlink()

    run(small_disk, lambda journal: no_room_and_room_again(journal, lambda: fill(small_disk), free))


def test_an_io_error_refuses_and_recovers(tmp_path: Path) -> None:
    """Where the system fails a write for another reason (here: a limit to the size of files), it is the same."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        size = (tmp_path / "journal.sqlite3-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))

    try:
        run(tmp_path, lambda journal: no_room_and_room_again(journal, limit, lift))
    finally:
        lift()


async def no_room_and_room_again(
    journal: SqliteJournal, take: Callable[[], object], free: Callable[[], object]
) -> None:
    job, other = make_job("bj-1"), make_job("bj-2", disk="vdb")
    heard = heard_by(journal)
    await add_job(journal, queued(job))
    await journal.tell_domain(DomainEvent.CONNECTED, "web1", "{}")
    assert await journal.check() is None

    take()
    # The last page may have had some room.
    with suppress(JournalError):
        for _ in range(20):
            await journal.tell_domain(DomainEvent.CONNECTED, "web1", "{}")
    acknowledged = len(heard)
    assert acknowledged < 20
    with pytest.raises(JournalError, match=r"can't be written.*nothing was stored"):
        await journal.tell_domain(DomainEvent.CONNECTED, "web1", "{}")
    with pytest.raises(JournalError) as full:
        await add_job(journal, queued(other))
    assert isinstance(full.value.__cause__, sqlite3.OperationalError)
    with pytest.raises(JournalError):
        await journal.store([started(job)])
    with pytest.raises(JournalError):
        await journal.prune(10**15)
    assert "can't be written" in (await journal.check() or "")
    assert await journal.job("bj-1") == job
    assert await journal.job("bj-2") is None
    assert len(await journal.events(ANY, after=0, limit=100)) == acknowledged

    free()
    # It is not tried again at each question.
    await asyncio.sleep(AGAIN_S)
    assert await journal.check() is None
    await add_job(journal, queued(other))
    await journal.store([started(job)])
    assert len(heard) == acknowledged + 2
    assert [event.id for event in heard] == list(range(1, acknowledged + 3))
    assert await journal.events(ANY, after=0, limit=100) == heard


def test_a_service_starts_on_a_full_disk(small_disk: Path) -> None:
    """After a crash on a full file system the jobs can still be read; the journal says that it can't be written."""
    state_dir = small_disk / "state"
    job = make_job()

    async def story(journal: SqliteJournal) -> None:
        assert await journal.unfinished() == [job]
        assert "can't be written" in (await journal.check() or "")

    with opened(state_dir) as before:
        asyncio.run(add_job(before, queued(job)))
        # What a crash leaves: the files as they are while the service runs.
        left = {path.name: path.read_bytes() for path in state_dir.iterdir()}
    for name, content in left.items():
        (state_dir / name).write_bytes(content)
    fill(small_disk)
    run(state_dir, story)
    (small_disk / "ballast").unlink()
    assert run(state_dir, lambda journal: journal.check()) is None
