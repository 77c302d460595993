"""Who else has a base: domains that are off and were opened over another image than a header says, disks plugged in."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.live.conftest import Boot
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    assert_same,
    blockdev,
    build_chain,
    read_image,
    write_guest,
)
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = pytest.mark.live

ACTIVE: JSON = {"flags": ["active"], "on_ready": "pivot"}


def create(image: Path, below: Path | str | None = None, *options: str) -> Path:
    """A qcow2 image of 4 MiB over another one."""
    over = ["-b", str(below), "-F", "qcow2"] if below else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, *over, str(image), "4M"], check=True)
    return image


def over(base: Path, overlay: Path) -> list[str]:
    """QEMU's arguments for a disk of the overlay over that base, whatever the overlay's header says."""
    below = {"driver": "qcow2", "node-name": "b", "read-only": True, "file": {"driver": "file", "filename": str(base)}}
    top = {"driver": "qcow2", "node-name": "o", "backing": "b", "file": {"driver": "file", "filename": str(overlay)}}
    nodes = ["-blockdev", json.dumps(below), "-blockdev", json.dumps(top)]
    return [*nodes, "-device", "virtio-blk-pci,drive=o,id=virtio0"]


def test_a_header_that_names_two_images(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """QEMU writes `json:` with a `backing` in it where an overlay was opened over another base: that base is in use."""
    chain = build_chain(folder, 2, size=4 * MIB)
    overlay = create(folder / "overlay.qcow2", create(folder / "stale.qcow2"))
    snapshot = folder / "snapshot.qcow2"
    old = service.qmp_dir / f"{domain}-old.qmp"
    with Qemu(old, over(chain.images[0], overlay)) as qemu:
        service.wait_for_domain(old.stem)
        qemu.qmp("blockdev-snapshot-sync", node_name="o", snapshot_file=str(snapshot), snapshot_node_name="s")
        files = [layer["file"] for layer in service.disk(old.stem)["chain"]]
        qemu.quit()
    service.wait_for_domain(old.stem, "shutoff")
    assert [layer["file"] for layer in service.disk(old.stem)["chain"]] == files
    before = read_image(snapshot)
    boot(blockdev(chain))
    refused = service.commit(domain, **ACTIVE)
    assert (refused.status_code, refused.json()["code"]) == (409, "image-shared")
    assert_same(read_image(snapshot), before)
    service.client.delete(f"/domains/{old.stem}")


@pytest.mark.parametrize("relative", [True, False])
def test_a_merge_above_an_image_over_another_base(
    service: Service, boot: Boot, domain: str, folder: Path, *, relative: bool
) -> None:
    """The header that the merge writes has to say, too, over which base the image below is opened."""
    chain = build_chain(folder, 1, size=4 * MIB)
    overlay = create(folder / "overlay.qcow2", create(folder / "stale.qcow2"))
    first, second = folder / "first.qcow2", folder / "second.qcow2"
    qemu = boot(over(chain.images[0], overlay))
    qemu.qmp("blockdev-snapshot-sync", node_name="o", snapshot_file=str(first), snapshot_node_name="first")
    view = write_guest(qemu, chain.view, 3, MIB, CLUSTER)
    if relative:
        create(second, first.name, "-u")
    mode = {"mode": "existing"} if relative else {}
    qemu.qmp("blockdev-snapshot-sync", node_name="first", snapshot_file=str(second), snapshot_node_name="s", **mode)
    view = write_guest(qemu, view, 5, 2 * MIB, CLUSTER)
    answer = service.commit(domain, top="vda[1]", base="vda[2]", flags=["delete"])
    if answer.status_code == 202:
        job = service.wait_for_job(answer.json()["id"])
        assert (job["state"], job["error"]) == ("completed", None)
    else:
        assert answer.json()["code"] in ("backing-file-impossible", "backing-file-wrong")
    qemu.quit()
    assert_same(read_image(second), view)


def unlocked(arguments: list[str]) -> list[str]:
    """The same without QEMU's locks, as on NFS."""
    return [each.replace('"driver": "file"', '"driver": "file", "locking": "off"') for each in arguments]


def test_a_disk_that_was_plugged_in(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """QEMU tells nobody of it; the process has the base open."""
    chain: Chain = build_chain(folder, 2, size=4 * MIB)
    own, plugged = create(folder / "own.qcow2"), create(folder / "plugged.qcow2", chain.images[0])
    before = read_image(plugged)
    other = service.qmp_dir / f"{domain}-other.qmp"
    slot = ["-device", "pcie-root-port,id=rp1,chassis=1"]
    disk = ["-drive", f"file={own},format=qcow2,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,id=virtio0"]
    with Qemu(other, [*slot, *disk]) as qemu:
        service.wait_for_domain(other.stem)
        boot(unlocked(blockdev(chain)))
        assert len(service.client.get(f"/domains/{other.stem}").json()["disks"]) == 1
        file = {"driver": "file", "filename": str(plugged), "locking": "off"}
        base = {"driver": "file", "filename": str(chain.images[0]), "locking": "off"}
        backing = {"driver": "qcow2", "read-only": True, "file": base}
        qemu.qmp("blockdev-add", driver="qcow2", node_name="hot", file=file, backing=backing)
        qemu.qmp("device_add", driver="virtio-blk-pci", id="hot", drive="hot", bus="rp1")
        time.sleep(0.2)
        refused = service.commit(domain, **ACTIVE)
        assert (refused.status_code, refused.json()["code"]) == (409, "image-shared")
        assert refused.json()["used_by"].startswith(other.stem)
        qemu.quit()
    assert_same(read_image(plugged), before)


@pytest.mark.parametrize("locking", [True, False])
def test_names_that_were_swapped(service: Service, boot: Boot, domain: str, folder: Path, *, locking: bool) -> None:
    """The merged image's name leads to the active layer by now: that is not deleted."""
    chain = build_chain(folder, 4, size=4 * MIB)
    qemu = boot(blockdev(chain) if locking else unlocked(blockdev(chain)))
    merged, active = chain.images[2], chain.images[3]
    number = active.stat().st_ino
    merged.rename(folder / "aside")
    active.rename(merged)
    (folder / "aside").rename(active)
    answer = service.commit(domain, top="vda[1]", base="vda[2]", flags=["delete"])
    if answer.status_code == 202:
        service.wait_for_job(answer.json()["id"])
    assert merged.stat().st_ino == number
    qemu.quit()
