from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.chain import Disk
from app.core.evidence import Judgement, Process
from app.core.job import Control, Progress
from app.core.machine.inputs import Absent, Gone, Observed
from app.core.reconcile import how_proven, leftovers, orphans, reconcile, uses_base
from app.core.states import State
from tests.core.samples import FILES, LAYERS, PROCESS, active_job, disk

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


# Who uses an image --------------------------------------------------------------------------------------------------


def test_who_else_uses_a_base() -> None:
    """Another disk with the base anywhere in its chain is changed by a merge into it."""
    other = Disk(name="vda", layers=(replace(LAYERS[0], file="/other"), LAYERS[3]))
    assert uses_base(other, disk(), LAYERS[3])
    assert not uses_base(other, disk(), LAYERS[1])
    assert not uses_base(Disk(name="vda"), disk(), LAYERS[3])


def test_the_same_disk_seen_twice_is_no_other_user() -> None:
    """A disk with the same active layer, by path or by file, is this very disk under another registration."""
    assert not uses_base(disk(), disk(), LAYERS[3])
    seen = disk(*(replace(layer, identity=(1, inode)) for inode, layer in enumerate(LAYERS)))
    elsewhere = disk(*(replace(layer, file=f"/mnt{layer.file}") for layer in seen.layers))
    assert not uses_base(elsewhere, seen, seen.layers[3])


def test_a_base_is_told_by_its_file() -> None:
    """One file under two paths is one base; two files under one path, seen from two places, are two."""
    base = replace(LAYERS[3], identity=(1, 3))
    top = replace(LAYERS[0], file="/other", identity=(1, 9))
    mine = disk(*LAYERS[:3], base)
    assert uses_base(Disk(name="vda", layers=(top, replace(base, file="/link"))), mine, base)
    assert not uses_base(Disk(name="vda", layers=(top, replace(base, identity=(2, 3)))), mine, base)
    assert FILES[3] == base.file


def test_which_jobs_are_orphans() -> None:
    """A job with our prefix and without a record is an orphan; others' jobs are theirs."""
    assert orphans({"bj-2", "bj-1", "bj-3", "backup0", "commit-vda"}, {"bj-3"}) == ["bj-1", "bj-2"]


def test_how_an_outcome_is_proven() -> None:
    """What the judgement was read from, in its own words; a job without one was never in QEMU."""
    assert how_proven(active_job()) == "it was not in QEMU, and nothing had been merged"
    judged = Judgement(state=State.FAILED, because="QEMU had concluded it with the error: No medium")
    assert how_proven(replace(active_job(), control=Control(judgement=judged))) == judged.because
