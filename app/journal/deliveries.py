"""What is to be sent of an event, stored in the event's own transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Final

from app.engine.ports.events import StoredEvent
from app.engine.ports.outbox import Webhook

UNDELIVERED: Final = (
    "SELECT 1 FROM deliveries JOIN webhooks ON webhooks.id = webhook_id WHERE state = 'pending' AND disabled_at IS NULL"
)
"""Deliveries that are going to be made; a condition follows."""


def insert(connection: sqlite3.Connection, webhook: Webhook) -> None:
    """Store a new webhook in a transaction."""
    connection.execute(
        "INSERT INTO webhooks (id, url, types, job_id, secret, created_at, created_by) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            webhook.id,
            webhook.url,
            json.dumps(sorted(webhook.types)),
            webhook.job_id,
            webhook.secret,
            webhook.created_at,
            webhook.created_by,
        ),
    )


def enqueue(connection: sqlite3.Connection, event: StoredEvent) -> Sequence[str]:
    """Store in a transaction what is to be sent of an event; the ids of the webhooks that it is for."""
    # Two questions, as SQLite finds no index for "this job's or nobody's".
    return [
        webhook_id
        for condition in ("job_id IS NULL", "job_id = :job")
        for (webhook_id,) in connection.execute(
            "INSERT INTO deliveries (id, webhook_id, event_id, created_at, due_at)"  # noqa: S608  # constants only
            " SELECT 'wd-' || lower(hex(randomblob(16))), id, :event, :now, :now FROM webhooks"
            f" WHERE {condition} AND (types = '[]' OR :type IN (SELECT value FROM json_each(types)))"
            " RETURNING webhook_id",
            {"job": event.job_id, "event": event.id, "now": event.time, "type": event.type},
        ).fetchall()
    ]
