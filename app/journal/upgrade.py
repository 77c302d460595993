"""What a migration has to do beyond its SQL: to read what an older release has written.

A step knows the older release's layout by itself, and never asks the classes of this one: those change, and the old
files don't.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from app.core.images import Access, Claim, DiskChain, Image, InvalidMark, InvalidReason, marks_of_merge
from app.journal.images import add_claims, columns_of

_MODIFIED: Final = (
    "SELECT seq, body FROM jobs WHERE (ended = 0 AND data_state <> 'untouched')"
    " OR (ended = 1 AND (data_state = 'base-modified' OR (state = 'completed' AND intent = 'keep'))) ORDER BY seq"
)
"""The jobs that have left a base modified and have not merged, as the release before has found them."""

_MERGED: Final = (
    "SELECT seq, domain, disk, body ->> '$.work.invalidates' FROM jobs NOT INDEXED"
    " WHERE seq > ? AND state = 'completed' AND data_state = 'merged' AND intent <> 'keep'"
    " AND EXISTS (SELECT 1 FROM temp.marked WHERE marked.domain = jobs.domain AND marked.disk = jobs.disk)"
    " ORDER BY seq"
)
"""The merges on disks that have a mark, in one pass through the file: to look for each mark would take minutes."""


def _images_and_claims(connection: sqlite3.Connection) -> None:
    """Fill the tables of schema 6 from the bodies of schema 5."""
    for (body,) in connection.execute("SELECT body FROM jobs WHERE ended = 0 ORDER BY seq").fetchall():
        job = json.loads(body)
        add_claims(connection, job["id"], _claims(job))
    connection.executemany(
        "INSERT OR REPLACE INTO invalid_marks (job_id, path, dev, ino, rdev, domain, reason)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(mark.job_id, *columns_of(mark.image), mark.domain, mark.reason.value) for mark in list(_marks(connection))],
    )


def _chain(job: Mapping[str, Any]) -> list[Image]:
    files, known = job["work"]["chain"], job["work"].get("identities", ())
    # The first releases have stored no identities.
    known = [*known, *[None] * (len(files) - len(known))]
    return [Image(file, None if each is None else (each[0], each[1])) for file, each in zip(files, known, strict=True)]


def _claims(job: Mapping[str, Any]) -> Iterator[Claim]:
    """What the job does to its disk: it was alone on it, and now it is alone on the images that it changes, too.

    The merge writes to the base and to the header above the merged layers. The merged layers become worthless.
    """
    yield Claim(DiskChain(job["domain"], job["disk"]), Access.WRITE)
    work = job["work"]
    written = range(max(work["top"] - 1, 0), work["base"] + 1)
    for place, (file, image) in enumerate(zip(work["chain"], _chain(job), strict=True)):
        access = Access.WRITE if place in written else Access.READ
        yield Claim(image, Access.DELETE if file in work["deletes"] else access)


def _marks(connection: sqlite3.Connection) -> Iterator[InvalidMark]:
    """A mark for each image that shows a mixture, without those that a later job has merged after all."""
    marks: list[tuple[int, str, InvalidMark]] = []
    for seq, body in connection.execute(_MODIFIED):
        job = json.loads(body)
        kept = job["state"] == "completed"
        found = marks_of_merge(
            _chain(job),
            top=job["work"]["top"],
            base=job["work"]["base"],
            job_id=job["id"],
            domain=job["domain"],
            reason=InvalidReason.KEPT if kept else InvalidReason.BASE_MODIFIED,
        )
        marks += [(seq, job["disk"], mark) for mark in found]
    merged = _last_merges(connection, marks)
    for seq, disk, mark in marks:
        if merged.get((mark.domain, disk, mark.image.path), 0) < seq:
            yield mark


def _last_merges(
    connection: sqlite3.Connection, marks: list[tuple[int, str, InvalidMark]]
) -> dict[tuple[str, str, str], int]:
    """For each image that a mark is on and that was merged: the number of the last job that has merged it."""
    wanted = {(mark.domain, disk, mark.image.path) for _, disk, mark in marks}
    connection.execute("CREATE TEMP TABLE marked (domain TEXT, disk TEXT, PRIMARY KEY (domain, disk)) WITHOUT ROWID")
    connection.executemany("INSERT INTO marked VALUES (?, ?)", {(domain, disk) for domain, disk, _ in wanted})
    merged: dict[tuple[str, str, str], int] = {}
    for seq, domain, disk, files in connection.execute(_MERGED, (min((seq for seq, _, _ in marks), default=0),)):
        for file in json.loads(files):
            image = (domain, disk, Image(file).path)
            if image in wanted:
                merged[image] = seq
    connection.execute("DROP TABLE temp.marked")
    return merged


STEPS: Final[Mapping[int, Callable[[sqlite3.Connection], None]]] = MappingProxyType({6: _images_and_claims})
"""By the number of the migration, what is done after its SQL, in the same transaction."""
