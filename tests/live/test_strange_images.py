"""Images that are not what their names say, or can't take what a merge does to them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import Boot
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    assert_same,
    blockdev,
    build_chain,
    drive_with_id,
    read_image,
    small_file_system,
)
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4, size=8 * MIB, data=48 * CLUSTER)]

ACTIVE: JSON = {"flags": ["active"], "on_ready": "pivot"}
BELOW: JSON = {"top": "vda[1]"}


def run(*command: object) -> str:
    """A command's output; it has to succeed."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def attached(image: Path, format_: str = "qcow2", extra: str = "") -> list[str]:
    """A disk that QEMU opens from the headers."""
    drive = f"file={image},format={format_},if=none,id=d0{extra}"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=d0,id=virtio0"]


def both(service: Service, domain: str, **body: Any) -> str:
    """The code with which a dry run and the run refuse alike."""
    dry = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=body)
    answer = service.commit(domain, **body)
    assert dry.status_code == answer.status_code != 202, (dry.text, answer.text)
    assert dry.json()["code"] == answer.json()["code"]
    return answer.json()["code"]


def guest_sees(qemu: Qemu, folder: Path) -> bytes:
    """What the guest's disk shows, through an export of the same QEMU."""
    node = qemu.qmp("query-block")[0]["inserted"]["node-name"]
    socket, out = folder / "nbd", folder / "seen.raw"
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    qemu.qmp("block-export-add", type="nbd", id="see", node_name=node, name="see")
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", f"nbd+unix:///see?socket={socket}", out)
    qemu.qmp("nbd-server-stop")
    return out.read_bytes()


# Under another name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [blockdev, drive_with_id])
@pytest.mark.parametrize(
    ("layer", "body", "code"),
    [
        (0, ACTIVE, "image-read-only"),
        (0, BELOW, "image-read-only"),
        (2, {"top": "vda[2]"}, "overlay-not-writable"),
    ],
)
def test_another_file_has_the_name_by_now(
    service: Service,
    boot: Boot,
    domain: str,
    chain: Chain,
    *,
    layer: int,
    body: JSON,
    code: str,
    opened: Callable[[Chain], list[str]],
) -> None:
    """To write, QEMU opens a name anew: a refreshed template would be read by the guest after a mere dry run."""
    image = chain.images[layer]
    qemu = boot(opened(chain))
    image.rename(image.with_suffix(".aside"))
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 0xee 0 8M", image)
    before = image.read_bytes()
    assert both(service, domain, **body) == code
    assert_same(guest_sees(qemu, image.parent), chain.view)
    assert image.read_bytes() == before
    image.with_suffix(".aside").rename(image)
    assert service.wait_for_job(service.started(domain, **body)["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.images[0] if body is ACTIVE else chain.active), chain.view)


def test_the_overlay_is_replaced_during_the_merge(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path
) -> None:
    """No header is written into another file; the merge is given up, and the chain is as it was."""
    qemu = boot(blockdev(chain))
    overlay = chain.images[2]
    job = service.started(domain, top="vda[2]", bandwidth=2 * CLUSTER, flags=["bandwidth_bytes"])
    service.wait_for_job(job["id"], "running")
    overlay.rename(folder / "aside")
    run("qemu-img", "create", "-q", "-f", "qcow2", overlay, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 0xee 0 8M", overlay)
    before = overlay.read_bytes()
    time.sleep(1.2)
    service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0})
    done = service.wait_for_job(job["id"])
    assert (done["state"], "another file is called" in done["error"]["detail"]) == ("failed", True)
    assert_same(guest_sees(qemu, folder), chain.view)
    assert overlay.read_bytes() == before


@pytest.mark.parametrize("how", ["active", "below"])
def test_a_clone_that_was_made_during_the_merge(tmp_path: Path, chain: Chain, how: str) -> None:
    """https://github.com/OpenNebula/one/issues/5570: nobody tells of it, and the image under it is not deleted."""
    top, clone = chain.images[3] if how == "active" else chain.images[2], tmp_path / "clones" / "clone.qcow2"
    clone.parent.mkdir()
    with Service(tmp_path / "service", {"BLOCKJOBD_IMAGE_ROOTS": str(tmp_path)}) as rooted:
        with Qemu(rooted.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
            rooted.wait_for_domain("vm")
            more: JSON = {"on_ready": "pivot"} if how == "active" else {"top": "vda[1]"}
            flags = ["delete", "bandwidth_bytes", *(["active"] if how == "active" else [])]
            job = rooted.started("vm", bandwidth=4 * CLUSTER, flags=flags, **more)
            rooted.wait_for_job(job["id"], "running")
            run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", top, "-F", "qcow2", clone, "8M")
            rooted.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0})
            done = rooted.wait_for_job(job["id"])
            assert (done["state"], done["result"]["deleted"]) == ("completed", [])
            assert all(str(clone) in left["reason"] for left in done["result"]["not_deleted"])
            qemu.quit()
        rooted.stop()
    assert_same(read_image(clone), chain.views[3] if how == "active" else chain.views[2])


