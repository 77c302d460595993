"""Problem documents (RFC 9457), and how errors of any origin become problem documents."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import Scope

from app.api.codes import KINDS, MEDIA_TYPE
from app.core.errors import Code, Problem, Refused, invalid
from app.engine.ports.journal import JournalError


class ProblemOut(BaseModel):
    """Why a request can't be served, or why a job failed (RFC 9457). A code may add members, such as `qmp`."""

    model_config = ConfigDict(extra="allow", frozen=True, title="Problem")

    type: str = Field(
        description="`urn:blockjobd:problem:` and the code", examples=["urn:blockjobd:problem:job-conflict"]
    )
    title: str = Field(description="what the code means")
    status: int = Field(description="the HTTP status that goes with the code")
    detail: str = Field(description="what is wrong this time, and what can be done about it")
    code: str = Field(description="the reason, for programs", examples=["job-conflict"])
    instance: str = Field(description="what it happened to", examples=["/domains/web1/disks/vda/commit"])
    libvirt: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="libvirt's error for the same thing, where it has one",
        examples=["VIR_ERR_BLOCK_COPY_ACTIVE"],
    )


def problem_document(problem: Problem, instance: str) -> ProblemOut:
    """The document of `problem`; `instance` is the path of the request, or of the job that failed."""
    kind = KINDS[problem.code]
    return ProblemOut.model_validate(
        {
            "libvirt": kind.libvirt,
            **problem.extra,
            "type": f"urn:blockjobd:problem:{problem.code}",
            "title": kind.title,
            "status": kind.status,
            "detail": problem.detail,
            "code": problem.code.value,
            "instance": instance,
        }
    )


def path_of(scope: Scope) -> str:
    """The path of a request, percent-encoded as it was sent."""
    return cast(bytes, scope["raw_path"]).decode("ascii", "backslashreplace")


def problem_response(problem: Problem, instance: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that carries `problem`."""
    document = problem_document(problem, instance)
    sent = dict(headers or {})
    if problem.code is Code.UNAUTHENTICATED:
        sent["WWW-Authenticate"] = "Bearer"
    if problem.code is Code.IDEMPOTENCY_IN_PROGRESS or document.status in (429, 503):
        sent["Retry-After"] = "1"
    return Response(document.model_dump_json(), status_code=document.status, headers=sent, media_type=MEDIA_TYPE)


def json_pointer(location: Sequence[str | int], body: object, *, missing: bool) -> str:
    """The JSON Pointer (RFC 6901) of a validation error's `location` in `body`.

    Pydantic adds its own names for the variants of a union to the location. A part that the body does not have is such
    a name, except for the last part of the location of a field that is `missing`.
    """
    pointer, node = "", body
    for part in location:
        if isinstance(node, dict) and part in node:
            node = cast("dict[object, object]", node)[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(cast("list[object]", node)):
            node = cast("list[object]", node)[part]
        elif not (missing and part == location[-1]):
            continue
        pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    # JSON may name a field by half a surrogate pair, which no answer can hold.
    return pointer.encode(errors="backslashreplace").decode()


def _validation_errors(error: RequestValidationError) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for item in cast("Sequence[Mapping[str, Any]]", error.errors()):
        place, *rest = cast("tuple[str | int, ...]", item["loc"])
        detail = str(item["msg"]).removeprefix("Value error, ")
        if place != "body":
            found.append({"parameter": "/".join(str(part) for part in rest), "detail": detail})
        elif item["type"] == "json_invalid":
            found.append({"pointer": "", "detail": f"not JSON: {item['ctx']['error']} at character {rest[0]}"})
        elif isinstance(error.body, bytes):
            found.append({"pointer": "", "detail": "expected JSON with the header `Content-Type: application/json`"})
        else:
            pointer = json_pointer(rest, error.body, missing=item["type"] == "missing")
            found.append({"pointer": pointer, "detail": detail})
    return found


def invalid_parameter(name: str, detail: str) -> Problem:
    """The problem of a request with one wrong query parameter or header."""
    return Problem(
        code=Code.INVALID_REQUEST,
        detail=f"{name}: {detail}",
        extra={"errors": [{"parameter": name, "detail": detail}]},
    )


async def _on_validation(request: Request, error: RequestValidationError) -> Response:
    errors = _validation_errors(error)
    detail = "; ".join(f"{item.get('parameter', item.get('pointer')) or 'body'}: {item['detail']}" for item in errors)
    problem = Problem(code=Code.INVALID_REQUEST, detail=detail, extra={"errors": errors})
    return problem_response(problem, path_of(request.scope))


async def _on_http(request: Request, error: HTTPException) -> Response:
    path, headers = path_of(request.scope), {}
    match error.status_code:
        case 404:
            problem = Problem(code=Code.NOT_FOUND, detail=f"there is no route {path}; /openapi.json lists all routes")
        case 405:
            allowed = ", ".join(_methods(request))
            problem = Problem(code=Code.METHOD_NOT_ALLOWED, detail=f"{path} takes {allowed}, not {request.method}")
            headers = {"Allow": allowed}
        case 413:
            problem = Problem(code=Code.PAYLOAD_TOO_LARGE, detail=error.detail)
        case 400:
            # FastAPI raises this for a body that is not text, is nested too deeply, or has a number that is too long.
            problem = invalid("", "the body can't be read as JSON")
        case _:
            # The framework and the service answer with no other status, so this is a fault.
            raise error
    return problem_response(problem, path, headers=headers)


def _methods(request: Request) -> list[str]:
    """Every method of the request's path. Starlette only knows the methods of the first route that matches."""
    app = cast(FastAPI, request.app)
    path = cast(str, request.scope["path"])
    routes = (route for route in iter_route_contexts(app.routes) if route.path_regex.match(path))
    return sorted({method for route in routes for method in route.methods or ()})


async def _on_refused(request: Request, error: Refused) -> Response:
    return problem_response(error.problem, path_of(request.scope))


async def _on_journal(request: Request, error: JournalError) -> Response:
    problem = Problem(code=error.code, detail=str(error))
    return problem_response(problem, path_of(request.scope))


def internal_error(request: Request, request_id: str) -> Response:
    """The answer to a fault of the service. The log has the traceback under `request_id`."""
    problem = Problem(
        code=Code.INTERNAL_ERROR,
        detail=f"the service has failed; its log says more about the request {request_id}",
        extra={"request_id": request_id},
    )
    return problem_response(problem, path_of(request.scope))


HANDLERS: Final[Mapping[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]] = {
    Refused: _on_refused,
    JournalError: _on_journal,
    RequestValidationError: _on_validation,
    HTTPException: _on_http,
}
"""How each expected exception is answered."""
