"""Webhooks, and what they are to be sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.core.outgoing import Answer, DeliveryState
from app.engine.ports.events import StoredEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where events are sent to. Times in ms since 1970.

    No `types`: events of every type. With a `job_id` it is that job's callback. The `previous` secret signs as well
    until `previous_until`. While `disabled_at` is set nothing is sent; `disabled_because` says why.
    """

    id: str
    url: str
    types: frozenset[str]
    job_id: str | None = None
    secret: str
    previous: str | None = None
    previous_until: int = 0
    created_at: int
    created_by: str
    disabled_at: int | None = None
    disabled_because: str | None = None
    pending: int = 0
    """How many deliveries are not delivered yet."""

    def secrets(self, now: int) -> tuple[str, ...]:
        """Those that sign at that time, the newest first."""
        old = self.previous if self.previous is not None and now < self.previous_until else None
        return (self.secret,) if old is None else (self.secret, old)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event that a webhook is sent, and what came of that so far. Times in ms since 1970.

    `seq` orders all deliveries; `id` is the same for each attempt. `due_at` is when the next attempt is due.
    """

    seq: int
    id: str
    webhook_id: str
    event_id: int
    event_type: str
    state: DeliveryState
    attempts: int
    created_at: int
    due_at: int
    attempted_at: int | None
    answer: Answer | None


class Outbox(Protocol):
    """The webhooks, and what they are to be sent; written by the journal with each event, in its transaction.

    Each write is one transaction, and durable when the call returns; writes raise `JournalError`.
    """

    def listen(self, wake: Callable[[Collection[str]], None]) -> None:
        """Have `wake` called on the event loop with the ids of the webhooks that an event was stored for."""
        ...

    async def add(self, webhook: Webhook) -> None:
        """Store a new webhook. The events after this are for it too."""
        ...

    async def webhook(self, webhook_id: str) -> Webhook | None:
        """A webhook."""
        ...

    async def webhooks(
        self, *, job_id: str | None, after: int | None, limit: int
    ) -> tuple[Sequence[Webhook], int | None]:
        """The webhooks for all jobs, or the callbacks of one; oldest first, and the cursor of the next page."""
        ...

    async def remove(self, webhook_id: str) -> bool:
        """Delete a webhook with its deliveries; whether it was there."""
        ...

    async def rotate(self, webhook_id: str, secret: str, *, until: int) -> bool:
        """Give a webhook a new secret, beside which the one before signs until then; whether it was there."""
        ...

    async def enable(self, webhook_id: str, *, now: int) -> bool:
        """Have a webhook sent everything that it has missed, from now on; whether it was there."""
        ...

    async def waiting(self) -> Sequence[str]:
        """The ids of the webhooks that are enabled and have something to be sent."""
        ...

    async def head(self, webhook_id: str) -> tuple[Webhook, Delivery, StoredEvent] | None:
        """The oldest delivery that is still to be made; None where there is none, or the webhook is disabled."""
        ...

    async def note(self, delivery: Delivery, *, disabled: str | None, data: Callable[[Webhook], str]) -> None:
        """Store what came of an attempt.

        `disabled` says why the webhook is disabled by it; the event that tells so has the text that `data` gives of the
        webhook as it is then.
        """
        ...

    async def deliveries(
        self, webhook_id: str, *, before: int | None, limit: int
    ) -> tuple[Sequence[Delivery], int | None]:
        """A webhook's deliveries, newest first, and the cursor of the next page."""
        ...

    async def redeliver(self, webhook_id: str, delivery_id: str, *, now: int) -> Delivery | None:
        """Have a delivery made once more, or now if it waits; None where there is none of that id."""
        ...