def test_layers_that_are_descriptors(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """What QEMU can do with them before a dry run, it can do afterwards."""
    handed: list[int] = []
    arguments: list[str] = []
    for number, image in enumerate(chain.images):
        for mode in (os.O_RDWR, os.O_RDONLY):
            handed.append(os.open(image, mode))
            arguments += ["-add-fd", f"fd={handed[-1]},set={number + 3}"]
    for number in range(4):
        file: JSON = {"driver": "file", "node-name": f"fn{number}", "filename": f"/dev/fdset/{number + 3}"}
        node: JSON = {"driver": "qcow2", "node-name": f"n{number}", "file": f"fn{number}", "read-only": number != 3}
        node["backing"] = f"n{number - 1}" if number else None
        arguments += ["-blockdev", json.dumps(file | {"auto-read-only": True}), "-blockdev", json.dumps(node)]
    qemu = boot([*arguments, "-device", "virtio-blk-pci,drive=n3,id=virtio0"], pass_fds=handed)
    for descriptor in handed:
        os.close(descriptor)
    dry = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=ACTIVE)
    assert dry.status_code == 200, dry.text
    assert service.wait_for_job(service.started(domain, **ACTIVE)["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


def test_a_data_file_that_another_machine_is_over(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """With data_file_raw the data file is an image by itself."""
    base, data, top, other = (folder / name for name in ("base.qcow2", "base.raw", "top.qcow2", "other.qcow2"))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", base, "8M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 1M 4M", top)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", data, "-F", "raw", other)
    service.client.put(f"/domains/{domain}-off", json={"disks": {"vda": {"image": str(other)}}})
    qemu = boot(attached(top))
    assert both(service, domain, **ACTIVE) == "image-shared"
    service.client.delete(f"/domains/{domain}-off")
    assert service.wait_for_job(service.started(domain, **ACTIVE)["id"])["state"] == "completed"
    qemu.quit()


def test_room_is_where_the_data_goes(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A base with its data elsewhere grows there, and hardly beside its header."""
    with small_file_system(folder, 2 * MIB) as place:
        base, data, top = place / "base.qcow2", folder / "base.data", folder / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", base, "8M")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
        run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 1M 4M", top)
        qemu = boot(attached(top))
        assert service.wait_for_job(service.started(domain, **ACTIVE)["id"])["state"] == "completed"
        qemu.quit()
        run("qemu-io", "-f", "qcow2", "-c", "read -P 9 1M 4M", base)


# What can't be written ------------------------------------------------------------------------------------------------


def test_a_vmdk_that_is_written_once(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """The image of an OVA takes no second write to a place: the job would fail in the middle."""
    raw, base, top = folder / "raw", folder / "base.vmdk", folder / "top.qcow2"
    raw.write_bytes(b"\x05" * (8 * MIB))
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "vmdk", top)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 1M 1M", top)
    boot(attached(top))
    assert both(service, domain, **ACTIVE) == "image-read-only"


@pytest.mark.parametrize("grows", [False, True])
def test_an_inconsistent_bitmap_in_the_base(
    service: Service, boot: Boot, domain: str, folder: Path, *, grows: bool
) -> None:
    """https://github.com/abbbi/virtnbdbackup/issues/266: QEMU was killed, and makes no such image longer."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    run("qemu-img", "bitmap", "--add", base, "broken")
    with Qemu(folder / "first.qmp", attached(base)) as first:
        first.kill()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "6M" if grows else "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 2 1M 1M", top)
    view = read_image(top)
    qemu = boot(attached(top))
    if grows:
        assert both(service, domain, **ACTIVE) == "base-cannot-grow"
    else:
        assert service.wait_for_job(service.started(domain, **ACTIVE)["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(top if grows else base), view)


@pytest.mark.parametrize("body", [ACTIVE, BELOW], ids=["active", "below"])
def test_a_base_that_turns_out_to_be_corrupt(
    service: Service, boot: Boot, domain: str, chain: Chain, body: JSON
) -> None:
    """https://github.com/apache/cloudstack/issues/3193: QEMU gives the base up in the midst; the job ends."""
    view = chain.view
    with chain.images[0].open("r+b") as file:
        # Without its reference counts, the next new cluster lies over the header.
        file.seek(48)
        file.seek(int.from_bytes(file.read(8), "big"))
        file.seek(int.from_bytes(file.read(8), "big"))
        file.write(bytes(CLUSTER))
    qemu = boot(blockdev(chain))
    job = service.wait_for_job(service.started(domain, **body)["id"])
    assert job["state"] in {"failed", "lost"}, job
    assert job["result"]["deleted"] == []
    qemu.kill()
    assert len(view) == 8 * MIB


@pytest.mark.parametrize("when", ["running", "ready"])
def test_a_snapshot_inside_a_layer_that_is_to_be_deleted(
    service: Service, boot: Boot, domain: str, chain: Chain, when: str
) -> None:
    """One that was made while the job ran is not deleted with the image."""
    qemu = boot(blockdev(chain))
    bandwidth = 8 * CLUSTER if when == "running" else 0
    job = service.started(domain, bandwidth=bandwidth, flags=["active", "delete", "bandwidth_bytes"])
    service.wait_for_job(job["id"], when)
    qemu.qmp("human-monitor-command", command_line="savevm kept")
    service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0})
    service.wait_for_job(job["id"], "ready")
    service.client.post(f"/jobs/{job['id']}/pivot")
    done = service.wait_for_job(job["id"])
    assert done["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)
    [kept] = done["result"]["not_deleted"]
    assert (kept["file"], "internal snapshots" in kept["reason"]) == (str(chain.active), True)
    assert chain.active.exists()


# What can't be compared -----------------------------------------------------------------------------------------------


def test_verify_below_a_smaller_overlay(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """What lies beyond the overlay's end is not seen by it, and is no difference."""
    chain = build_chain(folder, 3, sizes=[8 * MIB, 4 * MIB, 4 * MIB])
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 6M 1M", chain.images[0])
    qemu = boot(blockdev(chain))
    job = service.wait_for_job(service.started(domain, top="vda[1]", verify=True)["id"])
    assert (job["state"], job["error"], job["result"]["verified"]) == ("completed", None, 4 * MIB)
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_verify_of_a_part_of_a_file(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Who asks for a proof that can't be given is told before anything is merged."""
    raw, middle, top = folder / "disk.raw", folder / "mid.qcow2", folder / "top.qcow2"
    raw.write_bytes(b"\x99" * MIB + b"\x11" * (4 * MIB) + b"\x99" * MIB)
    part = {"driver": "raw", "offset": MIB, "size": 4 * MIB, "file": {"driver": "file", "filename": str(raw)}}
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", f"json:{json.dumps(part)}", "-F", "raw", middle, "4M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    boot(attached(top))
    assert both(service, domain, top="vda[1]", verify=True) == "not-supported"
