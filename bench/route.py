"""The bare route: `python -m bench.route PORT FOLDER` answers with the files of a folder, and does nothing else.

The server is the service's own and the routes are FastAPI's, but there is no token, no log and no journal.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import uvloop
from fastapi import FastAPI, Response

from app.api.server import Server
from app.engine.hub import Hub
from app.settings import Listen


class _NoHub:
    def close(self) -> None:
        """There are no streams."""


def _route(content: bytes) -> Callable[[], Awaitable[Response]]:
    async def route() -> Response:
        return Response(content, media_type="application/json")

    return route


def main(port: str, folder: str) -> None:
    """Serve until SIGTERM."""
    app = FastAPI()
    for file in Path(folder).iterdir():
        app.add_api_route(f"/{file.name}", _route(file.read_bytes()), methods=["GET", "POST"], response_model=None)
    server = Server(app, cast(Hub, _NoHub()), Listen(port=int(port)))
    uvloop.run(server.serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
