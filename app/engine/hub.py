"""Fan-out of events to any number of subscribers.

One ring of recent events serves them all, so a subscriber costs a position in it and no queue. Who falls behind the
ring's end is disconnected and comes back with the id of the last event that it got: nothing is ever skipped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

from app.core.errors import Code, Problem, Refused
from app.core.states import ENDINGS
from app.engine.ports.clock import Clock
from app.engine.ports.events import EventFilter, StoredEvent
from app.engine.ports.journal import Journal

RING: Final = 8192
"""Events that are kept at hand for the subscribers."""

SUBSCRIBERS_MAX: Final = 4096
"""Subscribers at one time; each holds a connection."""

IDLE: Final = 10.0
"""Seconds after which an idle stream gives a sign of life; the contract allows 15."""

PAGE: Final = 500
"""Events that are read from the journal at a time."""

RESET: Final = "stream.reset"
LAST: Final = frozenset(type_.value for type_ in ENDINGS.values())


@dataclass(slots=True)
class _Cursor:
    """Where a subscriber is: the position of the next event in the ring, and the last id it got from the journal."""

    position: int
    seen: int = 0


class Hub:
    """Takes events in the order of their ids and hands them to subscribers."""

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self._ring: deque[StoredEvent] = deque(maxlen=RING)
        self._next = 0
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()
        self.closed = False
        self.subscribers = 0

    def publish(self, events: Sequence[StoredEvent]) -> None:
        """Hand events on; the stored ones among them are durable already and come in the order of their ids."""
        self._ring.extend(events)
        self._next += len(events)
        woken, self._wake = self._wake, asyncio.Event()
        woken.set()

    def close(self) -> None:
        """End every stream; new ones are refused."""
        self.closed = True
        self._wake.set()
        self._moved.set()

    def check_room(self) -> None:
        """Raise `Refused` where one more subscriber can't be served."""
        if self.closed:
            raise Refused(Problem(code=Code.SHUTTING_DOWN, detail="the service is shutting down"))
        if self.subscribers >= SUBSCRIBERS_MAX:
            raise Refused(
                Problem(
                    code=Code.TOO_MANY_REQUESTS,
                    detail=f"{SUBSCRIBERS_MAX} event streams are open, which is as many as are served",
                )
            )

    @property
    def next_move(self) -> asyncio.Event:
        """Set once a job has moved after now, or at shutdown.

        Events can't serve for this: they are published as they are committed, a moment before the actor that waits
        for the commit has the job's new version at hand.
        """
        return self._moved

    def note_move(self) -> None:
        """Tell those who wait for a job to look at it again."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def stream(
        self, wanted: EventFilter, *, after: int | None, whole_job: bool = False
    ) -> AsyncGenerator[StoredEvent | None, None]:
        """The events that are `wanted`, from the one after the id `after` on, or else from now on.

        None is a sign of life. `whole_job`: without `after` start with the job's first event; end after its last. An
        `after` outside of what is kept gives an event `stream.reset` first, with the id from which on nothing is
        missing.
        """
        # "Now" is this call, not when the first event is asked for: that may be after the subscriber has been told
        # that its stream is open, and has caused events itself.
        return self._stream(wanted, _Cursor(position=self._next), after, whole_job=whole_job)

    async def _stream(
        self, wanted: EventFilter, cursor: _Cursor, after: int | None, *, whole_job: bool
    ) -> AsyncGenerator[StoredEvent | None, None]:
        everything = replace(wanted, types=frozenset())
        self.subscribers += 1
        try:
            over = whole_job and await self._is_over(wanted.job_id)
            if after is not None or whole_job:
                async with aclosing(self._history(cursor, everything, after)) as history:
                    async for event in history:
                        if event.type == RESET or wanted.wants(event):
                            yield event
                        if whole_job and event.type in LAST:
                            return
            if over:
                return
            async with aclosing(self._live(cursor, everything)) as live:
                async for happening in live:
                    if happening is None or wanted.wants(happening):
                        yield happening
                    if whole_job and happening is not None and happening.type in LAST:
                        return
        finally:
            self.subscribers -= 1

    async def _history(
        self, cursor: _Cursor, wanted: EventFilter, after: int | None
    ) -> AsyncGenerator[StoredEvent, None]:
        cursor.seen = after or 0
        _, last = await self._journal.event_bounds()
        if after is not None and after > last:
            cursor.seen = last
            yield self._reset(last)
        while True:
            # Taken before the journal is read: what is published meanwhile stands in the ring behind it.
            cursor.position = self._next
            page = await self._journal.events(wanted, after=cursor.seen, limit=PAGE)
            # Asked after each page: what a subscriber has yet to get may be pruned while it takes its time.
            pruned, _ = await self._journal.event_bounds()
            if after is not None and cursor.seen < pruned:
                cursor.seen = pruned
                yield self._reset(pruned)
                continue
            for event in page:
                cursor.seen = event.id or cursor.seen
                yield event
            if len(page) < PAGE:
                return

    def _reset(self, id_: int) -> StoredEvent:
        return StoredEvent(id=id_, type=RESET, time=self._clock.now(), domain="", disk=None, job_id=None, data="{}")

    async def _live(self, cursor: _Cursor, wanted: EventFilter) -> AsyncGenerator[StoredEvent | None, None]:
        while not self.closed:
            while cursor.position < self._next:
                oldest = self._next - len(self._ring)
                if cursor.position < oldest:
                    # Too slow: what comes next is not at hand any more. The journal has it.
                    return
                event = self._ring[cursor.position - oldest]
                cursor.position += 1
                if (event.id is None or event.id > cursor.seen) and wanted.wants(event):
                    yield event
            if not self.closed and not await self._woken(IDLE):
                yield None

    async def _is_over(self, job_id: str | None) -> bool:
        job = await self._journal.job(job_id or "")
        return job is None or job.ended

    async def _woken(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True
