"""Disks and chains as the API shows them, and the names that lead to a disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.live.conftest import Boot
from tests.support.chains import (
    MIB,
    Chain,
    blockdev,
    build_chain,
    drive,
    explicit_nodes,
    header_backing,
)
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3)]


def small(folder: Path, prefix: str) -> Chain:
    """Two small layers."""
    return build_chain(folder, 2, size=MIB, prefix=prefix)


def attached(chain: Chain, name: str, device: str) -> list[str]:
    """A drive `drive-NAME` and a device `dev-NAME` for it."""
    drive_ = f"file={chain.active},format=qcow2,if=none,id=drive-{name}"
    return ["-drive", drive_, "-device", f"{device},drive=drive-{name},id=dev-{name}"]


def disks_of(service: Service, domain: str) -> dict[str, JSON]:
    """The disks by target name."""
    items = service.client.get(f"/domains/{domain}/disks").json()["items"]
    return {disk["name"]: disk for disk in items}


# Target names --------------------------------------------------------------------------------------------------------

Q35 = {
    "vda": "virtio-blk-pci",
    "sda": "scsi-hd,bus=scsi.0",
    "sdb": "usb-storage,bus=usb.0",
    "sdc": "ide-hd",
    "vdb": "virtio-blk-pci,addr=12",
}
PC = {"hda": "ide-hd,bus=ide.0", "sda": "ide-hd,bus=ahci.0", "fda": "floppy", "vda": "virtio-blk-pci"}


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_target_names_by_bus(service: Service, boot: Boot, domain: str, folder: Path, machine: str) -> None:
    """Every bus counts by itself: virtio vda, SCSI, SATA and USB sda, IDE hda, floppy fda; each takes a merge."""
    buses = Q35 if machine == "q35" else PC
    arguments = ["-device", "virtio-scsi-pci,id=scsi", "-device", "qemu-xhci,id=usb"]
    if machine == "pc":
        arguments = ["-device", "ich9-ahci,id=ahci", "-device", "isa-fdc"]
    for name, device in buses.items():
        arguments += attached(small(folder, name), name, device)
    boot(arguments, machine=machine)

    disks = disks_of(service, domain)

    assert list(disks) == sorted(buses)
    for name, disk in disks.items():
        assert [Path(layer["file"]).name for layer in disk["chain"]] == [f"{name}1.qcow2", f"{name}0.qcow2"]
        assert {f"dev-{name}", f"drive-{name}"} <= set(disk["aliases"])
        assert not disk["read_only"]
    assert sorted(service.wait_for_domain(domain)["disks"]) == sorted(buses)
    jobs = [service.started(domain, name, flags=["active"], on_ready="pivot") for name in buses]
    for job in jobs:
        done = service.wait_for_job(job["id"])
        assert (done["state"], len(done["result"]["chain"])) == ("completed", 1)


def test_a_drive_without_a_device(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A drive that no device uses is xda, is found by its id, and takes a merge."""
    chain = small(folder, "x")
    boot(["-drive", f"file={chain.active},format=qcow2,if=none,id=spare"])
    assert service.disk(domain, "spare")["name"] == "xda"
    job = service.started(domain, "spare", flags=["active"], on_ready="pivot")
    assert service.wait_for_job(job["id"])["result"]["chain"] == [str(chain.images[0])]


# What a disk shows ---------------------------------------------------------------------------------------------------


