"""An id, a line in the log and a count for each request."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, cast

import structlog
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.metrics import Metrics
from app.api.problems import internal_error, path_of
from app.engine.ports.tokens import Token

STALLED: Final = 60.0
"""Seconds after which a client that takes nothing of its answer is disconnected."""

ABORT: Final = "blockjobd.abort"
"""The name of an extension of the scope (ASGI, "Extensions"): its `call` cuts the connection."""

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

QUIET: Final = frozenset({"/livez", "/readyz", "/metrics"})
"""Routes that are called all the time. Only their failures are logged."""

STREAM: Final = b"text/event-stream"

log = structlog.get_logger("blockjobd.http")


class RequestObserver:
    """ASGI middleware: gives each request an id, answers faults with a 500, logs and counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics, *, stalled: float = STALLED) -> None:
        self._stalled = stalled
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        request_id = _given_id(scope) or secrets.token_hex(8)
        answer = _Answer(scope, send, request_id, self._stalled)
        begin = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, answer.send)
            except Exception:
                request = Request(scope)
                log.exception("a request met a fault", method=request.method, path=path_of(scope))
                if answer.status is not None:
                    raise
                await internal_error(request, request_id)(scope, receive, answer.send)
            finally:
                self._note(scope, answer, time.perf_counter() - begin)

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        template = cast(str, getattr(scope.get("route"), "path_format", "none"))
        method = cast(str, scope["method"])
        status = answer.status or 499
        self._metrics.answered(route=template, method=method, status=status, seconds=None if answer.stream else seconds)
        if template in QUIET and status < 400:
            return
        token = cast("Token | None", scope.get("state", {}).get("token"))
        log.info(
            "request",
            method=method,
            path=path_of(scope),
            status=status,
            ms=round(seconds * 1000, 1),
            token=token.name if token else None,
        )


def _given_id(scope: Scope) -> str | None:
    """The id that the client has given to its request: the first `X-Request-Id`, if it is well-formed, else None."""
    for name, value in cast("Iterable[tuple[bytes, bytes]]", scope["headers"]):
        if name == b"x-request-id":
            given = value.decode("latin-1")
            return given if REQUEST_ID.fullmatch(given) else None
    return None


class _Answer:
    """Passes an answer on with the id of its request, and remembers its status and whether it is a stream."""

    __slots__ = ("_later", "_request_id", "_scope", "_send", "_stalled", "status", "stream")

    def __init__(self, scope: Scope, send: Send, request_id: str, stalled: float) -> None:
        self._later = asyncio.get_running_loop().call_later
        self._stalled = stalled
        self._scope = scope
        self._send = send
        self._request_id = request_id
        self.status: int | None = None
        self.stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = cast(int, message["status"])
            headers = cast("Iterable[tuple[bytes, bytes]]", message["headers"])
            self.stream = any(name == b"content-type" and value.startswith(STREAM) for name, value in headers)
            message["headers"] = [*headers, (b"x-request-id", self._request_id.encode())]
        timer = self._later(self._stalled, self._disconnect)
        try:
            await self._send(message)
        finally:
            timer.cancel()

    def _disconnect(self) -> None:
        # This ends the waiting `send` and so the answer, as if the client had left.
        log.warning("a client takes nothing and is disconnected", seconds=self._stalled, request_id=self._request_id)
        extension = cast("Mapping[str, Callable[[], None]]", self._scope.get("extensions", {}).get(ABORT, {}))
        if "call" in extension:
            extension["call"]()
