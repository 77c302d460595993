"""Uses and marks of images outlive the jobs and the service, and change together with the job that changes them."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.images import Image, ImageUse, InvalidMark, InvalidReason
from app.core.states import State
from app.engine.ports.journal import Registration
from app.engine.ports.uses import MarkChange
from app.journal import journal as module
from app.journal.database import FILE
from app.journal.journal import SqliteJournal
from app.journal.writing import LostUpdate

from .support import DAY, SetClock, add_job, ended, make_job, queued, run, started

BIG = (1 << 64) - 1
"""The highest number of a device or an inode."""

ACTIVE = Image("/images/s1.qcow2", (64, 10))
BASE = Image("/images/base.qcow2", (64, 20))
DEVICE = Image("/dev/vg/base", (5, 9), 64771)


def uses(*images: Image | None, domain: str = "web1", disk: str = "vda", at: int = 7) -> tuple[ImageUse, ...]:
    """A chain, active layer first."""
    return tuple(
        ImageUse(domain=domain, disk=disk, place=place, image=image, seen_at=at) for place, image in enumerate(images)
    )


def mark(image: Image, job_id: str = "bj-1", reason: InvalidReason = InvalidReason.BASE_MODIFIED) -> InvalidMark:
    return InvalidMark(image=image, job_id=job_id, domain="web1", reason=reason)


def test_uses_are_there_after_a_restart(tmp_path: Path) -> None:
    """As they were recorded: by domain, disk and place, with everything that is known of the images."""
    vda = uses(ACTIVE, BASE)
    vdb = uses(Image("nbd://host/x"), DEVICE, Image("/far", (BIG, BIG), BIG), None, disk="vdb")
    other = uses(BASE, domain="db1")

    async def record(journal: SqliteJournal) -> None:
        await journal.record_uses("web1", {"vdb": vdb, "vda": vda})
        await journal.record_uses("db1", {"vda": other})

    run(tmp_path, record)
    assert run(tmp_path, lambda journal: journal.uses()) == [*other, *vda, *vdb]


def test_a_newer_reading_replaces_an_older_one(tmp_path: Path) -> None:
    """Of its own disk: a shorter chain leaves nothing of the longer one, and other disks are not touched."""
    vdb = uses(DEVICE, disk="vdb")

    async def story(journal: SqliteJournal) -> None:
        await journal.record_uses("web1", {"vda": uses(ACTIVE, BASE), "vdb": vdb})
        await journal.record_uses("web1", {"vda": uses(BASE, at=8)})
        assert await journal.uses() == [*uses(BASE, at=8), *vdb]
        await journal.record_uses("web1", {"vda": ()})
        assert await journal.uses() == list(vdb)

    run(tmp_path, story)


def test_a_use_of_another_disk_is_refused(tmp_path: Path) -> None:
    """Uses under a wrong disk are a mistake of ours, and replace nothing."""

    async def story(journal: SqliteJournal) -> None:
        await journal.record_uses("web1", {"vda": uses(ACTIVE)})
        with pytest.raises(ValueError, match="among those of web1/vda"):
            await journal.record_uses("web1", {"vda": uses(BASE, disk="vdb")})
        assert await journal.uses() == list(uses(ACTIVE))

    run(tmp_path, story)


def test_uses_stay_until_their_domain_is_forgotten(tmp_path: Path) -> None:
    """Retention does not take them away, nor does another registration; they end with the domain's, all at once."""

    async def story(journal: SqliteJournal) -> None:
        await journal.register(Registration(id="web1"))
        await journal.record_uses("web1", {"vda": uses(ACTIVE)})
        await journal.record_uses("db1", {"vda": uses(BASE, domain="db1")})
        await journal.register(Registration(id="web1", allow_managed=True))
        await journal.prune(DAY)
        assert len(await journal.uses()) == 2
        await journal.unregister("web1", "{}")
        assert await journal.uses() == list(uses(BASE, domain="db1"))

    run(tmp_path, story)


def test_marks_outlive_their_job(tmp_path: Path) -> None:
    """After the job was pruned and the service has started anew, its images are still known to be invalid."""
    job = make_job()
    seen, unseen = mark(BASE), mark(Image("/images/s2.qcow2"), reason=InvalidReason.KEPT)

    async def fail(journal: SqliteJournal) -> None:
        await add_job(journal, queued(job))
        await journal.store([started(job)], marks=MarkChange(add=(seen, unseen)))
        await journal.store([ended(started(job).job, at=5, state=State.FAILED)])
        await journal.prune(DAY)
        assert await journal.job(job.id) is None

    async def ask(journal: SqliteJournal) -> None:
        assert await journal.invalid_marks([BASE, unseen.image, ACTIVE]) == [seen, unseen]
        # The image, whatever it is called, and no other that is called so now.
        assert await journal.invalid_marks([Image("/link", (64, 20))]) == [seen]
        assert await journal.invalid_marks([Image(BASE.path, (64, 21))]) == []
        assert await journal.invalid_marks([Image("/images/x/../s2.qcow2", (64, 30))]) == [unseen]
        assert await journal.invalid_marks([]) == []

    run(tmp_path, fail)
    run(tmp_path, ask)


