"""What webhooks are to be sent: stored with its event or not at all, in order, and kept until it was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.outgoing import Answer, DeliveryState
from app.core.states import State
from app.engine.ports.events import DomainEvent, EventFilter
from app.engine.ports.journal import JobConflict
from app.engine.ports.outbox import Webhook
from app.journal.journal import SqliteJournal
from app.journal.outbox import SqliteOutbox

from .support import DAY, SetClock, add_job, ended, make_job, opened, queued, started

ALL = Webhook(id="wh-1", url="http://a", types=frozenset(), secret="s1", created_at=1_000, created_by="admin")
ENDS = replace(ALL, id="wh-2", types=frozenset({"job.completed", "job.canceled"}))
FINE = Answer(status=200, body="thanks")

Story = Callable[[SqliteJournal, SqliteOutbox], Awaitable[None]]


def run(state_dir: Path, story: Story, clock: SetClock | None = None) -> None:
    async def tell() -> None:
        time = clock or SetClock()
        with opened(state_dir, time) as journal:
            await story(journal, SqliteOutbox(journal, time))

    asyncio.run(tell())


async def types_of(outbox: SqliteOutbox, webhook_id: str) -> list[str]:
    """What is to be sent, or was, oldest first."""
    deliveries, _ = await outbox.deliveries(webhook_id, before=None, limit=100)
    return [delivery.event_type for delivery in reversed(deliveries)]


async def deliver(outbox: SqliteOutbox, webhook_id: str) -> str | None:
    """Send the next one, and what it told."""
    head = await outbox.head(webhook_id)
    if head is None:
        return None
    _, delivery, event = head
    done = replace(delivery, state=DeliveryState.DELIVERED, attempts=1, attempted_at=7, answer=FINE)
    await outbox.note(done, disabled=None, data=str)
    return event.type


def test_each_webhook_gets_what_it_asked_for(tmp_path: Path) -> None:
    """From its first moment on, in the order of the events, also over a restart; callbacks only of their own job."""
    job, other = make_job(), make_job("bj-2", disk="vdb")
    callback = replace(ALL, id="wh-3", job_id=job.id)

    async def before(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")
        await outbox.add(ALL)
        await outbox.add(ENDS)
        await add_job(journal, queued(job), None, callback)
        await add_job(journal, queued(other))

    async def after(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        await journal.store([started(job), ended(started(job).job, at=2_000)])
        assert await types_of(outbox, ALL.id) == ["job.queued", "job.queued", "job.started", "job.canceled"]
        assert await types_of(outbox, ENDS.id) == ["job.canceled"]
        assert await types_of(outbox, callback.id) == ["job.queued", "job.started", "job.canceled"]
        assert await outbox.waiting() == [ALL.id, ENDS.id, callback.id]
        told = [await deliver(outbox, callback.id) for _ in range(4)]
        assert told == ["job.queued", "job.started", "job.canceled", None]
        assert await outbox.waiting() == [ALL.id, ENDS.id]
        events = await journal.events(EventFilter(job_id=job.id), after=0, limit=10)
        deliveries, _ = await outbox.deliveries(callback.id, before=None, limit=10)
        assert [delivery.event_id for delivery in reversed(deliveries)] == [event.id for event in events]
        assert len({delivery.id for delivery in deliveries}) == 3
        assert [delivery.answer for delivery in deliveries] == [FINE] * 3

    run(tmp_path, before)
    run(tmp_path, after)


def test_what_is_not_stored_is_not_sent(tmp_path: Path) -> None:
    """A transaction that fails leaves neither a callback nor a delivery behind, and wakes nobody."""
    woken: list[str] = []

    async def story(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        outbox.listen(woken.extend)
        await outbox.add(ALL)
        await add_job(journal, queued(make_job()))
        await asyncio.sleep(0)
        assert woken == [ALL.id]
        with pytest.raises(JobConflict):
            await add_job(journal, queued(make_job("bj-2")), None, replace(ALL, id="wh-9", job_id="bj-2"))
        await asyncio.sleep(0)
        assert woken == [ALL.id]
        assert await outbox.webhook("wh-9") is None
        assert await types_of(outbox, ALL.id) == ["job.queued"]

    run(tmp_path, story)


def test_a_disabled_webhook_misses_nothing(tmp_path: Path) -> None:
    """It is told of by an event; enabled again it gets everything in order, the delivery that failed first."""

    async def story(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        watching = replace(ALL, id="wh-0", types=frozenset({"webhook.disabled"}))
        await outbox.add(watching)
        await outbox.add(ALL)
        await add_job(journal, queued(make_job()))
        head = await outbox.head(ALL.id)
        assert head is not None
        failed = replace(head[1], state=DeliveryState.FAILED, attempts=10, answer=Answer(error="timed out"))
        await outbox.note(failed, disabled="it failed", data=lambda webhook: f'{{"id": "{webhook.id}"}}')
        await journal.store([started(make_job())])
        found = await outbox.webhook(ALL.id)
        assert found is not None
        assert (found.disabled_at, found.disabled_because, found.pending) == (1_000, "it failed", 3)
        assert await outbox.head(ALL.id) is None
        assert await outbox.waiting() == [watching.id]
        told = await outbox.head(watching.id)
        assert told is not None
        assert (told[2].type, told[2].data, told[2].job_id) == ("webhook.disabled", '{"id": "wh-1"}', None)
        assert await outbox.enable(ALL.id, now=5_000)
        enabled = await outbox.head(ALL.id)
        assert enabled is not None
        assert (enabled[1].id, enabled[1].attempts, enabled[1].due_at) == (failed.id, 0, 5_000)
        sent = [await deliver(outbox, ALL.id) for _ in range(4)]
        assert sent == ["job.queued", "webhook.disabled", "job.started", None]
        assert not await outbox.enable("wh-x", now=5_000)

    run(tmp_path, story)


def test_once_more(tmp_path: Path) -> None:
    """A delivery that is made again has the same id, and goes before newer ones."""

    async def story(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        await outbox.add(ALL)
        await add_job(journal, queued(make_job()))
        await deliver(outbox, ALL.id)
        await journal.store([started(make_job())])
        (newer, older), _ = await outbox.deliveries(ALL.id, before=None, limit=10)
        again = await outbox.redeliver(ALL.id, older.id, now=9_000)
        assert again is not None
        assert (again.id, again.state, again.attempts, again.due_at) == (older.id, DeliveryState.PENDING, 0, 9_000)
        head = await outbox.head(ALL.id)
        assert head is not None
        assert head[1].id == older.id
        assert newer.seq > older.seq
        assert await outbox.redeliver("wh-2", older.id, now=1) is None
        assert await outbox.redeliver(ALL.id, "wd-x", now=1) is None

    run(tmp_path, story)


def test_secrets_are_rotated(tmp_path: Path) -> None:
    """The old one signs as well, until its time is over."""

    async def story(_journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        await outbox.add(ALL)
        assert await outbox.rotate(ALL.id, "s2", until=2_000)
        found = await outbox.webhook(ALL.id)
        assert found is not None
        assert (found.secrets(1_999), found.secrets(2_000)) == (("s2", "s1"), ("s2",))
        assert not await outbox.rotate("wh-x", "s3", until=2_000)

    run(tmp_path, story)


def test_pages(tmp_path: Path) -> None:
    """Webhooks oldest first, deliveries newest first, each once."""

    async def story(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        for number in range(5):
            await outbox.add(replace(ALL, id=f"wh-{number}"))
            await journal.tell_domain(DomainEvent.ADDED, f"web{number}", "{}")
        found: list[str] = []
        after = None
        while True:
            page, after = await outbox.webhooks(job_id=None, after=after, limit=2)
            found += [webhook.id for webhook in page]
            if after is None:
                break
        assert found == [f"wh-{number}" for number in range(5)]
        seen: list[int] = []
        before = None
        while True:
            deliveries, before = await outbox.deliveries("wh-0", before=before, limit=2)
            seen += [delivery.event_id for delivery in deliveries]
            if before is None:
                break
        assert seen == [5, 4, 3, 2, 1]

    run(tmp_path, story)


def test_what_is_still_to_be_sent_is_not_pruned(tmp_path: Path) -> None:
    """Neither jobs nor events; what was sent is, and what waits for a disabled webhook."""
    job = make_job()

    async def story(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        await outbox.add(ALL)
        await add_job(
            journal,
            [*queued(job), ended(job, at=1_000, state=State.FAILED)],
            None,
            replace(ALL, id="wh-cb", job_id=job.id),
        )
        await journal.tell_domain(DomainEvent.ADDED, "web1", "{}")
        await journal.prune(DAY)
        assert await journal.job(job.id) is not None
        assert len(await types_of(outbox, ALL.id)) == 3
        assert [await deliver(outbox, ALL.id) for _ in range(3)] == ["job.queued", "job.failed", "domain.added"]
        await journal.prune(DAY)
        # The callback has not been delivered yet.
        assert await journal.job(job.id) is not None
        assert await types_of(outbox, ALL.id) == ["job.queued", "job.failed"]
        head = await outbox.head("wh-cb")
        assert head is not None
        gone = replace(head[1], state=DeliveryState.FAILED, answer=Answer(status=410))
        await outbox.note(gone, disabled="gone", data=lambda _webhook: "{}")
        await journal.prune(DAY)
        assert await journal.job(job.id) is None
        assert await outbox.webhook("wh-cb") is None
        assert await types_of(outbox, ALL.id) == ["webhook.disabled"]

    run(tmp_path, story)


def test_a_webhook_goes_with_its_deliveries(tmp_path: Path) -> None:
    """And is gone."""

    async def story(journal: SqliteJournal, outbox: SqliteOutbox) -> None:
        await outbox.add(ALL)
        await add_job(journal, queued(make_job()))
        assert await outbox.remove(ALL.id)
        assert not await outbox.remove(ALL.id)
        assert await outbox.webhook(ALL.id) is None
        assert await types_of(outbox, ALL.id) == []
        assert await outbox.waiting() == []

    run(tmp_path, story)
