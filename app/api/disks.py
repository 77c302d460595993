"""Disks: their chains, and the jobs on them."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Body, Query, Request, Response

from app.api.auth import Guarded, Operator, Reader
from app.api.bodies import CommitIn, PullIn
from app.api.codes import refusals
from app.api.idempotency import IfMatchHeader, KeyHeader
from app.api.pages import Cursor, Limit, cut_page, page_response
from app.api.problems import path_of
from app.api.requests import READS, DiskName, DomainId, UseCases
from app.api.schemas.disks import DiskOut, Disks, disk_json, disk_out
from app.api.schemas.jobs import JobOut
from app.api.schemas.plans import PlanOut
from app.api.verbs import COMMIT, DISK, MONITOR, PULL, Asked, answer_job

router = APIRouter(route_class=Guarded, tags=["disks"])

PLAN: Final = {"model": PlanOut, "description": "The plan, with `dry_run=true`"}

DryRun = Annotated[bool, Query(description="change nothing, and answer with the plan")]


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


@router.post(
    "/domains/{domain}/disks/{disk:path}/commit",
    operation_id="commitBlocks",
    status_code=202,
    response_model=JobOut,
    responses={200: PLAN, **refusals(*COMMIT)},
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
    dry_run: DryRun = False,
) -> Response:
    """Merge the layers from `top` down to the one above `base` into `base`, while the guest runs."""
    asked = Asked("commit", domain, disk, body, if_match)
    return await answer_job(use, asked, who.name, key=idempotency_key, path=path_of(http.scope), dry_run=dry_run)


@router.post(
    "/domains/{domain}/disks/{disk:path}/pull",
    operation_id="pullBlocks",
    status_code=202,
    response_model=JobOut,
    responses={200: PLAN, **refusals(*PULL)},
)
async def pull_blocks(
    domain: DomainId,
    disk: DiskName,
    body: Annotated[PullIn, Body(default_factory=PullIn)],
    who: Operator,
    use: UseCases,
    *,
    http: Request,
    if_match: IfMatchHeader = None,
    idempotency_key: KeyHeader = None,
    dry_run: DryRun = False,
) -> Response:
    """Copy into `top` what the layers between it and `base` have, while the guest runs; no image becomes invalid."""
    asked = Asked("pull", domain, disk, body, if_match)
    return await answer_job(use, asked, who.name, key=idempotency_key, path=path_of(http.scope), dry_run=dry_run)


@router.get("/domains/{domain}/disks/{disk:path}", operation_id="getDisk", responses=refusals(*READS, *DISK))
async def get_disk(domain: DomainId, disk: DiskName, _who: Reader, use: UseCases, response: Response) -> DiskOut:
    """One disk and its chain. The `ETag` is the chain's digest."""
    found = disk_out(await use.disk(domain, disk))
    response.headers["ETag"] = f'"{found.digest}"'
    return found
