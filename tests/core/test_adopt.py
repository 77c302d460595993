from __future__ import annotations

import pytest

from app.core.adopt import OrphanJob, adopt
from app.core.flags import CommitFlag
from app.core.job import DataState, JobType, OnReady, State
from tests.core.samples import FILES, LAYERS, NODES, PROCESS, disk


@pytest.mark.parametrize(("top", "kind"), [(0, JobType.ACTIVE_COMMIT), (1, JobType.COMMIT)])
def test_a_stray_gets_a_record(top: int, kind: JobType) -> None:
    """A job without a record runs from now on as one that waits for a person, and deletes nothing."""
    stray = OrphanJob(disk=disk(*LAYERS), top=top, base=3, bandwidth=7)
    job = adopt(stray, id_="bj-9", domain="web1", process=PROCESS, now=500)
    assert (job.id, job.domain, job.disk, job.type, job.version) == ("bj-9", "web1", "vda", kind, 1)
    assert (job.state, job.data_state, job.on_ready) == (State.RUNNING, DataState.BASE_MODIFIED, OnReady.WAIT)
    assert (job.top, job.base, job.overlay) == (FILES[top], FILES[3], FILES[0] if top else None)
    assert job.flags == (CommitFlag(0) if top else CommitFlag.ACTIVE)
    assert (job.bandwidth, job.process, job.created_at, job.started_at) == (7, PROCESS, 500, 500)
    assert (job.requested_by, job.work.deletes, job.work.merged_nodes) == ("unknown", (), NODES[top:3])
