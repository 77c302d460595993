"""An outcome is proven, or it is not said, whoever else has had a hand in between."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, build_chain, read_image, write_guest
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4, size=8 * MIB, data=64 * CLUSTER)]

SLOW: JSON = {"flags": ["active", "delete", "bandwidth_bytes"], "bandwidth": 65536}
"""A merge of the active layer that copies one burst and then sits there."""


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service of the test's own, which it stops and starts."""
    with Service(tmp_path / "service") as running:
        yield running


def machine(service: Service, chain: Chain, *arguments: str) -> Qemu:
    qemu = Qemu(service.qmp_dir / "vm.qmp", arguments or blockdev(chain))
    service.wait_for_domain("vm")
    return qemu


def move(qemu: Qemu, device: str, node: str) -> None:
    """Have a device use another node, as a client can without the guest's noticing."""
    path = f"/machine/peripheral/{device}/virtio-backend"
    # A canceled job leaves its base read-only in some versions.
    qemu.qmp("human-monitor-command", command_line=f'qemu-io "{node}" "reopen -w"')
    qemu.qmp("qom-set", path=path, property="drive", value=node)


def dismiss(qemu: Qemu, job: JSON) -> None:
    until(lambda: [each["status"] for each in qemu.qmp("query-jobs")] == ["concluded"])
    qemu.qmp("job-dismiss", id=job["id"])


def undecided(job: JSON, chain: Chain) -> None:
    """The job is lost, says what to compare, and has deleted nothing."""
    assert (job["state"], job["error"]["code"]) == ("lost", "outcome-unknown"), job
    assert f"qemu-img compare -U {chain.active} {chain.images[0]}" in job["error"]["detail"]
    assert job["data_state"] == "base-modified"
    assert job["result"]["deleted"] == []
    assert all(image.exists() for image in chain.images)


def test_canceled_dismissed_and_moved_by_others(service: Service, chain: Chain) -> None:
    """A chain that looks merged is none where nobody here has heard how the job ended."""
    with machine(service, chain) as qemu:
        job = service.started("vm", **SLOW)
        until(lambda: service.job(job["id"])["progress"]["current"] > 0)
        service.stop()
        qemu.qmp("job-cancel", id=job["id"])
        dismiss(qemu, job)
        move(qemu, "virtio0", "n0")
        service.start()
        undecided(service.wait_for_job(job["id"]), chain)
    assert_same(read_image(chain.active), chain.view)


def test_a_gentle_cancel_by_others_that_looks_like_a_pivot(service: Service, chain: Chain) -> None:
    """Concluded without error and moved onto the base by hand: it is not known what the overlay got in between."""
    with machine(service, chain) as qemu:
        job = service.wait_for_job(service.started("vm", flags=["active", "delete"])["id"], "ready")
        service.stop()
        qemu.qmp("block-job-cancel", device=job["id"])
        until(lambda: [each["status"] for each in qemu.qmp("query-jobs")] == ["concluded"])
        view = write_guest(qemu, chain.view, 0x42, MIB, CLUSTER)
        move(qemu, "virtio0", "n0")
        service.start()
        ended = service.wait_for_job(job["id"])
        assert ended["result"]["deleted"] == []
    assert_same(read_image(chain.active), view)


def test_completed_by_others_and_killed_while_nobody_looked(service: Service, chain: Chain) -> None:
    """After a pivot by another client the old overlay is the wrong image to start from, so nobody is told to."""
    with machine(service, chain) as qemu:
        job = service.wait_for_job(service.started("vm", flags=["active"])["id"], "ready")
        service.stop()
        qemu.qmp("job-complete", id=job["id"])
        until(lambda: [each["status"] for each in qemu.qmp("query-jobs")] == ["concluded"])
        write_guest(qemu, chain.view, 0x42, MIB, CLUSTER)
        qemu.kill()
    service.start()
    ended = service.wait_for_job(job["id"])
    undecided(ended, chain)
    assert "Start the domain from the same active layer" not in ended["error"]["detail"]


