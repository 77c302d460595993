"""Images in the journal's tables: their uses, the claims on them, and the marks of the invalid ones.

Every function works in a transaction or a read of its caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

from app.core.images import (
    Access,
    Claim,
    DiskChain,
    Image,
    ImageUse,
    InvalidMark,
    InvalidReason,
    JobClaims,
    find_conflict,
    may_be_same,
    one_view,
)
from app.engine.ports.journal import JobConflict
from app.engine.ports.uses import DiskUses, MarkChange

_UNSIGNED: Final = 1 << 64
"""SQLite's integers are signed, and the kernel's numbers of devices and inodes are not: both have 64 bits."""

_SAME: Final = "path = :path OR (dev = :dev AND ino = :ino) OR rdev = :rdev"
"""Rows of what may be the same image: `may_be_same` says yes only where something is equal, and is asked after that."""

Columns = tuple[str | None, int | None, int | None, int | None]
"""path, dev, ino, rdev"""


def columns_of(image: Image | None) -> Columns:
    """An image as it stands in a row."""
    if image is None:
        return None, None, None, None
    dev, ino = image.identity or (None, None)
    return image.path, _signed(dev), _signed(ino), _signed(image.device)


def image_of(path: str, dev: int | None, ino: int | None, rdev: int | None) -> Image:
    """The image of a row."""
    known = None if dev is None or ino is None else (dev % _UNSIGNED, ino % _UNSIGNED)
    return Image(path, known, None if rdev is None else rdev % _UNSIGNED)


def _signed(number: int | None) -> int | None:
    return number if number is None or number < _UNSIGNED // 2 else number - _UNSIGNED


def _values(image: Image) -> dict[str, str | int | None]:
    return dict(zip(("path", "dev", "ino", "rdev"), columns_of(image), strict=True))


# Uses -----------------------------------------------------------------------------------------------------------------


def replace_uses(connection: sqlite3.Connection, disks: DiskUses) -> None:
    """Keep the uses of some disks in place of what was known of them."""
    for (domain, disk), uses in disks.items():
        if any((use.domain, use.disk) != (domain, disk) for use in uses):
            raise ValueError(f"a use of another disk stands among those of {domain}/{disk}")
        connection.execute("DELETE FROM image_uses WHERE domain = ? AND disk = ?", (domain, disk))
        connection.executemany(
            "INSERT INTO image_uses (domain, disk, place, path, dev, ino, rdev, seen_at, format, born)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (domain, disk, use.place, *columns_of(use.image), use.seen_at, use.format, use.image and use.image.born)
                for use in uses
            ],
        )


def every_use(connection: sqlite3.Connection) -> Sequence[ImageUse]:
    """Every use, by domain, disk and place."""
    return [
        ImageUse(
            domain=domain,
            disk=disk,
            place=place,
            image=None if path is None else replace(image_of(path, dev, ino, rdev), born=born),
            seen_at=seen_at,
            format=format_,
        )
        for domain, disk, place, path, dev, ino, rdev, seen_at, format_, born in connection.execute(
            "SELECT domain, disk, place, path, dev, ino, rdev, seen_at, format, born FROM image_uses"
            " ORDER BY domain, disk, place"
        )
    ]


# Claims ---------------------------------------------------------------------------------------------------------------


def add_claims(connection: sqlite3.Connection, job_id: str, claims: Iterable[Claim]) -> None:
    """Store the claims of an unfinished job. A trigger deletes them when the job ends."""
    connection.executemany(
        "INSERT INTO claims (job_id, access, domain, disk, path, dev, ino, rdev) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [(job_id, claim.access.value, *_resource(claim)) for claim in claims],
    )


def _resource(claim: Claim) -> tuple[str | int | None, ...]:
    if isinstance(claim.resource, DiskChain):
        return (claim.resource.domain, claim.resource.disk, *columns_of(None))
    return (None, None, *columns_of(claim.resource))


def refuse_conflicts(connection: sqlite3.Connection, mine: JobClaims) -> None:
    """Raise `JobConflict` where a stored claim of another job excludes one of mine."""
    conflict = find_conflict(mine, _rivals(connection, mine.claims))
    if conflict is not None:
        raise JobConflict(conflict.job_id, conflict.mine.resource)


def _rivals(connection: sqlite3.Connection, claims: Iterable[Claim]) -> Sequence[JobClaims]:
    """The jobs that have claims on what may be the same, with these claims; the oldest job first."""
    found: set[tuple[int, str, str | None, str, Claim]] = set()
    for claim in claims:
        if isinstance(claim.resource, DiskChain):
            condition = "claims.domain = :domain AND claims.disk = :disk"
            values: dict[str, str | int | None] = {"domain": claim.resource.domain, "disk": claim.resource.disk}
        else:
            condition, values = _SAME, _values(claim.resource)
        rows = connection.execute(
            "SELECT jobs.seq, job_id, parent, jobs.domain, access, claims.domain, claims.disk, path, dev, ino, rdev"  # noqa: S608
            f" FROM claims JOIN jobs ON jobs.id = job_id WHERE {condition}",
            values,
        )
        for seq, job_id, parent, of, access, domain, disk, *image in rows:
            resource = image_of(*image) if disk is None else DiskChain(domain, disk)
            found.add((seq, job_id, parent, of, Claim(resource, Access(access))))
    ordered = sorted(found, key=lambda row: (row[0], repr(row[-1])))
    return [
        JobClaims(job_id=job_id, domain=of, parent=parent, claims=tuple(claim for *_, claim in rows))
        for (_, job_id, parent, of), rows in groupby(ordered, key=lambda row: row[:4])
    ]


# Marks ----------------------------------------------------------------------------------------------------------------


def change_marks(connection: sqlite3.Connection, change: MarkChange) -> None:
    """End the marks of some images, and set others."""
    for image in change.remove:
        connection.executemany(
            "DELETE FROM invalid_marks WHERE job_id = ? AND path = ?",
            [(mark.job_id, mark.image.path) for mark in _marks(connection, image, change.domain)],
        )
    connection.executemany(
        "INSERT OR REPLACE INTO invalid_marks (job_id, path, dev, ino, rdev, domain, reason, born)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (mark.job_id, *columns_of(mark.image), mark.domain, mark.reason.value, mark.image.born)
            for mark in change.add
        ],
    )


def marks_of(connection: sqlite3.Connection, images: Iterable[Image]) -> Sequence[InvalidMark]:
    """The marks of what may be one of these images; by job and path, each once."""
    found = {(mark.job_id, mark.image.path): mark for image in images for mark in _marks(connection, image)}
    return [mark for _, mark in sorted(found.items())]


def _marks(connection: sqlite3.Connection, image: Image, domain: str | None = None) -> list[InvalidMark]:
    rows = connection.execute(
        f"SELECT job_id, domain, reason, born, path, dev, ino, rdev FROM invalid_marks WHERE {_SAME}",  # noqa: S608
        _values(image),
    ).fetchall()
    marks = [
        InvalidMark(
            image=replace(image_of(*known), born=born), job_id=job_id, domain=domain, reason=InvalidReason(reason)
        )
        for job_id, domain, reason, born, *known in rows
    ]
    return [mark for mark in marks if may_be_same(mark.image, image, one_view=one_view(domain, mark.domain))]
