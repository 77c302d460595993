"""The arguments of plain routes, found without FastAPI's way of solving dependencies.

For a simple read, that way takes longer than all the rest of the request. A plain route has no body. It takes
parameters and what can be found by the request alone, and it returns a response. FastAPI's own functions read and judge
the parameters, so that there is one set of rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import request_params_to_args
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import QueryParams

Find = Callable[[Request], Awaitable[object]]
Handler = Callable[[Request], Awaitable[Response]]


def plain_handler(dependant: Dependant, direct: Callable[[Dependant], Find | None]) -> Handler | None:
    """The function that answers the requests of a plain route; None for any other route.

    For a dependency, `direct` returns the function that finds its value by the request alone, or None if the request is
    not enough.
    """
    call = dependant.call
    if call is None or not inspect.iscoroutinefunction(call) or not _is_simple(dependant):
        return None
    if inspect.signature(call, eval_str=True).return_annotation is not Response:
        return None
    finds: list[tuple[str, Find]] = []
    for part in dependant.dependencies:
        find = direct(part)
        if part.name is None or find is None:
            return None
        finds.append((part.name, find))
    path, query, headers = dependant.path_params, dependant.query_params, dependant.header_params
    aliases = {field.alias.lower() for field in headers}
    names = {name.encode() for alias in aliases for name in (alias, alias.replace("_", "-"))}
    request_name = dependant.request_param_name
    # Most requests leave out all of these parameters, so their defaults are found once.
    defaults, missing = request_params_to_args([*query, *headers], QueryParams())

    async def handle(request: Request) -> Response:
        values: dict[str, Any] = {name: await find(request) for name, find in finds}
        given: list[tuple[list[Any], Mapping[str, Any]]] = [(path, request.path_params)] if path else []
        if missing or request.scope["query_string"] or any(name in names for name, _ in request.scope["headers"]):
            given += [(query, request.query_params), (headers, request.headers)]
        else:
            values.update(defaults)
        errors: list[Any] = []
        for fields, received in given:
            found, wrong = request_params_to_args(fields, received)
            values.update(found)
            errors += wrong
        if errors:
            raise RequestValidationError(errors)
        if request_name is not None:
            values[request_name] = request
        return await call(**values)

    return handle


def by_request_alone(dependant: Dependant) -> Find | None:
    """The function that finds the value of a dependency that takes only the request; None for any other dependency."""
    name, call = dependant.request_param_name, dependant.call
    parameters = [dependant.path_params, dependant.query_params, dependant.header_params, dependant.dependencies]
    if name is None or call is None or any(parameters) or not _is_simple(dependant):
        return None
    return call if inspect.iscoroutinefunction(call) else None


def _is_simple(dependant: Dependant) -> bool:
    more = (
        dependant.cookie_params,
        dependant.body_params,
        dependant.response_param_name,
        dependant.background_tasks_param_name,
        dependant.http_connection_param_name,
        dependant.websocket_param_name,
        dependant.security_scopes_param_name,
    )
    return not any(more)
