"""A name stays with its device, and a disk can be read whatever jobs others run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.live.conftest import Boot
from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, build_chain, explicit_nodes, read_image
from tests.support.qemu import Qemu, QmpError
from tests.support.service import Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=4 * MIB, data=16 * CLUSTER)]


SPEED = {"completed": 0, "canceled": 1}


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def names(service: Service, domain: str) -> dict[str, str]:
    """The target names, by the file of the active layer."""
    items = service.client.get(f"/domains/{domain}/disks").json()["items"]
    return {Path(disk["chain"][0]["file"]).parent.name: disk["name"] for disk in items if disk["chain"]}


def unplug(qemu: Qemu, device: str) -> None:
    qemu.qmp("device_del", id=device)
    until(lambda: all(device not in (each.get("qdev") or "") for each in qemu.qmp("query-block")))


def test_an_unplugged_disk_leaves_its_name(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A script that knows `sdb` goes on to mean the same disk, over the service's reconnects, too."""
    chains = {name: build_chain(folder / name, 2, size=4 * MIB) for name in ("one", "two", "three")}
    arguments = ["-device", "virtio-scsi-pci,id=bus"]
    for name, chain in chains.items():
        arguments += explicit_nodes(chain, prefix=f"{name}-")
    for name in ("one", "two"):
        arguments += ["-device", f"scsi-hd,bus=bus.0,drive={name}-1,id={name}"]
    qemu = boot(arguments)
    assert names(service, domain) == {"one": "sda", "two": "sdb"}
    unplug(qemu, "one")
    assert names(service, domain) == {"two": "sdb"}
    assert service.commit(domain, "sda", flags=["active"]).json()["code"] == "disk-not-found"
    qemu.qmp("device_add", driver="scsi-hd", bus="bus.0", drive="three-1", id="three")
    assert names(service, domain) == {"two": "sdb", "three": "sdc"}
    service.client.put(f"/domains/{domain}", json={"qmp": {"unix": str(qemu.monitor)}})
    service.wait_for_domain(domain)
    assert names(service, domain) == {"two": "sdb", "three": "sdc"}
    job = service.started(domain, "sdb", flags=["active"], on_ready="pivot")
    assert service.wait_for_job(job["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chains["two"].images[0]), chains["two"].view)


@pytest.mark.parametrize("how", ["completed", "canceled"])
def test_reading_beside_a_stream(service: Service, boot: Boot, domain: str, chain: Chain, how: str) -> None:
    """Another client's pull may end between any two looks: QEMU 7.2 is not asked what would end it."""
    qemu = boot(blockdev(chain))
    for number in range(5 if how == "canceled" else 1):
        qemu.qmp(
            "block-stream", job_id=f"pull{number}", device="n2", base_node="n0", auto_dismiss=False, speed=SPEED[how]
        )
        for _ in range(20):
            assert service.client.get(f"/domains/{domain}/disks").status_code == 200
        if how == "canceled":
            with suppress(QmpError):
                qemu.qmp("job-cancel", id=f"pull{number}")
        until(lambda: {each["status"] for each in qemu.qmp("query-jobs")} == {"concluded"})
        assert service.disk(domain)["chain"][-1]["file"] == chain.files[-1]
        qemu.qmp("job-dismiss", id=f"pull{number}")
    assert qemu.process.poll() is None
    assert service.disk(domain)["chain"][0]["file"] == chain.at(0)
