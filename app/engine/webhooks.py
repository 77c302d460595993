"""The use cases of webhooks that are sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final

from app.core.errors import Code, Problem, Refused, invalid
from app.core.outgoing import ROTATION
from app.engine.ports.clock import Clock
from app.engine.ports.outbox import Delivery, Outbox, Webhook
from app.engine.ports.sender import Sender
from app.engine.webhook_sender import WebhookSender

WEBHOOKS_MAX: Final = 1000
"""WebhookUseCases for all jobs that there may be; each costs a row for each event."""


class WebhookUseCases:
    """Every use case. All raise `Refused` where a request can't be served, and `JournalError`."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        webhook_sender: WebhookSender,
        sender: Sender,
        clock: Clock,
        new_id: Callable[[], str],
        new_secret: Callable[[], str],
    ) -> None:
        self._outbox = outbox
        self._webhook_sender = webhook_sender
        self._sender = sender
        self._clock = clock
        self._new_id = new_id
        self._new_secret = new_secret

    async def made(self, url: str, types: Collection[str], secret: str | None, *, who: str, pointer: str) -> Webhook:
        """A webhook that is not stored yet; without a `secret` it gets one. `pointer` names the URL in the request."""
        why = await self._sender.check(url)
        if why is not None:
            raise Refused(replace(invalid(pointer, why), code=Code.WEBHOOK_URL_REFUSED))
        return Webhook(
            id=self._new_id(),
            url=url,
            types=frozenset(types),
            secret=secret or self._new_secret(),
            created_at=self._clock.now(),
            created_by=who,
        )

    async def add(self, webhook: Webhook) -> None:
        """Have a webhook sent what is stored from now on."""
        _known, more = await self._outbox.webhooks(job_id=None, after=None, limit=WEBHOOKS_MAX - 1)
        if more is not None:
            detail = f"there are {WEBHOOKS_MAX} webhooks, which is as many as may be; delete some"
            raise Refused(Problem(code=Code.TOO_MANY_REQUESTS, detail=detail))
        await self._outbox.add(webhook)

    async def webhook(self, webhook_id: str) -> Webhook:
        """One webhook."""
        webhook = await self._outbox.webhook(webhook_id)
        if webhook is None:
            raise Refused(_unknown(webhook_id))
        return webhook

    async def webhooks(
        self, *, job_id: str | None, after: int | None, limit: int
    ) -> tuple[Sequence[Webhook], int | None]:
        """The webhooks for all jobs, or the callbacks of one; oldest first, and the cursor of the next page."""
        return await self._outbox.webhooks(job_id=job_id, after=after, limit=limit)

    async def remove(self, webhook_id: str) -> None:
        """Delete a webhook; nothing is sent to it any more."""
        if not await self._outbox.remove(webhook_id):
            raise Refused(_unknown(webhook_id))
        await self._webhook_sender.drop(webhook_id)

    async def rotate(self, webhook_id: str, secret: str | None) -> Webhook:
        """Give a webhook a new secret; the old one signs as well for a day."""
        new = secret or self._new_secret()
        if not await self._outbox.rotate(webhook_id, new, until=self._clock.now() + ROTATION):
            raise Refused(_unknown(webhook_id))
        return await self.webhook(webhook_id)

    async def enable(self, webhook_id: str) -> Webhook:
        """Send a disabled webhook all that it has missed, in order; one that waits for its next attempt, at once."""
        if not await self._outbox.enable(webhook_id, now=self._clock.now()):
            raise Refused(_unknown(webhook_id))
        self._webhook_sender.wake([webhook_id])
        return await self.webhook(webhook_id)

    async def deliveries(
        self, webhook_id: str, *, before: int | None, limit: int
    ) -> tuple[Sequence[Delivery], int | None]:
        """A webhook's deliveries, newest first, and the cursor of the next page."""
        await self.webhook(webhook_id)
        return await self._outbox.deliveries(webhook_id, before=before, limit=limit)

    async def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Make a delivery once more, under the same id; one that waits for its next attempt, at once."""
        webhook = await self.webhook(webhook_id)
        if webhook.disabled_at is not None:
            detail = f"{webhook_id} is disabled: {webhook.disabled_because}; enable it"
            raise Refused(Problem(code=Code.WEBHOOK_DISABLED, detail=detail))
        delivery = await self._outbox.redeliver(webhook_id, delivery_id, now=self._clock.now())
        if delivery is None:
            detail = f"{webhook_id} has no delivery {delivery_id!r}; GET /webhooks/{webhook_id}/deliveries lists them"
            raise Refused(Problem(code=Code.DELIVERY_NOT_FOUND, detail=detail))
        self._webhook_sender.wake([webhook_id])
        return delivery


def _unknown(webhook_id: str) -> Problem:
    return Problem(code=Code.WEBHOOK_NOT_FOUND, detail=f"there is no webhook {webhook_id!r}; GET /webhooks lists them")
