from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.chain import Disk, Identity
from app.core.job import DataState, Intent, Job, OnReady, Process, Progress, Proof, State, Verdict
from app.core.machine.inputs import Absent, Gone, Observed
from app.core.reconcile import (
    how_proven,
    leftovers,
    prove,
    prove_by_header,
    reconcile,
    same_process,
    strays,
    uses_base,
    valid_layers,
)
from tests.core.samples import FILES, LAYERS, PROCESS, active_job, disk, intermediate_job

RUNNING = Observed("running", Progress(current=1, end=2))
OTHER = Process(pid=4243, started=2000, uuid="4f4b6a5e-0000-4000-8000-000000000001")


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (PROCESS, True),
        (None, True),
        (Process(pid=None, started=None, uuid=None), True),
        (replace(PROCESS, pid=1), False),
        (replace(PROCESS, started=1), False),
        (replace(PROCESS, uuid="other"), False),
        (replace(PROCESS, uuid=None), True),
        (replace(PROCESS, uuid=None, pid=1), False),
    ],
)
def test_which_process_is_the_same(other: Process | None, *, same: bool) -> None:
    """A pid, start time or uuid that both sides know and that differs tells processes apart, either way round."""
    assert same_process(PROCESS, other) is same
    assert same_process(other, PROCESS) is same


@pytest.mark.parametrize("state", [state for state in State if state is not State.QUEUED])
def test_each_job_at_work_learns_what_qemu_says(state: State) -> None:
    """A job at work is listed, absent, or of a QEMU that is gone; a job that has ended gets nothing.

    What a listed job gets names the process that said so.
    """
    job = replace(active_job(), state=state, process=PROCESS)
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


@pytest.mark.parametrize(
    ("job", "chain", "proof"),
    [
        (active_job(), ("n0",), Proof.MERGED),
        (active_job(), ("snap", "n0"), Proof.MERGED),
        (active_job(), ("n3", "n2", "n1", "n0"), Proof.UNCHANGED),
        (active_job(), ("snap", "n3", "n2", "n1", "n0"), Proof.UNCHANGED),
        (active_job(), ("n3", "n0"), Proof.UNKNOWN),
        (active_job(), ("n2", "n1", "n0"), Proof.UNKNOWN),
        (active_job(), ("n2", "n3", "n1", "n0"), Proof.UNKNOWN),
        (active_job(), ("other",), Proof.UNKNOWN),
        (active_job(), (), Proof.UNKNOWN),
        (intermediate_job(), ("n3", "n0"), Proof.MERGED),
        (intermediate_job(), ("n3", "n2", "n1", "n0"), Proof.UNCHANGED),
        (intermediate_job(), ("n3", "n2", "n0"), Proof.UNKNOWN),
        (intermediate_job(), ("n3", "n2", "n1"), Proof.UNKNOWN),
        (intermediate_job(), ("n2", "n1", "new", "n0"), Proof.UNKNOWN),
    ],
)
def test_what_the_chain_proves(job: Job, chain: tuple[str, ...], proof: Proof) -> None:
    """Merged: the merged layers are gone and the base is there. Unchanged: all are there in order. Else it is open."""
    assert prove(job, chain, nodes=True) is proof
    files = dict(zip(job.work.nodes, job.work.chain, strict=True))
    assert prove(job, tuple(files.get(node, node) for node in chain), nodes=False) is proof


@pytest.mark.parametrize(
    ("backing", "proof"),
    [
        ("/images/base.qcow2", Proof.MERGED),
        ("/images/../images/base.qcow2", Proof.MERGED),
        ("/images/s2.qcow2", Proof.UNCHANGED),
        ("/images/./s2.qcow2", Proof.UNCHANGED),
        ("/images/s1.qcow2", Proof.UNKNOWN),
        (None, Proof.UNKNOWN),
    ],
)
def test_what_the_overlays_header_proves(backing: str | None, proof: Proof) -> None:
    """QEMU writes the overlay's header at the end of an inner merge, so the header tells on which side it died."""
    assert prove_by_header(intermediate_job(), backing) is proof


