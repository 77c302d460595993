"""The HTTP server: uvicorn, which ends the event streams before it waits for its connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Generator
from http import HTTPStatus
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.codes import MEDIA_TYPE
from app.api.observe import ABORT
from app.api.problems import problem_document
from app.core.errors import Code, Problem, invalid
from app.engine.hub import Hub
from app.settings import Listen

GRACE: Final = 2
"""Seconds that requests under way have to end at shutdown.

A client that does not read uses all of them. The actors have 2 s more, and the whole service has 5 s.
"""

BACKLOG: Final = 2048
"""Connections that may wait to be accepted."""


HEAD_MAX: Final = 64 << 10
"""Bytes that the head of a request may have. A larger head is refused, unless it arrives in one piece."""

MESSAGE_MAX: Final = 8 << 20
"""Bytes that are read of one request. A body of the largest size needs that many if its chunks are small."""


CONNECTIONS: Final = 1000
"""Connections that a server takes unless it is told otherwise."""

REFUSED_S: Final = 0.3
"""Seconds that a client that is one too many has to read why."""


class Protocol(HttpToolsProtocol):
    """HTTP/1.1. It answers bytes that are not HTTP with a problem document, and lets the application cut a connection.

    The parser below keeps a header until the header is complete, so the bytes of each request are counted here.
    """

    most = CONNECTIONS
    """Connections that are served at one time."""

    _messages = 0
    _taken = 0
    _limit: int | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a connection, or refuse it if there are as many as are served."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            # Before it has said anything: each of them holds a descriptor, which monitors may need.
            self._refused = True
            # One that is refused takes nobody's place.
            self.connections.discard(self)
            detail = f"{self.most} connections are open, which is as many as are served (max_connections)"
            self._refuse(503, Problem(code=Code.TOO_MANY_REQUESTS, detail=detail))
            self.loop.call_later(REFUSED_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and end the connection if a request has too many."""
        if self._refused:
            # Nobody reads it, and a connection that is closed with something unread is reset before its answer is.
            self.transport.close()
            return
        before = self._messages
        super().data_received(data)
        if self._limit is None or before != self._messages or self.transport.is_closing():
            return
        self._taken += len(data)
        if self._taken > self._limit == HEAD_MAX:
            self.send_400_response(f"the head of the request is larger than {HEAD_MAX} bytes")
        elif self._taken > self._limit:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._messages += 1
        self._taken, self._limit = 0, HEAD_MAX
        self.scope["extensions"] = {ABORT: {"call": self.transport.abort}}

    def on_headers_complete(self) -> None:
        """Begin a body."""
        self._limit = MESSAGE_MAX
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request."""
        self._limit = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP, and end the connection."""
        self._refuse(400, invalid("", msg))
        self.transport.close()

    def _refuse(self, status: int, problem: Problem) -> None:
        body = problem_document(problem, "/").model_copy(update={"status": status}).model_dump_json().encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)


class Server(uvicorn.Server):
    """One server for one application. The server binds its socket when it is made, so `url` is known before it serves.

    `ready` is called with `url` once the server takes requests. Raises OSError if it can't listen on `listen`.
    """

    def __init__(
        self,
        app: FastAPI,
        hub: Hub,
        listen: Listen,
        *,
        max_connections: int = CONNECTIONS,
        ready: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=type("BoundedProtocol", (Protocol,), {"most": max_connections}),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._hub = hub
        self._listen = listen
        self._ready = ready
        self._socket = _bind(listen)

    @property
    def url(self) -> str:
        """Where the service is: `http://HOST:PORT`, or `unix:PATH`."""
        if self._listen.unix is not None:
            return f"unix:{self._listen.unix}"
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, or until `should_exit` is set."""
        try:
            await super().serve([self._socket] if sockets is None else sockets)
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket. `serve` closes it too, so only a server that never serves needs this call."""
        self._socket.close()
        if self._listen.unix is not None:
            self._listen.unix.unlink(missing_ok=True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests."""
        await super().startup(sockets)
        if self._ready is not None:
            self._ready(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, which have no end of their own, and wait for the other requests."""
        self._hub.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Handle signals while serving. uvicorn raises them again at the end, but the code after `serve` must run."""
        loop = asyncio.get_running_loop()
        taken: list[signal.Signals] = []
        # Only a main thread gets signals.
        with contextlib.suppress(ValueError, RuntimeError):
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.handle_exit, number, None)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)


def _bind(listen: Listen) -> socket.socket:
    if listen.unix is None:
        found = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _name, address = found[0]
        # With the protocol named, asyncio sees that it is TCP and sends without delay, which saves 40 ms an answer.
        bound = socket.socket(family, kind, protocol)
    else:
        _remove_stale(listen.unix)
        bound, address = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(listen.unix)
    try:
        if listen.unix is None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        if listen.unix is not None:
            listen.unix.chmod(0o660)
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound


def _remove_stale(path: Path) -> None:
    """Remove the socket of a service that was killed. A socket with a listener stays, and binding to it will fail."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == errno.ECONNREFUSED and path.is_socket():
            path.unlink()
