"""Deliveries go on whatever fails on this side: a journal that is full for a while, a fault of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.core.errors import Code
from app.core.outgoing import Answer, DeliveryState
from app.engine import webhook_sender as module
from app.engine.ports.events import DomainEvent, StoredEvent
from app.engine.ports.journal import JournalError
from app.engine.ports.outbox import Delivery, Webhook
from app.engine.webhook_sender import WebhookSender
from app.journal.outbox import SqliteOutbox
from tests.journal.support import SetClock, opened

WEBHOOK = Webhook(id="wh-1", url="http://a", types=frozenset(), secret="A" * 32, created_at=1, created_by="admin")


class EventRenderer:
    """Writes the least."""

    def event(self, event: StoredEvent) -> str:
        """Which event it is."""
        return event.data

    def webhook(self, webhook: Webhook) -> str:
        """Which webhook it is."""
        return webhook.id


@dataclass
class Taking:
    """A sender whose receiver takes everything."""

    sent: dict[str, list[bytes]] = field(default_factory=dict[str, list[bytes]])

    async def check(self, url: str) -> str | None:
        """Any URL will do."""
        return None if url else "no URL"

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Taken."""
        assert url == WEBHOOK.url
        self.sent.setdefault(headers["webhook-id"], []).append(body)
        return Answer(status=200)


class Failing(SqliteOutbox):
    """The real outbox, of which some calls fail first."""

    notes = 0
    heads = 0

    async def note(self, delivery: Delivery, *, disabled: str | None, data: Callable[[Webhook], str]) -> None:
        """As the real one's, later."""
        if self.notes:
            self.notes -= 1
            raise JournalError(Code.JOURNAL_FULL, "no space")
        await super().note(delivery, disabled=disabled, data=data)

    async def head(self, webhook_id: str) -> tuple[Webhook, Delivery, StoredEvent] | None:
        """As the real one's, later."""
        if self.heads:
            self.heads -= 1
            raise RuntimeError("a fault")
        return await super().head(webhook_id)


@pytest.mark.parametrize(("notes", "heads"), [(0, 0), (3, 0), (0, 2)])
def test_each_is_sent_once_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: int, heads: int) -> None:
    """What was answered is not sent again only because it could not be stored at once."""
    monkeypatch.setattr(module, "FULL", 0.01)
    monkeypatch.setattr(module, "BROKEN", 0.01)

    async def story() -> None:
        clock, sender = SetClock(), Taking()
        with opened(tmp_path, clock) as journal:
            outbox = Failing(journal, clock)
            outbox.notes, outbox.heads = notes, heads
            webhook_sender = WebhookSender(
                outbox=outbox, sender=sender, clock=clock, renderer=EventRenderer(), spread=lambda: 0.0
            )
            await webhook_sender.start()
            await outbox.add(WEBHOOK)
            for number in range(3):
                await journal.tell_domain(DomainEvent.ADDED, "web1", str(number))
            async with asyncio.timeout(10):
                while True:
                    made, _ = await outbox.deliveries(WEBHOOK.id, before=None, limit=10)
                    if {delivery.state for delivery in made} == {DeliveryState.DELIVERED}:
                        break
                    await asyncio.sleep(0.01)
            await webhook_sender.stop()
        assert list(sender.sent.values()) == [[b"0"], [b"1"], [b"2"]]

    asyncio.run(story())
