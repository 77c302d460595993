"""Events, as they are stored and told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """An event as the journal holds it.

    `domain`, `disk` and `job_id` say what the event is about, and are what streams are filtered by; the API makes a
    CloudEvent's `source` and `subject` of them. `time` is in ms since 1970, `data` the JSON text of the event's data.
    A `job.progress` event has no id and is never stored.
    """

    id: int | None
    type: str
    time: int
    domain: str
    disk: str | None
    job_id: str | None
    data: str


class DomainEvent(StrEnum):
    """What subscribers are told of a domain."""

    ADDED = "domain.added"
    REMOVED = "domain.removed"
    CONNECTED = "domain.connected"
    DISCONNECTED = "domain.disconnected"


WEBHOOK_DISABLED: Final = "webhook.disabled"
"""The type of the event that tells that a webhook is sent nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which events a stream wants. None or empty: any."""

    domain: str | None = None
    job_id: str | None = None
    types: frozenset[str] = frozenset()

    def wants(self, event: StoredEvent) -> bool:
        """Whether `event` belongs into the stream."""
        return (
            (self.domain is None or event.domain == self.domain)
            and (self.job_id is None or event.job_id == self.job_id)
            and (not self.types or event.type in self.types)
        )
