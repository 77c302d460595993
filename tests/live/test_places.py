"""Places among the running jobs are for jobs that work: who waits for a person, or hangs, holds nobody up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.conftest import NewChain
from tests.support.chains import CLUSTER, MIB, blockdev
from tests.support.qemu import Qemu
from tests.support.service import Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=4 * MIB, data=16 * CLUSTER)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service with one place, which soon gives up a QEMU that does not answer."""
    settings = {"BLOCKJOBD_MAX_RUNNING_JOBS": "1", "BLOCKJOBD_QMP_TIMEOUT": "1"}
    with Service(tmp_path / "service", settings) as running:
        yield running


@pytest.mark.parametrize("restarted", [False, True])
def test_a_ready_job_that_waits(service: Service, new_chain: NewChain, tmp_path: Path, *, restarted: bool) -> None:
    """It gives its place to others, also over a restart, and pivots without waiting for one."""
    with (
        Qemu(service.qmp_dir / "a.qmp", blockdev(new_chain(tmp_path / "a"))),
        Qemu(service.qmp_dir / "b.qmp", blockdev(new_chain(tmp_path / "b"))),
    ):
        service.wait_for_domain("a")
        service.wait_for_domain("b")
        waiting = service.wait_for_job(service.started("a", flags=["active"])["id"], "ready")
        if restarted:
            service.stop()
            service.start()
            service.wait_for_domain("b")
        slow = service.started("b", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes"])
        assert slow["state"] != "queued"
        assert service.client.post(f"/jobs/{waiting['id']}/pivot").status_code == 202
        assert service.wait_for_job(waiting["id"])["state"] == "completed"
        assert service.job(slow["id"])["state"] == "running"


def test_a_queued_job_of_a_qemu_that_hangs(service: Service, new_chain: NewChain, tmp_path: Path) -> None:
    """Others pass it as soon as it is known to hang; it is started once its QEMU answers again."""
    machines = {name: new_chain(tmp_path / name) for name in ("a", "b", "c")}
    with (
        Qemu(service.qmp_dir / "a.qmp", blockdev(machines["a"])),
        Qemu(service.qmp_dir / "b.qmp", blockdev(machines["b"])) as hung,
        Qemu(service.qmp_dir / "c.qmp", blockdev(machines["c"])),
    ):
        for name in machines:
            service.wait_for_domain(name)
        first = service.started("a", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes"])
        queued = service.started("b", top="vda[1]")
        last = service.started("c", top="vda[1]")
        assert (queued["state"], last["state"]) == ("queued", "queued")
        hung.pause()
        service.client.delete(f"/jobs/{first['id']}")
        begun = time.monotonic()
        assert service.wait_for_job(last["id"])["state"] == "completed"
        assert time.monotonic() - begun < 30
        assert service.job(queued["id"])["state"] == "queued"
        hung.wake()
        assert service.wait_for_job(queued["id"])["state"] == "completed"
