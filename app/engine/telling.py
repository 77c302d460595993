"""Events of domains, on their way into the journal."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

import structlog

from app.engine.ports.events import DomainEvent
from app.engine.ports.journal import Journal, JournalError
from app.engine.tasks import Tasks
from app.engine.views import DomainView, Render

AGAIN_S: Final = 1.0
"""Seconds until a journal that can't be written is tried again."""

WAITING: Final = 16
"""Events of one domain that wait for such a journal. Beyond them the last one gives its place to the newest."""

log = structlog.get_logger(__name__)


class DomainTeller:
    """Stores events of domains in the order in which they are told.

    While the journal can't be written they wait, and are stored once it can be: a control plane that missed that a
    domain is there again would never look at it.
    """

    def __init__(self, journal: Journal, render: Render, tasks: Tasks) -> None:
        self._journal = journal
        self._render = render
        self._tasks = tasks
        self._waiting: deque[tuple[DomainEvent, str, str]] = deque()
        self._storing = asyncio.Lock()
        self._retry_task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Try no more what could not be stored: the journal is about to be closed."""
        if self._retry_task is not None:
            self._retry_task.cancel()

    async def tell(self, event: DomainEvent, view: DomainView) -> None:
        """Store an event with the domain as it is by now, or have it wait."""
        of_domain = [place for place, (_, domain, _) in enumerate(self._waiting) if domain == view.id]
        if len(of_domain) > WAITING:
            del self._waiting[of_domain[-1]]
        self._waiting.append((event, view.id, self._render.domain(view)))
        await self.flush()

    async def flush(self) -> None:
        """Store what waits, as far as the journal can be written."""
        if not self._waiting:
            return
        async with self._storing:
            try:
                while self._waiting:
                    first = self._waiting[0]
                    await self._journal.tell_domain(*first)
                    # Somebody else's place may have been given away meanwhile, but never the first one's.
                    if self._waiting and self._waiting[0] is first:
                        self._waiting.popleft()
            except JournalError as error:
                log.error("events wait", waiting=len(self._waiting), error=str(error))
                if self._retry_task is None:
                    self._retry_task = self._tasks.start("events of domains", self._retry())

    async def _retry(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(AGAIN_S)
                await self.flush()
        finally:
            self._retry_task = None
