"""Events of domains wait for a journal that can't be written, and come in their order."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from app.core.errors import Code
from app.engine import telling
from app.engine.ports.events import DomainEvent, EventFilter
from app.engine.ports.journal import JournalError
from app.engine.tasks import Tasks
from app.engine.telling import WAITING, DomainTeller
from app.engine.views import DomainState, DomainView
from app.journal.journal import SqliteJournal
from tests.journal.support import PlainRender, run


def view(id_: str) -> DomainView:
    """A domain of which little is known."""
    return DomainView(
        id=id_,
        name=id_,
        uuid=None,
        state=DomainState.RUNNING,
        driver="qmp",
        version=None,
        pid=None,
        managed_by=None,
        error=None,
        disks=(),
    )


async def told(journal: SqliteJournal) -> list[tuple[str, str | None]]:
    """The events in the journal, and of which domains they are."""
    return [(event.type, event.domain) for event in await journal.events(EventFilter(), after=0, limit=1000)]


def test_what_could_not_be_stored_is_stored_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which it was told; of a domain that comes and goes all the time the last state is kept."""
    monkeypatch.setattr(telling, "AGAIN_S", 0.01)
    full = False
    write = SqliteJournal.tell_domain

    async def failing(journal: SqliteJournal, type_: DomainEvent, domain: str, data: str) -> None:
        if full:
            raise JournalError(Code.JOURNAL_FULL, "full")
        await write(journal, type_, domain, data)

    monkeypatch.setattr(SqliteJournal, "tell_domain", failing)

    async def story(journal: SqliteJournal) -> None:
        nonlocal full
        teller = DomainTeller(journal, PlainRender(), Tasks())
        await teller.tell(DomainEvent.ADDED, view("a"))
        full = True
        await teller.tell(DomainEvent.CONNECTED, view("a"))
        await teller.tell(DomainEvent.ADDED, view("b"))
        for _ in range(50):
            await teller.tell(DomainEvent.DISCONNECTED, view("a"))
            await teller.tell(DomainEvent.CONNECTED, view("a"))
        await teller.tell(DomainEvent.DISCONNECTED, view("a"))
        full = False
        async with asyncio.timeout(30):
            while len(stored := await told(journal)) < 3 + WAITING:  # noqa: ASYNC110 - a journal has no waiters
                await asyncio.sleep(0.01)
        assert stored[:3] == [("domain.added", "a"), ("domain.connected", "a"), ("domain.added", "b")]
        assert stored[-1] == ("domain.disconnected", "a")
        assert len(stored) <= 3 + WAITING
        await teller.tell(DomainEvent.CONNECTED, view("a"))
        assert await told(journal) == [*stored, ("domain.connected", "a")]

    run(tmp_path, story)
