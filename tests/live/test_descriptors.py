"""Without a descriptor to look with, nothing is concluded of a QEMU, and its job goes on to be watched."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from app.core.evidence import Process
from app.hostfs.process import alive, open_files, start_time
from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, read_image
from tests.support.qemu import Qemu
from tests.support.service import Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=8 * MIB, data=64 * CLUSTER)]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def connected(service: Service, stack: ExitStack, count: int) -> None:
    for _ in range(count):
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        try:
            client.connect(str(service.socket))
        except BlockingIOError:
            return


def test_no_descriptor_left(tmp_path: Path, chain: Chain) -> None:
    """`ulimit -n 48` and idle clients: the job that runs is neither ended nor forgotten."""
    within = ("prlimit", "--nofile=48:48")
    with (
        Service(tmp_path / "service", within=within) as service,
        Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)) as qemu,
    ):
        service.wait_for_domain("vm")
        job = service.started("vm", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes"])
        with ExitStack() as stack:
            connected(service, stack, 100)
            for _ in range(10):
                qemu.qmp("stop")
                qemu.qmp("cont")
                time.sleep(0.1)
        until(lambda: service.client.get("/livez").status_code == 200)
        assert service.job(job["id"])["state"] == "running"
        assert service.wait_for_domain("vm")["state"] in {"running", "paused"}
        assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
        assert service.wait_for_job(job["id"])["state"] == "completed"
        qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def hidden(_pid: int) -> None:
    """What a /proc shows that hides processes."""


def test_an_error_while_looking_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a process that is not there has ended; what can't be looked at is not known."""
    own = Process(pid=os.getpid(), started=start_time(os.getpid()), uuid=None)
    gone = Process(pid=2**22 + 1, started=1, uuid=None)
    assert (alive(own), alive(gone)) == (True, False)
    descriptors: list[int] = []
    try:
        with suppress(OSError):
            while True:
                descriptors.append(os.open("/dev/null", os.O_RDONLY))
        found = (alive(own), alive(gone), open_files(own))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert found == (None, None, None)
    # As if /proc hid the processes of others.
    monkeypatch.setattr("app.hostfs.process._stat", hidden)
    assert alive(own) is None
