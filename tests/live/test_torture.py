"""Merges under kills at random moments, in the short form of `make torture`; and the judge of it, who has to see."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from tests.torture.campaign import campaign
from tests.torture.judge import judge
from tests.torture.plan import How, plan_round
from tests.torture.records import DomainEnd, Record, Reply, Request

JSON = dict[str, Any]

SEED = 10
ROUNDS = 5
"""Of this seed, the first five rounds have faults of all kinds."""


@pytest.mark.live
@pytest.mark.timeout(300)
def test_random_kills(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is killed, stopped or cut off, and whenever: nothing is lost, doubled, or told wrongly."""
    done = campaign(SEED, ROUNDS)
    assert done.violations == 0, capsys.readouterr().out
    assert set(done.faults) == {how.value for how in How}
    assert all(done.faults.values())
    assert sum(done.outcomes.values()) > ROUNDS * 3


def test_a_seed_makes_a_plan() -> None:
    """The same seed and number make the same round; others make another one."""
    assert plan_round(1, 2) == plan_round(1, 2)
    assert plan_round(1, 2) != plan_round(1, 3) != plan_round(2, 3)
    hows = {fault.how for number in range(30) for fault in plan_round(7, number).faults}
    assert hows == set(How)


# The judge -----------------------------------------------------------------------------------------------------------

CHAIN = ("/3", "/2", "/1", "/0")


def a_job(number: int, state: str, *, top: str, base: str, **more: Any) -> JSON:
    result: JSON = {"chain": [], "invalidated": [], "deleted": [], "not_deleted": []}
    kind = "active-commit" if top == "/3" else "commit"
    job: JSON = {"id": f"bj-{number}", "domain": "vm", "type": kind, "state": state, "top": top, "base": base}
    job |= {"flags": [], "on_ready": "wait", "bandwidth": number, "version": 6, "error": None, "result": result}
    return job | more


def a_record() -> Record:
    """A merge below the active layer that has completed and deleted, then one of the active layer that was lost."""
    first = a_job(1, "completed", top="/2", base="/1", flags=["delete"])
    first["result"] |= {"chain": ["/3", "/1", "/0"], "invalidated": ["/2"], "deleted": ["/2"]}
    second = a_job(2, "lost", top="/3", base="/0", error={"code": "outcome-unknown"})
    second["result"] |= {"chain": ["/3", "/1", "/0"]}
    told = {
        "bj-1": ["queued", "started", "paused", "resumed", "completed"],
        "bj-2": ["queued", "started", "ready", "pivoting", "lost"],
    }
    streamed: list[JSON] = []
    for job in (first, second):
        for version, type_ in enumerate(told[job["id"]], 2):
            data = job if version == 6 else job | {"version": version}
            id_, name = str(10 + len(streamed)), f"job.{type_}"
            event = {"id": id_, "type": name, "subject": f"jobs/{job['id']}", "data": data}
            streamed.append({"id": id_, "event": name, "data": event})
    end = DomainEnd(
        name="vm",
        jobs=("bj-1", "bj-2"),
        images=CHAIN,
        graph=("/0",),
        headers=("/0",),
        there=frozenset({"/3", "/1", "/0"}),
        runs={"bj-1": 1, "bj-2": 1},
        qemu_ended=True,
    )
    return Record(
        after=9,
        requests=[
            Request(domain="vm", speed=1, body={}, status=202, answer={"id": "bj-1"}),
            Request(domain="vm", speed=2, body={}),
            Request(domain="vm", speed=3, body={}, status=409, answer={"code": "job-conflict"}),
            Request(domain="vm", speed=4, body={}),
        ],
        replies=[Reply(domain="vm", what="pivot", status=202, answer={})],
        jobs=[first, second],
        histories={id_: [e["data"] for e in streamed if e["data"]["subject"] == f"jobs/{id_}"] for id_ in told},
        streamed=streamed,
        journal=[(int(event["id"]), event["event"]) for event in streamed],
        ends=[end],
    )


def change_job(record: Record, number: int, **changes: Any) -> None:
    """Change a job, and all that shows how it is at its end."""
    # The record's parts share one dict for it.
    record.jobs[number].update(changes)


def ending(record: Record, number: int, state: str) -> None:
    """Have the job's events tell of another ending."""
    change_job(record, number, state=state, error=None)
    last = record.histories[record.jobs[number]["id"]][-1]
    last["type"] = f"job.{state}"
    at = next(at for at, event in enumerate(record.streamed) if event["id"] == last["id"])
    record.streamed[at]["event"] = last["type"]
    record.journal[at] = (record.journal[at][0], last["type"])


def everywhere(record: Record, at: int) -> None:
    """Take an event out of the stream, the journal and the history."""
    event = record.streamed.pop(at)
    del record.journal[at]
    for history in record.histories.values():
        history[:] = [told for told in history if told["id"] != event["id"]]


