"""How far a base can grow where it is: on a device, in an export, and with what is not written over in its place."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from app.hostfs import qcow2
from tests.live.conftest import Boot
from tests.support.chains import CLUSTER, MIB, assert_same, read_image, small_file_system
from tests.support.service import JSON, Service

pytestmark = pytest.mark.live

ACTIVE: JSON = {"flags": ["active"], "on_ready": "pivot"}


def run(*command: str | Path | int) -> str:
    """Run a tool; what it printed."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def attached(image: Path) -> list[str]:
    """QEMU's arguments for a disk with this active layer."""
    return ["-drive", f"file={image},if=virtio,format=qcow2,id=d0"]


@contextmanager
def device(folder: Path, size: int) -> Generator[Path]:
    """A block device of that many bytes."""
    (folder / "behind").touch()
    os.truncate(folder / "behind", size)
    name = Path(run("losetup", "-f", "--show", folder / "behind").strip())
    try:
        yield name
    finally:
        run("losetup", "-d", name)


def end_of(image: Path) -> int:
    """Where the image ends in its file, as the service sees it."""
    with image.open("rb") as file:
        return qcow2.end(lambda at, length: os.pread(file.fileno(), length, at))


def dry(service: Service, domain: str) -> JSON:
    """The plan of an active merge, or the problem."""
    return service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=ACTIVE).json()


def written_over(folder: Path, base: Path, size: str, *options: str) -> tuple[Path, bytes]:
    """An overlay that hides the first `size` bytes of a full base of 8 MiB, and what the base shows.

    Half of the latter can be compressed. `options` are those with which qemu-img makes the base.
    """
    raw, overlay = folder / "raw", folder / "overlay.qcow2"
    half = CLUSTER // 2
    shown = b"".join(Random(number).randbytes(half) + b"\1" * half for number in range(128))
    raw.write_bytes(shown)
    run("qemu-img", "convert", *options, "-O", "qcow2", raw, base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 9 0 {size}", overlay)
    return overlay, shown


def growth_as_planned(service: Service, boot: Boot, domain: str, base: Path, overlay: Path) -> int:
    """Bytes by which the base's file grows in a merge of the overlay: no more than was planned."""
    before = base.stat().st_blocks * 512
    qemu = boot(attached(overlay))
    plan = dry(service, domain)
    job = service.wait_for_job(service.started(domain, **ACTIVE)["id"])
    assert (job["state"], job["error"]) == ("completed", None)
    qemu.quit()
    grown = base.stat().st_blocks * 512 - before
    assert grown <= plan["base_growth_max"]
    return grown


@pytest.mark.parametrize("clusters", [24, 104])
def test_a_qcow2_image_on_a_device(service: Service, boot: Boot, domain: str, folder: Path, clusters: int) -> None:
    """https://github.com/oVirt/vdsm/issues/352: the room is that of the device, not of the file system of /dev."""
    with device(folder, clusters * CLUSTER) as base:
        run("qemu-img", "create", "-q", "-f", "qcow2", base, "6M")
        run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 1M", base)
        overlay = folder / "overlay.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
        run("qemu-io", "-f", "qcow2", "-c", "write -q -P 2 1M 4M", overlay)
        qemu = boot(attached(overlay))
        said = dry(service, domain)
        free = max(0, clusters * CLUSTER - end_of(base))
        if clusters == 24:
            assert (said["code"], said["free"]) == ("insufficient-storage", free)
            assert said["needed"] >= 4 * MIB
        else:
            assert said["base_growth_max"] >= 4 * MIB
            job = service.wait_for_job(service.started(domain, **ACTIVE)["id"])
            assert (job["state"], job["error"]) == ("completed", None)
        qemu.quit()
        shown = b"\1" * MIB + b"\2" * 4 * MIB
        assert_same(read_image(overlay if clusters == 24 else base), shown)


@pytest.mark.parametrize("kind", ["compressed", "snapshot", "plain"])
def test_what_stays_when_it_is_written_over(service: Service, boot: Boot, domain: str, folder: Path, kind: str) -> None:
    """https://github.com/oVirt/vdsm/pull/418: compressed clusters, and those of a snapshot, get new places."""
    base = folder / "base.qcow2"
    overlay, shown = written_over(folder, base, "4M", *(["-c"] if kind == "compressed" else []))
    if kind == "snapshot":
        run("qemu-img", "snapshot", "-c", "before", base)
    grown = growth_as_planned(service, boot, domain, base, overlay)
    # Places that were given up in the midst of it may be given out again.
    assert (grown > 2 * MIB) is (kind != "plain")
    assert_same(read_image(base), b"\x09" * 4 * MIB + shown[4 * MIB :])


@pytest.mark.parametrize("kind", ["compressed", "snapshot"])
def test_a_base_without_room_for_what_stays(service: Service, boot: Boot, domain: str, folder: Path, kind: str) -> None:
    """The plan refuses what would fail in the middle, and so does the run that nobody has planned."""
    with small_file_system(folder, 12 * MIB) as small:
        base = small / "base.qcow2"
        overlay, _ = written_over(folder, base, "8M", *(["-c"] if kind == "compressed" else []))
        if kind == "snapshot":
            run("qemu-img", "snapshot", "-c", "before", base)
        qemu = boot(attached(overlay))
        assert dry(service, domain)["code"] == "insufficient-storage"
        started = service.commit(domain, **ACTIVE)
        assert (started.status_code, started.json()["code"]) == (507, "insufficient-storage")
        qemu.quit()


def test_places_that_were_given_out_beforehand(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """With preallocation=metadata every cluster has its place, and the file is a hole there."""
    base, overlay = folder / "base.qcow2", folder / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", base, "8M")
    run("qemu-io", "-f", "qcow2", *(f"-cwrite -q -P 7 {at}k 4k" for at in range(0, 4096, 64)), base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 6M", overlay)
    assert growth_as_planned(service, boot, domain, base, overlay) > 5 * MIB
    assert_same(read_image(base), b"\x09" * 6 * MIB)


def test_an_end_that_nobody_knows(folder: Path) -> None:
    """While the reference counts are behind they don't say where the image ends."""
    image = folder / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "8M")
    assert end_of(image) == 4 * CLUSTER, "a header, a refcount table, a block of them, an L1 table"
    writes = ("-c", "write -q 0 2M", "-c", "flush", "-c", "abort")
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, image], check=False, capture_output=True)
    with pytest.raises(qcow2.Damaged, match="behind"):
        end_of(image)


def test_a_raw_base_in_an_export(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """https://github.com/autotest/tp-qemu/pull/3264: an export does not become longer."""
    base, overlay, socket = folder / "base", folder / "overlay.qcow2", folder / "nbd"
    run("qemu-img", "create", "-q", "-f", "raw", base, "4M")
    run("qemu-nbd", "--fork", "--pid-file", folder / "pid", "-k", socket, "-f", "raw", "-x", "root", "-t", base)
    try:
        name = f"nbd+unix:///root?socket={socket}"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", overlay, "6M")
        qemu = boot(attached(overlay))
        said = dry(service, domain)
        assert (said["code"], said["needed"]) == ("base-cannot-grow", 6 * MIB)
        qemu.quit()
    finally:
        os.kill(int((folder / "pid").read_text()), 15)
