from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.evidence import Judgement, Process
from app.core.job import Control, Progress
from app.core.machine.inputs import Absent, Gone, Observed
from app.core.reconcile import how_proven, leftovers, orphans, reconcile
from app.core.states import State
from tests.core.samples import PROCESS, active_job

RUNNING = Observed("running", Progress(current=1, end=2))
OTHER = Process(pid=4243, started=2000, uuid="4f4b6a5e-0000-4000-8000-000000000001")


@pytest.mark.parametrize("state", [state for state in State if state is not State.QUEUED])
def test_each_job_at_work_learns_what_qemu_says(state: State) -> None:
    """A job at work is listed, absent, or of a QEMU that is gone; a job that has ended gets nothing.

    What a listed job gets names the process that said so.
    """
    job = replace(active_job(), state=state, control=Control(process=PROCESS))
    seen = {job.id: RUNNING, "backup0": RUNNING}
    if job.ended:
        assert reconcile([job], seen, PROCESS) == []
        return
    assert reconcile([job], seen, PROCESS) == [(job, replace(RUNNING, process=PROCESS))]
    assert reconcile([job], {}, PROCESS) == [(job, Absent())]
    assert reconcile([job], seen, OTHER) == [(job, Gone())]


def test_a_queued_job_is_left_alone() -> None:
    """QEMU knows nothing of a job that waits, so what it lists says nothing about it."""
    assert reconcile([active_job()], {}, PROCESS) == []


def test_a_job_of_an_unknown_process_is_looked_up() -> None:
    """Before its process is known, a job is looked for in whichever QEMU answers."""
    job = replace(active_job(), state=State.STARTING)
    assert reconcile([job], {job.id: RUNNING}, OTHER) == [(job, replace(RUNNING, process=OTHER))]


def test_only_our_concluded_and_ended_jobs_are_leftovers() -> None:
    """A job is dismissed once its outcome is stored: not while it runs, nor when the journal does not know it."""
    concluded = Observed("concluded", Progress())
    ended = replace(active_job(), state=State.FAILED)
    seen = {"bj-1": concluded, "bj-2": concluded, "bj-3": RUNNING, "bj-4": concluded}
    jobs = {"bj-1": ended, "bj-3": ended, "bj-4": replace(ended, state=State.CONCLUDING)}
    assert leftovers(seen, jobs) == ["bj-1"]


def test_which_jobs_are_orphans() -> None:
    """A job with our prefix and without a record is an orphan; others' jobs are theirs."""
    assert orphans({"bj-2", "bj-1", "bj-3", "backup0", "commit-vda"}, {"bj-3"}) == ["bj-1", "bj-2"]


def test_how_an_outcome_is_proven() -> None:
    """What the judgement was read from, in its own words; a job without one was never in QEMU."""
    assert how_proven(active_job()) == "it was not in QEMU, and nothing had been merged"
    judged = Judgement(state=State.FAILED, because="QEMU had concluded it with the error: No medium")
    assert how_proven(replace(active_job(), control=Control(judgement=judged))) == judged.because
