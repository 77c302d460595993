"""The JSON of the API, and the plain functions that make it from the values of the core."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.problems import ProblemOut, problem_document
from app.core.flags import flag_names
from app.core.job import DataState, Job, JobType, OnError, OnReady, PauseReason, State
from app.core.plan import Plan
from app.core.qmp import block_commit_arguments
from app.engine.recovery import Found, Recovery
from app.engine.views import DiskView, DomainState, DomainView

KEPT_TEXTS: Final = 256
"""Ended jobs whose texts are kept."""


def timestamp(ms: int) -> str:
    """ISO 8601 in UTC with milliseconds, from milliseconds since 1970."""
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{ms % 1000:03d}Z"


def time_or_none(ms: int | None) -> str | None:
    """As `timestamp`, where there may be no time."""
    return None if ms is None else timestamp(ms)


class Out(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(frozen=True)


class IgnoredOut(Out):
    """A delivery that starts nothing."""

    ignored: str = Field(description="why it is not meant")


class QemuOut(Out):
    """The QEMU behind a monitor."""

    version: str | None
    pid: int | None


class DomainOut(Out):
    """A domain."""

    id: str
    name: str
    uuid: str | None
    state: DomainState
    driver: Literal["qmp"] = "qmp"
    qemu: QemuOut | None
    managed_by: str | None = Field(description="`libvirt`, or null")
    error: ProblemOut | None
    disks: Sequence[str] = Field(description="target names")


class LayerOut(Out):
    """One image of a chain. Sizes in bytes."""

    index: int
    file: str
    format: str
    node: str
    virtual_size: int
    actual_size: int
    backing: str | None = Field(description="the string in the image's own header")
    valid: bool = Field(description="false once a commit has modified the layer below and has not finished")


class DiskOut(Out):
    """A disk and its chain, active layer first."""

    name: str
    aliases: Sequence[str]
    node: str | None
    read_only: bool
    virtual_size: int
    chain: Sequence[LayerOut]
    digest: str = Field(description="another one whenever the chain is another; also the `ETag`")
    job: str | None = Field(description="the unfinished job on this disk")


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
    base: str
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
    actions: Sequence[str] = Field(description="what the job takes now")
    created_at: str
    started_at: str | None
    ready_at: str | None
    finished_at: str | None
    version: int = Field(description="rises with each stored change; also the `ETag`")
    resolved: ResolutionOut | None = Field(
        default=None, exclude_if=lambda value: value is None, description="there where a person has judged the outcome"
    )


class WarningOut(Out):
    """Something to know before the job runs."""

    code: str
    detail: str


class CommandOut(Out):
    """What QEMU will be told, but for the job's id."""

    execute: Literal["block-commit"] = "block-commit"
    arguments: dict[str, object]


class PlanOut(Out):
    """What a commit would do. Sizes in bytes."""

    type: JobType
    disk: str
    top: str
    base: str
    overlay: str | None
    flags: Sequence[str]
    chain_before: Sequence[str]
    chain_after: Sequence[str]
    invalidates: Sequence[str] = Field(description="files that must not be used any more")
    deletes: Sequence[str]
    bytes_to_copy: int
    base_growth_max: int
    free: int | None = Field(description="on the file system of `base`; null where the service can't see it")
    resizes_base_to: int | None
    backing_file: str | None = Field(description="what the header of `overlay` will say")
    warnings: Sequence[WarningOut]
    qmp: CommandOut


class Domains(Out):
    """A page of domains."""

    items: Sequence[DomainOut]
    next: str | None


class Disks(Out):
    """A page of disks."""

    items: Sequence[DiskOut]
    next: str | None


class Jobs(Out):
    """A page of jobs, newest first."""

    items: Sequence[JobOut]
    next: str | None


class FindingOut(Out):
    """A job as it was found after the service's start."""

    job: str
    domain: str
    disk: str | None
    found: Found = Field(
        description="`waiting`: its QEMU has not been asked yet; `queued`; `started`: QEMU had not heard of it; "
        "`re-adopted`: it goes on; `finished` while no service was there; `lost`; `adopted`: the journal did not know "
        "it; `unknown`: neither does anybody tell what it works on, so it is left alone"
    )
    state: State | None = Field(description="its state when it was found")
    proof: str | None = Field(description="how the outcome of a finished job is known")
    at: str