def test_every_field_of_a_disk(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A disk shows its names, its size, and of each layer place, file, format, node, sizes and header."""
    chain = build_chain(folder, 3, base_format="raw", sizes=[2 * MIB, 3 * MIB, 4 * MIB])
    boot(blockdev(chain))
    answer = service.client.get(f"/domains/{domain}/disks/vda")
    disk = answer.json()
    assert answer.headers["ETag"] == f'"{disk["digest"]}"'
    assert disk["digest"].startswith("sha256:")
    assert {key: disk[key] for key in ("name", "node", "read_only", "virtual_size", "job")} == {
        "name": "vda",
        "node": "n2",
        "read_only": False,
        "virtual_size": 4 * MIB,
        "job": None,
    }
    assert disk["aliases"] == ["virtio0", "n2"]
    assert disk["chain"] == [
        {
            "index": index,
            "file": str(chain.images[number]),
            "format": chain.formats[number],
            "node": f"n{number}",
            "virtual_size": (number + 2) * MIB,
            "actual_size": chain.images[number].stat().st_blocks * 512,
            "backing": header_backing(chain.images[number]),
            "valid": True,
        }
        for index, number in enumerate((2, 1, 0))
    ]


@pytest.mark.parametrize("absolute", [True, False])
def test_headers_are_shown_as_they_stand(
    service: Service, boot: Boot, domain: str, folder: Path, *, absolute: bool
) -> None:
    """`backing` is the string in the header, relative or absolute; `file` is an absolute path either way."""
    chain = build_chain(folder, 3, absolute=absolute, nested=True)
    boot(drive(chain))
    disk = service.disk(domain)
    assert [layer["file"] for layer in disk["chain"]] == chain.files
    expected = [str(image) for image in chain.images[:-1]] if absolute else ["../l0.qcow2", "../l1.qcow2"]
    assert [layer["backing"] for layer in reversed(disk["chain"])] == [None, *expected]


def test_relative_names_on_the_command_line(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """An image that QEMU was given relative to its own folder is shown by its absolute path, and takes a merge."""
    chain = build_chain(folder / "images", 3)
    relative = Chain(images=[Path(image.name) for image in chain.images], views=chain.views, formats=chain.formats)
    boot(drive(relative), cwd=folder / "images")
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == chain.files
    job = service.started(domain, top=str(chain.images[1]))
    assert service.wait_for_job(job["id"])["result"]["chain"] == [chain.files[0], chain.files[2]]
    assert header_backing(chain.active) == "l0.qcow2"


@pytest.mark.parametrize("above", [0, 1, 2])
def test_filters_are_no_layers(service: Service, boot: Boot, domain: str, folder: Path, *, above: int) -> None:
    """Throttle and copy-on-read nodes do not show in the chain; on top they are the disk's node, and lead to it."""
    chain = build_chain(folder, 3)
    root = "throttle" if above == 2 else "n2"
    cor = {"driver": "copy-on-read", "node-name": "cor", "file": root}
    arguments = [*explicit_nodes(chain, throttle_above=above), "-blockdev", json.dumps(cor)]
    boot([*arguments, "-device", "virtio-blk-pci,drive=cor,id=virtio0"])
    disk = service.disk(domain)
    assert [layer["file"] for layer in disk["chain"]] == chain.files
    assert [layer["node"] for layer in disk["chain"]] == ["n2", "n1", "n0"]
    assert [layer["index"] for layer in disk["chain"]] == [0, 1, 2]
    assert disk["node"] == "cor"
    assert service.disk(domain, "cor") == disk


def test_json_filenames_never_show(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Where QEMU calls a node `json:{…}`, the service shows the path of its image."""
    chain = build_chain(folder, 3)
    # Another chain than the headers tell of, so that QEMU can't name the nodes by their files.
    for image in chain.images[1:]:
        image.rename(folder / f"moved-{image.name}")
    chain.images[1:] = [folder / f"moved-{image.name}" for image in chain.images[1:]]
    qemu = boot(blockdev(chain))
    assert any(node["file"].startswith("json:") for node in qemu.qmp("query-named-block-nodes", flat=True))
    disk = service.disk(domain)
    assert [layer["file"] for layer in disk["chain"]] == chain.files
    assert "json:" not in json.dumps(disk)
    job = service.started(domain, top="vda[1]")
    done = service.wait_for_job(job["id"])
    assert done["state"] == "completed"
    assert "json:" not in json.dumps(done)
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == [chain.files[0], chain.files[2]]


def test_read_only_disk(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A disk that the guest can't write shows it."""
    chain = build_chain(folder, 2)
    boot(drive(chain, extra=",readonly=on"))
    assert service.disk(domain)["read_only"] is True


def test_empty_cdrom(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A drive without a medium is a disk without layers, sizes and node."""
    chain = build_chain(folder, 2)
    boot([*drive(chain), "-device", "ide-cd,id=cd0"])
    disks = disks_of(service, domain)
    assert list(disks) == ["sda", "vda"]
    empty = disks["sda"]
    assert empty["aliases"] == ["cd0"]
    assert (empty["chain"], empty["virtual_size"], empty["node"]) == ([], 0, None)
    assert len(disks["vda"]["chain"]) == 2


def test_a_new_snapshot_shows_at_once(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A snapshot that is taken while QEMU runs is in the chain at once, under a digest of its own."""
    chain = build_chain(folder, 2)
    qemu = boot(drive(chain))
    before = service.disk(domain)
    overlay = folder / "new.qcow2"
    qemu.qmp("blockdev-snapshot-sync", device="drive0", snapshot_file=str(overlay), format="qcow2")
    after = service.disk(domain)
    assert [layer["file"] for layer in after["chain"]] == [str(overlay), *chain.files]
    assert after["digest"] != before["digest"]


def test_digest_changes_with_the_chain_only(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """The digest stays while the chain does, changes with each merge, and is the quoted ETag."""
    chain = build_chain(folder, 4)
    boot(blockdev(chain))
    digests: list[str] = []
    bodies: list[JSON] = [{"top": "vda[2]"}, {"top": "vda[1]"}, {"flags": ["active"], "on_ready": "pivot"}]
    for body in bodies:
        answers = [service.client.get(f"/domains/{domain}/disks/vda") for _ in range(2)]
        assert {answer.headers["ETag"] for answer in answers} == {f'"{answers[0].json()["digest"]}"'}
        digests.append(answers[0].json()["digest"])
        service.wait_for_job(service.started(domain, **body)["id"], "completed")
    digests.append(service.disk(domain)["digest"])
    assert len(set(digests)) == 4


def test_the_digest_is_of_the_chain_not_of_the_process(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """The same images in another QEMU, opened in another way, have the same digest."""
    chain = build_chain(folder, 3)
    qemu = boot(blockdev(chain))
    digest = service.disk(domain)["digest"]
    qemu.quit()
    boot(drive(chain), name=f"{domain}-again")
    assert service.disk(f"{domain}-again")["digest"] == digest


# Names that lead to a disk -------------------------------------------------------------------------------------------


def test_every_name_of_a_disk(service: Service, boot: Boot, domain: str, chain: Chain, folder: Path) -> None:
    """Target name, qdev id, drive id, node-name of the root, and the path of any of its images lead to a disk."""
    other = small(folder, "other")
    boot([*attached(chain, "a", "virtio-blk-pci"), *attached(other, "b", "virtio-blk-pci")])
    expected = service.disk(domain, "vda")
    (folder / "link.qcow2").symlink_to(chain.images[1])
    (folder / "hard.qcow2").hardlink_to(chain.images[0])
    paths = [*chain.files, f"{folder}/./l1.qcow2", f"{folder}/link.qcow2", f"{folder}/hard.qcow2"]
    for name in ("vda", "dev-a", "drive-a", expected["node"], *paths):
        assert service.disk(domain, quote(name, safe="")) == expected, name
    assert service.disk(domain, quote(str(other.active), safe=""))["name"] == "vdb"


@pytest.mark.parametrize("name", ["vdb", "l2.qcow2", "/no/such/image.qcow2", "vda[0]", "VDA"])
def test_no_such_disk(service: Service, boot: Boot, domain: str, chain: Chain, *, name: str) -> None:
    """A name that no disk has is answered with 404, and with those there are."""
    boot(blockdev(chain))
    answer = service.client.get(f"/domains/{domain}/disks/{quote(name, safe='')}")
    assert (answer.status_code, answer.json()["code"]) == (404, "disk-not-found")
    assert "vda" in answer.json()["detail"]


def test_a_merge_by_any_name(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A merge takes each name of the disk; the job says the target name."""
    boot(attached(chain, "a", "virtio-blk-pci"))
    names: list[Any] = ["vda", "dev-a", "drive-a", quote(str(chain.images[1]), safe="")]
    for name in names:
        answer = service.client.post(
            f"/domains/{domain}/disks/{name}/commit", params={"dry_run": "true"}, json={"top": "vda[1]"}
        )
        assert (answer.status_code, answer.json()["disk"]) == (200, "vda")
    job = service.started(domain, quote(str(chain.images[0]), safe=""), top="drive-a[1]")
    assert service.wait_for_job(job["id"], "completed")["disk"] == "vda"


def test_pages_of_disks(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Disks come in pages of `limit`, in order, each once."""
    arguments: list[str] = []
    for name in ("a", "b", "c"):
        arguments += attached(small(folder, name), name, "virtio-blk-pci")
    boot(arguments)
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = service.client.get(f"/domains/{domain}/disks", params=params).json()
        assert len(page["items"]) <= 2
        seen += [disk["name"] for disk in page["items"]]
        cursor = page["next"]
    assert seen == ["vda", "vdb", "vdc"]


def test_an_image_of_a_path_with_odd_characters(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Spaces, percent signs, brackets, quotes and letters of any script in paths are no obstacle anywhere."""
    place = folder / 'a b%2Fc[1] "ä"'
    chain = build_chain(place, 3)
    boot(blockdev(chain))
    name = quote(str(chain.images[1]), safe="")
    assert service.disk(domain, name)["name"] == "vda"
    job = service.started(domain, name, top=str(chain.images[1]), flags=["delete"])
    done = service.wait_for_job(job["id"])
    assert (done["state"], done["result"]["deleted"]) == ("completed", [str(chain.images[1])])
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == [chain.files[0], chain.files[2]]
