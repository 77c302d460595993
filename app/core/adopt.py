"""A block job of ours that the journal does not know, after it was restored from a backup: its record, made anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from app.core.chain import Disk
from app.core.flags import CommitFlag
from app.core.job import DataState, Job, Process, State
from app.core.plan import CommitRequest, Facts, Plan, Selection, plan_commit

UNKNOWN: Final = "unknown"
"""Who has requested a job whose record is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanJob:
    """What a job works on, as QEMU's block graph shows it.

    `disk` is as it was before the job; `top` and `base` are positions in its chain, `bandwidth` is in bytes/s.
    """

    disk: Disk
    top: int
    base: int
    bandwidth: int


def adopt(stray: OrphanJob, *, id_: str, domain: str, process: Process, now: int) -> Job:
    """The record of a job that QEMU has, running; `now` is in ms since 1970.

    What its request said beyond the layers is lost with its first record, so the job gets the defaults that do no
    harm: at `ready` it waits for a person, and no file is deleted.
    """
    flags = CommitFlag.ACTIVE if stray.top == 0 else CommitFlag(0)
    request = CommitRequest(bandwidth=stray.bandwidth, flags=flags)
    plan = plan_commit(Selection(disk=stray.disk, request=request, top=stray.top, base=stray.base), Facts())
    # Without facts nothing speaks against the base, which QEMU is writing to anyway.
    assert isinstance(plan, Plan)
    job = plan.job(id_=id_, domain=domain, requested_by=UNKNOWN, now=now)
    return replace(
        job, state=State.RUNNING, process=process, started_at=now, data_state=DataState.BASE_MODIFIED, version=1
    )
