"""The bare contender: what somebody would write with `qemu.qmp` for one merge, with no journal, no checks, no rest."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from qemu.qmp import QMPClient

ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
JSON = dict[str, Any]


class MergeFailed(Exception):
    """QEMU ended the job otherwise than by completing it."""


@asynccontextmanager
async def monitor(socket: Path) -> AsyncGenerator[QMPClient]:
    """A connection for as long as the block lasts."""
    client = QMPClient()
    await client.connect(str(socket))
    try:
        yield client
    finally:
        await client.disconnect()


async def merge(client: QMPClient, *, device: str, top: str, base: str) -> None:
    """Merge the layers from the node `top` down into the node `base`, with a pivot where `top` is the active layer.

    Returns when QEMU says that it is done. Raises `MergeFailed`.
    """
    with client.listener(("BLOCK_JOB_READY", *ENDS)) as events:
        arguments = {"job-id": "job", "device": device, "top-node": top, "base-node": base}
        await client.execute("block-commit", cast("dict[str, object]", arguments))
        while True:
            event = await events.get()
            if event["event"] in ENDS:
                break
            await client.execute("job-complete", {"id": "job"})
    data = cast(JSON, event["data"])
    if event["event"] != "BLOCK_JOB_COMPLETED" or "error" in data:
        raise MergeFailed(str(event))


async def flush(client: QMPClient, node: str) -> None:
    """Have on the disk what was written to a node."""
    await client.execute("human-monitor-command", {"command-line": f'qemu-io "{node}" "flush"'})
