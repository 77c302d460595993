"""The JSON of events: CloudEvents (version 1.0), the same in streams, histories and webhooks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, Literal
from urllib.parse import quote

from pydantic import Field

from app.api.schemas.base import Out, timestamp
from app.core.states import EventType
from app.engine.hub import RESET
from app.engine.ports.events import WEBHOOK_DISABLED, DomainEvent, StoredEvent

TYPES: Final = frozenset({*(type_.value for type_ in (*EventType, *DomainEvent)), WEBHOOK_DISABLED, RESET})
"""Every type of event."""

STORED: Final = TYPES - {EventType.PROGRESS.value, RESET}
"""The types of events that the journal stores and that webhooks can be sent."""


class EventOut(Out):
    """An event. `job.progress` has no id, `stream.reset` neither subject nor time."""

    specversion: Literal["1.0"]
    id: str | None = None
    source: str
    type: str
    subject: str | None = None
    time: str | None = None
    datacontenttype: Literal["application/json"]
    data: dict[str, object] = Field(description="the job, the domain, or the webhook")


class Events(Out):
    """A page of events, oldest first."""

    items: Sequence[EventOut]
    next: str | None


def event_json(event: StoredEvent) -> str:
    """The JSON text of an event; its data goes in word for word, as the journal has stored it."""
    source = f"/domains/{quote(event.domain, safe='')}" if event.domain else "/"
    if event.disk is not None:
        source += f"/disks/{quote(event.disk, safe='')}"
    subject = f"jobs/{event.job_id}" if event.job_id else f"domains/{event.domain}" if event.domain else None
    if event.type == WEBHOOK_DISABLED:
        subject = f"webhooks/{json.loads(event.data)['id']}"
        source = f"/{subject}"
    attributes = {
        "specversion": "1.0",
        "id": None if event.id is None else str(event.id),
        "source": source,
        "type": event.type,
        "subject": subject,
        "time": timestamp(event.time) if event.time else None,
        "datacontenttype": "application/json",
    }
    known = json.dumps({name: value for name, value in attributes.items() if value is not None})
    return f'{known[:-1]}, "data": {event.data}}}'
