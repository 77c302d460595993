"""The header that a merge leaves leads to the base tomorrow, too, or the merge is refused before anything is done."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import Boot
from tests.support.chains import MIB, assert_same, header_backing, read_image
from tests.support.service import JSON, Service

pytestmark = pytest.mark.live

BASE, MIDDLE, TOP = 0x11, 0x22, 0x33


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return done.stdout


def create(image: Path, below: str | None = None, *options: str, size: str = "4M", form: str = "qcow2") -> Path:
    """An image; `below` is the string for its header."""
    under = ["-b", below, "-F", form] if below is not None else []
    # The string may mean nothing to the tool, which has another working directory.
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-u"] if under else []), *options, *under, image, size)
    return image


def fill(image: Path | str, pattern: int, at: str, *options: str) -> None:
    run("qemu-io", *(options or ("-f", "qcow2")), "-c", f"write -P {pattern} {at} 64k", image)


def opened(active: Path, *more: str) -> list[str]:
    return [*more, "-drive", f"file={active},format=qcow2,if=none,id=drive0", "-device", "virtio-blk-pci,drive=drive0"]


def chain_files(image: Path, *options: str) -> list[str]:
    """The images that the headers lead to, from the active one down; raises where one can't be opened."""
    shown = json.loads(run("qemu-img", "info", *options, "-U", "--backing-chain", "--output=json", image))
    return [os.path.realpath(layer["filename"]) for layer in shown]


def merged(service: Service, domain: str, **body: Any) -> JSON:
    """The merge of the layer below the active one; both the plan and the end are looked at."""
    asked: JSON = {"top": "vda[1]"} | body
    plan = service.client.post(f"/domains/{domain}/disks/vda/commit", params={"dry_run": "true"}, json=asked)
    assert plan.status_code == 200, plan.text
    job = service.wait_for_job(service.started(domain, **asked)["id"])
    assert job["state"] == "completed", job
    return plan.json() | {"result": job["result"]}


def refused(service: Service, domain: str, code: str, **body: Any) -> JSON:
    """The refusal, by the dry run and by the run; nothing is left of it."""
    asked: JSON = {"top": "vda[1]"} | body
    url = f"/domains/{domain}/disks/vda/commit"
    for answer in (service.client.post(url, params={"dry_run": "true"}, json=asked), service.commit(domain, **asked)):
        assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert service.client.get("/jobs", params={"domain": domain}).json()["items"] == []
    return answer.json()


def three(folder: Path, names: Sequence[str] = ("base.qcow2", "mid.qcow2", "top.qcow2")) -> tuple[Path, Path, Path]:
    """A base, a middle and a top layer with relative headers, and data in each."""
    base, middle, top = (folder / name for name in names)
    create(base)
    create(middle, f"./{base.name}")
    create(top, f"./{middle.name}")
    for image, pattern, at in ((base, BASE, "0"), (middle, MIDDLE, "64k"), (top, TOP, "128k")):
        fill(image, pattern, at)
    return base, middle, top


# Names that a header can hold ----------------------------------------------------------------------------------------


