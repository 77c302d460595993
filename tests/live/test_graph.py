"""Reading the block graph while it changes, and without hurting the QEMU that is asked."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from app.drivers.qmp import graph, replies
from app.drivers.qmp.driver import QmpDriver
from app.drivers.qmp.runner import QmpRunner
from app.engine.ports.driver import Address
from tests.support.chains import blockdev, build_chain
from tests.support.qemu import Qemu

pytestmark = pytest.mark.live


async def connect(qemu: Qemu) -> QmpRunner:
    """The service's monitor of that QEMU."""
    return await QmpDriver(10).connect(Address(unix=str(qemu.monitor)), lambda: None)


def end_of_stream(qemu: Qemu, *, base: str) -> None:
    """Another client's stream into the active layer, concluded and not dismissed."""
    qemu.qmp("block-stream", job_id="pull", device="n2", base_node=base, auto_dismiss=False)
    deadline = time.monotonic() + 10
    while qemu.qmp("query-jobs")[0]["status"] != "concluded":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_concluded_stream_hurts_nobody(tmp_path: Path) -> None:
    """QEMU 7.2 crashes when asked about its nodes beside a concluded stream: so it is not asked, and lives."""
    chain = build_chain(tmp_path, 3)
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:

        async def story() -> None:
            monitor = await connect(qemu)
            before = (await monitor.disks())[0].files
            await asyncio.to_thread(end_of_stream, qemu, base="n0")
            after = (await monitor.disks())[0].files
            await monitor.close()
            assert (before, after) == (tuple(chain.files), (chain.files[0], chain.files[2]))

        asyncio.run(story())
        assert qemu.process.poll() is None


def test_connecting_to_a_concluded_stream(tmp_path: Path) -> None:
    """Who connects only then sees the chain too, though the nodes can't be asked for until that job is dismissed."""
    chain = build_chain(tmp_path, 3)
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        end_of_stream(qemu, base="n0")

        async def story() -> None:
            monitor = await connect(qemu)
            assert (await monitor.disks())[0].files == (chain.files[0], chain.files[2])
            await monitor.conclude("pull")
            assert (await monitor.disks())[0].files == (chain.files[0], chain.files[2])
            await monitor.close()

        asyncio.run(story())
        assert qemu.process.poll() is None


def test_replies_of_different_moments(tmp_path: Path) -> None:
    """A node that only one of the replies has is no shorter chain: the replies don't belong together."""
    chain = build_chain(tmp_path, 3)
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        devices = replies.DEVICES.read(qemu.qmp("query-block"))
        stats = replies.STATS.read(qemu.qmp("query-blockstats"))
        nodes: list[dict[str, Any]] = qemu.qmp("query-named-block-nodes", flat=True)
    by_name = replies.NODES.read(nodes)
    names: dict[str, str] = {}
    graph.name_devices(devices, {}, names)
    whole = graph.read_disks(devices=devices, stats=stats, nodes=by_name, graph=None, names=names, folder=None)
    assert whole[0].files == tuple(chain.files), json.dumps(nodes)
    for gone in ("n0", "n1", "n2"):
        left = {name: node for name, node in by_name.items() if name != gone}
        with pytest.raises(graph.Torn):
            graph.read_disks(devices=devices, stats=stats, nodes=left, graph=None, names=names, folder=None)
