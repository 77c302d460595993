"""What the journal is asked, and the ended jobs that it keeps at hand."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from app.core.job import Job
from app.core.states import State
from app.engine.ports.events import EventFilter, StoredEvent
from app.engine.ports.journal import IdempotencyKey, JobFilter, Registration, StoredAnswer
from app.journal.codec import decode_job, decode_registration

KEPT_JOBS: Final = 256
"""Ended jobs that are kept in memory, the last that were asked for: an outcome is often asked for more than once."""

Query = Callable[[str, Mapping[str, object]], Awaitable[list[tuple[Any, ...]]]]


class Reading:
    """Queries of jobs, events and what is kept beside them."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._ended: OrderedDict[str, Job] = OrderedDict()

    def forget(self) -> None:
        """Keep no job at hand: some were pruned."""
        # A new one: a read that began before puts what it found into the old one.
        self._ended = OrderedDict()

    async def job(self, job_id: str) -> Job | None:
        """The last stored version of a job."""
        kept = self._ended
        job = kept.get(job_id)
        if job is not None:
            kept.move_to_end(job_id)
            return job
        rows = await self._query("SELECT body FROM jobs WHERE id = :id", {"id": job_id})
        return self._keep(kept, decode_job(rows[0][0])) if rows else None

    @staticmethod
    def _keep(kept: OrderedDict[str, Job], job: Job) -> Job:
        # A job that was lost may still be resolved; any other that has ended changes no more, it is only pruned.
        if job.ended and job.state is not State.LOST:
            kept[job.id] = job
            if len(kept) > KEPT_JOBS:
                kept.popitem(last=False)
        return job

    async def kept(self, key: IdempotencyKey, *, since: int) -> StoredAnswer | None:
        """What a key of that name led to, if it was stored at `since` or later."""
        rows = await self._query(
            "SELECT fingerprint, job_id, status, body FROM idempotency_keys"
            " WHERE who = :who AND key = :key AND created_at >= :since",
            {"who": key.who, "key": key.key, "since": since},
        )
        for fingerprint, job_id, status, body in rows:
            return StoredAnswer(fingerprint=fingerprint, job_id=job_id, status=status, body=body)
        return None

    async def unfinished(self) -> Sequence[Job]:
        """Every job that has not ended, oldest first."""
        rows = await self._query("SELECT body FROM jobs WHERE ended = 0 ORDER BY seq", {})
        return [decode_job(body) for (body,) in rows]

    async def jobs(self, wanted: JobFilter) -> tuple[Sequence[Job], int | None]:
        """Jobs, newest first, and the cursor of the next page (None: there is none)."""
        where = _where(
            {
                "parent = :parent": wanted.parent is not None,
                "domain = :domain": wanted.domain is not None,
                "disk = :disk": wanted.disk is not None,
                "state = :state": wanted.state is not None,
                # Not bound: SQLite takes an index with a condition only where it can see that the condition holds.
                "ended = 0": wanted.active is True,
                "ended = 1": wanted.active is False,
                "seq < :before": wanted.before is not None,
            }
        )
        kept = self._ended
        rows = await self._query(
            f"SELECT seq, id, body FROM jobs {where} ORDER BY seq DESC LIMIT :limit + 1",  # noqa: S608  # constants only
            {
                "parent": wanted.parent,
                "domain": wanted.domain,
                "disk": wanted.disk,
                "state": wanted.state,
                "before": wanted.before,
                "limit": wanted.limit,
            },
        )
        page = rows[: wanted.limit]
        jobs = [kept.get(id_) or self._keep(kept, decode_job(body)) for _, id_, body in page]
        return jobs, page[-1][0] if len(rows) > len(page) else None

    async def jobs_of(self, parent: str) -> Sequence[Job]:
        """The jobs that are steps of another one, oldest first."""
        rows = await self._query("SELECT body FROM jobs WHERE parent = :parent ORDER BY seq", {"parent": parent})
        return [decode_job(body) for (body,) in rows]

    async def events(self, wanted: EventFilter, *, after: int, limit: int) -> Sequence[StoredEvent]:
        """Stored events with an id above `after`, oldest first."""
        where = _where(
            {
                "id > :after": True,
                "job_id = :job_id": wanted.job_id is not None,
                "domain = :domain": wanted.domain is not None,
                "type IN (SELECT value FROM json_each(:types))": bool(wanted.types),
            }
        )
        columns = "id, type, time, domain, disk, job_id, data"
        rows = await self._query(
            f"SELECT {columns} FROM events {where} ORDER BY id LIMIT :limit",  # noqa: S608  # constants only
            {
                "after": after,
                "job_id": wanted.job_id,
                "domain": wanted.domain,
                "types": json.dumps(sorted(wanted.types)),
                "limit": limit,
            },
        )
        return [
            StoredEvent(id=id_, type=type_, time=time, domain=domain, disk=disk, job_id=job_id, data=data)
            for id_, type_, time, domain, disk, job_id, data in rows
        ]

    async def event_bounds(self) -> tuple[int, int]:
        """(id of the last event that was pruned, id of the last event); 0 where there is none."""
        ((pruned, last),) = await self._query(
            "SELECT value, max(value, (SELECT coalesce(max(id), 0) FROM events)) FROM meta WHERE key = 'pruned'", {}
        )
        return pruned, last

    async def registrations(self) -> Sequence[Registration]:
        """The domains that were registered, by id."""
        rows = await self._query("SELECT body FROM domains ORDER BY id", {})
        return [decode_registration(body) for (body,) in rows]


def _where(conditions: Mapping[str, bool]) -> str:
    """The conditions that apply, as SQL, so that each query finds its index."""
    chosen = [text for text, applies in conditions.items() if applies]
    return f"WHERE {' AND '.join(chosen)}" if chosen else ""
