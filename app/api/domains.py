"""Domains: which domains are known, and how a domain is registered."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Path, Response

from app.api.auth import Admin, Guarded, Reader
from app.api.bodies import DomainIn
from app.api.codes import refusals
from app.api.pages import Cursor, Limit, cut_page, page_response
from app.api.requests import CHANGES, READS, DomainId, UseCases
from app.api.schemas.domains import DomainOut, Domains, domain_json, domain_out
from app.core.errors import Code

router = APIRouter(route_class=Guarded, tags=["domains"])

NewDomainId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="the domain's id")]


@router.get("/domains", operation_id="listDomains", response_model=Domains, responses=refusals(*READS))
async def list_domains(_who: Reader, use: UseCases, limit: Limit = 100, cursor: Cursor = None) -> Response:
    """Every known domain, by id."""
    views, following = cut_page(await use.domains(), lambda view: view.id, after=cursor, limit=limit)
    return page_response(map(domain_json, views), following)


@router.get("/domains/{domain}", operation_id="getDomain", responses=refusals(*READS, Code.DOMAIN_NOT_FOUND))
async def get_domain(domain: DomainId, _who: Reader, use: UseCases) -> DomainOut:
    """One domain."""
    return domain_out(await use.domain(domain))


@router.put(
    "/domains/{domain}",
    operation_id="registerDomain",
    responses={
        201: {"model": DomainOut, "description": "Registered; the domain is new"},
        **refusals(*CHANGES, Code.JOB_CONFLICT),
    },
)
async def register_domain(
    domain: NewDomainId, body: DomainIn, _who: Admin, use: UseCases, response: Response
) -> DomainOut:
    """Register a domain by its monitor, its images or both; again: register it anew."""
    view, new = await use.register(body.registration(domain))
    if new:
        response.status_code = 201
        response.headers["Location"] = f"/domains/{quote(domain)}"
    return domain_out(view)


@router.delete(
    "/domains/{domain}",
    operation_id="forgetDomain",
    status_code=204,
    responses=refusals(*CHANGES, Code.DOMAIN_NOT_FOUND, Code.JOB_CONFLICT),
)
async def forget_domain(domain: DomainId, _who: Admin, use: UseCases) -> None:
    """Forget a domain. QEMU and the images are left alone."""
    await use.forget(domain)
