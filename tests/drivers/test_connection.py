"""A connection hands out values only: what a peer says in another shape is malformed, and the connection says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.drivers.qmp import replies
from app.drivers.qmp.checks import MalformedReply
from app.drivers.qmp.connection import Connection
from app.engine.ports.driver import Address, Declined, Unreachable

JSON = dict[str, Any]
VERSION: JSON = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}


@asynccontextmanager
async def connected(
    path: Path, *answers: JSON, version: JSON = VERSION, first: bytes = b"", taken: list[object] | None = None
) -> AsyncGenerator[Connection]:
    """A connection to a peer that greets with that version and gives these answers in turn.

    It says something else `first`, before each answer. Events go into the list `taken`.
    """
    left = iter(answers)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n")
        while said := await reader.read(65536):
            # The negotiation has no id, and each command is awaited before the next one.
            request: JSON = json.loads(said)
            reply: JSON = {"return": {}}
            if "id" in request:
                writer.write(first)
                reply = next(left) | {"id": request["id"]}
            writer.write(json.dumps(reply).encode() + b"\n")
        writer.close()

    events = [] if taken is None else taken
    async with await asyncio.start_unix_server(talk, path):
        connection = await Connection.open(
            Address(unix=str(path)), 5, lambda name, data: events.append((name, data)), lambda: None
        )
        try:
            yield connection
        finally:
            await connection.close()


def test_a_malformed_reply(tmp_path: Path) -> None:
    """A reply of another shape is told as what it is, and the connection would go on."""

    async def story() -> None:
        wrong: JSON = {"return": {"running": "yes", "status": "running"}}
        right: JSON = {"return": {"running": True, "status": "running"}}
        async with connected(tmp_path / "vm.qmp", wrong, right) as connection:
            assert str(connection.version) == "7.2.0"
            with pytest.raises(Unreachable) as malformed:
                await connection.ask(replies.STATUS)
            assert isinstance(malformed.value, MalformedReply)
            assert str(malformed.value) == "query-status: running: expected true or false"
            assert (await connection.ask(replies.STATUS)).running

    asyncio.run(story())


@pytest.mark.parametrize("version", [{}, {"qemu": {"major": "7", "minor": 2, "micro": 0}}], ids=str)
def test_a_greeting_without_a_version(tmp_path: Path, version: JSON) -> None:
    """A peer that does not say which QEMU it is can't be connected to."""

    async def story() -> None:
        with pytest.raises(MalformedReply, match="greeting: qemu"):
            async with connected(tmp_path / "vm.qmp", version=version):
                pass

    asyncio.run(story())


def test_refusals(tmp_path: Path) -> None:
    """QEMU's refusal is told in its words; what is too long to be QEMU's is malformed."""

    async def story() -> None:
        short, long = ({"error": {"class": "GenericError", "desc": desc}} for desc in ("Job not found", "x" * 100_000))
        async with connected(tmp_path / "vm.qmp", short, long) as connection:
            with pytest.raises(Declined, match="Job not found"):
                await connection.execute("job-pause", {"id": "bj-1"})
            with pytest.raises(MalformedReply, match="job-pause: error: desc: longer than 65536 bytes"):
                await connection.execute("job-pause", {"id": "bj-1"})

    asyncio.run(story())


def test_events_of_any_shape(tmp_path: Path) -> None:
    """An event is handed on as it came, whatever its name and data are, and the reply after it is read."""

    async def story() -> None:
        events: list[object] = []
        said = b'{"event": ["no", "name"]}\n{"event": "STOP", "data": null}\n{"event": "STOP", "data": {}, "more": 1}\n'
        status: JSON = {"return": {"running": True, "status": "running"}}
        async with connected(tmp_path / "vm.qmp", status, first=said, taken=events) as connection:
            assert (await connection.ask(replies.STATUS)).running
        assert events == [(["no", "name"], None), ("STOP", None), ("STOP", {})]

    asyncio.run(story())
