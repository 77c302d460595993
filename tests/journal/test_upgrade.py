"""What the migration to uses, claims and marks makes of the jobs that are there, and what a kill leaves of it."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.core.images import Access, Claim, DiskChain, Image, InvalidMark, InvalidReason
from app.engine.ports.journal import JobConflict
from app.journal.database import FILE, connect
from app.journal.journal import SqliteJournal

from .support import add_job, claim, ended, make_job, new, queued, run

ROOT = Path(__file__).parents[2]

MARKED = {
    # In the middle of it, or about to say that it is merged.
    "bj-running": ("vdc", ["s2"]),
    "bj-pausing": ("vdd", ["s2", "s1"]),
    "bj-paused": ("vde", ["s2", "s1"]),
    "bj-ready": ("vdf", ["s2", "s1"]),
    "bj-pivoting": ("vdg", ["s2", "s1"]),
    "bj-aborting": ("vdh", ["s2", "s1"]),
    "bj-forcing": ("vdi", ["s2", "s1"]),
    "bj-concluding": ("vdj", ["s2", "s1"]),
    "bj-unjudged": ("vdk", ["s2", "s1"]),
    "bj-keeping": ("vdl", ["s2", "s1"]),
    # Ended without a merge.
    "bj-kept": ("vdb", ["s2", "s1"]),
    "bj-full": ("vdc", ["s2", "s1"]),
    "bj-canceled": ("vde", ["s2", "s1"]),
    "bj-lost": ("vdg", ["s2", "s1"]),
    "bj-given-up": ("vdi", ["s2", "s1"]),
    "bj-gone": ("vdj", ["s2", "s1"]),
    "bj-adopted": ("vdl", ["s2", "s1"]),
}
"""The disk of each job that has left a base modified, and its layers that are invalid since."""


def rows(state_dir: Path, query: str) -> list[Any]:
    """What the file itself holds."""
    with closing(sqlite3.connect(state_dir / FILE)) as connection:
        return connection.execute(query).fetchall()


def change_body(state_dir: Path, job_id: str, change: str) -> None:
    """Have the older release have written another body; its version goes up by one."""
    with closing(sqlite3.connect(state_dir / FILE)) as connection:
        connection.execute(
            f"UPDATE jobs SET body = json_set({change}, '$.version', version + 1) WHERE id = ?", (job_id,)
        )
        connection.commit()


def test_the_schema_is_whole_afterwards(old: Path) -> None:
    """SQLite finds nothing wrong, and a job of a newer layout, without an intent of the old kind, can be stored."""
    connect(old).close()
    assert rows(old, "PRAGMA user_version") == [(10,)]
    assert rows(old, "PRAGMA integrity_check") == [("ok",)]
    assert rows(old, "PRAGMA foreign_key_check") == []
    with closing(connect(old)) as connection:
        connection.execute(
            "INSERT INTO jobs (id, body) SELECT 'bj-9', json_remove(json_set(body, '$.id', 'bj-9', '$.parent', 'bj-8'),"
            " '$.intent') FROM jobs WHERE id = 'bj-queued'"
        )
        assert connection.execute("SELECT intent, parent, ended FROM jobs WHERE id = 'bj-9'").fetchall() == [
            (None, "bj-8", 0)
        ]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        with pytest.raises(sqlite3.IntegrityError, match=r"NOT NULL constraint failed: jobs\.state"):
            connection.execute("INSERT INTO jobs (id, body) SELECT 'bj-7', json_remove(body, '$.state') FROM jobs")


def test_an_upgraded_file_has_the_schema_of_a_new_one(old: Path, tmp_path: Path) -> None:
    """Whatever way it came, so that both behave alike."""
    schema = "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name"
    connect(old).close()
    connect(tmp_path / "new").close()
    assert rows(old, schema) == rows(tmp_path / "new", schema)


def test_unfinished_jobs_have_claims(old: Path) -> None:
    """Each on its disk's chain, as before, and on the images, by paths of its own domain and by identity from any."""
    unfinished = {id_ for (id_,) in rows(old, "SELECT id FROM jobs WHERE ended = 0")}

    async def story(journal: SqliteJournal) -> None:
        assert {id_ for (id_,) in rows(old, "SELECT job_id FROM claims WHERE disk IS NOT NULL")} == unfinished
        for disk, job_id in (("vda", "bj-queued"), ("vdj", "bj-concluding")):
            with pytest.raises(JobConflict) as conflict:
                await add_job(journal, queued(make_job("bj-9", disk=disk)))
            assert conflict.value.job_id == job_id
            assert conflict.value.resource == DiskChain("web1", disk)
        # The base of bj-starting under another name, and the path of bj-running's, whose identity was never seen.
        for image, job_id in (
            (Image("/link", (64, 203)), "bj-starting"),
            (Image("/images/web1/vdc/s1.qcow2"), "bj-running"),
        ):
            with pytest.raises(JobConflict) as conflict:
                await journal.add_jobs([new(make_job("bj-9", disk="vdz"), Claim(image, Access.READ))])
            assert conflict.value.job_id == job_id
        # Below bj-running's base nothing is changed.
        below = claim("/images/web1/vdc/base.qcow2", access=Access.READ)
        await journal.add_jobs([new(make_job("bj-9", disk="vdz"), *below)])
        with pytest.raises(JobConflict):
            await journal.add_jobs([new(make_job("bj-10", disk="vdy"), *claim("/images/web1/vdc/base.qcow2"))])

    run(old, story)


