"""A name stays with its device, and a disk can be read whatever jobs others run."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("how", ["put", "restarted", "killed"])
def test_an_unplugged_disk_leaves_its_name(service: Service, boot: Boot, domain: str, folder: Path, how: str) -> None:
    """A script that knows `sdb` goes on to mean the same disk, over the service's reconnects and restarts, too."""
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
    if how == "put":
        service.client.put(f"/domains/{domain}", json={"qmp": {"unix": str(qemu.monitor)}})
    else:
        service.kill() if how == "killed" else service.stop()
        service.start()
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


@pytest.fixture
def daemon(service: Service, domain: str, folder: Path) -> Iterator[Chain]:
    """A QEMU that has left the folder from which its relative names start, as `-daemonize` does."""
    chain = build_chain(folder / "images", 4, size=4 * MIB)
    for image, backing in zip(chain.images[1:], chain.images, strict=False):
        command = ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing.name, str(image)]
        subprocess.run(command, check=True)
    pidfile, monitor = folder / "pid", service.qmp_dir / f"{domain}.qmp"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-S"]
    command += ["-daemonize", "-pidfile", str(pidfile), "-qmp", f"unix:{monitor},server=on,wait=off"]
    command += ["-drive", f"file={chain.active.name},if=virtio,id=drive0"]
    subprocess.run(command, cwd=folder / "images", check=True)
    pid = int(pidfile.read_text())
    try:
        service.wait_for_domain(domain)
        yield chain
    finally:
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([process], [], [], 10)
        os.close(process)
        monitor.unlink()


@pytest.mark.parametrize("body", [{"flags": ["active"], "on_ready": "pivot"}, {"top": "vda[2]", "base": "vda[3]"}])
def test_relative_names_of_a_daemon(service: Service, daemon: Chain, domain: str, body: dict[str, Any]) -> None:
    """That QEMU can't open its names again is the reason that is told, and not that the disk is a temporary one."""
    refused = service.commit(domain, **body)
    assert (refused.status_code, refused.json()["code"]) == (409, "image-read-only"), refused.text
    assert "No such file or directory" in refused.json()["detail"]
    assert_same(read_image(daemon.active), daemon.view)


def test_an_image_that_was_renamed(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """It is no temporary one; as nobody can tell what its name leads to, nothing is deleted by it."""
    qemu = boot(blockdev(chain))
    renamed = chain.active.with_name("renamed.qcow2")
    chain.active.rename(renamed)
    job = service.wait_for_job(service.started(domain, flags=["active", "delete"], on_ready="pivot")["id"])
    assert (job["state"], job["error"]) == ("completed", None)
    qemu.quit()
    assert renamed.exists()
    assert_same(read_image(chain.images[0]), chain.view)


@pytest.mark.parametrize("name", ["another.qcow2", "l1.qcow2"])
def test_a_layer_that_was_removed_is_no_other_image(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, name: str
) -> None:
    """QEMU goes on with a file without a name; what else it has open, a backup's target, is not taken for it."""
    backup = folder / "backups" / name
    backup.parent.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(backup), "4M"], check=True)
    target = {"driver": "qcow2", "node-name": "target", "file": {"driver": "file", "filename": str(backup)}}
    qemu = boot([*blockdev(chain), "-blockdev", json.dumps(target)])
    chain.images[1].unlink()
    assert str(backup) not in json.dumps(service.disk(domain))
    answer = service.commit(domain, flags=["active", "delete"], on_ready="pivot")
    if answer.status_code == 202:
        job = service.wait_for_job(answer.json()["id"])
        assert str(backup) not in json.dumps(job)
    qemu.quit()
    assert backup.exists()
