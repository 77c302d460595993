"""The service's contender: a client that asks for a merge over HTTP and hears of its end by the event stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from httpx_sse import aconnect_sse

from tests.support.service import Service

ENDS = "job.completed,job.failed,job.canceled,job.lost"
JSON = dict[str, Any]


class MergeFailed(Exception):
    """The job was refused, or ended otherwise than by completing."""


class Client:
    """One event stream, and requests beside it."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self._ends: dict[str, asyncio.Future[JSON]] = {}
        self._open = asyncio.Event()

    async def listen(self) -> None:
        """Take in events until canceled."""
        async with aconnect_sse(self.http, "GET", "/events", params={"types": ENDS}, timeout=None) as stream:
            self._open.set()
            async for event in stream.aiter_sse():
                job: JSON = json.loads(event.data)["data"]
                self._end_of(job["id"]).set_result(job)

    def _end_of(self, job_id: str) -> asyncio.Future[JSON]:
        return self._ends.setdefault(job_id, asyncio.get_running_loop().create_future())

    async def ready(self) -> None:
        """Return once the stream is open."""
        await self._open.wait()

    async def merge(self, domain: str, body: Mapping[str, object]) -> JSON:
        """Ask for a merge, and return its job when it has completed; raises `MergeFailed`."""
        answer = await self.http.post(f"/domains/{domain}/disks/vda/commit", json=body)
        if answer.status_code != 202:
            raise MergeFailed(answer.text)
        job = await self._end_of(answer.json()["id"])
        if job["state"] != "completed":
            raise MergeFailed(json.dumps(job))
        return job


@asynccontextmanager
async def client(running: Service) -> AsyncGenerator[Client]:
    """A client with its stream open."""
    token = (running.state_dir / "token").read_text().strip()
    transport = httpx.AsyncHTTPTransport(uds=str(running.socket), limits=httpx.Limits(max_connections=None))
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://blockjobd", headers=headers, timeout=120
    ) as http:
        made = Client(http)
        listening = asyncio.create_task(made.listen())
        try:
            await made.ready()
            yield made
        finally:
            listening.cancel()
            await asyncio.wait([listening])
