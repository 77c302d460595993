"""Streams over a real journal: nothing is lost, doubled or out of order, however a subscriber comes and goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from app.core.errors import Code, Refused
from app.core.job import Job
from app.engine import hub as hub_module
from app.engine.hub import Hub
from app.engine.ports.events import DomainEvent, EventFilter, StoredEvent
from app.engine.views import DomainView
from app.journal.journal import SqliteJournal
from app.wiring import SystemClock

EVERYTHING = EventFilter()


class PlainRender:
    """Names instead of documents."""

    def job(self, job: Job) -> str:
        """The job's id."""
        return f'"{job.id}"'

    def domain(self, view: DomainView) -> str:
        """The domain's id."""
        return f'"{view.id}"'


def run(tmp_path: Path, story: Callable[[Hub, SqliteJournal], Awaitable[None]]) -> None:
    """Tell a story with a hub and a journal."""

    async def main() -> None:
        journal = SqliteJournal.open(tmp_path, PlainRender(), SystemClock())
        hub = Hub(journal, SystemClock())
        journal.listen(hub.publish)
        try:
            async with asyncio.timeout(60):
                await story(hub, journal)
        finally:
            hub.close()
            journal.close()

    asyncio.run(main())


async def tell(journal: SqliteJournal, count: int, domain: str = "web1") -> None:
    """Store some events."""
    for number in range(count):
        await journal.tell_domain(DomainEvent.CONNECTED, domain, str(number))


async def take(stream: AsyncGenerator[StoredEvent | None, None], count: int) -> list[int]:
    """The ids of the next events of a stream."""
    ids: list[int] = []
    while len(ids) < count:
        event = await anext(stream)
        if event is not None and event.id is not None:
            ids.append(event.id)
    return ids


def test_a_new_subscriber_hears_what_comes_from_now_on(tmp_path: Path) -> None:
    """Without a last id a stream starts now, not with the past."""

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        await tell(journal, 3)
        async with aclosing(hub.stream(EVERYTHING, after=None)) as stream:
            waiting = asyncio.create_task(take(stream, 2))
            await asyncio.sleep(0)
            await tell(journal, 2)
            assert await waiting == [4, 5]

    run(tmp_path, story)


def test_now_is_when_the_stream_is_asked_for(tmp_path: Path) -> None:
    """What happens once a subscriber knows of its stream comes, also if that is before the first event is awaited."""

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        await tell(journal, 1)
        async with aclosing(hub.stream(EVERYTHING, after=None)) as stream:
            await tell(journal, 2)
            assert await take(stream, 2) == [2, 3]

    run(tmp_path, story)


def test_one_who_was_away_gets_exactly_what_it_missed(tmp_path: Path) -> None:
    """With a last id the stream goes on right behind it: first from the journal, then live, without a seam."""

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        await tell(journal, 700)
        async with aclosing(hub.stream(EVERYTHING, after=100)) as stream:
            telling = asyncio.create_task(tell(journal, 300))
            assert await take(stream, 900) == list(range(101, 1001))
            await telling

    run(tmp_path, story)


def test_fifty_subscribers_that_come_back_again_and_again(tmp_path: Path) -> None:
    """Whoever leaves after a few events and returns with the last id has seen each event once, in order."""

    async def wander(hub: Hub, step: int) -> list[int]:
        seen: list[int] = []
        while len(seen) < 400:
            async with aclosing(hub.stream(EVERYTHING, after=seen[-1] if seen else 0)) as stream:
                seen += await take(stream, min(step, 400 - len(seen)))
        return seen

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        wanderers = [asyncio.create_task(wander(hub, 7 + number)) for number in range(50)]
        await tell(journal, 400)
        assert await asyncio.gather(*wanderers) == [list(range(1, 401))] * 50

    run(tmp_path, story)


def test_a_filter_lets_its_own_through_only(tmp_path: Path) -> None:
    """A domain's stream has that domain's events, from the journal and live."""

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        for _ in range(3):
            await tell(journal, 1, "web1")
            await tell(journal, 1, "web2")
        async with aclosing(hub.stream(EventFilter(domain="web2"), after=0)) as stream:
            assert await take(stream, 3) == [2, 4, 6]
            await tell(journal, 1, "web1")
            await tell(journal, 1, "web2")
            assert await take(stream, 1) == [8]

    run(tmp_path, story)


def test_one_who_cannot_keep_up_is_disconnected_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who falls behind the ring's end gets the end of the stream, and all the rest when it comes back."""
    monkeypatch.setattr(hub_module, "RING", 16)

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        async with aclosing(hub.stream(EVERYTHING, after=0)) as stream:
            await tell(journal, 1)
            assert await take(stream, 1) == [1]
            await tell(journal, 40)
            with pytest.raises(StopAsyncIteration):
                await take(stream, 40)
        async with aclosing(hub.stream(EVERYTHING, after=1)) as stream:
            assert await take(stream, 40) == list(range(2, 42))

    run(tmp_path, story)


def test_past_retention_the_stream_says_so_first(tmp_path: Path) -> None:
    """A last id from before what is kept, or from another journal, gives a stream.reset, then what there is."""

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        await tell(journal, 5)
        await journal.prune(SystemClock().now() + 1000)
        await tell(journal, 2)
        async with aclosing(hub.stream(EVERYTHING, after=2)) as stream:
            first = await anext(stream)
            assert first is not None
            assert (first.type, first.id) == ("stream.reset", 5)
            assert await take(stream, 2) == [6, 7]
        async with aclosing(hub.stream(EVERYTHING, after=99)) as stream:
            first = await anext(stream)
            assert first is not None
            assert (first.type, first.id) == ("stream.reset", 7)

    run(tmp_path, story)


def test_an_idle_stream_gives_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream on which nothing happens yields None from time to time, for a comment line."""
    monkeypatch.setattr(hub_module, "IDLE", 0.01)

    async def story(hub: Hub, _journal: SqliteJournal) -> None:
        async with aclosing(hub.stream(EVERYTHING, after=None)) as stream:
            assert await anext(stream) is None

    run(tmp_path, story)


def test_at_shutdown_every_stream_ends_and_new_ones_are_refused(tmp_path: Path) -> None:
    """Closing the hub ends the streams cleanly."""

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        async with aclosing(hub.stream(EVERYTHING, after=None)) as stream:
            waiting = asyncio.create_task(take(stream, 1))
            await asyncio.sleep(0.01)
            assert hub.subscribers == 1
            hub.close()
            with pytest.raises(StopAsyncIteration):
                await waiting
        assert hub.subscribers == 0
        with pytest.raises(Refused) as refused:
            hub.check_room()
        assert refused.value.problem.code is Code.SHUTTING_DOWN
        await tell(journal, 1)

    run(tmp_path, story)


def test_pruning_that_overtakes_a_slow_replay_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pruned while a subscriber takes its time is not left out without a word."""
    monkeypatch.setattr(hub_module, "PAGE", 3)

    async def story(hub: Hub, journal: SqliteJournal) -> None:
        await tell(journal, 10)
        async with aclosing(hub.stream(EVERYTHING, after=0)) as stream:
            assert await take(stream, 3) == [1, 2, 3]
            await journal.prune(SystemClock().now() + 1000)
            await tell(journal, 2)
            told = await anext(stream)
            assert told is not None
            assert (told.type, told.id) == ("stream.reset", 10)
            assert await take(stream, 2) == [11, 12]

    run(tmp_path, story)
