"""Jobs, their versions and their events in the journal."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.job import Job
from app.core.machine.step import StoredVersion
from app.core.states import EventType, State
from app.engine.ports.driver import Address
from app.engine.ports.events import DomainEvent, EventFilter
from app.engine.ports.journal import JobConflict, JobFilter, Registration
from app.journal.journal import SqliteJournal
from app.journal.writing import LostUpdate

from .support import SetClock, add_job, ended, heard_by, make_job, opened, queued, run, started

ANY = EventFilter()


def test_a_job_is_there_after_a_restart(tmp_path: Path) -> None:
    """What was stored is read again, equal, by the next process on the state directory."""
    job = make_job()
    run(tmp_path, lambda journal: add_job(journal, queued(job)))
    assert run(tmp_path, lambda journal: journal.job(job.id)) == job
    assert run(tmp_path, lambda journal: journal.unfinished()) == [job]


def test_an_unknown_job_is_none(tmp_path: Path) -> None:
    """A job that was never stored is no error."""
    assert run(tmp_path, lambda journal: journal.job("bj-none")) is None


def test_events_tell_of_the_versions_in_order(tmp_path: Path) -> None:
    """Each version that has an event gets one, with the job's JSON, heard of before the write ends."""
    job = make_job()
    running = started(job)
    silent = StoredVersion(None, replace(running.job, version=3))

    async def story(journal: SqliteJournal) -> None:
        heard = heard_by(journal)
        await add_job(journal, [*queued(job), running])
        assert [(event.id, event.type) for event in heard] == [(1, "job.queued"), (2, "job.started")]
        await journal.store([silent, ended(silent.job, at=5)])
        assert [event.id for event in heard] == [1, 2, 3]
        assert await journal.events(ANY, after=0, limit=10) == heard
        assert json.loads(heard[2].data) == {"id": "bj-1", "state": "canceled", "version": 4}
        last = heard[2]
        assert (last.domain, last.disk, last.job_id, last.time) == ("web1", "vda", "bj-1", 77)
        assert await journal.unfinished() == []

    run(tmp_path, story, SetClock(77))


def test_a_disk_has_one_unfinished_job(tmp_path: Path) -> None:
    """A second job on a disk is refused with the first one's id until that has ended; other disks don't matter."""
    first, second = make_job("bj-1"), make_job("bj-2")

    async def story(journal: SqliteJournal) -> None:
        heard = heard_by(journal)
        await add_job(journal, queued(first))
        with pytest.raises(JobConflict) as conflict:
            await add_job(journal, queued(second))
        assert conflict.value.job_id == "bj-1"
        assert await journal.job("bj-2") is None
        await add_job(journal, queued(make_job("bj-3", disk="vdb")))
        await add_job(journal, queued(make_job("bj-4", domain="web2")))
        await journal.store([ended(first, at=5)])
        await add_job(journal, queued(second))
        assert [event.id for event in heard] == [1, 2, 3, 4, 5]

    run(tmp_path, story)


def test_requests_for_a_disk_at_the_same_time_make_one_job(tmp_path: Path) -> None:
    """Of many jobs that are added to one disk at once, one is stored, and the others are refused with its id."""

    async def story(journal: SqliteJournal) -> None:
        adds = [add_job(journal, queued(make_job(f"bj-{number}"))) for number in range(20)]
        answers = await asyncio.gather(*adds, return_exceptions=True)
        (job,) = await journal.unfinished()
        refused = [answer for answer in answers if isinstance(answer, JobConflict)]
        assert len(refused) == 19
        assert {conflict.job_id for conflict in refused} == {job.id}

    run(tmp_path, story)


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_lost_update_is_refused(tmp_path: Path, version: int) -> None:
    """A version that is not the one after the stored one is not stored, nor is any other of that write."""
    job = make_job()

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, [*queued(job), started(job)])
        stored = await journal.job(job.id)
        wrong = replace(job, state=State.PAUSED, version=version)
        with pytest.raises(LostUpdate, match=f"version {version} of the job bj-1"):
            await journal.store([StoredVersion(EventType.PAUSED, wrong)])
        with pytest.raises(LostUpdate):
            await journal.store(
                [StoredVersion(None, replace(job, version=3)), StoredVersion(None, replace(job, version=5))]
            )
        assert await journal.job(job.id) == stored
        assert await journal.event_bounds() == (0, 2)

    run(tmp_path, story)


def test_a_job_that_ended_stays_so(tmp_path: Path) -> None:
    """A version after the last one is a lost update."""
    job = make_job()
    end = ended(job, at=5)

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, [*queued(job), end])
        with pytest.raises(LostUpdate):
            await journal.store([started(end.job)])

    run(tmp_path, story)


