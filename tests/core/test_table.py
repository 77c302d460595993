from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from app.core.job import Job
from app.core.machine import table
from app.core.machine.inputs import Absent, Input, Launch, Observed, Pause, Pivot, Resume
from app.core.machine.step import Step
from app.core.machine.table import TRANSITIONS, IllegalMove, Row, step
from app.core.states import OnError, PauseReason, State
from tests.core import drawing
from tests.core.samples import PROCESS, Story, active_job
from tests.core.test_job import at, seen, started


def test_the_picture_is_the_table() -> None:
    """The page in the docs is drawn from the table; `python -m tests.core.drawing` makes it anew."""
    assert drawing.PAGE.read_text(encoding="utf-8") == drawing.page()
    assert drawing.WORDS.keys() == set(get_args(Input))


def test_a_handler_that_leads_elsewhere_is_a_mistake_of_ours() -> None:
    """What a row says is checked at each step, before anything is stored."""

    def lost(job: Job, _event: Input, _now: int) -> Step:
        return Step(replace(job, state=State.LOST))

    pair = (State.QUEUED, Launch)
    rows = {**TRANSITIONS, pair: Row(lost, TRANSITIONS[pair].leads_to)}
    before = table.TRANSITIONS
    table.TRANSITIONS = rows  # pyright: ignore[reportAttributeAccessIssue, reportConstantRedefinition]
    try:
        with pytest.raises(IllegalMove, match="queued with Launch leads to lost"):
            step(active_job(), Launch(), 200)
    finally:
        table.TRANSITIONS = before  # pyright: ignore[reportAttributeAccessIssue, reportConstantRedefinition]


@pytest.mark.parametrize("state", [State.READY, State.PIVOTING, State.ABORTING])
def test_a_job_that_is_taken_away_is_concluded_from_any_state(state: State) -> None:
    """Another client's dismissal is noticed whatever the job was doing."""
    following = step(at(state), Absent(), 200)
    assert (following.job.state, [str(command) for command in following.commands]) == (State.CONCLUDING, ["gather"])


@pytest.mark.parametrize(
    ("status", "state", "told"),
    [
        (seen("paused", io_status="nospace"), State.PAUSED, ["queued", "started", "paused"]),
        (seen("ready"), State.READY, ["queued", "started", "ready"]),
    ],
)
def test_a_start_whose_reply_was_lost_is_seen_late(status: Observed, state: State, told: list[str]) -> None:
    """The job may have come far until it is first seen; nothing in between is left out."""
    story = Story(active_job(on_error=OnError.ENOSPC))
    story.on(Launch(PROCESS))
    story.on(status)
    assert (story.job.state, story.told) == (state, told)


def test_a_pause_during_a_stopped_pivot_is_taken_back() -> None:
    """A pivot that an I/O error stopped is resumed elsewhere and paused here: to resume it goes on with the pivot."""
    story = started(active_job(on_error=OnError.ENOSPC))
    story.on(seen("ready"))
    story.on(Pivot())
    story.on(seen("standby", io_status="nospace"))
    assert story.job.pause_reason is PauseReason.NO_SPACE
    # The mirror has to copy again what did not fit.
    story.on(seen("running"))
    assert story.job.state is State.RUNNING
    story.on(Pause())
    assert story.on(Resume()) == ("resume", "pivot")
    assert story.job.state is State.PIVOTING
