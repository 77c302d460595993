"""Webhooks that CI pipelines send: whose they are, and the job that they start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, cast

from fastapi import APIRouter, Path, Request, Response
from pydantic import ValidationError

from app.api.auth import limited
from app.api.codes import refusals
from app.api.idempotency import request_key, served_once
from app.api.problems import invalid_parameter, path_of
from app.api.requests import UseCases
from app.api.schemas.hooks import IgnoredOut
from app.api.schemas.jobs import JobOut
from app.api.verbs import BODIES, COMMIT, PULL, Asked, started
from app.core.errors import Code, Problem, Refused, invalid
from app.core.incoming import ID_HEADERS, IncomingDelivery, delivery_id, mismatch, signature_error
from app.engine.idempotency import HOOK
from app.engine.ports.clock import Clock
from app.settings import Hook, SettingsError

SIGNED_IDS: Final = frozenset({"standard"})
"""The providers that sign the delivery's id together with its body."""

router = APIRouter(tags=["hooks"])
"""The route needs no token, because a delivery is signed."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A hook of the configuration with its secret and the request that it makes, after all checks."""

    hook: Hook
    secret: str
    asked: Asked

    def verdict(self, delivery: IncomingDelivery) -> str | None:
        """None if the delivery starts the job, else the reason why not; raises `Refused` if the body is not JSON."""
        return mismatch(self.hook.provider, self.hook.event, self.hook.match, delivery.headers, _payload(delivery.body))


def prepared(name: str, hook: Hook) -> Taken:
    """The hook after all checks; raises `SettingsError` if it can't be served."""
    try:
        secret = hook.secret_file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"hooks.{name}.secret_file: {error}") from error
    if not secret:
        raise SettingsError(f"hooks.{name}.secret_file: {hook.secret_file} is empty")
    try:
        body = BODIES[hook.verb].model_validate(hook.body)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"])
        raise SettingsError(f"hooks.{name}.body.{where}: {wrong['msg']}") from error
    asked = Asked(hook.verb, hook.domain, hook.disk, body)
    try:
        asked.request()
    except Refused as refused:
        raise SettingsError(f"hooks.{name}.body: {refused.problem.detail}") from refused
    return Taken(hook, secret, asked)


def _payload(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(invalid("", f"not JSON: {error}")) from error


async def _delivery(http: Request) -> IncomingDelivery:
    body = await Request(http.scope, limited(http.receive)).body()
    return IncomingDelivery({name.lower(): value for name, value in http.headers.items()}, body)


@router.post(
    "/hooks/{name}",
    operation_id="takeDelivery",
    status_code=202,
    response_model=JobOut,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "the provider's payload, signed in its headers",
            "content": {"application/json": {"schema": {}}},
        }
    },
    responses={
        200: {"model": IgnoredOut, "description": "The delivery starts nothing"},
        **refusals(Code.SIGNATURE_INVALID, Code.HOOK_NOT_FOUND, *COMMIT, *PULL),
    },
)
async def take_delivery(
    name: Annotated[str, Path(description="the hook's name in the configuration")], http: Request, use: UseCases
) -> Response:
    """Start what the hook is configured for. A delivery that comes again gets the first answer."""
    taken = cast("Mapping[str, Taken]", http.app.state.hooks).get(name)
    if taken is None:
        raise Refused(
            Problem(code=Code.HOOK_NOT_FOUND, detail=f"no hook is called {name!r}; the configuration names the hooks")
        )
    delivery = await _delivery(http)
    now = cast(Clock, http.app.state.clock).now() / 1000
    error = signature_error(taken.hook.provider, taken.secret, delivery, now)
    if error is not None:
        raise Refused(Problem(code=Code.SIGNATURE_INVALID, detail=error))
    if delivery.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(invalid("", "expected JSON with the header `Content-Type: application/json`"))
    reason = taken.verdict(delivery)
    if reason is not None:
        return Response(IgnoredOut(ignored=reason).model_dump_json(), media_type="application/json")
    id_ = delivery_id(taken.hook.provider, delivery.headers)
    if id_ is None:
        header = ID_HEADERS[taken.hook.provider][0]
        raise Refused(invalid_parameter(header, f"expected the delivery's id in the header {header}"))
    who = HOOK + name
    # An id that is not signed can be invented for a body that was recorded: then it is the body that is taken once.
    once = id_ if taken.hook.provider in SIGNED_IDS else f"body:{hashlib.sha256(delivery.body).hexdigest()}"
    key = request_key(once, who=who, request={"body": delivery.body.decode(errors="backslashreplace")})

    async def serve() -> Response:
        return await started(use, taken.asked, who, key)

    return await served_once(use, key, path_of(http.scope), serve)
