"""What is done in the journal's transactions: jobs, their versions and claims, and the events that tell of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.core.images import JobClaims
from app.core.machine.step import StoredVersion
from app.engine.ports.clock import Clock
from app.engine.ports.events import StoredEvent
from app.engine.ports.journal import IdempotencyKey, NewJob
from app.engine.views import Render
from app.journal.codec import encode_job
from app.journal.deliveries import enqueue, insert
from app.journal.images import add_claims, refuse_conflicts


class LostUpdate(Exception):
    """A version of a job does not follow the stored one: two writers worked on it, or one on an old copy."""


@dataclass(slots=True)
class Transaction:
    """A transaction in the making: its connection, and whom to tell once it is stored.

    `events` are published then, and `woken` are the webhooks for which something was stored.
    """

    connection: sqlite3.Connection
    render: Render
    clock: Clock
    events: list[StoredEvent] = field(default_factory=list[StoredEvent])
    woken: set[str] = field(default_factory=set[str])

    def tell(self, type_: str, *, domain: str, disk: str | None, job_id: str | None, data: str) -> None:
        """Store an event, and what webhooks are to be sent of it."""
        time = self.clock.now()
        id_ = self.connection.execute(
            "INSERT INTO events (type, time, domain, disk, job_id, data) VALUES (?, ?, ?, ?, ?, ?)",
            (type_, time, domain, disk, job_id, data),
        ).lastrowid
        event = StoredEvent(id=id_, type=type_, time=time, domain=domain, disk=disk, job_id=job_id, data=data)
        self.woken.update(enqueue(self.connection, event))
        self.events.append(event)

    def add(self, new: NewJob) -> None:
        """Store a new job with its claims, version by version; raises `JobConflict`."""
        first = new.versions[0]
        job = first.job
        ((parent,),) = self.connection.execute(
            "INSERT INTO jobs (id, body) VALUES (?, ?) RETURNING parent", (job.id, encode_job(job))
        ).fetchall()
        refuse_conflicts(self.connection, JobClaims(job_id=job.id, domain=job.domain, parent=parent, claims=new.claims))
        add_claims(self.connection, job.id, new.claims)
        if new.callback is not None:
            # Before the events, which are for it already.
            insert(self.connection, new.callback)
        self._tell_version(first)
        self.update(new.versions[1:])
        if new.key is not None:
            self._keep_key(new.key, job.id)

    def update(self, told: Sequence[StoredVersion]) -> None:
        """Store versions of jobs; raises `LostUpdate`. A trigger ends the claims of a job that has ended."""
        for each in told:
            job = each.job
            changed = self.connection.execute(
                "UPDATE jobs SET body = ? WHERE id = ? AND version = ? AND (ended = 0 OR state = 'lost')",
                (encode_job(job), job.id, job.version - 1),
            ).rowcount
            if not changed:
                raise LostUpdate(f"version {job.version} of the job {job.id} does not follow the stored one")
            self._tell_version(each)

    def _tell_version(self, told: StoredVersion) -> None:
        if told.type is not None:
            job = told.job
            data = self.render.job(job)
            self.tell(told.type.value, domain=job.domain, disk=job.disk, job_id=job.id, data=data)

    def _keep_key(self, key: IdempotencyKey, job_id: str) -> None:
        # In place of one that is too old to be found.
        self.connection.execute(
            "INSERT OR REPLACE INTO idempotency_keys (who, key, fingerprint, job_id, created_at)"
            " VALUES (?, ?, ?, ?, ?)",
            (key.who, key.key, key.fingerprint, job_id, self.clock.now()),
        )
