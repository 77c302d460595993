"""Merges of layers: what the guest sees before is what it sees after, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.core.flags import flag_names
from app.core.kinds.commit import CommitFlag
from tests.live.conftest import Boot, chain_spec
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    Templates,
    assert_same,
    blockdev,
    build_chain,
    drive_with_id,
    explicit_nodes,
    header_backing,
    header_format,
    read_image,
    write_guest,
)
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

LAYERS = 5

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=LAYERS)]

PAIRS = [(base, top) for top in range(1, LAYERS) for base in range(top)]
DEVICE = ["-device", "virtio-blk-pci,id=virtio0,drive="]


def top_only(chain: Chain) -> list[str]:
    """`-blockdev` for the active layer alone: QEMU opens the others from the headers."""
    file = {"driver": "file", "filename": str(chain.active)}
    node = {"driver": "qcow2", "node-name": "top", "file": file}
    return ["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=top,id=virtio0"]


OPENED = {"drive": drive_with_id, "blockdev": blockdev, "headers": top_only}


def event_types(service: Service, job: JSON) -> list[str]:
    return [event["type"] for event in service.history(job["id"])]


def open_files(qemu: Qemu) -> set[str]:
    """The files of all nodes that QEMU has, in whatever spelling it shows them."""
    return {node["file"] for node in qemu.qmp("query-named-block-nodes", flat=True)}


def assert_merged(
    service: Service, qemu: Qemu, domain: str, before: Sequence[str], job: JSON, *, top: int, base: int, disk: str
) -> None:
    """The job has ended well, the chain is the one that is left, and QEMU keeps nothing of the merged layers.

    `before` is the chain as it was, `top` and `base` positions in it.
    """
    merged, left = list(before[top:base]), [*before[:top], *before[base:]]
    assert (job["state"], job["error"], job["data_state"]) == ("completed", None, "merged")
    assert job["progress"]["percent"] == 100.0
    assert (job["type"], job["top"], job["base"]) == (
        "commit" if top else "active-commit",
        before[top],
        before[base],
    )
    assert job["overlay"] == (before[top - 1] if top else None)
    assert job["actions"] == []
    result = job["result"]
    assert (result["chain"], result["invalidated"]) == (left, merged)

    now = service.disk(domain, disk)
    assert [layer["file"] for layer in now["chain"]] == left
    assert all(layer["valid"] for layer in now["chain"])
    assert [layer["index"] for layer in now["chain"]] == list(range(len(left)))
    assert now["job"] is None
    assert qemu.qmp("query-jobs") == []
    assert qemu.qmp("query-block-jobs") == []
    for file in open_files(qemu):
        assert not any(image in file for image in merged)


def finish(service: Service, qemu: Qemu, domain: str, disk: str = "vda", **body: Any) -> JSON:
    """Start a commit, and check the job and the chain at its end; the job."""
    before = [layer["file"] for layer in service.disk(domain, disk)["chain"]]
    started = service.started(domain, disk, **body)
    job = service.wait_for_job(started["id"])
    assert job["state"] == "completed", job
    top, base = before.index(job["top"]), before.index(job["base"])
    assert_merged(service, qemu, domain, before, job, top=top, base=base, disk=disk)
    return job


def assert_content(qemu: Qemu, image: Path, view: bytes, format_: str = "qcow2") -> None:
    """End QEMU; the image on disk holds what the guest saw."""
    qemu.quit()
    assert_same(read_image(image, format_), view)


def pivot_body(**more: Any) -> dict[str, Any]:
    return {"flags": ["active"], "on_ready": "pivot", **more}


# Every pair of layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
@pytest.mark.parametrize(("base", "top"), PAIRS)
def test_every_pair_of_layers(
    service: Service, boot: Boot, domain: str, chain: Chain, *, base: int, top: int, opened: str
) -> None:
    """Any layer is merged into any below it; of the headers only the one above `top` changes, and stays relative."""
    qemu = boot(OPENED[opened](chain))
    before = [header_backing(image) for image in chain.images]
    digest = service.disk(domain)["digest"]
    body: dict[str, Any] = {"base": str(chain.images[base]), "top": str(chain.images[top])}
    active = top == LAYERS - 1

    job = finish(service, qemu, domain, **(pivot_body(**body) if active else body))

    assert service.disk(domain)["digest"] != digest
    after = [header_backing(image) for image in chain.images]
    if active:
        assert after == before
        assert event_types(service, job) == ["job.queued", "job.started", "job.ready", "job.pivoting", "job.completed"]
        left = base
    else:
        before[top + 1] = chain.images[base].name
        assert after == before
        assert event_types(service, job) == ["job.queued", "job.started", "job.completed"]
        left = LAYERS - 1
    running = [event["data"] for event in service.history(job["id"]) if event["type"] == "job.started"]
    assert [(at["state"], at["data_state"]) for at in running] == [("running", "base-modified")]
    assert all(at["progress"]["percent"] < 100 for at in running)
    assert all(image.exists() for image in chain.images)
    assert_content(qemu, chain.images[left], chain.view)


@pytest.mark.parametrize("opened", ["drive", "blockdev", "headers"])
def test_wait_then_pivot(service: Service, boot: Boot, domain: str, chain: Chain, *, opened: str) -> None:
    """Without a pivot an active commit stays `ready`, its chain as it was; what is written meanwhile is merged too."""
    qemu = boot(OPENED[opened](chain))
    job = service.started(domain, flags=["active"])
    ready = service.wait_for_job(job["id"], "ready")
    assert ready["progress"]["percent"] == 100.0
    assert ready["data_state"] == "base-modified"
    assert (ready["finished_at"], ready["result"]) == (None, None)
    disk = service.disk(domain)
    assert [layer["file"] for layer in disk["chain"]] == chain.files
    assert [layer["valid"] for layer in disk["chain"]] == [True, False, False, False, True]
    assert disk["job"] == job["id"]
    view = write_guest(qemu, chain.view, 0x5A, MIB, 3 * CLUSTER)
    assert event_types(service, job) == ["job.queued", "job.started", "job.ready"]

    asked = service.client.post(f"/jobs/{job['id']}/pivot")

    assert asked.status_code == 202
    assert asked.json()["state"] in ("pivoting", "concluding", "completed")
    done = service.wait_for_job(job["id"])
    assert_merged(service, qemu, domain, chain.files, done, top=0, base=LAYERS - 1, disk="vda")
    view = write_guest(qemu, view, 0x5B, 2 * MIB, CLUSTER)
    assert_content(qemu, chain.images[0], view)


@pytest.mark.parametrize(("base", "top"), [(0, 3), (1, 2)])
def test_chain_opened_from_headers(
    service: Service, boot: Boot, domain: str, chain: Chain, *, base: int, top: int
) -> None:
    """Layers that QEMU opened by itself under a node of ours are merged and released too."""
    qemu = boot(top_only(chain))
    finish(service, qemu, domain, base=str(chain.images[base]), top=str(chain.images[top]))
    assert header_backing(chain.images[top + 1]) == chain.images[base].name
    assert_content(qemu, chain.active, chain.view)


def test_guest_data_written_while_an_intermediate_merge_runs(
    service: Service, boot: Boot, domain: str, chain: Chain
) -> None:
    """The guest writes during a merge below it; both its data and the merged data are there afterwards."""
    qemu = boot(blockdev(chain))
    job = service.started(domain, top="vda[1]", bandwidth=CLUSTER, flags=["bandwidth_bytes"])
    service.wait_for_job(job["id"], "running")
    view = write_guest(qemu, chain.view, 0x77, MIB + CLUSTER, 5 * CLUSTER)
    assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    done = service.wait_for_job(job["id"])
    assert_merged(service, qemu, domain, chain.files, done, top=1, base=4, disk="vda")
    assert_content(qemu, chain.active, view)


# How layers are named ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
@pytest.mark.parametrize(
    ("base", "top"),
    [
        pytest.param("vda[3]", "vda[1]", id="index"),
        pytest.param("virtio0[3]", "drive0[1]", id="index-of-alias"),
        pytest.param("l1.qcow2", "l3.qcow2", id="header-string"),
        pytest.param("{folder}/../{name}/l1.qcow2", "{folder}/./l3.qcow2", id="unnormalized-path"),
        pytest.param("{folder}/link.qcow2", "{folder}/l3.qcow2", id="symlink"),
    ],
)
def test_names_of_layers(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, base: str, top: str, opened: str
) -> None:
    """A layer is named by its place, by the string in a header, or by any path that leads to it."""
    (folder / "link.qcow2").symlink_to("l1.qcow2")
    qemu = boot(OPENED[opened](chain))
    words = {"folder": str(folder), "name": folder.name}
    if opened == "blockdev":
        top = top.replace("drive0", "n4")
    job = finish(service, qemu, domain, base=base.format(**words), top=top.format(**words))
    assert (job["base"], job["top"]) == (str(chain.images[1]), str(chain.images[3]))
    assert_content(qemu, chain.active, chain.view)


def test_layers_by_node_name(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A layer is named by its node."""
    qemu = boot(blockdev(chain))
    job = finish(service, qemu, domain, base="n1", top="n2")
    assert (job["base"], job["top"]) == (str(chain.images[1]), str(chain.images[2]))
    assert_content(qemu, chain.active, chain.view)


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
@pytest.mark.parametrize("top", [None, 3, 2, 1])
def test_shallow(service: Service, boot: Boot, domain: str, chain: Chain, *, top: int | None, opened: str) -> None:
    """`shallow` merges `top`, or the active layer, into the one right below it."""
    qemu = boot(OPENED[opened](chain))
    if top is None:
        job = finish(service, qemu, domain, flags=["shallow", "active"], on_ready="pivot")
        assert (job["top"], job["base"]) == (str(chain.images[4]), str(chain.images[3]))
        left = chain.images[3]
    else:
        job = finish(service, qemu, domain, top=str(chain.images[top]), flags=["shallow"])
        assert (job["top"], job["base"]) == (str(chain.images[top]), str(chain.images[top - 1]))
        left = chain.active
    assert_content(qemu, left, chain.view)


