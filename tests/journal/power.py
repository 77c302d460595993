"""Power cuts while a journal is written to: `python -m tests.journal.power CUTS [SEED]`."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from app.core.machine.step import StoredVersion
from app.core.states import EventType
from app.engine.ports.journal import JournalError
from app.journal.database import connect, damage
from app.journal.journal import SqliteJournal
from tests.support.disk import Disk

from .support import DAY, SetClock, add_job, ended, make_job, opened, queued


def cut_while_writing(folder: Path, disk: Disk, *, cuts: int, seed: int) -> None:
    """Write to a journal, let syncs fail now and then, and cut the power that often; see what each cut has left.

    Raises AssertionError where something that was acknowledged is missing, or something is there in part.
    """
    chance = random.Random(seed)
    state_dir = folder / "state"
    acknowledged: dict[str, int] = {}
    refused: set[str] = set()

    async def work(journal: SqliteJournal) -> None:
        made = 0
        for number in range(cuts):
            for _ in range(chance.randint(1, 8)):
                made += 1
                job = make_job(f"bj-{made}", domain=f"vm{made}")
                if chance.random() < 0.1:
                    disk.only, disk.fail_sync = "-wal", 1
                try:
                    await add_job(journal, queued(job))
                except JournalError:
                    refused.add(job.id)
                    continue
                finally:
                    disk.fail_sync = 0
                acknowledged[job.id] = 1
                paused = replace(job, version=2)
                await journal.store([StoredVersion(EventType.PAUSED, paused)])
                acknowledged[job.id] = 2
                if chance.random() < 0.3:
                    await journal.store([ended(paused, at=1)])
                    acknowledged[job.id] = 3
            if chance.random() < 0.1:
                await journal.prune(0)
            if chance.random() < 0.2:
                with closing(sqlite3.connect(state_dir / "journal.sqlite3")) as other:
                    other.execute("PRAGMA wal_checkpoint(PASSIVE)")
            left = folder / f"cut{number}"
            left.mkdir()
            disk.cut(state_dir, left, random.Random(seed * 1_000_003 + number))
            _judge(left, acknowledged, refused)
            shutil.rmtree(left)

    with opened(state_dir, SetClock(DAY)) as journal:
        asyncio.run(work(journal))


def _judge(left: Path, acknowledged: dict[str, int], refused: set[str]) -> None:
    with closing(connect(left)) as found:
        assert (wrong := damage(found)) is None, (left, wrong)
        versions = dict(found.execute("SELECT id, version FROM jobs").fetchall())
        events = dict(found.execute("SELECT job_id, count(*) FROM events GROUP BY job_id").fetchall())
    assert not refused & versions.keys(), (left, refused & versions.keys())
    assert versions == acknowledged, left
    assert events == acknowledged, left


def main() -> None:
    """As many cuts as were asked for, in runs of 200."""
    cuts, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    disk = Disk()
    disk.install()
    for number, start in enumerate(range(0, cuts, 200)):
        with tempfile.TemporaryDirectory() as folder:
            cut_while_writing(Path(folder), disk, cuts=min(200, cuts - start), seed=seed + number)
    sys.stdout.write(f"{cuts} power cuts, seeds from {seed}: nothing lost, nothing in part\n")
    disk.remove()


if __name__ == "__main__":
    main()
