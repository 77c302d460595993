"""The arguments of plain routes: found by a shorter way, and the same as FastAPI's own finds."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator

from app.api import disks, domains, events, hooks, jobs, webhooks
from app.api.arguments import by_request_alone, plain_handler
from app.api.auth import Guarded, direct
from app.core.states import State


async def _host(request: Request) -> str:
    return request.headers["host"]


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


router = APIRouter()


@router.get("/items/{item}")
async def plain(
    item: Annotated[int, Path(), AfterValidator(_even)],
    host: Annotated[str, Depends(_host)],
    request: Request,
    *,
    limit: Annotated[int, Query(ge=1, le=9)] = 5,
    state: Annotated[State | None, Query()] = None,
    needed: Annotated[bool, Query()],
    x_first: Annotated[str, Header()] = "none",
    second: Annotated[int | None, Header(alias="X-Second", ge=0)] = None,
) -> Response:
    found = (item, host, request.method, limit, state, needed, x_first, second)
    return Response(repr(found))


@router.get("/defaults/{item}")
async def defaults(
    item: str, *, limit: Annotated[int, Query(ge=1)] = 5, x_first: Annotated[str, Header()] = "none"
) -> Response:
    return Response(repr((item, limit, x_first)))


class _Short(APIRoute):
    def get_route_handler(self) -> Any:
        handler = plain_handler(self.dependant, by_request_alone)
        assert handler is not None
        return handler


def _application(route_class: type[APIRoute]) -> FastAPI:
    application = FastAPI()
    for route in router.routes:
        assert isinstance(route, APIRoute)
        application.router.routes.append(route_class(route.path, route.endpoint, methods=["GET"]))
    return application


PATHS = ["/items/2", "/items/3", "/items/x", "/items/%00", "/defaults/a", "/defaults/%2F"]
QUERIES = [
    "",
    "needed=yes",
    "needed=maybe",
    "needed=1&limit=9",
    "needed=1&limit=10",
    "needed=1&limit=",
    "needed=1&limit=3&limit=4",
    "needed=1&state=ready",
    "needed=1&state=READY",
    "limit=many&state=none",
    "other=1",
]
HEADERS: list[dict[str, str]] = [
    {},
    {"X-First": "one"},
    {"X_First": "one"},
    {"X-Second": "2"},
    {"x-second": "-2"},
    {"X-SECOND": "two", "Other": "1"},
]


def test_the_same_as_by_fastapi() -> None:
    """Whatever is sent or missing, the answer is FastAPI's own."""

    async def ask(route_class: type[APIRoute]) -> list[tuple[int, str]]:
        transport = httpx.ASGITransport(_application(route_class))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            asked = [
                await client.get(f"{path}?{query}", headers=headers)
                for path in PATHS
                for query in QUERIES
                for headers in HEADERS
            ]
        return [(answer.status_code, answer.text) for answer in asked]

    short = asyncio.run(ask(_Short))
    assert {status for status, _ in short} == {200, 404, 422}
    assert short == asyncio.run(ask(APIRoute))


def test_which_routes_are_plain() -> None:
    """Those with a body, a stream or a model of their own are left to FastAPI."""
    routes = [route for module in (jobs, domains, disks, events, webhooks, hooks) for route in module.router.routes]
    found = {
        route.operation_id for route in routes if isinstance(route, Guarded) and plain_handler(route.dependant, direct)
    }
    assert found == {
        "listJobs",
        "getJob",
        "getJobHistory",
        "abortJob",
        "pivotJob",
        "pauseJob",
        "resumeJob",
        "listDomains",
        "listDisks",
        "listWebhooks",
        "listDeliveries",
    }


async def _with_body(body: Annotated[dict[str, int], Body()]) -> Response:
    return Response(str(body))


async def _with_response(response: Response) -> Response:
    return response


async def _with_a_model() -> dict[str, int]:
    return {}


async def _with_more(host: Annotated[str, Depends(lambda: "here")]) -> Response:
    return Response(host)


@pytest.mark.parametrize("endpoint", [_with_body, _with_response, _with_a_model, _with_more])
def test_what_is_not_plain(endpoint: Any) -> None:
    """A route that takes or gives anything else has no short way."""
    assert plain_handler(APIRoute("/", endpoint).dependant, by_request_alone) is None