def test_what_old_jobs_do_to_their_images(old: Path) -> None:
    """The base and the header above are written to, merged layers are written off or deleted, the rest is read."""
    connect(old).close()
    found = {
        id_: [access for (access,) in rows(old, f"SELECT access FROM claims WHERE job_id = '{id_}' ORDER BY seq")]
        for id_ in ("bj-queued", "bj-running", "bj-starting", "bj-concluding")
    }
    # First the chain of the disk, then the images from the active layer down.
    assert found == {
        "bj-queued": ["write", "delete", "delete", "delete", "write"],
        "bj-starting": ["write", "write", "write", "write", "write"],
        "bj-running": ["write", "write", "delete", "write", "read"],
        "bj-concluding": ["write", "write", "delete", "write", "write"],
    }


def test_old_claims_end_with_their_job(old: Path) -> None:
    """A job of the older release that ends now leaves its disk to others."""

    async def story(journal: SqliteJournal) -> None:
        job = await journal.job("bj-queued")
        assert job
        await journal.store([ended(job, at=5)])
        await add_job(journal, queued(make_job("bj-9")))

    run(old, story)


def test_invalid_images_are_marked(old: Path) -> None:
    """The merged layers of jobs that have left a base modified, as before; not those that were merged after all."""

    async def story(journal: SqliteJournal) -> None:
        chains = [json.loads(body)["work"] for (body,) in rows(old, "SELECT body FROM jobs")]
        images = {Image(file) for work in chains for file in work["chain"]}
        found: dict[str, list[str]] = {}
        for mark in await journal.invalid_marks(images):
            found.setdefault(mark.job_id, []).append(mark.image.path)
        assert {id_: sorted(files) for id_, files in found.items()} == {
            id_: sorted(f"/images/{'web1' if unfinished else 'db1'}/{disk}/{name}.qcow2" for name in names)
            for id_, (disk, names) in MARKED.items()
            for unfinished in [list(MARKED).index(id_) < 10]
        }
        seen = InvalidMark(
            image=Image("/images/db1/vdb/s2.qcow2", (64, 1021)),
            job_id="bj-kept",
            domain="db1",
            reason=InvalidReason.KEPT,
        )
        assert await journal.invalid_marks([Image("/elsewhere", (64, 1021))]) == [seen]
        (unseen,) = await journal.invalid_marks([Image("/images/db1/vdi/s1.qcow2")])
        assert unseen.image == Image("/images/db1/vdi/s1.qcow2")
        assert unseen.reason is InvalidReason.BASE_MODIFIED

    run(old, story)


def test_only_a_later_merge_ends_a_mark(old: Path) -> None:
    """Images that were merged first and became invalid after that, under the same names, are marked."""
    with closing(sqlite3.connect(old / FILE)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        # The job that had failed before the merge comes after it.
        connection.execute("CREATE TEMP TABLE moved AS SELECT body FROM jobs WHERE id = 'bj-again-1'")
        connection.execute("DELETE FROM jobs WHERE id = 'bj-again-1'")
        connection.execute("INSERT INTO jobs (id, body) SELECT 'bj-again-1', body FROM temp.moved")
        connection.commit()
    marked = run(old, lambda journal: journal.invalid_marks([Image("/images/db1/vdk/s2.qcow2")]))
    assert [mark.job_id for mark in marked] == ["bj-again-1"]


def test_numbers_of_64_bits_survive(old: Path) -> None:
    """SQLite's JSON would make floats of the highest inode numbers; they are read exactly."""
    change_body(
        old, "bj-queued", "json_set(body, '$.work.identities', json('[[18446744073709551615,18446744073709551614]]'))"
    )

    async def story(journal: SqliteJournal) -> None:
        image = Image("/elsewhere", (2**64 - 1, 2**64 - 2))
        with pytest.raises(JobConflict) as conflict:
            await journal.add_jobs([new(make_job("bj-9", domain="db9"), Claim(image, Access.READ))])
        assert conflict.value.job_id == "bj-queued"
        # The rest of the chain has no identities in this body.
        with pytest.raises(JobConflict):
            await journal.add_jobs([new(make_job("bj-9", disk="vdz"), *claim("/images/web1/vda/base.qcow2"))])

    run(old, story)


def upgrade(state_dir: Path, doomed: int) -> tuple[int, str]:
    """How an upgrade ends that is killed right before a statement, and what it has printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.journal.dying_upgrade", str(state_dir), str(doomed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_killed_upgrade_leaves_the_old_journal(old: Path, tmp_path: Path) -> None:
    """After kill -9 at any statement the file is the old one, with everything, and the next start upgrades it."""
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / FILE).write_bytes((old / FILE).read_bytes())
    code, printed = upgrade(whole, 0)
    assert code == 0
    statements = int(printed)
    assert statements > 100
    dump = "SELECT seq, body FROM jobs ORDER BY seq"
    marks = "SELECT * FROM invalid_marks ORDER BY job_id, path"
    before = rows(old, dump)
    # The last statements are the new number of the schema and the COMMIT.
    for doomed in [*range(5, statements, statements // 8), statements - 1, statements]:
        code, _ = upgrade(old, doomed)
        assert code == -signal.SIGKILL
        assert rows(old, "PRAGMA user_version") == [(5,)]
        assert rows(old, "SELECT count(*) FROM sqlite_schema WHERE name = 'claims'") == [(0,)]
        assert rows(old, dump) == before
    assert upgrade(old, 0)[0] == 0
    assert rows(old, "PRAGMA user_version") == [(10,)]
    assert rows(old, dump) == before
    assert rows(old, marks) == rows(whole, marks) != []
    assert rows(old, "PRAGMA integrity_check") == [("ok",)]