class RecoveryOut(Out):
    """What was found after the service's start."""

    started_at: str
    waiting: int = Field(description="how many jobs' QEMUs have not been asked yet; 0: this is all")
    items: Sequence[FindingOut]
    next: str | None


class HealthOut(Out):
    """That the service is up, and what was checked."""

    status: Literal["ok"] = "ok"
    checks: dict[str, str] = {}


def domain_out(view: DomainView) -> DomainOut:
    """The JSON of a domain."""
    seen = view.version is not None or view.pid is not None
    return DomainOut(
        id=view.id,
        name=view.name,
        uuid=view.uuid,
        state=view.state,
        qemu=QemuOut(version=view.version, pid=view.pid) if seen else None,
        managed_by=view.managed_by,
        error=problem_document(view.error, f"/domains/{view.id}") if view.error else None,
        disks=view.disks,
    )


def disk_out(view: DiskView) -> DiskOut:
    """The JSON of a disk."""
    disk = view.disk
    chain = [
        LayerOut(
            index=index,
            file=layer.file,
            format=layer.format,
            node=layer.node,
            virtual_size=layer.virtual_size,
            actual_size=layer.actual_size,
            backing=layer.backing,
            valid=valid,
        )
        for index, (layer, valid) in enumerate(zip(disk.layers, view.valid, strict=True))
    ]
    return DiskOut(
        name=disk.name,
        aliases=disk.aliases,
        node=disk.node,
        read_only=disk.read_only,
        virtual_size=disk.virtual_size,
        chain=chain,
        digest=disk.digest,
        job=view.job,
    )


def job_out(job: Job) -> JobOut:
    """The JSON of a job."""
    result = job.result and ResultOut(
        chain=job.result.chain,
        invalidated=job.result.invalidated,
        deleted=job.result.deleted,
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
        top=job.top,
        base=job.base,
        overlay=job.overlay,
        flags=flag_names(job.flags),
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


def recovery_out(recovery: Recovery) -> RecoveryOut:
    """The JSON of a recovery report."""
    findings = recovery.findings
    return RecoveryOut(
        started_at=timestamp(recovery.started_at),
        waiting=sum(finding.found is Found.WAITING for finding in findings),
        items=[
            FindingOut(
                job=finding.job_id,
                domain=finding.domain,
                disk=finding.disk,
                found=finding.found,
                state=finding.state,
                proof=finding.proof,
                at=timestamp(finding.at),
            )
            for finding in findings
        ],
        next=None,
    )


def plan_out(plan: Plan) -> PlanOut:
    """The JSON of a dry run."""
    chosen = plan.selection
    disk, request, overlay = chosen.disk, chosen.request, chosen.overlay
    top = disk.layers[chosen.top]
    arguments = block_commit_arguments(
        device=disk.node or "",
        top_node=top.node,
        base_node=chosen.base_layer.node,
        backing_file=plan.backing_file,
        speed=request.bandwidth,
        on_error=request.on_error.value,
    )
    return PlanOut(
        type=plan.type,
        disk=disk.name,
        top=top.file,
        base=chosen.base_layer.file,
        overlay=overlay.file if overlay else None,
        flags=flag_names(request.flags),
        chain_before=disk.files,
        chain_after=plan.chain_after,
        invalidates=plan.invalidates,
        deletes=plan.deletes,
        bytes_to_copy=plan.bytes_to_copy,
        base_growth_max=plan.base_growth_max,
        free=plan.free,
        resizes_base_to=plan.resizes_base_to,
        backing_file=plan.backing_file,
        warnings=[WarningOut(code=warning.code, detail=warning.detail) for warning in plan.warnings],
        qmp=CommandOut(arguments=arguments),
    )


def job_json(job: Job) -> str:
    """The JSON text of a job, in answers and in events alike."""
    return _text(_Same(job)) if job.ended else job_out(job).model_dump_json()


class _Same:
    """Equals only what holds the very same value, so that it costs nothing to compare."""

    __slots__ = ("job",)

    def __init__(self, job: Job) -> None:
        self.job = job

    def __hash__(self) -> int:
        return id(self.job)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.job is other.job


# What has ended changes no more, and the journal keeps what was asked for last.
@lru_cache(maxsize=KEPT_TEXTS)
def _text(same: _Same) -> str:
    return job_out(same.job).model_dump_json()


def domain_json(view: DomainView) -> str:
    """The JSON text of a domain, in answers and in events alike."""
    return domain_out(view).model_dump_json()