def test_a_mark_ends_with_the_image(tmp_path: Path) -> None:
    """Every job's mark of an image ends once it is merged, deleted or replaced; other images keep theirs."""
    first, again = mark(BASE), mark(BASE, "bj-2")
    other, new = mark(DEVICE), mark(replace(BASE, identity=(64, 21)), "bj-3")

    async def story(journal: SqliteJournal) -> None:
        await journal.change_marks(MarkChange(add=(first, again, other)))
        await journal.change_marks(MarkChange(add=(first,)))
        assert await journal.invalid_marks([BASE, DEVICE, BASE]) == [other, first, again]
        await journal.change_marks(MarkChange(remove=(Image("/dev/dm-0", (5, 1), 64771),)))
        assert await journal.invalid_marks([DEVICE]) == []
        # Another file under the path takes over: the old one's marks end, and its own is set, in one change.
        await journal.change_marks(MarkChange(add=(new,), remove=(BASE,)))
        assert await journal.invalid_marks([BASE]) == []
        assert await journal.invalid_marks([new.image]) == [new]

    run(tmp_path, story)


def test_uses_and_marks_are_stored_with_their_job_or_not_at_all(tmp_path: Path) -> None:
    """A lost update leaves no use and no mark behind; the right one stores job, uses and marks together."""
    job = make_job()
    chain = {("web1", "vda"): uses(BASE), ("db1", "vda"): uses(DEVICE, domain="db1")}

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(job))
        await journal.change_marks(MarkChange(add=(mark(BASE),)))
        change = MarkChange(add=(mark(ACTIVE),), remove=(BASE,))
        with pytest.raises(LostUpdate):
            await journal.store([ended(started(job).job, at=5)], uses=chain, marks=change)
        assert await journal.uses() == []
        assert await journal.invalid_marks([ACTIVE, BASE]) == [mark(BASE)]
        await journal.store([started(job)], uses=chain, marks=change)
        assert await journal.uses() == [*chain["db1", "vda"], *chain["web1", "vda"]]
        assert await journal.invalid_marks([ACTIVE, BASE]) == [mark(ACTIVE)]

    run(tmp_path, story)


def test_uses_are_recorded_while_others_write(tmp_path: Path) -> None:
    """Readings of one disk that come at once leave one whole reading, never a mixture."""

    async def story(journal: SqliteJournal) -> None:
        readings = [uses(*([BASE] * (number % 5)), at=number) for number in range(40)]
        await asyncio.gather(*(journal.record_uses("web1", {"vda": reading}) for reading in readings))
        assert tuple(await journal.uses()) == readings[-1]

    run(tmp_path, story, SetClock())


def test_names_of_devices_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over restarts, for each process; of the processes seen longest ago nothing is kept."""
    clock = SetClock()

    async def keep(journal: SqliteJournal) -> None:
        await journal.keep_names("a", {"x": "sda"})
        await journal.keep_names("a", {"x": "sda", "y": "sdb"})
        clock.time += 1
        for number in range(5):
            await journal.keep_names(f"b{number}", {})

    async def look(journal: SqliteJournal) -> None:
        assert await journal.names_of("a") == {"x": "sda", "y": "sdb"}
        assert await journal.names_of("nobody") == {}
        monkeypatch.setattr(module, "NAMED", 3)
        await journal.keep_names("c", {"z": "vda"})
        assert await journal.names_of("a") == {}
        assert await journal.names_of("c") == {"z": "vda"}

    run(tmp_path, keep, clock)
    run(tmp_path, look, clock)


def test_a_use_knows_when_its_file_was_made(tmp_path: Path) -> None:
    """A file system gives numbers again: the file that has one now is another one."""
    use = ImageUse(domain="web1", disk="vda", place=0, image=replace(BASE, born=7), seen_at=1)

    async def keep(journal: SqliteJournal) -> None:
        await journal.record_uses("web1", {"vda": (use,)})

    run(tmp_path, keep)
    assert run(tmp_path, lambda journal: journal.uses()) == [use]


def test_uses_of_a_journal_without_formats(tmp_path: Path) -> None:
    """They stay, and nobody has told their format."""
    chain = uses(ACTIVE, BASE)

    async def keep(journal: SqliteJournal) -> None:
        await journal.record_uses("web1", {"vda": tuple(replace(use, format="raw") for use in chain)})

    run(tmp_path, keep)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.executescript("ALTER TABLE image_uses DROP COLUMN format; PRAGMA user_version = 9")
    assert run(tmp_path, lambda journal: journal.uses()) == list(chain)


def test_a_use_knows_the_format_that_qemu_told(tmp_path: Path) -> None:
    """What was raw is not looked into when the domain is off, after a restart of the service either."""
    chain = tuple(replace(use, format=told) for use, told in zip(uses(ACTIVE, BASE), ("raw", None), strict=True))

    async def keep(journal: SqliteJournal) -> None:
        await journal.record_uses("web1", {"vda": chain})

    run(tmp_path, keep)
    assert run(tmp_path, lambda journal: journal.uses()) == list(chain)