def retype(record: Record, at: int, type_: str) -> None:
    """Have an event be of another type, wherever it is told."""
    record.streamed[at]["event"] = record.streamed[at]["data"]["type"] = type_
    record.journal[at] = (record.journal[at][0], type_)


def set_end(record: Record, **changes: Any) -> None:
    """Have the domain be found otherwise."""
    for name, value in changes.items():
        setattr(record.ends[0], name, value)


def answer(record: Record, number: int, status: int, **answer_: Any) -> None:
    """Have a request be answered otherwise."""
    record.requests[number].status, record.requests[number].answer = status, answer_


def asked_twice(record: Record) -> None:
    """Have both jobs come from one request."""
    record.histories["bj-2"][0]["data"].update(bandwidth=1)


WRONG: dict[str, tuple[str, Callable[[Record], object]]] = {
    "completed and not merged": ("the jobs allow for", lambda r: set_end(r, graph=CHAIN, headers=CHAIN)),
    "failed and merged": ("failed, and its result has the chain", lambda r: ending(r, 0, "failed")),
    "canceled and merged": ("the jobs allow for", lambda r: ending(r, 1, "canceled")),
    "lost without need": ("can be proven", lambda r: set_end(r, qemu_ended=False)),
    "merged in the graph only": ("the headers", lambda r: set_end(r, headers=("/3", "/1", "/0"))),
    "an event twice": ("came after", lambda r: r.streamed.insert(3, r.streamed[3])),
    "an event missed": ("did not come", lambda r: r.streamed.pop(2)),
    "an id skipped": ("did not come", lambda r: everywhere(r, 2)),
    "the first event missed": ("did not come", lambda r: everywhere(r, 0)),
    "events in another order": ("came after", lambda r: r.streamed.reverse()),
    "an event that was not stored": ("the stream and the journal", lambda r: r.journal.pop()),
    "another event stored": ("the stream and the journal", lambda r: r.journal.__setitem__(4, (14, "job.failed"))),
    "a history that differs": ("the stream and the history", lambda r: r.histories["bj-1"].pop(1)),
    "two endings": ("job.completed after job.completed", lambda r: retype(r, 3, "job.completed")),
    "ready twice": ("job.ready after job.ready", lambda r: retype(r, 8, "job.ready")),
    "completed without a start": ("completed without", lambda r: retype(r, 1, "job.paused")),
    "a version that falls": ("do not rise", lambda r: r.histories["bj-1"][2]["data"].update(version=1)),
    "a job that goes on": ("has not ended", lambda r: change_job(r, 0, state="running")),
    "a job changed after its end": ("last event", lambda r: r.jobs.__setitem__(0, r.jobs[0] | {"version": 7})),
    "a job that nobody asked for": ("nobody asked", lambda r: r.requests.pop(0)),
    "two jobs for one request": ("several jobs", asked_twice),
    "an accepted request without a job": ("not in the journal", lambda r: answer(r, 3, 202, id="bj-4")),
    "a refused request with a job": ("was refused", lambda r: answer(r, 0, 409, code="job-conflict")),
    "an internal error": ("was answered 500", lambda r: answer(r, 2, 500, code="internal-error")),
    "an internal error of a wish": (
        "was answered 500",
        lambda r: r.replies.append(Reply(domain="vm", what="pause", status=500, answer={})),
    ),
    "a job left in QEMU": ("still has", lambda r: set_end(r, in_qemu=("bj-1",))),
    "two jobs in QEMU": ("run 2 times", lambda r: set_end(r, runs={"bj-1": 2})),
    "deleted without being told": ("without being told", lambda r: set_end(r, there=frozenset({"/3", "/0"}))),
    "told and not deleted": ("and there", lambda r: set_end(r, there=frozenset(CHAIN))),
    "deleted from the chain": ("still in the chain", lambda r: set_end(r, there=frozenset({"/3", "/1"}))),
    "asked to delete, and not done": ("were to be", lambda r: r.jobs[0]["result"].update(deleted=[])),
    "deleted unasked": ("were to be", lambda r: change_job(r, 0, flags=[])),
    "another chain in the result": ("its result has", lambda r: r.jobs[0]["result"].update(chain=list(CHAIN))),
    "completed without a result": ("without a result", lambda r: change_job(r, 0, result=None)),
    "lost without a word": ("without an error", lambda r: change_job(r, 1, error=None)),
    "a byte": ("a byte differs", lambda r: r.troubles.append("a byte differs")),
}
"""What is wrong, a part of what the judge has to say of it, and how a right record is made so."""


def test_a_right_record() -> None:
    """The judge has nothing against a round in which all was as it has to be."""
    assert judge(a_record()) == []


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_record(wrong: str) -> None:
    """The judge sees each thing that may be wrong, alone."""
    said, make = WRONG[wrong]
    record = deepcopy(a_record())
    make(record)
    assert any(said in violation for violation in judge(record))
