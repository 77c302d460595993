"""What QEMU and the images say is heard before a job starts: the dry run refuses what the run would."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live.conftest import Boot
from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, explicit_nodes, read_image
from tests.support.qemu import Qemu, as_user
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4, size=8 * MIB, data=16 * CLUSTER)]

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users take root")
BELOW: JSON = {"top": "vda[1]"}
ACTIVE: JSON = {"flags": ["active"], "on_ready": "pivot"}


def run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def dry(service: Service, domain: str, body: JSON) -> JSON:
    url = f"/domains/{domain}/disks/vda/commit"
    answer = service.client.post(url, params={"dry_run": "true"}, json=body)
    return answer.json() | {"http": answer.status_code}


def refused(service: Service, domain: str, code: str, body: JSON, status: int = 409) -> JSON:
    """The refusal, which dry run and run agree on; no job is left of it."""
    planned = dry(service, domain, body)
    assert (planned["http"], planned.get("code")) == (status, code), planned
    answer = service.commit(domain, **body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert service.client.get("/jobs", params={"domain": domain}).json()["items"] == []
    return answer.json()


def done(service: Service, domain: str, body: JSON) -> JSON:
    """The job that the dry run has let pass, completed."""
    planned = dry(service, domain, body)
    assert planned["http"] == 200, planned
    job = service.wait_for_job(service.started(domain, **body)["id"])
    assert (job["state"], job["error"]) == ("completed", None)
    return planned


# Who can write -------------------------------------------------------------------------------------------------------


@contextmanager
def read_only_mount(folder: Path) -> Generator[None]:
    run("mount", "--bind", folder, folder)
    try:
        run("mount", "-o", "remount,bind,ro", folder)
        yield
    finally:
        run("umount", folder)


def moved(chain: Chain, position: int, folder: Path) -> Path:
    """The image at the position in the chain, base first, is in another folder by now; headers are right."""
    folder.mkdir()
    image = chain.images[position].rename(folder / chain.images[position].name)
    chain.images[position] = image
    for above, below in ((position, position - 1), (position + 1, position)):
        if below >= 0 and above < len(chain.images):
            names = ("-b", chain.images[below], "-F", "qcow2", chain.images[above])
            run("qemu-img", "rebase", "-u", "-f", "qcow2", *names)
    return image


@ROOT
def test_an_overlay_on_a_read_only_mount(service: Service, boot: Boot, domain: str, chain: Chain, folder: Path) -> None:
    """QEMU would end itself at the end of the merge, when the header can't be written."""
    overlay = moved(chain, 2, folder / "ro")
    with read_only_mount(folder / "ro"):
        qemu = boot(blockdev(chain))
        problem = refused(service, domain, "overlay-not-writable", {"top": "vda[2]"})
        assert problem["file"] == str(overlay)
        done(service, domain, {"top": "vda[1]", "base": "vda[2]"})
        qemu.quit()
    assert_same(read_image(chain.active), chain.view)


