"""Clients that are slow, or leave without a word."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from app.api.metrics import Metrics
from app.api.observe import ABORT, RequestObserver
from app.api.server import Server
from app.engine.hub import Hub
from app.engine.ports.events import StoredEvent
from app.settings import load
from app.wiring import running

PROGRESS = StoredEvent(
    id=None, type="job.progress", time=1, domain="web1", disk="vda", job_id="bj-1", data=f'"{"x" * 10_000}"'
)


async def eventually(holds: Callable[[], bool]) -> None:
    """Return once it holds."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.01)


def test_a_client_that_leaves_in_a_burst(tmp_path: Path) -> None:
    """A client that has a lot unread when it leaves is no fault, and leaves nothing behind."""

    async def follow_and_leave(server: Server, hub: Hub, token: str) -> None:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = server.url.removeprefix("http://").partition(":")
        client.connect((host, int(port)))
        client.sendall(f"GET /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        await eventually(lambda: hub.subscribers == 1)
        for _ in range(100):
            hub.publish([PROGRESS] * 20)
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        client.close()
        await eventually(lambda: hub.subscribers == 0)

    async def main() -> None:
        settings = load(None, {"BLOCKJOBD_STATE_DIR": str(tmp_path), "BLOCKJOBD_LISTEN": "127.0.0.1:0"})
        async with running(settings) as application:
            server = Server(application.api, application.hub, settings.listen)
            serving = asyncio.create_task(server.serve())
            await eventually(lambda: server.started)
            await follow_and_leave(server, application.hub, (tmp_path / "token").read_text().strip())
            server.should_exit = True
            await serving

    with capture_logs() as logs:
        asyncio.run(main())
    assert [entry for entry in logs if entry["log_level"] in {"error", "warning"}] == []


def test_a_client_that_takes_nothing_is_disconnected() -> None:
    """An answer that its client does not take ends with the connection, instead of waiting for ever."""
    cut = asyncio.Event()

    async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send_once_cut(_message: Message) -> None:
        await cut.wait()

    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": "/events",
        "raw_path": b"/events",
        "headers": [],
        "extensions": {ABORT: {"call": cut.set}},
    }

    async def main() -> None:
        async with asyncio.timeout(10):
            await RequestObserver(answer, Metrics(None, "1"), stalled=0.1)(scope, receive, send_once_cut)

    with capture_logs() as logs:
        asyncio.run(main())
    assert [entry["event"] for entry in logs] == ["a client takes nothing and is disconnected", "request"]
