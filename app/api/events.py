"""Streams of server-sent events.

The 200 of a stream is sent before its first event is known, so every refusal has to come from a dependency.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.dependencies.utils import solve_dependencies
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event

from app.api.arguments import Handler
from app.api.auth import Guarded, Reader
from app.api.cloudevents import TYPES, event_json
from app.api.codes import refusals
from app.api.problems import invalid_parameter
from app.api.requests import INTEGER_MAX, READS, DomainId, JobId, UseCases
from app.core.errors import Code, Refused
from app.engine.ports.events import EventFilter, StoredEvent
from app.engine.service import Service

HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""The headers of FastAPI's own streams. They tell proxies to pass on each event at once."""


class Streamed(Guarded):
    """A route whose endpoint yields the bytes of events. The task that waits for an event also sends it.

    FastAPI would pass events through two tasks and two queues for each stream, and start a timer for each event.
    """

    def handler(self) -> Handler:
        """The function that opens a stream."""

        async def open_stream(request: Request) -> Response:
            solved = await solve_dependencies(
                request=request,
                dependant=self.dependant,
                async_exit_stack=request.scope["fastapi_inner_astack"],
                embed_body_fields=False,
            )
            if solved.errors:
                raise RequestValidationError(solved.errors)
            return StreamingResponse(
                self.endpoint(**solved.values), media_type=EventSourceResponse.media_type, headers=HEADERS
            )

        return open_stream


router = APIRouter(route_class=Streamed, tags=["events"])

STREAM: Final = (*READS, Code.TOO_MANY_REQUESTS, Code.SHUTTING_DOWN)
"""What any stream may be refused with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client wants of a stream: the events that pass `filter`, after the id `after` (None: from now on)."""

    filter: EventFilter
    after: int | None


def _wanted(
    last_event_id: Annotated[
        int | None,
        Header(
            alias="Last-Event-ID",
            ge=0,
            le=INTEGER_MAX,
            description="the last event that the client got; it wins over `after`",
        ),
    ] = None,
    after: Annotated[int | None, Query(ge=0, le=INTEGER_MAX, description="send the events after this one")] = None,
    types: Annotated[str | None, Query(description="types of events, with commas in between; all by default")] = None,
) -> Wanted:
    names: frozenset[str] = frozenset(() if types is None else types.split(","))
    if unknown := sorted(names - TYPES):
        expected = ", ".join(sorted(TYPES))
        raise Refused(invalid_parameter("types", f"unknown type {unknown[0]!r}; expected some of {expected}"))
    return Wanted(filter=EventFilter(types=names), after=after if last_event_id is None else last_event_id)


Asked = Annotated[Wanted, Depends(_wanted)]
Events = AsyncGenerator[StoredEvent | None]


@asynccontextmanager
async def _open(use: Service, wanted: Wanted, *, whole_job: bool = False) -> AsyncGenerator[Events]:
    await use.check_stream(wanted.filter)
    # The endpoint of a route is dropped when its client leaves, so the events are closed here.
    async with aclosing(use.hub.stream(wanted.filter, after=wanted.after, whole_job=whole_job)) as events:
        yield events


async def _everything(wanted: Asked, use: UseCases) -> AsyncGenerator[Events]:
    async with _open(use, wanted) as events:
        yield events


async def _of_domain(domain: DomainId, wanted: Asked, use: UseCases) -> AsyncGenerator[Events]:
    of_domain = replace(wanted, filter=replace(wanted.filter, domain=domain))
    async with _open(use, of_domain) as events:
        yield events


async def _of_job(job_id: JobId, wanted: Asked, use: UseCases) -> AsyncGenerator[Events]:
    of_job = replace(wanted, filter=replace(wanted.filter, job_id=job_id))
    async with _open(use, of_job, whole_job=True) as events:
        yield events


# All subscribers get the same text of an event, at almost the same time.
@lru_cache(maxsize=64)
def _sent(event: StoredEvent | None) -> bytes:
    if event is None:
        return format_sse_event(comment="idle")
    id_ = None if event.id is None else str(event.id)
    return format_sse_event(data_str=event_json(event), event=event.type, id=id_)


@router.get(
    "/events",
    operation_id="streamEvents",
    response_class=EventSourceResponse,
    response_model=None,
    responses=refusals(*STREAM),
)
async def stream_events(_who: Reader, events: Annotated[Events, Depends(_everything)]) -> AsyncIterator[bytes]:
    """Every event, from now on or after the last one that was got."""
    async for event in events:
        yield _sent(event)


@router.get(
    "/domains/{domain}/events",
    operation_id="streamDomainEvents",
    response_class=EventSourceResponse,
    response_model=None,
    responses=refusals(*STREAM, Code.DOMAIN_NOT_FOUND),
)
async def stream_domain_events(_who: Reader, events: Annotated[Events, Depends(_of_domain)]) -> AsyncIterator[bytes]:
    """The events of a domain and its jobs, from now on or after the last one that was got."""
    async for event in events:
        yield _sent(event)


@router.get(
    "/jobs/{job_id}/events",
    operation_id="streamJobEvents",
    response_class=EventSourceResponse,
    response_model=None,
    responses=refusals(*STREAM, Code.JOB_NOT_FOUND),
)
async def stream_job_events(_who: Reader, events: Annotated[Events, Depends(_of_job)]) -> AsyncIterator[bytes]:
    """The events of a job from its first one on; the stream ends after its last."""
    async for event in events:
        yield _sent(event)
