"""Who may do what: bearer tokens with roles, spelt in the signature of each route.

FastAPI reads and parses the body before it solves dependencies, but the token has to be judged first. So `Guarded`, the
class of all routes that need a token, judges the token before FastAPI sees the request. The dependency in the signature
of a route says which role the route needs, and gives the token to the route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Final, cast

from fastapi import Depends, Request, Response, Security
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from app.api.arguments import Find, Handler, by_request_alone, plain_handler
from app.api.problems import invalid_parameter
from app.core.errors import Code, Problem, Refused
from app.engine.ports.tokens import Role, Token

FindToken = Callable[[str], Token | None]
"""Finds the token with this text; returns None for an unknown text."""

BODY_MAX: Final = 1 << 20
"""The largest body that is read, in bytes."""

RANKS: Final = {role: rank for rank, role in enumerate(Role)}
"""The rank of each role. A role may do everything that a role of a lower rank may do."""

_bearer = HTTPBearer(auto_error=False, scheme_name="token", description="A token of `blockjobd token create`.")


class Requires:
    """The dependency that asks for a role and yields the caller's token."""

    def __init__(self, role: Role) -> None:
        self.role = role

    # FastAPI would call a function that is not `async` in a thread.
    async def __call__(
        self, request: Request, _documented: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> Token:
        """The token that `Guarded` has judged."""
        return cast(Token, request.state.token)


Reader = Annotated[Token, Depends(Requires(Role.READ))]
Operator = Annotated[Token, Depends(Requires(Role.OPERATE))]
Admin = Annotated[Token, Depends(Requires(Role.ADMIN))]


class Guarded(APIRoute):
    """A route that needs a token. It refuses parameters that it does not know, and bodies over 1 MiB."""

    def get_route_handler(self) -> Handler:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The handler of the route. It checks the token, the names of the parameters and the size of the body first."""
        handler = self.handler()
        parts = list(_all_dependants(self.dependant))
        role = next(part.call.role for part in parts if isinstance(part.call, Requires))
        known = {parameter.alias for part in parts for parameter in part.query_params}
        takes_body = self.body_field is not None

        async def guarded(request: Request) -> Response:
            request.state.token = _judge(request, role)
            # A `dry_run` that is misspelt, or given as true and as false, must not start a job.
            for name in request.query_params if request.scope["query_string"] else ():
                if name not in known:
                    expected = ", ".join(sorted(known)) or "none"
                    raise Refused(invalid_parameter(name, f"unknown parameter; expected {expected}"))
                if len(request.query_params.getlist(name)) > 1:
                    raise Refused(invalid_parameter(name, "given more than once"))
            if not takes_body:
                return await handler(request)
            if _announced(request) > BODY_MAX:
                raise _too_large()
            return await handler(Request(request.scope, limited(request.receive)))

        return guarded

    def handler(self) -> Handler:
        """The function that answers the requests that have passed the checks."""
        return plain_handler(self.dependant, direct) or super().get_route_handler()


def direct(dependant: Dependant) -> Find | None:
    """The function that finds the value of a dependency by the request alone, or None if the request is not enough.

    `Guarded` has stored the token in the request.
    """
    return _judged if isinstance(dependant.call, Requires) else by_request_alone(dependant)


async def _judged(request: Request) -> object:
    return request.state.token


def _all_dependants(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for part in dependant.dependencies:
        yield from _all_dependants(part)


def _judge(request: Request, role: Role) -> Token:
    find_token = cast(FindToken, request.app.state.find_token)
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    token = find_token(text.strip()) if scheme.lower() == "bearer" and text.strip() else None
    if token is None:
        raise Refused(
            Problem(
                code=Code.UNAUTHENTICATED,
                detail="the token is missing or unknown; send it as `Authorization: Bearer TOKEN`",
            )
        )
    if RANKS[token.role] < RANKS[role]:
        raise Refused(
            Problem(
                code=Code.OPERATION_DENIED,
                detail=f"the token {token.name!r} has the role {token.role}; the request needs the role {role}",
            )
        )
    return token


def _too_large() -> HTTPException:
    return HTTPException(413, f"the body is larger than {BODY_MAX} bytes")


def _announced(request: Request) -> int:
    """The length of the body in bytes, as the client announces it. The server refuses a length that is not a number."""
    return int(request.headers.get("content-length", "0"))


def limited(receive: Receive) -> Receive:
    """Receives the messages of a request; raises `HTTPException` once the body has more than `BODY_MAX` bytes."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > BODY_MAX:
            raise _too_large()
        return message

    return receive_limited
