"""The HTTP application."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fastapi import FastAPI
from starlette.middleware import Middleware

from app.api import disks, docs, domains, events, health, hooks, jobs, webhooks
from app.api.auth import FindToken
from app.api.docs import openapi_json
from app.api.metrics import Metrics
from app.api.observe import RequestObserver
from app.api.problems import HANDLERS
from app.engine.ports.clock import Clock
from app.engine.service import Service

__all__ = ["create_app", "openapi_json"]

ABOUT: Final = """Merges the disk layers of running QEMU virtual machines. Every request takes a bearer token, but for \
`/livez`, `/readyz` and `/hooks/{name}`; every error is a problem document."""


def create_app(
    service: Service | None,
    find_token: FindToken,
    *,
    version: str,
    clock: Clock | None = None,
    taken: Mapping[str, hooks.Taken] | None = None,
) -> FastAPI:
    """The application that serves the use cases of `service` to the holders of tokens.

    Without a service only the OpenAPI document of the application can be used.
    """
    metrics = Metrics(service, version)
    app = FastAPI(
        title="blockjobd",
        version=version,
        description=ABOUT,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(RequestObserver, metrics=metrics)],
        exception_handlers=dict(HANDLERS),
    )
    app.state.service = service
    app.state.find_token = find_token
    app.state.metrics = metrics
    app.state.clock = clock
    app.state.hooks = taken or {}
    # An included router would search its routes anew for each request, so the application gets the routes themselves.
    for router in (
        *(module.router for module in (jobs, domains, disks, events, webhooks, health, docs)),
        hooks.router,
        health.free,
    ):
        app.router.routes.extend(router.routes)
    return app