@pytest.mark.parametrize(
    ("identity", "proof"),
    [((1, 0), Proof.MERGED), ((1, 2), Proof.UNCHANGED), ((1, 1), Proof.UNKNOWN), (None, Proof.UNKNOWN)],
)
def test_the_header_leads_to_a_file_whatever_it_calls_it(identity: Identity | None, proof: Proof) -> None:
    """A link or `..` in the header leads to the base, or to the top, all the same."""
    job = intermediate_job()
    job = replace(job, work=replace(job.work, identities=((1, 3), (1, 2), (1, 1), (1, 0))))
    assert prove_by_header(job, "/links/image.qcow2", identity) is proof


@pytest.mark.parametrize(
    ("intent", "verdict", "proof"),
    [
        (Intent.RUN, Verdict.GONE, Proof.UNCHANGED),
        (Intent.ABORT, Verdict.GONE, Proof.UNCHANGED),
        (Intent.ABORT, Verdict.FINE, Proof.UNCHANGED),
        (Intent.FORCE, Verdict.GONE, Proof.UNCHANGED),
        (Intent.RUN, Verdict.FINE, Proof.UNKNOWN),
        (Intent.PIVOT, Verdict.GONE, Proof.UNKNOWN),
        (Intent.PIVOT, Verdict.FINE, Proof.UNKNOWN),
        (Intent.KEEP, Verdict.GONE, Proof.UNKNOWN),
    ],
)
def test_no_header_tells_of_a_pivot(intent: Intent, verdict: Verdict, proof: Proof) -> None:
    """With QEMU gone, the images show an active layer as unmerged only if nobody can have pivoted."""
    assert prove_by_header(replace(active_job(), intent=intent, verdict=verdict), None) is proof


# Layers that a merge has touched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "valid"),
    [
        (active_job(), (True, False, False, True)),
        (intermediate_job(), (True, False, False, True)),
        (replace(active_job(), on_ready=OnReady.KEEP, state=State.COMPLETED), (True, False, False, True)),
    ],
)
def test_layers_between_top_and_a_modified_base_are_not_valid(job: Job, valid: tuple[bool, ...]) -> None:
    """Once the base is written to, the images on it show a mixture; the active layer and the base itself do not."""
    assert valid_layers(disk(), [job]) == (True,) * 4
    assert valid_layers(disk(), [replace(job, data_state=DataState.BASE_MODIFIED)]) == valid


def test_layers_above_top_stay_valid() -> None:
    """A layer that was not to be merged is not marked, nor is one of a chain that has lost the job's base."""
    job = replace(intermediate_job(), data_state=DataState.BASE_MODIFIED)
    snapshot = replace(LAYERS[0], file="/images/s4.qcow2", node="n4")
    assert valid_layers(disk(snapshot, *LAYERS), [job]) == (True, True, False, False, True)
    assert valid_layers(disk(*LAYERS[:3]), [job]) == (True, True, True)
    assert valid_layers(disk(), []) == (True,) * 4


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


def test_which_jobs_are_strays() -> None:
    """A job with our prefix and without a record is a stray; others' jobs are theirs."""
    assert strays({"bj-2", "bj-1", "bj-3", "backup0", "commit-vda"}, {"bj-3"}) == ["bj-1", "bj-2"]


@pytest.mark.parametrize(
    ("verdict", "state", "words"),
    [
        (None, State.FAILED, "it was not in QEMU, and nothing had been merged"),
        (Verdict.FINE, State.COMPLETED, "concluded it without error; QEMU's block graph showed the merged layers gone"),
        (Verdict.ERROR, State.FAILED, "concluded it with the error: No medium"),
        (Verdict.VANISHED, State.FAILED, "did not list it any more; QEMU's block graph showed the chain unchanged"),
        (Verdict.GONE, State.COMPLETED, "its QEMU had ended; the images' headers showed the merged layers gone"),
        (Verdict.GONE, State.LOST, "its QEMU had ended; the images' headers and that together prove no outcome"),
    ],
)
def test_how_an_outcome_is_proven(verdict: Verdict | None, state: State, words: str) -> None:
    """QEMU's last word and where the chain was read, in words."""
    job = replace(active_job(), state=state, verdict=verdict, verdict_error="No medium")
    assert words in how_proven(job)
    kept = replace(active_job(on_ready=OnReady.KEEP), state=State.COMPLETED, verdict=Verdict.FINE, intent=Intent.KEEP)
    assert "showed the chain unchanged" in how_proven(kept)
