"""A real server with a real journal, in a thread; no QEMU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from app.api.server import Server
from app.engine.ports.tokens import Role
from app.journal.tokens import Tokens
from app.settings import Settings, load
from app.wiring import SystemClock, running

JSON = Any


@dataclass(slots=True)
class Background:
    """A server in a thread; `url` is known once it takes requests."""

    url: str = ""
    ended: threading.Event = field(default_factory=threading.Event)
    stop: Callable[[], None] = lambda: None


@contextmanager
def served(settings: Settings) -> Generator[Background]:
    """Everything that `blockjobd serve` starts, until the block ends."""
    background, up = Background(), threading.Event()

    def ready(url: str) -> None:
        background.url = url
        up.set()

    async def main() -> None:
        async with running(settings) as application:
            server = Server(application.api, application.hub, settings.listen, ready=ready)
            background.stop = lambda: setattr(server, "should_exit", True)
            await server.serve()

    def work() -> None:
        try:
            asyncio.run(main())
        finally:
            background.ended.set()
            up.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert up.wait(20)
    try:
        yield background
    finally:
        background.stop()
        thread.join(20)


@dataclass(frozen=True, slots=True)
class Api:
    """Clients of a running service."""

    background: Background
    reader: httpx.Client
    operator: httpx.Client
    admin: httpx.Client
    anonymous: httpx.Client

    def as_role(self, role: str) -> httpx.Client:
        """The client with a token of this role."""
        return {"read": self.reader, "operate": self.operator, "admin": self.admin, "none": self.anonymous}[role]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    """No log among the test results; `capture_logs` still sees it."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service on a free port, with a token of each role."""
    folder: Path = tmp_path_factory.mktemp("api")
    settings = load(None, {"BLOCKJOBD_STATE_DIR": str(folder), "BLOCKJOBD_LISTEN": "127.0.0.1:0"})
    with served(settings) as background:
        with Tokens.open(folder, SystemClock()) as tokens:
            texts = {role: tokens.create(role, f"test-{role}") for role in Role}

        def client(headers: dict[str, str]) -> httpx.Client:
            return httpx.Client(base_url=background.url, headers=headers, timeout=20)

        with (
            client({"Authorization": f"Bearer {texts[Role.READ]}"}) as reader,
            client({"Authorization": f"Bearer {texts[Role.OPERATE]}"}) as operator,
            client({"Authorization": f"Bearer {texts[Role.ADMIN]}"}) as admin,
            client({}) as anonymous,
        ):
            yield Api(background, reader, operator, admin, anonymous)


def problem(response: httpx.Response, status: int, code: str) -> JSON:
    """The problem document of a response, checked for what each must have."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), (
        response.text
    )
    document = response.json()
    assert document["type"] == f"urn:blockjobd:problem:{code}"
    assert (document["code"], document["status"]) == (code, status)
    assert document["title"]
    assert document["detail"]
    assert document["instance"] == response.request.url.raw_path.decode().partition("?")[0]
    assert "Traceback" not in response.text
    return document
