from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.chain import Disk
from app.core.job import adopted
from app.core.kinds import adopt
from app.core.orphan import OrphanJob
from app.core.states import DataState, JobType, OnReady, State
from tests.core.samples import FILES, LAYERS, NODES, PROCESS, commit_spec, disk


def orphan(*, top: int, on: Disk | None = None, merged: tuple[str, ...] | None = None) -> OrphanJob:
    """A commit into base as QEMU's graph shows it, from the layer at `top` down."""
    nodes = NODES[top:3] if merged is None else merged
    held = {"base": ("n0",), "intermediate node": nodes} if top else {"target": ("n0",), "source": nodes}
    return OrphanJob(job_type="commit", speed=7, disks=(Disk(name="vdb"), on or disk()), held=held)


@pytest.mark.parametrize(("top", "type_"), [(0, JobType.ACTIVE_COMMIT), (1, JobType.COMMIT)])
def test_an_orphan_gets_a_record(top: int, type_: JobType) -> None:
    """A job without a record runs from now on as one that waits for a person, and deletes nothing."""
    plan = adopt(orphan(top=top))
    assert plan is not None
    job = adopted(plan, id_="bj-9", domain="web1", process=PROCESS, now=500)
    assert (job.id, job.domain, job.disk, job.type, job.version) == ("bj-9", "web1", "vda", type_, 1)
    assert (job.state, job.data_state, job.on_ready) == (State.RUNNING, DataState.BASE_MODIFIED, OnReady.WAIT)
    assert (job.top_file, job.base_file, job.overlay_file) == (FILES[top], FILES[3], FILES[0] if top else None)
    assert job.spec.flag_names == ([] if top else ["active"])
    assert (job.bandwidth, job.control.process, job.created_at, job.started_at) == (7, PROCESS, 500, 500)
    assert (job.requested_by, commit_spec(job).deletes) == ("unknown", ())
    assert [layer.node for layer in job.spec.merged] == list(NODES[top:3])


def test_layers_that_left_the_chain_are_put_back() -> None:
    """A merge that QEMU has carried out already is recorded on the chain as it was before."""
    shorter = disk(LAYERS[0], LAYERS[3])
    done = replace(orphan(top=1, on=shorter), loose={layer.node: layer for layer in LAYERS[1:3]})
    plan = adopt(done)
    assert plan is not None
    assert (plan.disk.files, plan.spec.top_index, plan.spec.base_index) == (FILES, 1, 3)


@pytest.mark.parametrize(
    "unclear",
    [
        replace(orphan(top=1), job_type="stream"),
        replace(orphan(top=1), held={}),
        replace(orphan(top=1), disks=(Disk(name="vdb"),)),
        orphan(top=1, merged=()),
        orphan(top=1, merged=("n0",)),
        orphan(top=1, on=disk(LAYERS[0], LAYERS[3])),
    ],
)
def test_what_the_graph_does_not_tell_is_left_alone(unclear: OrphanJob) -> None:
    """A job of another kind, without nodes, of no disk, or of layers that nobody knows any more gets no record."""
    assert adopt(unclear) is None
