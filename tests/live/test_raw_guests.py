"""A guest writes what it likes into its raw disk, also what looks like a qcow2 header. Nobody may believe it."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, read_image
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=4 * MIB, data=16 * CLUSTER, folder="a")]

ACTIVE: Final[JSON] = {"flags": ["active"], "on_ready": "pivot"}
SIZE: Final = 123 * 4096
"""Bytes of a file of the host that is nobody's image."""


def header(name: str) -> bytes:
    """A sector or two that say: qcow2, over the image of that name."""
    text = name.encode()
    fields = struct.pack(">4sIQIIQ", b"QFI\xfb", 2, 200, len(text), 16, 4 * MIB)
    return (fields.ljust(200, b"\0") + text).ljust(1024, b"\0")


def sectors(kind: str, folder: Path, chain: Chain) -> bytes:
    """What the guest writes. It names the other machine's base, a file of the host, or what nobody can follow."""
    if kind == "damaged":
        return b"QFI\xfb".ljust(1024, b"\xff")
    if kind == "file":
        secret = folder / "secret"
        secret.write_bytes(bytes(SIZE))
        return header(str(secret))
    if kind == "surrogate":
        odd = str(folder / "odd")
        # A file of the host whose name is not UTF-8 would be found by it.
        Path(f"{odd}\udc80").write_bytes(bytes(CLUSTER))
        described = {"driver": "qcow2", "file": {"driver": "file", "filename": f"{odd}\udc80"}}
        return header(f"json:{json.dumps(described)}")
    return header({"base": str(chain.images[0]), "broken": "json:{broken"}[kind])


def write(qemu: Qemu, image: Path, data: bytes) -> None:
    """Write to the beginning of the disk, as the guest would: through the device's own node."""
    source = image.with_suffix(".sectors")
    source.write_bytes(data)
    qemu.qmp("human-monitor-command", command_line=f'qemu-io d0 "write -s {source} 0 {len(data)}"')
    source.unlink()
    assert image.read_bytes()[: len(data)] == data


def raw_disk(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    image = folder / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    return image


def drive(image: Path) -> list[str]:
    return ["-drive", f"file={image},format=raw,if=virtio,id=d0"]


@contextmanager
def machines(folder: Path, chain: Chain, settings: JSON | None = None) -> Generator[tuple[Service, Qemu, Qemu, Path]]:
    """A service that knows two running machines: `a` with the chain, `b` with a raw disk."""
    image = raw_disk(folder / "b")
    with ExitStack() as stack:
        service = stack.enter_context(Service(folder / "service", settings))
        a = stack.enter_context(Qemu(service.qmp_dir / "a.qmp", blockdev(chain)))
        b = stack.enter_context(Qemu(service.qmp_dir / "b.qmp", drive(image)))
        for name in ("a", "b"):
            service.wait_for_domain(name)
            assert service.disk(name)
        yield service, a, b, image


def plan(service: Service) -> tuple[int, str]:
    answer = service.client.post("/domains/a/disks/vda/commit", params={"dry_run": "true"}, json=ACTIVE)
    return answer.status_code, answer.text


def works(service: Service) -> None:
    assert plan(service)[0] == 200, plan(service)
    job = service.wait_for_job(service.started("a", **ACTIVE)["id"])
    assert (job["state"], job["error"]) == ("completed", None)


def assert_raw(service: Service, name: str, image: Path) -> None:
    """The domain's disk is what QEMU had: one raw image, of its own size."""
    (layer,) = service.disk(name)["chain"]
    assert (layer["file"], layer["format"], layer["virtual_size"]) == (str(image), "raw", 4 * MIB)


@pytest.mark.parametrize("kind", ["damaged", "broken", "base", "file", "surrogate"])
def test_off_it_is_what_qemu_had(folder: Path, chain: Chain, kind: str) -> None:
    """No header that the guest has written stops others' merges, or shows anything of the host, over a restart too."""
    with machines(folder, chain) as (service, a, b, image):
        write(b, image, sectors(kind, folder, chain))
        b.quit()
        service.wait_for_domain("b", "shutoff")
        assert_raw(service, "b", image)
        assert plan(service)[0] == 200, plan(service)
        service.stop()
        service.start()
        service.wait_for_domain("b", "shutoff")
        service.wait_for_domain("a")
        assert_raw(service, "b", image)
        works(service)
        a.quit()
    assert_same(read_image(chain.images[0]), chain.view)


@pytest.mark.parametrize("kind", ["damaged", "base", "surrogate"])
def test_registered_with_the_image_of_a_machine_that_was_seen(folder: Path, chain: Chain, kind: str) -> None:
    """By another name of the domain, and by another name of the file: the file is the one that QEMU had as raw."""
    with machines(folder, chain) as (service, a, b, image):
        write(b, image, sectors(kind, folder, chain))
        b.quit()
        service.wait_for_domain("b", "shutoff")
        link = folder / "link.img"
        link.symlink_to(image)
        body = {"disks": {"vda": {"image": str(link)}}}
        assert service.client.put("/domains/c", json=body).status_code == 201
        assert_raw(service, "c", link)
        works(service)
        a.quit()


def test_another_file_in_its_place(folder: Path, chain: Chain) -> None:
    """What QEMU told was told of that file: an overlay that has its path now is an overlay."""
    with machines(folder, chain) as (service, _a, b, image):
        b.quit()
        body = {"qmp": {"unix": str(service.qmp_dir / "b.qmp")}}
        assert service.client.put("/domains/b", json=body).status_code == 200
        service.wait_for_domain("b", "shutoff")
        overlay = folder / "overlay"
        below = ["-b", chain.images[0], "-F", "qcow2"]
        subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *below, overlay, "4M"], check=True)
        overlay.rename(image)
        status, text = plan(service)
        assert (status, json.loads(text)["used_by"]) == (409, "b/vda")