def test_killed_under_the_eyes_of_the_service(service: Service, chain: Chain) -> None:
    """A QEMU that was heard to its end, and never said that the job was about to take effect, has not pivoted."""
    with machine(service, chain) as qemu:
        job = service.wait_for_job(service.started("vm", flags=["active"])["id"], "ready")
        qemu.kill()
        ended = service.wait_for_job(job["id"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "domain-gone")
    assert_same(read_image(chain.active), chain.view)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("top", ["vda[0]", "vda[1]"])
def test_another_machine_behind_the_same_port(service: Service, chain: Chain, tmp_path: Path, top: str) -> None:
    """Whoever answers at an address by now has no word in what became of another QEMU's job."""
    port = free_port()
    monitor = ["-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"]
    job: JSON = {}
    with Qemu(tmp_path / "one.sock", [*monitor, *blockdev(chain)]) as qemu:
        service.client.put("/domains/vm", json={"qmp": {"tcp": f"127.0.0.1:{port}"}})
        service.wait_for_domain("vm")
        flags = SLOW["flags"] if top == "vda[0]" else ["delete", "bandwidth_bytes"]
        asked: JSON = SLOW | {"top": top, "flags": flags, "bandwidth": 4096}
        job = service.started("vm", **asked)
        until(lambda: service.job(job["id"])["progress"]["current"] > 0)
        service.stop()
        qemu.kill()
    other = build_chain(tmp_path / "other", layers=1, size=8 * MIB, data=64 * CLUSTER)
    arguments = blockdev(other)
    with Qemu(tmp_path / "two.sock", [*monitor, *arguments]):
        service.start()
        ended = service.wait_for_job(job["id"])
        assert (ended["state"], ended["result"]["deleted"]) == ("lost", []), ended
    assert all(image.exists() for image in chain.images)
    assert_same(read_image(chain.active), chain.view)


def test_a_service_that_sees_no_processes(tmp_path: Path, chain: Chain) -> None:
    """In a pid namespace of its own the service can't tell one QEMU from the next one on the same socket."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace takes root")
    within = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with Service(tmp_path / "service", within=within) as service:
        with machine(service, chain) as qemu:
            job = service.started("vm", **SLOW)
            until(lambda: service.job(job["id"])["progress"]["current"] > 0)
            qemu.kill()
        bottom = Chain([chain.images[0]], [chain.views[0]], [chain.formats[0]])
        with Qemu(service.qmp_dir / "vm.qmp", blockdev(bottom)):
            undecided(service.wait_for_job(job["id"]), chain)
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize("top", ["vda[0]", "vda[1]"])
def test_the_whole_way_without_seeing_processes(tmp_path: Path, chain: Chain, top: str) -> None:
    """A job whose id QEMU lists was taken by that QEMU: nothing else is needed to hear its verdict."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace takes root")
    within = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with Service(tmp_path / "service", within=within) as service, machine(service, chain) as qemu:
        more: JSON = {"flags": ["active"], "on_ready": "pivot"} if top == "vda[0]" else {}
        ended = service.wait_for_job(service.started("vm", top=top, **more)["id"])
        assert (ended["state"], ended["error"]) == ("completed", None)
        qemu.quit()
    assert_same(read_image(chain.images[0] if top == "vda[0]" else chain.active), chain.view)


def test_vanished_below_the_active_layer(service: Service, chain: Chain) -> None:
    """The header has the last word: it still leads to the merged layer, so nothing was merged."""
    with machine(service, chain) as qemu:
        job = service.started("vm", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes", "delete"])
        until(lambda: service.job(job["id"])["progress"]["current"] > 0)
        service.stop()
        qemu.qmp("job-cancel", id=job["id"])
        dismiss(qemu, job)
        service.start()
        ended = service.wait_for_job(job["id"])
        assert (ended["state"], ended["error"]["code"]) == ("failed", "job-vanished")
    assert_same(read_image(chain.active), chain.view)


def test_finished_by_others_below_the_active_layer(service: Service, chain: Chain) -> None:
    """A header that leads to the base proves the merge; without a verdict to us nothing is deleted."""
    with machine(service, chain) as qemu:
        job = service.started("vm", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes", "delete"])
        until(lambda: service.job(job["id"])["progress"]["current"] > 0)
        service.stop()
        qemu.conclude(job["id"])
        qemu.qmp("job-dismiss", id=job["id"])
        service.start()
        ended = service.wait_for_job(job["id"])
        assert ended["state"] == "completed", ended
        assert ended["result"]["deleted"] == []
        assert len(ended["result"]["not_deleted"]) == 2
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize("apart_first", [False, True])
def test_a_service_that_moves_between_namespaces(tmp_path: Path, chain: Chain, *, apart_first: bool) -> None:
    """From the host into a container, or back: a pid of before says nothing there, and the job is watched on."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace takes root")
    apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    within = apart if apart_first else ()
    with Service(tmp_path / "service", within=within) as service, machine(service, chain) as qemu:
        job = service.started("vm", **SLOW)
        until(lambda: service.job(job["id"])["progress"]["current"] > 0)
        service.kill()
        service.within = () if apart_first else apart
        service.start()
        service.wait_for_domain("vm")
        time.sleep(1.5)
        assert service.job(job["id"])["state"] == "running"
        assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
        service.wait_for_job(job["id"], "ready")
        assert service.client.delete(f"/jobs/{job['id']}").status_code == 202
        assert service.wait_for_job(job["id"], "canceled")["data_state"] == "base-modified"
        qemu.quit()
    assert_same(read_image(chain.active), chain.view)
