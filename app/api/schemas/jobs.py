"""The JSON of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from pydantic import Field

from app.api.problems import ProblemOut, problem_document
from app.api.schemas.base import Out, time_or_none, timestamp
from app.core.job import Job
from app.core.states import DataState, JobType, OnError, OnReady, PauseReason, State

KEPT_TEXTS: Final = 256
"""How many ended jobs have their JSON text cached."""


class ProgressOut(Out):
    """How far a job is."""

    current: int = Field(description="bytes done")
    end: int = Field(description="bytes in all; it may grow")
    percent: float = Field(description="100 only at `ready` or the end")
    rate: int = Field(description="bytes/s")
    eta: float | None = Field(description="seconds")


class NotDeletedOut(Out):
    """An image that `delete` left in place."""

    file: str
    reason: str


class ResultOut(Out):
    """What became of the chain."""

    chain: Sequence[str]
    invalidated: Sequence[str]
    deleted: Sequence[str]
    not_deleted: Sequence[NotDeletedOut]
    verified: int | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="bytes that were compared; only where `verify` asked for it",
    )
    unused: Sequence[str] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="files that the disk does not use any more, and whose content is right; not after a commit",
    )


class ResolutionOut(Out):
    """A person's verdict on a job that was lost."""

    by: str
    at: str


class JobOut(Out):
    """A block job."""

    id: str
    type: JobType
    state: State
    pause_reason: PauseReason | None
    domain: str
    disk: str
    top: str
    base: str | None = Field(description="null after a pull of everything below `top`")
    overlay: str | None = Field(description="the layer above `top`; null for the active layer")
    flags: Sequence[str]
    on_ready: OnReady
    on_error: OnError
    bandwidth: int = Field(description="bytes/s; 0: no limit")
    progress: ProgressOut
    data_state: DataState
    error: ProblemOut | None
    result: ResultOut | None
    requested_by: str
    actions: Sequence[str] = Field(description="requests that the job accepts now")
    created_at: str
    started_at: str | None
    ready_at: str | None
    finished_at: str | None
    version: int = Field(description="rises with each stored change; also the `ETag`")
    resolved: ResolutionOut | None = Field(
        default=None, exclude_if=lambda value: value is None, description="only after a person has judged a lost job"
    )


class Jobs(Out):
    """A page of jobs, newest first."""

    items: Sequence[JobOut]
    next: str | None


def job_out(job: Job) -> JobOut:
    """The JSON of a job."""
    result = job.result and ResultOut(
        chain=job.result.chain,
        invalidated=job.result.invalidated,
        deleted=job.result.deleted,
        verified=job.result.verified,
        unused=job.result.unused,
        not_deleted=[NotDeletedOut(file=left.file, reason=left.reason) for left in job.result.not_deleted],
    )
    done = job.progress
    return JobOut(
        id=job.id,
        type=job.type,
        state=job.state,
        pause_reason=job.pause_reason,
        domain=job.domain,
        disk=job.disk,
        top=job.top_file,
        base=job.base_file,
        overlay=job.overlay_file,
        flags=job.spec.flag_names,
        on_ready=job.on_ready,
        on_error=job.on_error,
        bandwidth=job.bandwidth,
        progress=ProgressOut(current=done.current, end=done.end, percent=job.percent, rate=done.rate, eta=done.eta),
        data_state=job.data_state,
        error=problem_document(job.error, f"/jobs/{job.id}") if job.error else None,
        result=result,
        requested_by=job.requested_by,
        actions=job.actions,
        created_at=timestamp(job.created_at),
        started_at=time_or_none(job.started_at),
        ready_at=time_or_none(job.ready_at),
        finished_at=time_or_none(job.finished_at),
        version=job.version,
        resolved=ResolutionOut(by=job.resolved.by, at=timestamp(job.resolved.at)) if job.resolved else None,
    )


def job_json(job: Job) -> str:
    """The JSON text of a job, in answers and in events alike."""
    return _text(_Same(job)) if job.ended else job_out(job).model_dump_json()


class _Same:
    """The key of a cached text. It equals only a key of the same object, so that comparing costs nothing."""

    __slots__ = ("job",)

    def __init__(self, job: Job) -> None:
        self.job = job

    def __hash__(self) -> int:
        return id(self.job)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.job is other.job


# The journal returns the same object for an ended job that was read recently.
@lru_cache(maxsize=KEPT_TEXTS)
def _text(same: _Same) -> str:
    return job_out(same.job).model_dump_json()
