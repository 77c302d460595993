"""What is past retention goes, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from app.engine.ports.events import DomainEvent, EventFilter
from app.engine.ports.journal import JobFilter
from app.journal.journal import SqliteJournal

from .support import DAY, SetClock, add_job, ended, make_job, queued, run, started

ANY = EventFilter()


async def event_ids(journal: SqliteJournal, wanted: EventFilter = ANY) -> list[int | None]:
    return [event.id for event in await journal.events(wanted, after=0, limit=10_000)]


def test_an_ended_job_goes_with_all_its_events(tmp_path: Path) -> None:
    """Jobs that ended before go, those that ended later or not at all stay, each with its whole history."""
    clock = SetClock()
    old, recent, long = make_job("old"), make_job("recent"), make_job("long", disk="vdb")

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(long))  # event 1
        await add_job(journal, [*queued(old), ended(old, at=1_000)])  # events 2 and 3
        await add_job(journal, queued(recent))  # event 4
        await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")  # event 5
        clock.time = DAY
        await journal.store([ended(recent, at=DAY)])  # event 6
        await journal.tell_domain(DomainEvent.REMOVED, "web1", "{}")  # event 7
        await journal.prune(DAY)
        jobs, _ = await journal.jobs(JobFilter())
        assert [job.id for job in jobs] == ["recent", "long"]
        assert await event_ids(journal) == [1, 4, 6, 7]
        assert await event_ids(journal, EventFilter(job_id="old")) == []
        assert await journal.event_bounds() == (5, 7)
        await journal.prune(DAY)
        assert await journal.event_bounds() == (5, 7)

    run(tmp_path, story, clock)


def test_ids_go_on_after_everything_was_pruned(tmp_path: Path) -> None:
    """No id is given twice, and the bounds stand, also after a restart with an empty journal."""
    job = make_job()

    async def fill(journal: SqliteJournal) -> None:
        assert await journal.event_bounds() == (0, 0)
        await add_job(journal, [*queued(job), ended(job, at=1_000)])
        await journal.prune(DAY)
        assert await journal.event_bounds() == (2, 2)

    async def go_on(journal: SqliteJournal) -> None:
        assert await journal.event_bounds() == (2, 2)
        await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")
        assert await event_ids(journal) == [3]
        assert await journal.event_bounds() == (2, 3)

    run(tmp_path, fill)
    run(tmp_path, go_on)


def test_others_write_while_much_is_pruned(tmp_path: Path) -> None:
    """A write that comes during a long prune is not kept waiting until its end."""
    old, job = make_job("old"), make_job("new")

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, [*queued(old), ended(old, at=1_000)])
        await add_job(journal, queued(job))
        await asyncio.gather(*(journal.tell_domain(DomainEvent.CONNECTED, "web1", "{}") for _ in range(1_800)))
        pruning = asyncio.create_task(journal.prune(DAY))
        await asyncio.sleep(0)
        await journal.store([started(job)])
        assert not pruning.done()
        await pruning
        assert await event_ids(journal) == [3, 1_804]
        assert await journal.event_bounds() == (1_803, 1_804)

    run(tmp_path, story)


def test_many_jobs_are_pruned(tmp_path: Path) -> None:
    """More jobs than one transaction takes go in one call."""

    async def story(journal: SqliteJournal) -> None:
        jobs = [make_job(f"bj-{number}", disk=f"disk{number}") for number in range(120)]
        await asyncio.gather(*(add_job(journal, [*queued(job), ended(job, at=1_000)]) for job in jobs))
        await journal.prune(DAY)
        assert await journal.jobs(JobFilter()) == ([], None)
        assert await journal.event_bounds() == (240, 240)

    run(tmp_path, story)


def test_a_clock_that_jumps_ahead_prunes_a_day_at_most(tmp_path: Path) -> None:
    """A start with a clock that is years ahead deletes next to nothing; with a clock that is right, all goes on."""
    clock = SetClock(100 * DAY)
    old, recent = make_job("old"), make_job("recent", disk="vdb")

    async def story(journal: SqliteJournal) -> None:
        await journal.prune(clock.time - 30 * DAY)
        await add_job(journal, [*queued(old), ended(old, at=70 * DAY + 1)])
        await add_job(journal, [*queued(recent), ended(recent, at=99 * DAY)])
        clock.time = 900 * DAY
        await journal.prune(clock.time - 30 * DAY)
        assert await ids_of_jobs(journal) == ["recent"]
        clock.time = 100 * DAY
        await journal.prune(clock.time - 30 * DAY)
        assert await ids_of_jobs(journal) == ["recent"]
        # A service that was off for long catches up by a day each time.
        clock.time = 130 * DAY
        for _ in range(30):
            await journal.prune(clock.time - 30 * DAY)
        assert await ids_of_jobs(journal) == []

    run(tmp_path, story, clock)


async def ids_of_jobs(journal: SqliteJournal) -> list[str]:
    jobs, _ = await journal.jobs(JobFilter())
    return [job.id for job in jobs]
