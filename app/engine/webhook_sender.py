"""Takes what the outbox holds to its receivers: at least once, and in order for each webhook.

There is a task for each webhook that something is to be sent to, so one receiver that is slow or gone holds up nobody
else. What an attempt came to is stored before the next one begins; who is killed in between sends the same again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog

from app.core.outgoing import SCHEDULE, Answer, DeliveryState, disabling, next_wait, signatures, waits
from app.engine.ports.clock import Clock
from app.engine.ports.events import StoredEvent
from app.engine.ports.journal import JournalError
from app.engine.ports.outbox import Delivery, Outbox, Webhook
from app.engine.ports.sender import Sender
from app.engine.views import EventRenderer

log = structlog.get_logger(__name__)

AT_ONCE: Final = 64
"""Deliveries that are under way at one time; each holds a connection."""

BROKEN: Final = 60.0
"""Seconds until what met a fault of ours is tried again."""

FULL: Final = 1.0
"""Seconds until a journal that can't be written is tried again."""


class WebhookSender:
    """Delivers until it is stopped. `spread` gives numbers in [0, 1) at random."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        sender: Sender,
        clock: Clock,
        renderer: EventRenderer,
        spread: Callable[[], float],
        schedule: Sequence[int] = SCHEDULE,
    ) -> None:
        self._outbox = outbox
        self._sender = sender
        self._clock = clock
        self._renderer = renderer
        self._spread = spread
        self._schedule = schedule
        self._places = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._woken: dict[str, asyncio.Event] = {}
        self._stopping = False

    async def start(self) -> None:
        """Go on with what was left."""
        self._outbox.listen(self.wake)
        self.wake(await self._outbox.waiting())

    async def stop(self) -> None:
        """End what is under way; it is sent again at the next start."""
        self._stopping = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self, webhooks: Collection[str]) -> None:
        """There may be something to be sent to these, or to be sent earlier than before."""
        for id_ in webhooks:
            self._woken.setdefault(id_, asyncio.Event()).set()
            if id_ not in self._tasks and not self._stopping:
                self._tasks[id_] = asyncio.create_task(self._serve(id_))

    async def drop(self, webhook_id: str) -> None:
        """End what is under way to a webhook that was deleted."""
        task = self._tasks.get(webhook_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _serve(self, id_: str) -> None:
        """Make one delivery after the other, until none is left."""
        woken = self._woken[id_]
        try:
            while True:
                woken.clear()
                head = await self._outbox.head(id_)
                if head is None:
                    if woken.is_set():
                        continue
                    return
                webhook, delivery, event = head
                wait = waits(
                    due_at=delivery.due_at,
                    attempts=delivery.attempts,
                    attempted_at=delivery.attempted_at,
                    now=self._clock.now(),
                )
                if wait > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(wait / 1000):
                            await woken.wait()
                    continue
                async with self._places:
                    answer = await self._attempt(webhook, delivery, event)
                await self._note(webhook, delivery, answer)
        except Exception:
            # A defect in here must not end it for good.
            log.exception("webhook failed", webhook=id_)
            asyncio.get_running_loop().call_later(BROKEN, self.wake, [id_])
        finally:
            del self._tasks[id_]
            del self._woken[id_]

    async def _attempt(self, webhook: Webhook, delivery: Delivery, event: StoredEvent) -> Answer:
        body = self._renderer.event(event).encode()
        now = self._clock.now()
        headers = signatures(webhook.secrets(now), delivery.id, now // 1000, body)
        return await self._sender.send(webhook.url, headers, body)

    async def _note(self, webhook: Webhook, delivery: Delivery, answer: Answer) -> None:
        now, attempts = self._clock.now(), delivery.attempts + 1
        why = disabling(answer, attempts, self._schedule)
        wait = None if answer.fine or why else next_wait(attempts, self._schedule, self._spread())
        state = DeliveryState.DELIVERED if answer.fine else DeliveryState.FAILED if why else DeliveryState.PENDING
        noted = replace(
            delivery,
            state=state,
            attempts=attempts,
            due_at=now + wait if wait is not None else delivery.due_at,
            attempted_at=now,
            answer=answer,
        )
        if not answer.fine:
            log.warning(
                "webhook not delivered",
                webhook=webhook.id,
                delivery=delivery.id,
                attempts=attempts,
                status=answer.status,
                error=answer.error,
                again_in_s=None if wait is None else wait // 1000,
                disabled=why,
            )
        while True:
            try:
                await self._outbox.note(noted, disabled=why, data=self._renderer.webhook)
            except JournalError as error:
                log.error("attempt not stored", webhook=webhook.id, delivery=delivery.id, error=str(error))
                await asyncio.sleep(FULL)
            else:
                return