def test_a_colon_in_a_relative_name(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """`vm:1.qcow2` would be a protocol, so the name begins with `./`."""
    base, _, top = three(folder, ("vm:1.qcow2", "vm:2.qcow2", "vm:3.qcow2"))
    view = read_image(top)
    with boot(["-drive", f"file={top},format=qcow2,if=virtio"]):
        plan = merged(service, domain)
    assert plan["backing_file"] == "./vm:1.qcow2"
    assert header_backing(top) == "./vm:1.qcow2"
    assert_same(read_image(top), view)
    assert base.exists()


@pytest.mark.parametrize("delete", [False, True])
def test_external_data_files(service: Service, boot: Boot, domain: str, folder: Path, *, delete: bool) -> None:
    """An image whose data is in another file is named by itself; its data file is nobody's image."""
    base, middle, top = (folder / name for name in ("base.qcow2", "mid.qcow2", "top.qcow2"))
    for image, below in ((base, None), (middle, "base.qcow2"), (top, "mid.qcow2")):
        create(image, below, "-o", f"data_file={image.with_suffix('.data')}")
    for image, pattern, at in ((base, BASE, "0"), (middle, MIDDLE, "64k"), (top, TOP, "128k")):
        fill(image, pattern, at)
    view = read_image(top)
    with boot(opened(top)):
        done = merged(service, domain, flags=["delete"] if delete else [])
    assert done["backing_file"] == "base.qcow2"
    assert chain_files(top) == [str(top), str(base)]
    assert_same(read_image(top), view)
    assert all(image.with_suffix(".data").exists() for image in (base, middle, top))
    assert middle.exists() is not delete
    assert done["result"]["deleted"] == ([str(middle)] if delete else [])


@pytest.mark.parametrize("said_by", ["header", "command line"])
def test_a_base_at_an_offset(service: Service, boot: Boot, domain: str, folder: Path, said_by: str) -> None:
    """The name tells at which offset the base begins, as a path alone would open other data."""
    raw = folder / "disk.raw"
    raw.write_bytes(b"\x99" * MIB + bytes([BASE]) * (4 * MIB) + b"\x99" * MIB)
    described = {"driver": "raw", "offset": MIB, "size": 4 * MIB, "file": {"driver": "file", "filename": str(raw)}}
    middle, top = folder / "mid.qcow2", folder / "top.qcow2"
    in_header = f"json:{json.dumps(described)}" if said_by == "header" else str(raw)
    create(middle, in_header, form="raw")
    create(top, "mid.qcow2")
    fill(top, TOP, "128k")
    backing = {"backing.backing.driver": "raw", "backing.backing.offset": MIB, "backing.backing.size": 4 * MIB}
    backing |= {"backing.backing.file.filename": str(raw), "backing.backing.file.driver": "file"}
    more = "".join(f",{key}={value}" for key, value in backing.items()) if said_by == "command line" else ""
    with boot(["-drive", f"file={top},format=qcow2,if=virtio{more}"]) as qemu:
        qemu.qmp("human-monitor-command", **{"command-line": 'qemu-io virtio0 "flush"'})
        merged(service, domain)
    view = read_image(top)
    assert view[:64] == bytes([BASE]) * 64
    assert view[128 << 10 : (128 << 10) + 64] == bytes([TOP]) * 64
    assert len(view) == 4 * MIB


def create_keyed(*command: str | Path) -> None:
    """Make an image with a key; the tool gives up where a kernel counts CPU time in ticks, and none has passed."""
    for _ in range(100):
        with suppress(subprocess.CalledProcessError):
            run(*command)
            return
    run(*command)


def test_a_key_that_only_a_header_names(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A base that opens with a key only: what names the key today goes on to name it."""
    base, middle, top = folder / "base.qcow2", folder / "mid.qcow2", folder / "top.qcow2"
    secret = ["--object", "secret,id=sec0,data=123456"]
    options = ["-o", "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10"]
    create_keyed("qemu-img", "create", "-q", *secret, "-f", "qcow2", *options, base, "4M")
    target = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={base}"
    run("qemu-io", *secret, "--image-opts", "-c", f"write -P {BASE} 0 64k", target)
    name = {"driver": "qcow2", "encrypt.key-secret": "sec0", "file.driver": "file", "file.filename": str(base)}
    create(middle, f"json:{json.dumps(name)}")
    create(top, "mid.qcow2")
    fill_keyed = ("-c", f"write -P {TOP} 128k 64k", str(top))
    run("qemu-io", *secret, "-f", "qcow2", *fill_keyed)
    with boot(opened(top, "-object", "secret,id=sec0,data=123456")):
        merged(service, domain)
    assert json.loads((header_backing(top) or "").removeprefix("json:")) == name
    run("qemu-io", *secret, "-f", "qcow2", "-c", f"read -P {BASE} 0 64k", "-c", f"read -P {TOP} 128k 64k", top)


def test_a_link_that_only_qemu_sees(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """In a mount namespace of its own QEMU goes through a link that nobody else has; a relative name needs none."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    images, mount = folder / "images", folder / "mount"
    images.mkdir()
    mount.mkdir()
    base, middle, top = three(images)
    view = read_image(top)
    script = f'mount -t tmpfs none {mount} && ln -s {images} {mount}/link && exec "$@"'
    within = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    with boot(opened(mount / "link" / "top.qcow2"), within=within):
        merged(service, domain)
    assert chain_files(top) == [str(top), str(base)]
    assert_same(read_image(top), view)
    assert middle.exists()


def test_folders_that_a_link_joins(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """`..` after a link means the folder above the one that the link leads to."""
    real, other = folder / "real" / "deep", folder / "other"
    real.mkdir(parents=True)
    other.mkdir()
    (folder / "link").symlink_to(real)
    base = create(folder / "real" / "base.qcow2")
    create(other / "mid.qcow2", "../link/../base.qcow2")
    top = create(real / "top.qcow2", "../../other/mid.qcow2")
    fill(base, BASE, "0")
    with boot(opened(folder / "link" / "top.qcow2")):
        merged(service, domain)
    assert chain_files(top) == [str(top), str(base)]
    assert_same(read_image(top)[:8], bytes([BASE]) * 8)


# Names that no header can hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere.qcow2", "mid.qcow2", "/dev/null", "json:{", "nbd://127.0.0.1:1/x", "a:b"])
def test_a_given_name_that_leads_elsewhere(service: Service, boot: Boot, domain: str, folder: Path, name: str) -> None:
    """A name by the caller has to lead to the base."""
    _, _, top = three(folder)
    with boot(opened(top)):
        problem = refused(service, domain, "backing-file-wrong", backing_file=name, flags=["delete"])
        assert name in problem["detail"]
        assert merged(service, domain, backing_file="./base.qcow2", flags=["delete"])["result"]["deleted"]
    assert header_backing(top) == "./base.qcow2"


def test_a_descriptor_of_qemu(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A base that QEMU has been handed open has no name that another process could open."""
    base, middle, top = three(folder)
    handed = os.open(base, os.O_RDWR)
    arguments = ["-add-fd", f"fd={handed},set=3", *nodes_of(Path("/dev/fdset/3"), middle, top)]
    arguments[3] = arguments[3].replace('"read-only": true', '"read-only": false')
    try:
        with boot(arguments, pass_fds=(handed,)):
            refused(service, domain, "backing-file-impossible")
    finally:
        os.close(handed)
    assert chain_files(top) == [str(top), str(middle), str(base)]


def nodes_of(*images: Path) -> list[str]:
    """Explicit nodes, base first, whatever the headers say."""
    arguments: list[str] = []
    for number, image in enumerate(images):
        node = {"driver": "qcow2", "node-name": f"n{number}", "read-only": number < len(images) - 1}
        node |= {"file": {"driver": "file", "filename": str(image)}, "backing": f"n{number - 1}" if number else None}
        arguments += ["-blockdev", json.dumps(node)]
    return [*arguments, "-device", f"virtio-blk-pci,drive=n{len(images) - 1}"]


def far_below(folder: Path, parts: int) -> Path:
    """A folder whose path is 200 bytes longer for each of the parts."""
    for _ in range(parts):
        folder /= "d" * 199
    folder.mkdir(parents=True)
    return folder


def test_a_name_longer_than_a_header_holds(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """No more than 1023 bytes fit into a header, and QEMU ends itself over more; a shorter name that works is taken."""
    far = far_below(folder, 5)
    base, middle, top = create(far / "base.qcow2"), folder / "mid.qcow2", folder / "top.qcow2"
    (folder / "link").symlink_to(far)
    create(middle, "link/base.qcow2")
    create(top, str(middle))
    with boot(nodes_of(base, middle, top)) as qemu:
        assert merged(service, domain)["backing_file"] == "link/base.qcow2"
        assert qemu.process.poll() is None
    assert chain_files(top) == [str(top), str(base)]


def test_no_name_that_a_header_holds(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Where every name is too long the merge is refused, and QEMU goes on."""
    far = far_below(folder, 6)
    base, middle, top = create(far / "base.qcow2"), create(far / "mid.qcow2", "base.qcow2"), folder / "top.qcow2"
    create(top, "mid.qcow2")
    with boot(nodes_of(base, middle, top)) as qemu:
        refused(service, domain, "backing-file-impossible")
        assert qemu.process.poll() is None


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_a_small_header_cluster(service: Service, boot: Boot, domain: str, folder: Path, compat: str) -> None:
    """In a cluster of 512 bytes little room is left for a name, and QEMU ends itself over more."""
    far = far_below(folder, 2)
    base, middle, top = create(far / "base.qcow2"), create(far / "mid.qcow2", "base.qcow2"), folder / "top.qcow2"
    create(top, "m", "-o", f"compat={compat},cluster_size=512")
    with boot(nodes_of(base, middle, top)) as qemu:
        refused(service, domain, "backing-file-impossible")
        assert qemu.process.poll() is None


def test_an_overlay_whose_header_qemu_cannot_change(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A format whose backing file QEMU can't change is told before anything is copied."""
    base, middle, _ = three(folder)
    top = folder / "top.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", folder / "base.vmdk", "4M")
    below = f"backing_file={folder / 'base.vmdk'},backing_fmt=vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", below, top, "4M")
    nodes = nodes_of(base, middle)[:-2]
    node = {"driver": "vmdk", "node-name": "n2", "backing": "n1", "file": {"driver": "file", "filename": str(top)}}
    with boot([*nodes, "-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=n2"]) as qemu:
        answer = service.commit(domain, top="vda[1]")
        assert (answer.status_code, answer.json()["code"]) == (409, "overlay-not-writable"), answer.text
        assert qemu.process.poll() is None
