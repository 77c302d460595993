"""Jobs have claims on chains and images; a job whose claims exclude another's is not stored."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.images import Access, Claim, DiskChain, Image
from app.core.job import Job
from app.core.states import State
from app.engine.ports.journal import IdempotencyKey, JobConflict, JobFilter, NewJob
from app.engine.ports.outbox import Webhook
from app.journal import writing
from app.journal.codec import encode_job
from app.journal.database import FILE
from app.journal.journal import SqliteJournal
from app.journal.outbox import SqliteOutbox
from app.journal.writing import LostUpdate

from .support import DAY, SetClock, add_job, claim, ended, heard_by, make_job, new, queued, run, started

VDA = Claim(DiskChain("web1", "vda"), Access.WRITE)
BIG = (1 << 64) - 1
"""The highest number of a device or an inode."""


def claimed(state_dir: Path) -> list[str]:
    """Whose claims the file holds."""
    with closing(sqlite3.connect(state_dir / FILE)) as connection:
        return [job_id for (job_id,) in connection.execute("SELECT DISTINCT job_id FROM claims ORDER BY job_id")]


def give_parents(monkeypatch: pytest.MonkeyPatch, parents: Mapping[str, str]) -> None:
    """Have jobs stored as steps of others."""

    def encode(job: Job) -> str:
        return json.dumps(json.loads(encode_job(job)) | {"parent": parents.get(job.id)})

    monkeypatch.setattr(writing, "encode_job", encode)


@pytest.mark.parametrize(
    ("mine", "theirs", "excluded"),
    [
        (claim("/a"), claim("/a"), True),
        (claim("/a"), claim("/a", access=Access.READ), True),
        (claim("/a", access=Access.READ), claim("/a", access=Access.READ), False),
        (claim("/a"), claim("/b"), False),
        ((VDA,), (VDA,), True),
        ((VDA,), (replace(VDA, access=Access.READ),), True),
        ((VDA,), claim("/a"), False),
        # The same file under another name, and other files under equal names.
        ((Claim(Image("/a", (1, 2)), Access.WRITE),), (Claim(Image("/b", (1, 2)), Access.DELETE),), True),
        ((Claim(Image("/a", (1, 2)), Access.WRITE),), (Claim(Image("/a", (1, 3)), Access.DELETE),), False),
        ((Claim(Image("/a", (BIG, BIG)), Access.WRITE),), (Claim(Image("/b", (BIG, BIG)), Access.READ),), True),
        # Two nodes of a block device.
        ((Claim(Image("/a", (1, 2), 64771), Access.WRITE),), (Claim(Image("/b", (1, 3), 64771), Access.READ),), True),
        ((Claim(Image("/x/../a"), Access.WRITE),), claim("/a"), True),
    ],
)
def test_claims_decide(tmp_path: Path, mine: tuple[Claim, ...], theirs: tuple[Claim, ...], excluded: bool) -> None:
    """Over restarts, and on whichever disks: a job is refused by the claims of an unfinished one until that ends."""
    first, second = make_job("bj-1"), make_job("bj-2", disk="vdb")
    run(tmp_path, lambda journal: journal.add_jobs([new(first, *theirs)]))

    async def story(journal: SqliteJournal) -> None:
        heard = heard_by(journal)
        if excluded:
            with pytest.raises(
                JobConflict, match=r"the unfinished job bj-1 works on the (image /a|disk vda)"
            ) as conflict:
                await journal.add_jobs([new(second, *mine)])
            assert conflict.value.job_id == "bj-1"
            assert conflict.value.resource == mine[0].resource
            assert await journal.job("bj-2") is None
            assert heard == []
            await journal.store([ended(first, at=5)])
        await journal.add_jobs([new(second, *mine)])

    run(tmp_path, story)
    assert claimed(tmp_path) == (["bj-2"] if excluded else ["bj-1", "bj-2"])


@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELED, State.LOST])
def test_claims_end_with_their_job(tmp_path: Path, state: State) -> None:
    """However it ends, also in the transaction that has stored it; a running job keeps them."""
    job, brief = make_job("bj-1"), make_job("bj-2", disk="vdb")

    async def story(journal: SqliteJournal) -> None:
        await journal.add_jobs([new(job, *claim("/a", "/b"))])
        await journal.store([started(job)])
        assert claimed(tmp_path) == ["bj-1"]
        await journal.add_jobs([NewJob(versions=[*queued(brief), ended(brief, at=5, state=state)], claims=claim("/c"))])
        assert claimed(tmp_path) == ["bj-1"]
        await journal.store([ended(started(job).job, at=5, state=state)])
        assert claimed(tmp_path) == []
        await journal.prune(DAY)
        left, _ = await journal.jobs(JobFilter())
        # A lost job waits for a person's verdict, however long that takes.
        assert {job.id for job in left} == ({"bj-1", "bj-2"} if state is State.LOST else set())

    run(tmp_path, story)


def test_an_end_that_is_not_stored_ends_no_claim(tmp_path: Path) -> None:
    """The claims go in the transaction of the end, so with a lost update they stay."""
    job = make_job()

    async def story(journal: SqliteJournal) -> None:
        await journal.add_jobs([new(job, VDA)])
        with pytest.raises(LostUpdate):
            await journal.store([ended(job, at=5), ended(job, at=6)])
        assert claimed(tmp_path) == ["bj-1"]

    run(tmp_path, story)


def test_an_ended_job_gets_no_claim(tmp_path: Path) -> None:
    """Nobody would end it; SQLite refuses it as well."""
    job = make_job()
    run(tmp_path, lambda journal: add_job(journal, [*queued(job), ended(job, at=5)]))
    with (
        closing(sqlite3.connect(tmp_path / FILE)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="only an unfinished job has claims"),
    ):
        connection.execute("INSERT INTO claims (job_id, access, path) VALUES ('bj-1', 'write', '/a')")


def test_of_many_jobs_on_an_image_one_is_stored(tmp_path: Path) -> None:
    """Asked for at once, on disks of their own, one wins, and all the others are refused with its id."""

    async def story(journal: SqliteJournal) -> None:
        jobs = [make_job(f"bj-{number}", disk=f"disk{number}") for number in range(30)]
        shared = Claim(Image("/base", (1, 2)), Access.WRITE)
        adds = [journal.add_jobs([new(job, shared, *claim(f"/{job.id}"))]) for job in jobs]
        answers = await asyncio.gather(*adds, return_exceptions=True)
        (winner,) = await journal.unfinished()
        refused = [answer for answer in answers if isinstance(answer, JobConflict)]
        assert len(refused) == 29
        assert {conflict.job_id for conflict in refused} == {winner.id}
        assert claimed(tmp_path) == [winner.id]

    run(tmp_path, story)


def test_several_jobs_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    """Where one of them can't be, nothing is left of the others: no job, claim, key, callback or event."""
    key = IdempotencyKey(who="ci", key="k", fingerprint="f")
    callback = Webhook(
        id="wh-1", url="http://a", types=frozenset(), job_id="bj-1", secret="s", created_at=1, created_by="ci"
    )
    first, second, third = (make_job(f"bj-{number}", disk=f"disk{number}") for number in (1, 2, 3))

    async def story(journal: SqliteJournal) -> None:
        heard = heard_by(journal)
        keyed = new(first, *claim("/a"), key=key, callback=callback)
        with pytest.raises(JobConflict) as conflict:
            await journal.add_jobs([keyed, new(second, *claim("/b")), new(third, *claim("/c", "/a"))])
        assert conflict.value.job_id == "bj-1"
        assert conflict.value.resource == Image("/a")
        assert await journal.unfinished() == []
        assert await journal.kept(key, since=0) is None
        assert await SqliteOutbox(journal, SetClock()).webhook("wh-1") is None
        assert heard == []
        assert claimed(tmp_path) == []
        await journal.add_jobs([keyed, new(second, *claim("/b")), new(third, *claim("/c"))])
        assert await journal.unfinished() == [first, second, third]
        assert [event.job_id for event in heard] == ["bj-1", "bj-2", "bj-3"]
        kept = await journal.kept(key, since=0)
        assert kept
        assert kept.job_id == "bj-1"

    run(tmp_path, story)