def test_empty_names_are_none(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """`""` as `base` and `top` means what null means: the whole chain."""
    qemu = boot(blockdev(chain))
    job = finish(service, qemu, domain, **pivot_body(base="", top=""))
    assert (job["top"], job["base"]) == (chain.files[0], chain.files[-1])
    assert_content(qemu, chain.images[0], chain.view)


@pytest.mark.parametrize("mask", range(1, 32))
def test_bitmask_equals_names(service: Service, bitmask_domain: str, *, mask: int) -> None:
    """Flags as libvirt's bitmask mean what their names mean: the same answer, be it a plan or a refusal."""
    url = f"/domains/{bitmask_domain}/disks/vda/commit?dry_run=true"
    names = flag_names(CommitFlag(mask))
    by_name = service.client.post(url, json={"flags": names, "bandwidth": 3})
    by_mask = service.client.post(url, json={"flags": mask, "bandwidth": 3})
    # What is free changes by itself.
    assert by_mask.json() | {"free": 0} == by_name.json() | {"free": 0}
    assert (by_mask.status_code == 200) == ("active" in names), by_mask.text
    if by_mask.status_code == 200:
        assert by_mask.json()["flags"] == names


@pytest.fixture(scope="module")
def bitmask_domain(
    service: Service, templates: Templates, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Any:
    """A domain for questions that change nothing."""
    folder = tmp_path_factory.mktemp("bitmask")
    with Qemu(folder / "bitmask.qmp", blockdev(templates.copy(chain_spec(request.node), folder))) as qemu:
        service.client.put("/domains/bitmask", json={"qmp": {"unix": str(qemu.monitor)}})
        service.wait_for_domain("bitmask")
        yield "bitmask"
    service.client.delete("/domains/bitmask")


@pytest.mark.parametrize(
    ("bandwidth", "flags", "expected"),
    [
        (0, [], 0),
        (3, [], 3 * MIB),
        (3, ["bandwidth_bytes"], 3),
        (3, 16, 3),
        (8796093022207, [], 8796093022207 * MIB),
        (2**63 - 1, ["bandwidth_bytes"], 2**63 - 1),
    ],
)
def test_bandwidth_units(service: Service, bitmask_domain: str, *, bandwidth: int, flags: Any, expected: int) -> None:
    """`bandwidth` is MiB/s, with `bandwidth_bytes` bytes/s; the largest of both fit into QEMU's `speed`."""
    url = f"/domains/{bitmask_domain}/disks/vda/commit?dry_run=true"
    plan = service.client.post(url, json={"top": "vda[1]", "bandwidth": bandwidth, "flags": flags}).json()
    assert plan["qmp"][0]["arguments"].get("speed", 0) == expected


@pytest.mark.parametrize(("bandwidth", "flags", "expected"), [(1, [], MIB), (65536, ["bandwidth_bytes"], 65536)])
def test_bandwidth_reaches_qemu(
    service: Service, boot: Boot, domain: str, chain: Chain, *, bandwidth: int, flags: list[str], expected: int
) -> None:
    """QEMU's job has the speed that was asked for, and the job shows it in bytes a second."""
    qemu = boot(blockdev(chain))
    job = service.started(domain, bandwidth=bandwidth, flags=[*flags, "active"])
    assert job["bandwidth"] == expected
    assert [(found["device"], found["speed"]) for found in qemu.qmp("query-block-jobs")] == [(job["id"], expected)]
    assert service.client.delete(f"/jobs/{job['id']}").status_code == 202
    service.wait_for_job(job["id"], "canceled")


# Headers -------------------------------------------------------------------------------------------------------------


def test_absolute_headers_stay_absolute(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A header that named its backing image absolutely does so after the merge."""
    chain = build_chain(folder, absolute=True)
    qemu = boot(drive_with_id(chain))
    finish(service, qemu, domain, top="vda[2]", base="vda[3]")
    assert header_backing(chain.images[3]) == str(chain.images[1])
    assert header_backing(chain.images[4]) == str(chain.images[3])
    assert_content(qemu, chain.active, chain.view)


@pytest.mark.parametrize("flags", [[], ["relative"]])
@pytest.mark.parametrize(
    ("base", "top", "header"), [(0, 1, "../../l0.qcow2"), (0, 3, "../../../../l0.qcow2"), (1, 2, "../../l1.qcow2")]
)
def test_relative_in_nested_folders(
    service: Service, boot: Boot, domain: str, folder: Path, *, base: int, top: int, header: str, flags: list[str]
) -> None:
    """A relative header leads from the overlay's folder to the base's, so that the chain opens again from it."""
    chain = build_chain(folder, nested=True)
    qemu = boot(drive_with_id(chain))
    finish(service, qemu, domain, base=str(chain.images[base]), top=str(chain.images[top]), flags=flags)
    assert header_backing(chain.images[top + 1]) == header
    assert_content(qemu, chain.active, chain.view)


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
def test_relative_through_a_symlinked_folder(
    service: Service, boot: Boot, domain: str, folder: Path, *, opened: str
) -> None:
    """Where the overlay is reached through a symlink, `..` in its header starts from its real folder."""
    chain = build_chain(folder, nested=True)
    (folder / "shortcut").symlink_to(chain.images[3].parent)
    chain.images[3] = folder / "shortcut" / chain.images[3].name
    chain.images[4] = folder / "shortcut" / "d4" / chain.images[4].name
    qemu = boot(OPENED[opened](chain))
    files = [layer["file"] for layer in service.disk(domain)["chain"]]
    assert all(Path(file).samefile(image) for file, image in zip(files, reversed(chain.images), strict=True))
    assert files[:2] == chain.files[:2]
    finish(service, qemu, domain, base=str(chain.images[1]), top=str(chain.images[2]))
    assert header_backing(chain.images[3]) == "../../l1.qcow2"
    assert_content(qemu, chain.active, chain.view)


@pytest.mark.parametrize("name", ["./l1.qcow2", "{folder}/l1.qcow2"])
def test_given_backing_file(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, name: str
) -> None:
    """`backing_file` goes into the header above `top` as it is given."""
    qemu = boot(blockdev(chain))
    name = name.format(folder=folder)
    finish(service, qemu, domain, base="vda[3]", top="vda[2]", backing_file=name)
    assert header_backing(chain.images[3]) == name
    assert_content(qemu, chain.active, chain.view)


# Formats, sizes, filters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
@pytest.mark.parametrize("top", [2, 1])
def test_raw_base(service: Service, boot: Boot, domain: str, folder: Path, *, top: int, opened: str) -> None:
    """A raw base takes the data; the header above says that it is raw."""
    chain = build_chain(folder, 3, base_format="raw")
    qemu = boot(OPENED[opened](chain))
    if top == 2:
        finish(service, qemu, domain, **pivot_body())
        assert_content(qemu, chain.images[0], chain.view, "raw")
    else:
        finish(service, qemu, domain, top=str(chain.images[top]))
        assert (header_backing(chain.active), header_format(chain.active)) == (chain.images[0].name, "raw")
        assert_content(qemu, chain.active, chain.view)


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
@pytest.mark.parametrize(("base", "top"), [(0, 2), (0, 1), (1, 2)])
def test_base_smaller_than_top(
    service: Service, boot: Boot, domain: str, folder: Path, *, base: int, top: int, opened: str
) -> None:
    """A base that is smaller than `top` grows to its size, and the dry run says so."""
    sizes = [2 * MIB, 3 * MIB, 4 * MIB]
    chain = build_chain(folder, 3, sizes=sizes)
    qemu = boot(OPENED[opened](chain))
    body: dict[str, Any] = {"base": str(chain.images[base]), "top": str(chain.images[top])}
    body = pivot_body(**body) if top == 2 else body
    plan = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=body).json()
    assert plan["resizes_base_to"] == sizes[top]
    assert "base-resized" in [warning["code"] for warning in plan["warnings"]]
    assert service.disk(domain)["chain"][2 - base]["virtual_size"] == sizes[base]

    finish(service, qemu, domain, **body)

    left = service.disk(domain)["chain"]
    assert {layer["file"]: layer["virtual_size"] for layer in left}[str(chain.images[base])] == sizes[top]
    assert_content(qemu, chain.images[base] if top == 2 else chain.active, chain.view)


def test_base_larger_than_top(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A base that is larger keeps its size; the guest's disk grows at the pivot, and the dry run warns of it."""
    chain = build_chain(folder, 2, sizes=[4 * MIB, 2 * MIB])
    qemu = boot(blockdev(chain))
    plan = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=pivot_body()).json()
    assert plan["resizes_base_to"] is None
    assert "disk-grows" in [warning["code"] for warning in plan["warnings"]]
    finish(service, qemu, domain, **pivot_body())
    assert service.disk(domain)["virtual_size"] == 4 * MIB
    qemu.quit()
    assert_same(read_image(chain.images[0])[: 2 * MIB], chain.view)


@pytest.mark.parametrize("above", range(4))
def test_throttle_in_the_chain(service: Service, boot: Boot, domain: str, chain: Chain, *, above: int) -> None:
    """A filter between layers is no obstacle: it is dropped where it lies between merged ones, with a warning."""
    arguments = [*explicit_nodes(chain, throttle_above=above), "-device", "virtio-blk-pci,drive=n4,id=virtio0"]
    qemu = boot(arguments)
    body = {"base": str(chain.images[1]), "top": str(chain.images[3])}
    plan = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=body).json()
    if above == 3:
        # QEMU would leave the header above it as it is, so that it would lead to a merged image.
        assert (plan["status"], plan["code"]) == (409, "node-in-use")
        return
    dropped = 1 <= above < 3
    assert ("filters-dropped" in [warning["code"] for warning in plan["warnings"]]) == dropped
    finish(service, qemu, domain, **body)
    nodes = {node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
    assert ("throttle" in nodes) == (not dropped)
    assert nodes - {"throttle"} == {"n0", "fn0", "n1", "fn1", "n4", "fn4"}
    finish(service, qemu, domain, **pivot_body())
    assert_content(qemu, chain.images[0], chain.view)


@pytest.mark.parametrize("active", [True, False])
def test_throttle_on_the_root(service: Service, boot: Boot, domain: str, chain: Chain, *, active: bool) -> None:
    """With a filter over the active layer, merges below it and of it work as without."""
    arguments = [*explicit_nodes(chain, throttle_above=4), "-device", "virtio-blk-pci,drive=throttle,id=virtio0"]
    qemu = boot(arguments)
    assert service.disk(domain)["node"] == "throttle"
    body = pivot_body(base="vda[2]") if active else {"top": "vda[1]", "base": "vda[2]"}
    finish(service, qemu, domain, **body)
    assert_content(qemu, chain.images[2] if active else chain.active, chain.view)


@pytest.mark.parametrize("active", [True, False])
def test_copy_on_read_on_top(service: Service, boot: Boot, domain: str, chain: Chain, *, active: bool) -> None:
    """A copy-on-read filter over the active layer is no layer and no obstacle."""
    cor = {"driver": "copy-on-read", "node-name": "cor", "file": "n4"}
    arguments = [*explicit_nodes(chain), "-blockdev", json.dumps(cor)]
    qemu = boot([*arguments, "-device", "virtio-blk-pci,drive=cor,id=virtio0"])
    body = pivot_body(base="vda[2]") if active else {"top": "vda[1]", "base": "vda[2]"}
    finish(service, qemu, domain, **body)
    assert_content(qemu, chain.images[2] if active else chain.active, chain.view)


# Several merges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
def test_one_after_the_other_on_the_same_disk(
    service: Service, boot: Boot, domain: str, chain: Chain, *, opened: str
) -> None:
    """A second and a third merge start right after the one before: it leaves nothing in their way."""
    qemu = boot(OPENED[opened](chain))
    finish(service, qemu, domain, top="vda[3]", base="vda[4]")
    finish(service, qemu, domain, top="vda[1]", base="vda[2]")
    finish(service, qemu, domain, **pivot_body(base="vda[1]"))
    finish(service, qemu, domain, **pivot_body())
    assert service.disk(domain)["chain"][0]["file"] == str(chain.images[0])
    assert_content(qemu, chain.images[0], chain.view)


def test_second_commit_after_a_new_snapshot(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A snapshot that is taken after a merge is merged in turn."""
    qemu = boot(drive_with_id(chain))
    finish(service, qemu, domain, **pivot_body())
    overlay = chain.images[0].with_name("new.qcow2")
    qemu.qmp("blockdev-snapshot-sync", device="drive0", snapshot_file=str(overlay), format="qcow2")
    view = write_guest(qemu, chain.view, 0x31, 0, 2 * CLUSTER)
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == [str(overlay), str(chain.images[0])]
    finish(service, qemu, domain, **pivot_body(flags=["active", "delete"]))
    assert not overlay.exists()
    assert_content(qemu, chain.images[0], view)


def test_two_disks_at_once(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Jobs on two disks of one QEMU run side by side, each on its own disk."""
    one = build_chain(folder, 3, prefix="a", seed=1)
    two = build_chain(folder, 3, prefix="b", seed=2)
    qemu = boot([*blockdev(one, "a", device="virtio0"), *blockdev(two, "b", device="virtio1")])
    first = service.started(domain, "vda", bandwidth=CLUSTER, flags=["active", "bandwidth_bytes"], on_ready="pivot")
    second = service.started(domain, "vdb", bandwidth=CLUSTER, flags=["bandwidth_bytes"], top="vdb[1]")
    assert {job["id"] for job in qemu.qmp("query-jobs")} == {first["id"], second["id"]}
    assert [service.disk(domain, disk)["job"] for disk in ("vda", "vdb")] == [first["id"], second["id"]]
    for job in (first, second):
        assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    done = [service.wait_for_job(job["id"]) for job in (first, second)]
    assert_merged(service, qemu, domain, one.files, done[0], top=0, base=2, disk="vda")
    assert_merged(service, qemu, domain, two.files, done[1], top=1, base=2, disk="vdb")
    qemu.quit()
    assert_same(read_image(one.images[0]), one.view)
    assert_same(read_image(two.active), two.view)


# Delete, keep --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [True, False])
def test_delete(service: Service, boot: Boot, domain: str, chain: Chain, *, active: bool) -> None:
    """`delete` unlinks the merged images, and no others."""
    qemu = boot(blockdev(chain))
    body: dict[str, Any] = {"base": str(chain.images[1]), "flags": ["delete"]}
    body |= {"flags": ["delete", "active"], "on_ready": "pivot"} if active else {"top": str(chain.images[3])}
    gone = chain.images[2:] if active else chain.images[2:4]
    plan = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=body).json()
    assert plan["deletes"] == [str(image) for image in reversed(gone)]

    job = finish(service, qemu, domain, **body)

    assert job["result"]["deleted"] == plan["deletes"]
    assert job["result"]["not_deleted"] == []
    assert [image for image in chain.images if not image.exists()] == gone
    assert_content(qemu, chain.images[1] if active else chain.active, chain.view)


def test_nothing_is_deleted_unasked(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """Without `delete` all images stay, and the result names those that are worthless now."""
    qemu = boot(blockdev(chain))
    job = finish(service, qemu, domain, **pivot_body())
    assert (job["result"]["deleted"], job["result"]["not_deleted"]) == ([], [])
    assert job["result"]["invalidated"] == chain.files[:-1]
    assert all(image.exists() for image in chain.images)


def test_delete_leaves_symlinks(service: Service, boot: Boot, domain: str, chain: Chain, folder: Path) -> None:
    """An image that is reached through a symlink is left, link and file, and named with the reason."""
    store = folder / "store"
    store.mkdir()
    chain.images[2].rename(store / "l2.qcow2")
    chain.images[2].symlink_to(store / "l2.qcow2")
    qemu = boot(blockdev(chain))
    job = finish(service, qemu, domain, base="vda[4]", top="vda[1]", flags=["delete"])
    assert job["result"]["deleted"] == [str(chain.images[3]), str(chain.images[1])]
    (left,) = job["result"]["not_deleted"]
    assert left["file"] == str(chain.images[2])
    assert "symbolic link" in left["reason"]
    assert chain.images[2].is_symlink()
    assert (store / "l2.qcow2").exists()
    assert_content(qemu, chain.active, chain.view)


def test_delete_leaves_what_others_use(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """An image that another domain uses is not deleted, and its user is named."""
    qemu = boot(blockdev(chain))
    # It opens the image without what lies below, so that the base of the merge is not shared, and without locks, so
    # that the merge is none of QEMU's concern.
    file = {"driver": "file", "filename": str(chain.images[3]), "locking": "off"}
    node = {"driver": "qcow2", "node-name": "alone", "read-only": True, "backing": None, "file": file}
    boot(["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=alone"], name=f"{domain}-other")
    job = finish(service, qemu, domain, base="vda[3]", top="vda[1]", flags=["delete"])
    assert job["result"]["deleted"] == [str(chain.images[2])]
    (left,) = job["result"]["not_deleted"]
    assert left["file"] == str(chain.images[3])
    assert f"{domain}-other/vda" in left["reason"]
    assert [image.exists() for image in chain.images] == [True, True, False, True, True]
    assert_content(qemu, chain.active, chain.view)


def test_keep(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """`keep` leaves the overlay active; the base is a copy of that moment, and the layers between are not valid."""
    qemu = boot(blockdev(chain))
    before = service.disk(domain)
    started = service.started(domain, flags=["active"], on_ready="keep")
    job = service.wait_for_job(started["id"])
    assert (job["state"], job["error"]) == ("completed", None)
    assert job["progress"]["percent"] == 100.0
    assert job["result"] == {
        "chain": chain.files,
        "invalidated": chain.files[1:-1],
        "deleted": [],
        "not_deleted": [],
    }
    after = service.disk(domain)
    assert [layer["file"] for layer in after["chain"]] == chain.files
    assert after["digest"] == before["digest"]
    assert [layer["valid"] for layer in after["chain"]] == [True, False, False, False, True]
    assert qemu.qmp("query-jobs") == []
    view = write_guest(qemu, chain.view, 0x44, 0, CLUSTER)
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)
    assert_same(read_image(chain.active), view)


def test_keep_and_then_merge(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """After `keep` a merge of the active layer still gives all of its data, and all layers are valid then."""
    qemu = boot(blockdev(chain))
    kept = service.started(domain, flags=["active"], on_ready="keep")
    service.wait_for_job(kept["id"], "completed")
    view = write_guest(qemu, chain.view, 0x45, MIB, CLUSTER)
    finish(service, qemu, domain, **pivot_body())
    assert_content(qemu, chain.images[0], view)


def test_dry_run_tells_what_happens(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """The plan of a dry run is what the merge does then."""
    qemu = boot(blockdev(chain))
    body: dict[str, Any] = {"base": "vda[3]", "top": "vda[1]", "flags": ["delete"]}
    answer = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=body)
    assert answer.status_code == 200
    plan = answer.json()
    expected = {
        "type": "commit",
        "disk": "vda",
        "top": str(chain.images[3]),
        "base": str(chain.images[1]),
        "overlay": str(chain.images[4]),
        "flags": ["delete"],
        "chain_before": chain.files,
        "chain_after": [chain.files[0], chain.files[3], chain.files[4]],
        "invalidates": chain.files[1:3],
        "deletes": chain.files[1:3],
        "resizes_base_to": None,
        "backing_file": "l1.qcow2",
    }
    assert {key: plan[key] for key in expected} == expected
    arguments = plan["qmp"][0]["arguments"]
    assert plan["qmp"][0]["execute"] == "block-commit"
    assert [arguments[key] for key in ("device", "top-node", "base-node")] == ["n4", "n3", "n1"]
    assert 0 < plan["bytes_to_copy"] <= len(chain.view)
    assert 0 <= plan["base_growth_max"] < plan["free"]
    size = chain.images[1].stat().st_blocks * 512

    job = finish(service, qemu, domain, **body)

    assert (job["result"]["chain"], job["result"]["deleted"]) == (plan["chain_after"], plan["deletes"])
    assert chain.images[1].stat().st_blocks * 512 - size <= plan["base_growth_max"]
    assert header_backing(chain.active) == plan["backing_file"]
