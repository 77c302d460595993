"""Disks: their chains, and the merge of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Final

from fastapi import APIRouter, Body, Query, Request, Response

from app.api.auth import Guarded, Operator, Reader
from app.api.bodies import CommitIn
from app.api.codes import refusals
from app.api.idempotency import IfMatchHeader, KeyHeader, digests, request_key, served_once
from app.api.jobs import job_response
from app.api.pages import Cursor, Limit, cut_page, page_response
from app.api.problems import path_of
from app.api.requests import CHANGES, READS, DiskName, DomainId, UseCases
from app.api.schemas.disks import DiskOut, Disks, disk_json, disk_out
from app.api.schemas.jobs import JobOut
from app.api.schemas.plans import PlanOut, plan_out
from app.core.errors import Code, Problem, Refused
from app.core.kinds import commit
from app.engine.ports.outbox import Webhook
from app.engine.service import Service

router = APIRouter(route_class=Guarded, tags=["disks"])

MONITOR: Final = (Code.DOMAIN_NOT_FOUND, Code.MONITOR_UNREACHABLE, Code.MONITOR_BUSY)
"""What any request that needs the domain's monitor may be refused with."""

DISK: Final = (*MONITOR, Code.DISK_NOT_FOUND, Code.DISK_AMBIGUOUS)
"""What any request for one disk may be refused with."""

COMMIT: Final = (
    *CHANGES,
    Code.SHALLOW_WITH_BASE,
    *DISK,
    Code.DOMAIN_MANAGED_ELSEWHERE,
    Code.NOT_SUPPORTED,
    Code.DISK_EMPTY,
    Code.CHAIN_CHANGED,
    Code.IDEMPOTENCY_KEY_REUSED,
    Code.IDEMPOTENCY_IN_PROGRESS,
    Code.WEBHOOK_URL_REFUSED,
    Code.JOB_CONFLICT,
    Code.TOP_NOT_FOUND,
    Code.BASE_NOT_FOUND,
    Code.BASE_NOT_BELOW_TOP,
    Code.NO_BACKING,
    Code.ACTIVE_FLAG_REQUIRED,
    Code.TOP_NOT_ACTIVE,
    Code.DELETE_WITH_KEEP,
    Code.RELATIVE_IMPOSSIBLE,
    Code.TEMPORARY_OVERLAY,
    Code.IMAGE_SHARED,
    Code.IMAGE_LOCKED,
    Code.DOMAIN_MIGRATING,
    Code.NODE_IN_USE,
    Code.IMAGE_READ_ONLY,
    Code.IMAGE_CORRUPT,
    Code.SIZES_UNSAFE,
    Code.BASE_CANNOT_GROW,
    Code.OVERLAY_NOT_WRITABLE,
    Code.BACKING_FILE_IMPOSSIBLE,
    Code.BACKING_FILE_WRONG,
    Code.INSUFFICIENT_STORAGE,
    Code.QEMU_ERROR,
)
"""What a commit may be refused with."""


@router.get(
    "/domains/{domain}/disks",
    operation_id="listDisks",
    response_model=Disks,
    responses=refusals(*READS, *MONITOR),
)
async def list_disks(
    domain: DomainId, _who: Reader, use: UseCases, limit: Limit = 100, cursor: Cursor = None
) -> Response:
    """The disks of a domain, by target name, with their chains."""
    views, following = cut_page(await use.disks(domain), lambda view: view.disk.name, after=cursor, limit=limit)
    return page_response(map(disk_json, views), following)


async def made_callback(use: Service, body: CommitIn, who: str) -> Webhook | None:
    """The webhook of a job that is still to be made, or None; raises `Refused` if its URL may not be sent to."""
    if body.callback is None:
        return None
    return await use.webhooks.made(body.callback.url, (), body.callback.secret, who=who, pointer="/callback/url")


@router.post(
    "/domains/{domain}/disks/{disk:path}/commit",
    operation_id="commitBlocks",
    status_code=202,
    response_model=JobOut,
    responses={200: {"model": PlanOut, "description": "The plan, with `dry_run=true`"}, **refusals(*COMMIT)},
)
async def commit_blocks(
    domain: DomainId,
    disk: DiskName,
    body: Annotated[CommitIn, Body(default_factory=CommitIn)],
    who: Operator,
    use: UseCases,
    *,
    http: Request,
    if_match: IfMatchHeader = None,
    idempotency_key: KeyHeader = None,
    dry_run: Annotated[bool, Query(description="change nothing, and answer with the plan")] = False,
) -> Response:
    """Merge the layers from `top` down to the one above `base` into `base`, while the guest runs."""
    request = commit.request(**body.model_dump(exclude={"callback"}))
    if isinstance(request, Problem):
        raise Refused(request)
    request = replace(request, digests=digests(if_match))
    if dry_run:
        await made_callback(use, body, who.name)
        plan = plan_out(await use.plan("commit", domain, disk, request))
        return Response(plan.model_dump_json(), media_type="application/json")
    key = None
    if idempotency_key is not None:
        asked = {"domain": domain, "disk": disk, "if_match": if_match, "body": body.model_dump(mode="json")}
        key = request_key(idempotency_key, who=who.name, request=asked)

    async def serve() -> Response:
        callback = await made_callback(use, body, who.name)
        job = await use.start("commit", domain, disk, request, who=who.name, key=key, callback=callback)
        return job_response(job, status_code=202, headers={"Location": f"/jobs/{job.id}"})

    return await serve() if key is None else await served_once(use, key, path_of(http.scope), serve)


@router.get("/domains/{domain}/disks/{disk:path}", operation_id="getDisk", responses=refusals(*READS, *DISK))
async def get_disk(domain: DomainId, disk: DiskName, _who: Reader, use: UseCases, response: Response) -> DiskOut:
    """One disk and its chain. The `ETag` is the chain's digest."""
    found = disk_out(await use.disk(domain, disk))
    response.headers["ETag"] = f'"{found.digest}"'
    return found