def test_steps_don_t_conflict_with_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's steps work on what it has claims on, and are listed by it; a stranger is refused."""
    parent, one, two = (make_job(f"bj-{number}") for number in (1, 2, 3))
    give_parents(monkeypatch, {"bj-2": "bj-1", "bj-3": "bj-1"})

    async def story(journal: SqliteJournal) -> None:
        await journal.add_jobs([new(parent, VDA, *claim("/a")), new(one, VDA, *claim("/a"))])
        with pytest.raises(JobConflict) as conflict:
            await journal.add_jobs([new(two, VDA)])
        assert conflict.value.job_id == "bj-2"
        with pytest.raises(JobConflict) as conflict:
            await journal.add_jobs([new(make_job("bj-9"), *claim("/a"))])
        assert conflict.value.job_id == "bj-1"
        await journal.store([ended(one, at=5)])
        await journal.add_jobs([new(two, VDA)])
        assert [job.id for job in await journal.jobs_of("bj-1")] == ["bj-2", "bj-3"]
        assert await journal.jobs_of("bj-2") == []
        listed, _ = await journal.jobs(JobFilter(parent="bj-1"))
        assert [job.id for job in listed] == ["bj-3", "bj-2"]
        listed, _ = await journal.jobs(JobFilter(parent="bj-1", active=True))
        assert [job.id for job in listed] == ["bj-3"]

    run(tmp_path, story)
