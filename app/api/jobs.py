"""Jobs: how far they are, and how they are steered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Response

from app.api.auth import Admin, Guarded, Operator, Reader
from app.api.bodies import PatchJobIn, ResolveIn
from app.api.cloudevents import Events, event_json
from app.api.codes import refusals
from app.api.pages import Limit, NumberCursor, cut_page, page_response
from app.api.requests import CHANGES, READS, JobId, UseCases
from app.api.schemas.jobs import JobOut, Jobs, job_json
from app.core.errors import Code, Problem, Refused
from app.core.flags import SpeedFlag, bandwidth_in_bytes, parse_flags
from app.core.job import Job
from app.core.states import State
from app.engine.ports.journal import JobFilter

router = APIRouter(route_class=Guarded, tags=["jobs"])

STEER: Final = (*CHANGES, Code.JOB_NOT_FOUND, Code.JOB_FINISHED, Code.MONITOR_UNREACHABLE, Code.QEMU_ERROR)
"""What any change of a job may be refused with."""

WAIT_MAX: Final = 60
"""The longest wait for a job, in seconds."""

WAIT: Final = re.compile(r'(?:^|,)\s*wait\s*=\s*"?(?P<seconds>[0-9]{1,9})"?\s*(?=[,;]|$)', re.IGNORECASE)
"""The preference `wait` in a `Prefer` header (RFC 7240). Preferences that the service does not know are ignored."""


def job_response(job: Job, *, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that carries a job; its version is the `ETag`."""
    sent = {"ETag": f'"{job.version}"', **(headers or {})}
    return Response(job_json(job), status_code=status_code, headers=sent, media_type="application/json")


@router.get("/jobs", operation_id="listJobs", response_model=Jobs, responses=refusals(*READS))
async def list_jobs(
    _who: Reader,
    use: UseCases,
    *,
    domain: Annotated[str | None, Query(description="of this domain")] = None,
    disk: Annotated[str | None, Query(description="of this disk, by target name")] = None,
    state: Annotated[State | None, Query(description="in this state")] = None,
    active: Annotated[bool | None, Query(description="unfinished, or ended")] = None,
    limit: Limit = 100,
    cursor: NumberCursor = None,
) -> Response:
    """Jobs, newest first."""
    wanted = JobFilter(domain=domain, disk=disk, state=state, active=active, before=cursor, limit=limit)
    jobs, following = await use.jobs(wanted)
    return page_response(map(job_json, jobs), following)


@router.get(
    "/jobs/{job_id}",
    operation_id="getJob",
    response_model=JobOut,
    responses=refusals(*READS, Code.JOB_NOT_FOUND),
)
async def get_job(
    job_id: JobId,
    _who: Reader,
    use: UseCases,
    prefer: Annotated[str | None, Header(description="`wait=SECONDS`, at most 60")] = None,
) -> Response:
    """One job. With `Prefer: wait=SECONDS`: once it has ended, is ready or paused, or the seconds are over."""
    wait = WAIT.search(prefer or "")
    if wait is None:
        return job_response(await use.job(job_id))
    seconds = min(int(wait["seconds"]), WAIT_MAX)
    return job_response(await use.wait(job_id, seconds), headers={"Preference-Applied": f"wait={seconds}"})


@router.get(
    "/jobs/{job_id}/history",
    operation_id="getJobHistory",
    response_model=Events,
    responses=refusals(*READS, Code.JOB_NOT_FOUND),
)
async def get_history(
    job_id: JobId, _who: Reader, use: UseCases, limit: Limit = 100, cursor: NumberCursor = None
) -> Response:
    """The stored events of a job, oldest first."""
    events, following = cut_page(await use.history(job_id), lambda event: event.id or 0, after=cursor, limit=limit)
    return page_response(map(event_json, events), following)


@router.delete(
    "/jobs/{job_id}",
    operation_id="abortJob",
    status_code=202,
    response_model=JobOut,
    responses={
        200: {"model": JobOut, "description": "It was aborting or canceled already"},
        **refusals(*STEER, Code.JOB_PIVOTING),
    },
)
async def abort_job(
    job_id: JobId,
    _who: Operator,
    use: UseCases,
    force: Annotated[bool, Query(description="cancel without waiting for a consistent copy")] = False,
) -> Response:
    """End a job without merging. At `ready` the overlay stays active, and `base` is a copy as of that moment."""
    job, begun = await use.abort(job_id, force=force)
    return job_response(job, status_code=202 if begun else 200)


@router.post(
    "/jobs/{job_id}/pivot",
    operation_id="pivotJob",
    status_code=202,
    response_model=JobOut,
    responses=refusals(*STEER, Code.JOB_NOT_READY, Code.JOB_NOT_PIVOTABLE),
)
async def pivot_job(job_id: JobId, _who: Operator, use: UseCases) -> Response:
    """Move the guest onto the base of a ready merge of the active layer."""
    return job_response(await use.pivot(job_id), status_code=202)


@router.post(
    "/jobs/{job_id}/pause",
    operation_id="pauseJob",
    status_code=202,
    response_model=JobOut,
    responses=refusals(*STEER, Code.JOB_NOT_PAUSABLE),
)
async def pause_job(job_id: JobId, _who: Operator, use: UseCases) -> Response:
    """Pause a running job."""
    return job_response(await use.pause(job_id), status_code=202)


@router.post(
    "/jobs/{job_id}/resume",
    operation_id="resumeJob",
    status_code=202,
    response_model=JobOut,
    responses=refusals(*STEER, Code.JOB_NOT_PAUSED),
)
async def resume_job(job_id: JobId, _who: Operator, use: UseCases) -> Response:
    """Have a paused job go on."""
    return job_response(await use.resume(job_id), status_code=202)


@router.post(
    "/jobs/{job_id}/resolve",
    operation_id="resolveJob",
    response_model=JobOut,
    responses=refusals(*CHANGES, Code.JOB_NOT_FOUND, Code.JOB_NOT_LOST),
)
async def resolve_job(job_id: JobId, body: ResolveIn, who: Admin, use: UseCases) -> Response:
    """Record a person's verdict on a lost job, with the name of their token. No image is touched."""
    return job_response(await use.resolve(job_id, State(body.outcome), who=who.name))


@router.patch("/jobs/{job_id}", operation_id="setJobSpeed", response_model=JobOut, responses=refusals(*STEER))
async def set_speed(job_id: JobId, body: PatchJobIn, _who: Operator, use: UseCases) -> Response:
    """Give a job another speed."""
    flags = parse_flags(body.flags, SpeedFlag)
    if isinstance(flags, Problem):
        raise Refused(flags)
    bandwidth = bandwidth_in_bytes(body.bandwidth, in_bytes=SpeedFlag.BANDWIDTH_BYTES in flags)
    if isinstance(bandwidth, Problem):
        raise Refused(bandwidth)
    return job_response(await use.set_speed(job_id, bandwidth))