@pytest.mark.parametrize("state", [State.LOST, State.CANCELED])
def test_what_is_kept_at_hand_is_what_is_stored(tmp_path: Path, state: State) -> None:
    """Jobs are asked for again and again, alone and in lists: it is their last version, until they are pruned."""
    job = make_job()
    end = ended(job, at=5, state=state)

    async def seen(journal: SqliteJournal) -> set[Job | None]:
        listed, _ = await journal.jobs(JobFilter(limit=10))
        return {*listed, await journal.job(job.id)}

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, queued(job))
        assert await seen(journal) == {job}
        await journal.store([end])
        assert await seen(journal) == await seen(journal) == {end.job}
        if state is State.LOST:
            resolved = replace(end.job, state=State.FAILED, version=end.job.version + 1)
            await journal.store([StoredVersion(EventType.FAILED, resolved)])
            assert await seen(journal) == await seen(journal) == {resolved}
        await journal.prune(6)
        assert await seen(journal) == {None}

    run(tmp_path, story)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE jobs SET body = json_set(body, '$.version', 1)",
        "UPDATE jobs SET body = json_set(body, '$.version', 4)",
        "UPDATE jobs SET body = json_set(body, '$.version', 3, '$.state', 'failed')",
        "UPDATE jobs SET body = json_set(body, '$.version', 3, '$.domain', NULL)",
        "UPDATE jobs SET body = 'no json'",
        "UPDATE jobs SET id = 'bj-9'",
        "DELETE FROM jobs",
        "UPDATE events SET data = '{}'",
        "INSERT INTO events (type, time, domain, data) VALUES ('job.progress', 0, 'web1', '{}')",
        "INSERT INTO events (type, time, domain, job_id, data) VALUES ('job.started', 0, 'web1', 'bj-9', '{}')",
        "INSERT INTO claims (job_id, access, path) VALUES ('bj-9', 'write', '/a')",
        "INSERT INTO claims (job_id, access, path) VALUES ('bj-1', 'lock', '/a')",
        "INSERT INTO claims (job_id, access, domain) VALUES ('bj-1', 'write', 'web1')",
        "INSERT INTO claims (job_id, access, domain, disk, path) VALUES ('bj-1', 'write', 'web1', 'vda', '/a')",
        "INSERT INTO claims (job_id, access, path, dev) VALUES ('bj-1', 'write', '/a', 7)",
        "INSERT INTO image_uses (domain, disk, place, dev, ino, seen_at) VALUES ('web1', 'vda', 0, 7, 7, 0)",
        "INSERT INTO invalid_marks (job_id, path, ino, domain, reason) VALUES ('bj-1', '/a', 7, 'web1', 'kept')",
        "INSERT INTO tokens VALUES ('short', 'ci', 'read', 0)",
    ],
)
def test_the_file_guards_itself(tmp_path: Path, statement: str) -> None:
    """What must not be is refused by SQLite as well, whoever writes."""
    job = make_job()
    run(tmp_path, lambda journal: add_job(journal, [*queued(job), started(job)]))
    connection = sqlite3.connect(tmp_path / "journal.sqlite3")
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.Error):
            connection.execute(statement)
    finally:
        connection.close()


def test_pages_are_stable_while_jobs_arrive(tmp_path: Path) -> None:
    """Paging from the newest job on gives each job once, even though newer ones are added between the pages."""

    async def story(journal: SqliteJournal) -> None:
        for number in range(10):
            await add_job(journal, queued(make_job(f"bj-{number}", disk=f"disk{number}")))
        seen: list[str] = []
        cursor: int | None = None
        sizes: list[int] = []
        while not sizes or cursor is not None:
            page, cursor = await journal.jobs(JobFilter(before=cursor, limit=4))
            seen += [job.id for job in page]
            sizes.append(len(page))
            late = len(sizes) + 100
            await add_job(journal, queued(make_job(f"bj-{late}", disk=f"disk{late}")))
        assert seen == [f"bj-{number}" for number in reversed(range(10))]
        assert sizes == [4, 4, 2]

    run(tmp_path, story)


def test_a_page_that_holds_the_rest_has_no_cursor(tmp_path: Path) -> None:
    """No page follows a last one that is full; a list of nothing is one empty page."""

    async def story(journal: SqliteJournal) -> None:
        assert await journal.jobs(JobFilter()) == ([], None)
        job = make_job()
        await add_job(journal, queued(job))
        assert await journal.jobs(JobFilter(limit=1)) == ([job], None)

    run(tmp_path, story)


