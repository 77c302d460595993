"""What is past retention is deleted. Uses and marks of images have no retention, and are not touched."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import Final

from app.engine.idempotency import DELIVERY_KEPT_FOR, HOOK, KEPT_FOR
from app.journal.deliveries import UNDELIVERED

PRUNED_EVENTS: Final = 500
"""Events of domains that one transaction deletes, so that no other write waits long."""

PRUNED_JOBS: Final = 25
"""Jobs that one transaction deletes, each with its handful of events."""

KEYS: Final = "DELETE FROM idempotency_keys WHERE created_at < ? AND (created_at < ? OR substr(who, 1, 5) <> ?)"

EVENTS: Final = (
    "DELETE FROM events WHERE id IN"  # noqa: S608  # constants only
    " (SELECT id FROM events WHERE job_id IS NULL AND time < ?"
    f" AND NOT EXISTS ({UNDELIVERED} AND event_id = events.id) ORDER BY time LIMIT ?)"
)

JOBS: Final = (
    "DELETE FROM jobs WHERE seq IN"  # noqa: S608  # constants only
    " (SELECT seq FROM jobs WHERE ended = 1 AND state <> 'lost' AND finished_at < ?"
    " AND NOT EXISTS (SELECT 1 FROM idempotency_keys WHERE job_id = jobs.id)"
    f" AND NOT EXISTS ({UNDELIVERED} AND event_id IN (SELECT id FROM events WHERE job_id = jobs.id))"
    " ORDER BY finished_at LIMIT ?)"
)


DAY: Final = 86_400_000
"""Milliseconds."""


def reckon(connection: sqlite3.Connection, now: int) -> int:
    """The time by which things are too old to be kept, in ms since 1970: `now`, but a day after the last one at most.

    So a clock that jumps ahead has nothing deleted that is a day younger than what would be deleted anyway.
    """
    row = connection.execute("SELECT value FROM meta WHERE key = 'reckoned'").fetchone()
    time = now if row is None else min(now, int(row[0]) + DAY)
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('reckoned', ?)", (time,))
    return time


async def prune(delete: Callable[[str, tuple[object, ...]], Awaitable[int]], *, now: int, before: int) -> None:
    """Delete keys that are too old to be found, and what is from before that time (both in ms since 1970).

    `delete` does a statement in a transaction of its own, and says how many rows that has deleted. The transactions are
    many and short, so that others write between them.
    """
    await delete(KEYS, (now - KEPT_FOR, now - DELIVERY_KEPT_FOR, HOOK))
    while await delete(EVENTS, (before, PRUNED_EVENTS)):
        pass
    while await delete(JOBS, (before, PRUNED_JOBS)):
        pass
