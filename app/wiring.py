"""Puts the rooms together: the only module that knows them all."""

from __future__ import annotations

import os
import resource
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from random import SystemRandom
from typing import Final

import uvloop
from fastapi import FastAPI

from app.api.app import create_app, openapi_json
from app.api.hooks import prepared
from app.api.render import JsonRender
from app.api.server import Server
from app.core.outgoing import SCHEDULE, new_secret
from app.core.reconcile import JOB_PREFIX
from app.drivers.qmp.discovery import SocketDiscovery
from app.drivers.qmp.driver import QmpDriver
from app.engine.budget import Budget
from app.engine.domains import DomainDirectory
from app.engine.hub import Hub
from app.engine.known import KnownDisks
from app.engine.recovery import Recovery
from app.engine.service import Service
from app.engine.shared import Shared
from app.engine.tasks import Tasks
from app.engine.views import Render
from app.engine.webhook_sender import WebhookSender
from app.engine.webhooks import WebhookUseCases
from app.hostfs.images import LocalImages
from app.hostfs.patience import Workers
from app.journal.journal import SqliteJournal
from app.journal.lock import locked
from app.journal.outbox import SqliteOutbox
from app.journal.tokens import Tokens
from app.logs import configure
from app.settings import Settings
from app.webhooks.sender import HttpSender

OWN_FILES: Final = 64
"""Files that the service opens for itself, at least; a quarter of those that it may open is more, mostly."""

CLIENTS_LEAST: Final = 8
"""Connections that clients have in any case."""

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, as ULIDs use it: no letters that look like digits."""


class SystemClock:
    """The host's clocks."""

    def now(self) -> int:
        """Milliseconds since 1970, UTC."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds, for durations."""
        return time.monotonic()


def new_job_id() -> str:
    """A ULID behind our prefix: sorts by time, needs no coordination, and is a well-formed QEMU job id."""
    return JOB_PREFIX + _ulid()


def new_webhook_id() -> str:
    """Likewise, for a webhook."""
    return "wh-" + _ulid()


def new_webhook_secret() -> str:
    """256 random bits, as the Standard WebhookUseCases specification writes them."""
    return new_secret(secrets.token_bytes(32))


def _ulid() -> str:
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """The running parts, and the HTTP application that serves them."""

    api: FastAPI
    hub: Hub


def _as_it_is(_shared: Shared) -> None:
    """The service as it is run: nothing stands between the engine and what is behind its ports."""


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    render: Render | None = None,
    wrap_ports: Callable[[Shared], None] = _as_it_is,
    schedule: Sequence[int] = SCHEDULE,
) -> AsyncGenerator[Application]:
    """The service with everything behind it, for as long as the block lasts.

    `render` and `wrap_ports` are for builds that look at, or end, what goes through the ports. `wrap_ports` may put
    other ports in place of the shared ones before anything uses them. `schedule` is when webhooks are tried again.

    Raises `StateDirInUse` where another service has the state directory, and `SettingsError` where a hook can't be
    served.
    """
    clock, render = SystemClock(), render or JsonRender()
    hooks = {name: prepared(name, hook) for name, hook in settings.hooks.items()}
    with ExitStack() as stack:
        stack.enter_context(locked(settings.state_dir))
        journal = SqliteJournal.open(settings.state_dir, render, clock)
        stack.callback(journal.close)
        tokens = stack.enter_context(Tokens.open(settings.state_dir, clock))
        tokens.ensure_admin()
        hub = Hub(journal, clock)
        workers = Workers()
        images = LocalImages(settings.image_roots, settings.qmp_timeout, workers=workers)
        shared = Shared(
            drivers={"qmp": QmpDriver(settings.qmp_timeout, workers, journal)},
            journal=journal,
            images=images,
            clock=clock,
            hub=hub,
            budget=Budget(settings.max_running_jobs),
            recovery=Recovery(clock),
            render=render,
            new_id=new_job_id,
            known=KnownDisks(images),
            tasks=Tasks(),
        )
        wrap_ports(shared)
        shared.journal.listen(hub.publish)
        domains = DomainDirectory(
            shared, SocketDiscovery(settings.qmp_dir, workers), retention_days=settings.retention_days
        )
        outbox = SqliteOutbox(journal, clock)
        sender = HttpSender(settings.webhook_allow, f"blockjobd/{version('blockjobd')}")
        webhook_sender = WebhookSender(
            outbox=outbox,
            sender=sender,
            clock=clock,
            renderer=JsonRender(),
            spread=SystemRandom().random,
            schedule=schedule,
        )
        webhooks = WebhookUseCases(
            outbox=outbox,
            webhook_sender=webhook_sender,
            sender=sender,
            clock=clock,
            new_id=new_webhook_id,
            new_secret=new_webhook_secret,
        )
        service = Service(shared, domains, webhooks)
        await webhook_sender.start()
        await domains.start()
        try:
            api = create_app(service, tokens.find, version=version("blockjobd"), clock=clock, taken=hooks)
            yield Application(api=api, hub=hub)
        finally:
            hub.close()
            await webhook_sender.stop()
            await domains.stop()


async def serve(
    settings: Settings,
    *,
    ready: Callable[[str], None] | None = None,
    render: Render | None = None,
    wrap_ports: Callable[[Shared], None] = _as_it_is,
    schedule: Sequence[int] = SCHEDULE,
) -> None:
    """Serve until SIGTERM or SIGINT; `ready` gets the base URL once requests are taken. The rest as in `running`."""
    os.umask(0o077)
    async with running(settings, render=render, wrap_ports=wrap_ports, schedule=schedule) as application:
        most = min(settings.max_connections, _connections())
        server = Server(application.api, application.hub, settings.listen, max_connections=most, ready=ready)
        await server.serve()


def _connections() -> int:
    """Raise the limit of open files as far as it goes; how many of them clients may have, so that monitors have some.

    A monitor takes one, and a look at a QEMU and its images a few more for a moment.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Python has no use for select(2), which alone can't bear large numbers.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(CLIENTS_LEAST, soft - max(OWN_FILES, soft // 4))


def run(settings: Settings, *, ready: Callable[[str], None] | None = None) -> None:
    """As `serve`, with an event loop and a log of its own."""
    configure(settings.log_format)
    uvloop.run(serve(settings, ready=ready))


def openapi_document() -> str:
    """The OpenAPI document as JSON text; needs no state directory and no QEMU."""

    def nobody(_text: str) -> None:
        return None

    return openapi_json(create_app(None, nobody, version=version("blockjobd")))