def test_jobs_are_filtered(tmp_path: Path) -> None:
    """Domain, disk, state and whether it is active narrow the list, alone and together."""
    old = make_job("bj-1")

    async def story(journal: SqliteJournal) -> None:
        await add_job(journal, [*queued(old), ended(old, at=5, state=State.FAILED)])
        await add_job(journal, queued(make_job("bj-2")))
        await add_job(journal, queued(make_job("bj-3", disk="vdb")))
        await add_job(journal, queued(make_job("bj-4", domain="web2")))

        async def ids(wanted: JobFilter) -> list[str]:
            return [job.id for job in (await journal.jobs(wanted))[0]]

        assert await ids(JobFilter()) == ["bj-4", "bj-3", "bj-2", "bj-1"]
        assert await ids(JobFilter(domain="web1")) == ["bj-3", "bj-2", "bj-1"]
        assert await ids(JobFilter(domain="web1", disk="vda")) == ["bj-2", "bj-1"]
        assert await ids(JobFilter(state=State.FAILED)) == ["bj-1"]
        assert await ids(JobFilter(active=False)) == ["bj-1"]
        assert await ids(JobFilter(active=True, disk="vda")) == ["bj-4", "bj-2"]

    run(tmp_path, story)


def test_events_are_filtered(tmp_path: Path) -> None:
    """Streams of a domain, of a job, or of some types get theirs, from the one after the given id on."""
    job, other = make_job("bj-1"), make_job("bj-2", domain="web2")

    async def story(journal: SqliteJournal) -> None:
        await journal.tell_domain(DomainEvent.ADDED, "web1", '{"id": "web1"}')
        await add_job(journal, queued(job))
        await add_job(journal, queued(other))
        await journal.store([started(job)])

        async def ids(wanted: EventFilter, after: int = 0, limit: int = 10) -> list[int | None]:
            return [event.id for event in await journal.events(wanted, after=after, limit=limit)]

        assert await ids(ANY) == [1, 2, 3, 4]
        assert await ids(ANY, after=1, limit=2) == [2, 3]
        assert await ids(EventFilter(domain="web1")) == [1, 2, 4]
        assert await ids(EventFilter(job_id="bj-1")) == [2, 4]
        assert await ids(EventFilter(job_id="bj-1", domain="web2")) == []
        assert await ids(EventFilter(types=frozenset({"job.queued", "domain.added"})), after=1) == [2, 3]

    run(tmp_path, story)


def test_events_are_heard_in_the_order_of_their_ids(tmp_path: Path) -> None:
    """Whichever task is resumed first or is canceled, subscribers hear of every event once and in order."""

    async def story(journal: SqliteJournal) -> None:
        heard = heard_by(journal)
        writes = [
            asyncio.create_task(journal.tell_domain(DomainEvent.CONNECTED, f"d{number}", "{}")) for number in range(40)
        ]
        await asyncio.sleep(0)
        for write in writes[::3]:
            write.cancel()
        await asyncio.gather(*writes, return_exceptions=True)
        # Stands behind them all, so that they are all done.
        await journal.tell_domain(DomainEvent.CONNECTED, "last", "{}")
        assert [event.id for event in heard] == list(range(1, 42))
        assert [event.domain for event in heard] == [*(f"d{number}" for number in range(40)), "last"]

    run(tmp_path, story)


def test_closing_finishes_what_was_asked_for(tmp_path: Path) -> None:
    """Writes that wait for their turn when the journal is closed are stored, even if nobody waits for them."""

    async def story() -> None:
        with opened(tmp_path) as journal:
            heard_by(journal)
            writes = [asyncio.create_task(journal.tell_domain(DomainEvent.CONNECTED, "web1", "{}")) for _ in range(10)]
            await asyncio.sleep(0)
            for write in writes:
                write.cancel()
            await asyncio.gather(*writes, return_exceptions=True)

    asyncio.run(story())
    assert run(tmp_path, lambda journal: journal.event_bounds()) == (0, 10)


def test_registrations_are_kept(tmp_path: Path) -> None:
    """A domain is registered, registered anew in place of that, and forgotten, over restarts."""
    first = Registration(id="web1", address=Address(unix="/run/web1.qmp"))
    second = Registration(id="web1", address=Address(tcp=("::1", 4444)), disks={"vda": "/i.qcow2"}, allow_managed=True)

    async def register(journal: SqliteJournal) -> None:
        await journal.register(first)
        await journal.register(second)
        await journal.register(Registration(id="api1"))

    run(tmp_path, register)
    assert run(tmp_path, lambda journal: journal.registrations()) == [Registration(id="api1"), second]
    run(tmp_path, lambda journal: journal.unregister("web1", "{}"))
    run(tmp_path, lambda journal: journal.unregister("web1", "{}"))
    assert run(tmp_path, lambda journal: journal.registrations()) == [Registration(id="api1")]