def test_in_the_folders_that_are_searched(folder: Path, chain: Chain) -> None:
    """Where `image_roots` has the raw image, its content makes it no overlay, while it runs and when it is off."""
    roots = json.dumps([str(folder / "a"), str(folder / "b")])
    with machines(folder, chain, {"BLOCKJOBD_IMAGE_ROOTS": roots}) as (service, a, b, image):
        write(b, image, sectors("base", folder, chain))
        assert plan(service)[0] == 200, plan(service)
        b.quit()
        service.wait_for_domain("b", "shutoff")
        assert_raw(service, "b", image)
        assert plan(service)[0] == 200, plan(service)
        # The same bytes in a file of which no QEMU has told are an overlay's.
        copy = image.with_name("copy.img")
        copy.write_bytes(image.read_bytes())
        status, text = plan(service)
        assert (status, json.loads(text)["used_by"]) == (409, str(copy))
        copy.unlink()
        works(service)
        a.quit()


def test_a_name_that_no_answer_can_hold(folder: Path, chain: Chain) -> None:
    """Nobody has said what the image is, and its header names a file by half a character: a refusal that says so."""
    image = raw_disk(folder / "c")
    data = sectors("surrogate", folder, chain)
    image.write_bytes(data + image.read_bytes()[len(data) :])
    with (
        Service(folder / "service") as service,
        Qemu(service.qmp_dir / "a.qmp", blockdev(chain)) as a,
    ):
        service.wait_for_domain("a")
        assert service.client.put("/domains/c", json={"disks": {"vda": {"image": str(image)}}}).status_code == 201
        status, text = plan(service)
        assert (status, json.loads(text)["used_by"]) == (409, "c")
        assert "nobody can tell what" in json.loads(text)["detail"]
        assert service.commit("a", **ACTIVE).status_code == 409
        assert service.client.delete("/domains/c").status_code == 204
        works(service)
        a.quit()


def test_an_overlay_whose_name_is_not_utf_8(folder: Path, chain: Chain) -> None:
    """It is found in the folders that are searched, and told as far as an answer can tell it."""
    odd = Path(f"{folder}/a/odd\udc80.qcow2")
    odd.write_bytes(header(str(chain.images[0])))
    roots = json.dumps([str(folder / "a")])
    with (
        Service(folder / "service", {"BLOCKJOBD_IMAGE_ROOTS": roots}) as service,
        Qemu(service.qmp_dir / "a.qmp", blockdev(chain)),
    ):
        service.wait_for_domain("a")
        status, text = plan(service)
        assert (status, json.loads(text)["used_by"]) == (409, f"{folder}/a/odd\ufffd.qcow2")