@ROOT
@pytest.mark.parametrize("flag", ["+i", "+a"])
def test_an_overlay_that_can_not_be_changed(service: Service, boot: Boot, domain: str, chain: Chain, flag: str) -> None:
    """An immutable file is none that a header can be written to."""
    if subprocess.run(["chattr", flag, chain.images[2]], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no such flags")
    try:
        qemu = boot(blockdev(chain))
        refused(service, domain, "overlay-not-writable", {"top": "vda[2]"})
        assert qemu.process.poll() is None
    finally:
        run("chattr", flag.replace("+", "-"), chain.images[2])


@ROOT
def test_an_overlay_that_can_not_be_changed_any_more(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path
) -> None:
    """Hours after the plan: the job is given up with the reason, QEMU lives, and nothing the guest sees has changed."""
    moved(chain, 2, folder / "ro")
    qemu = boot(blockdev(chain))
    body: JSON = {"top": "vda[2]", "bandwidth": 65536, "flags": ["bandwidth_bytes"]}
    job = service.started(domain, **body)
    time.sleep(1.2)
    with read_only_mount(folder / "ro"):
        assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
        ended = service.wait_for_job(job["id"], "failed")
        assert str(folder / "ro") in ended["error"]["detail"]
        assert "whose header has to change" in ended["error"]["detail"]
        assert qemu.process.poll() is None
    done(service, domain, {"top": "vda[2]"})
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


@ROOT
@pytest.mark.parametrize(("position", "code"), [(2, "overlay-not-writable"), (0, "image-read-only")])
def test_an_image_of_another_user(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, position: int, code: str
) -> None:
    """QEMU runs as nobody, and may only read the image."""
    for path in (folder, *chain.images):
        os.chown(path, 65534, 65534)
    for path in folder.parents:
        if path.is_relative_to("/tmp/") and path.stat().st_uid == 0:
            path.chmod(0o755)
    os.chown(chain.images[position], 0, 0)
    chain.images[position].chmod(0o644)
    qemu = boot([*blockdev(chain), *as_user("nobody")])
    problem = refused(service, domain, code, {"top": "vda[2]"})
    assert problem["file"] == str(chain.images[position])
    assert qemu.process.poll() is None


def test_a_base_that_qemu_was_told_not_to_write(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A file node that is read-only by its own options can't be reopened."""
    arguments = explicit_nodes(chain)
    file = json.loads(arguments[1])
    del file["auto-read-only"]
    arguments[1] = json.dumps(file | {"read-only": True})
    boot([*arguments, "-device", "virtio-blk-pci,drive=n3,id=virtio0"])
    refused(service, domain, "image-read-only", BELOW)
    refused(service, domain, "image-read-only", ACTIVE)
    done(service, domain, {"top": "vda[1]", "base": "vda[2]"})


def test_the_probe_leaves_all_as_it_was(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A dry run leaves each node as QEMU had it, and each file's content."""
    qemu = boot(blockdev(chain))
    before = {node["node-name"]: node["ro"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
    contents = [image.read_bytes() for image in chain.images]
    for body in (BELOW, {"top": "vda[2]"}, ACTIVE):
        assert dry(service, domain, body)["http"] == 200
    assert {node["node-name"]: node["ro"] for node in qemu.qmp("query-named-block-nodes", flat=True)} == before
    assert [image.read_bytes() for image in chain.images] == contents


# Sizes ---------------------------------------------------------------------------------------------------------------


def sized(folder: Path, *sizes: str) -> list[Path]:
    """A chain of these sizes, base first, with data at 3 MiB in the base."""
    images: list[Path] = []
    for number, size in enumerate(sizes):
        under = ["-b", images[-1].name, "-F", "qcow2"] if images else []
        images.append(folder / f"s{number}.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *under, images[-1], size)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 64k", images[0])
    return images


def opened(image: Path) -> list[str]:
    return ["-drive", f"file={image},format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=virtio0"]


@pytest.mark.parametrize("sizes", [("6M", "2M", "6M"), ("6M", "6M", "2M", "6M"), ("6M", "1M", "2M", "6M")])
def test_a_short_layer_between_longer_ones(
    service: Service, boot: Boot, domain: str, folder: Path, sizes: tuple[str, ...]
) -> None:
    """What reads as zeros beyond its end would become what the base holds there."""
    images = sized(folder, *sizes)
    boot(opened(images[-1]))
    problem = refused(service, domain, "sizes-unsafe", BELOW)
    assert problem["file"] == str(images[-2])


@pytest.mark.parametrize(
    ("sizes", "body"),
    [
        (("6M", "2M", "6M", "6M"), BELOW),
        (("6M", "2M", "6M"), ACTIVE),
        (("1M", "2M", "4M"), BELOW),
        (("4M", "2M", "2M"), BELOW),
        (("4M", "6M", "6M"), BELOW),
    ],
)
def test_sizes_that_are_safe(
    service: Service, boot: Boot, domain: str, folder: Path, *, sizes: tuple[str, ...], body: JSON
) -> None:
    """The guest reads the same before and after, to the last byte of the smaller of both."""
    images = sized(folder, *sizes) if sizes[0] != "1M" else short_base(folder, *sizes)
    view = read_image(images[-1])
    qemu = boot(opened(images[-1]))
    done(service, domain, body)
    qemu.quit()
    after = read_image(images[0] if body is ACTIVE else images[-1])
    assert_same(after[: len(view)], view)


def short_base(folder: Path, *sizes: str) -> list[Path]:
    images: list[Path] = []
    for number, size in enumerate(sizes):
        under = ["-b", images[-1].name, "-F", "qcow2"] if images else []
        images.append(folder / f"s{number}.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *under, images[-1], size)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number * 64}k 64k", images[-1])
    return images


def test_a_base_of_version_2_with_snapshots(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """QEMU can't make it longer, so it is told before anything is copied."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", base, "4M")
    run("qemu-img", "snapshot", "-c", "one", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "8M")
    boot(opened(top))
    refused(service, domain, "base-cannot-grow", ACTIVE)


def test_a_base_that_is_a_part_of_a_file(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A raw image between two offsets has no room behind it."""
    raw, top = folder / "disk.raw", folder / "top.qcow2"
    raw.write_bytes(bytes(6 * MIB))
    part = {"driver": "raw", "offset": MIB, "size": 4 * MIB, "file": {"driver": "file", "filename": str(raw)}}
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"json:{json.dumps(part)}", "-F", "raw", top, "8M")
    boot(opened(top))
    refused(service, domain, "base-cannot-grow", ACTIVE)


@contextmanager
def loop_device(file: Path) -> Generator[str]:
    made = subprocess.run(["losetup", "-f", "--show", file], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip("there are no loop devices here")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@ROOT
def test_a_device_as_the_base(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A device keeps its size: data that fits is copied and counted, more is refused."""
    disk = folder / "disk.raw"
    disk.write_bytes(bytes(4 * MIB))
    with loop_device(disk) as device:
        middle, top = folder / "mid.qcow2", folder / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", device, "-F", "raw", middle, "4M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", middle)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "8M")
        qemu = boot(opened(top))
        refused(service, domain, "base-cannot-grow", ACTIVE)
        planned = done(service, domain, BELOW)
        assert (planned["bytes_to_copy"], planned["resizes_base_to"]) == (MIB, None)
        qemu.quit()
        assert Path(device).read_bytes()[:MIB] == b"\x09" * MIB


@ROOT
def test_a_device_as_a_merged_layer(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """The data of an image on a device is counted as well."""
    base, place, top = folder / "base.qcow2", folder / "place", folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    place.write_bytes(bytes(8 * MIB))
    with loop_device(place) as device:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", device, "4M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", device)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", device, "-F", "qcow2", top, "4M")
        qemu = boot(opened(top))
        assert done(service, domain, BELOW | {"flags": ["delete"]})["bytes_to_copy"] == MIB
        qemu.quit()
    assert read_image(top)[:MIB] == b"\x09" * MIB


# What the images say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "body"), [(0, ACTIVE), (0, BELOW), (1, BELOW)])
def test_an_image_that_is_marked_corrupt(
    service: Service, boot: Boot, domain: str, chain: Chain, *, position: int, body: JSON
) -> None:
    """QEMU goes on with such an image while it runs, and does not open it for writing the next time."""
    image = chain.images[position]
    head = bytearray(image.read_bytes())
    head[79] |= 2
    image.write_bytes(head)
    boot(blockdev(chain))
    problem = refused(service, domain, "image-corrupt", body)
    assert problem["file"] == str(image)


def killed_while_writing(image: Path, backing: Path | None) -> None:
    """Make an image with lazy refcounts of 8 MiB whose writer was killed: its first 2 MiB are in use, and uncounted."""
    under = [] if backing is None else ["-b", backing, "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", *under, image, "8M")
    writes = ("-c", "write -q -P 1 0 2M", "-c", "flush", "-c", "abort")
    assert subprocess.run(["qemu-io", "-f", "qcow2", *writes, image], check=False, capture_output=True).returncode != 0
    assert '"dirty-flag": true' in run("qemu-img", "info", "--output=json", image)


@pytest.mark.parametrize(
    ("dirty", "body", "code"),
    [(0, ACTIVE, "image-corrupt"), (0, BELOW, "image-corrupt"), (2, {"top": "vda[2]"}, "overlay-not-writable")],
)
def test_an_image_whose_writer_was_killed(
    service: Service, boot: Boot, domain: str, folder: Path, *, dirty: int, body: JSON, code: str
) -> None:
    """Lazy reference counts that are behind: QEMU would give out places that are in use, and forget that they are."""
    images = [folder / f"{number}.qcow2" for number in range(4)]
    for number, image in enumerate(images):
        under = images[number - 1] if number else None
        if number == dirty:
            killed_while_writing(image, under)
        else:
            backing = [] if under is None else ["-b", under, "-F", "qcow2"]
            run("qemu-img", "create", "-q", "-f", "qcow2", *backing, image, "8M")
            run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {number + 2} {number + 2}M 1M", image)
    shown = read_image(images[3])
    qemu = boot(opened(images[3]))
    assert refused(service, domain, code, body)["file"] == str(images[dirty])
    qemu.quit()
    assert '"dirty-flag": true' in run("qemu-img", "info", "--output=json", images[dirty]), "it was repaired by nobody"
    run("qemu-img", "check", "-q", "-r", "all", images[dirty])
    qemu = boot(opened(images[3]))
    done(service, domain, body)
    qemu.quit()
    assert_same(read_image(images[0] if body == ACTIVE else images[3]), shown)
    run("qemu-img", "check", "-q", images[dirty])


def test_snapshots_and_bitmaps_in_merged_layers(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """What a merge loses is told, and an image with internal snapshots is not deleted."""
    run("qemu-img", "snapshot", "-c", "one", chain.images[1])
    run("qemu-img", "bitmap", "--add", chain.images[2], "daily")
    boot(blockdev(chain))
    planned = dry(service, domain, BELOW | {"flags": ["delete"]})
    codes = {warning["code"]: warning["detail"] for warning in planned["warnings"]}
    assert str(chain.images[1]) in codes["internal-snapshots-lost"]
    assert "daily" in codes["bitmaps-lost"]
    assert planned["deletes"] == [str(chain.images[2])]
    job = service.wait_for_job(service.started(domain, top="vda[1]", flags=["delete"])["id"])
    assert job["result"]["deleted"] == [str(chain.images[2])]
    assert [left["file"] for left in job["result"]["not_deleted"]] == [str(chain.images[1])]


def test_a_thin_disk_on_a_small_file_system(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """2 MiB take a few tables, however big the disk is."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    run("mount", "-t", "tmpfs", "-o", "size=32M", "none", folder)
    try:
        images: list[Path] = []
        for number in range(3):
            under = ["-b", images[-1], "-F", "qcow2"] if images else []
            images.append(folder / f"t{number}.qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", *under, images[-1], "1T")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 5 512G 2M", images[1])
        qemu = boot(opened(images[-1]))
        assert done(service, domain, BELOW)["base_growth_max"] < 8 * MIB
        qemu.quit()
    finally:
        run("umount", "-l", folder)


# Who else is in QEMU's graph -----------------------------------------------------------------------------------------


def exported(node: str) -> Callable[[Qemu, Path], None]:
    def do(qemu: Qemu, folder: Path) -> None:
        qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "nbd")}})
        qemu.qmp("block-export-add", id="exp0", type="nbd", node_name=node)

    return do


def overlaid(node: str) -> Callable[[Qemu, Path], None]:
    def do(qemu: Qemu, folder: Path) -> None:
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / "ov.qcow2", "8M")
        file = {"driver": "file", "filename": str(folder / "ov.qcow2")}
        qemu.qmp("blockdev-add", driver="qcow2", node_name="ov", file=file, backing=node)

    return do


def plugged(node: str) -> Callable[[Qemu, Path], None]:
    def do(qemu: Qemu, _folder: Path) -> None:
        qemu.qmp("device_add", driver="virtio-blk-pci", id="second", drive=node)

    return do


@pytest.mark.parametrize(
    ("user", "body", "code", "name"),
    [
        (exported("n0"), BELOW, "image-shared", "export exp0"),
        (exported("n0"), ACTIVE, "image-shared", "export exp0"),
        (exported("n1"), BELOW, "node-in-use", "export exp0"),
        (exported("n2"), ACTIVE, "node-in-use", "export exp0"),
        (overlaid("n0"), BELOW, "image-shared", "ov"),
        (overlaid("n1"), BELOW, "image-shared", "ov"),
        (overlaid("n3"), ACTIVE, "node-in-use", "ov"),
        (plugged("n0"), BELOW, "image-shared", "/vdb"),
    ],
)
def test_others_in_the_same_qemu(
    service: Service,
    boot: Boot,
    domain: str,
    chain: Chain,
    folder: Path,
    *,
    user: Callable[[Qemu, Path], None],
    body: JSON,
    code: str,
    name: str,
) -> None:
    """Exports, devices and overlays that use the nodes are seen before, and named."""
    qemu = boot(blockdev(chain), machine="pc")
    user(qemu, folder)
    assert name in refused(service, domain, code, body)["used_by"]


@pytest.mark.parametrize(("node", "body"), [("n3", BELOW), ("n2", BELOW), ("n3", ACTIVE)])
def test_an_export_that_stands_in_nobody_s_way(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, node: str, body: JSON
) -> None:
    """An export of the active layer, or of the topmost merged one, reads the same data afterwards."""
    qemu = boot(blockdev(chain))
    exported(node)(qemu, folder)
    done(service, domain, body)
    qemu.quit()
    assert_same(read_image(chain.images[0] if body is ACTIVE else chain.active), chain.view)


# Migration -----------------------------------------------------------------------------------------------------------


def test_a_domain_that_is_migrated(service: Service, boot: Boot, domain: str, chain: Chain, folder: Path) -> None:
    """Before, during and after a migration the images are another QEMU's."""
    place = f"unix:{folder}/migration"
    source = boot(blockdev(chain), run=True)
    source.qmp("migrate-set-parameters", max_bandwidth=1)
    with Qemu(folder / f"{domain}-in.qmp", [*blockdev(chain), "-incoming", place], run=True) as target:
        service.client.put(f"/domains/{domain}-in", json={"qmp": {"unix": str(target.monitor)}})
        service.wait_for_domain(f"{domain}-in", "incoming")
        refused(service, f"{domain}-in", "domain-migrating", ACTIVE)
        source.qmp("migrate", uri=place)
        refused(service, domain, "domain-migrating", ACTIVE)
        refused(service, domain, "domain-migrating", BELOW)
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        service.wait_for_domain(domain, "migrating")
        service.wait_for_domain(f"{domain}-in", "running")
        assert source.qmp("query-migrate")["status"] == "completed"
        refused(service, domain, "domain-migrating", ACTIVE)
        source.quit()
        done(service, f"{domain}-in", ACTIVE)
        target.quit()
    service.client.delete(f"/domains/{domain}-in")
    assert_same(read_image(chain.images[0]), chain.view)
