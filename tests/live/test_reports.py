"""Situations from public bug reports of people who merge layers of running machines. Each test names its source."""

from __future__ import annotations

import json
import subprocess
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
    drive,
    header_backing,
    read_image,
    write_guest,
)
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=8 * MIB, data=48 * CLUSTER)]

ACTIVE: JSON = {"flags": ["active"], "on_ready": "pivot"}


def snapshot(qemu: Qemu, node: str, overlay: Path, new: str) -> None:
    """A live external snapshot, as backup tools take it."""
    qemu.qmp(
        "blockdev-snapshot-sync",
        **{"node-name": node, "snapshot-file": str(overlay), "format": "qcow2", "snapshot-node-name": new},
    )


def bitmaps(image: Path) -> list[str]:
    """The names of the bitmaps that are stored in an image."""
    command = ["qemu-img", "info", "-U", "--output=json", str(image)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["format-specific"]["data"].get(
        "bitmaps", []
    )
    return [each["name"] for each in found]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_persistent_bitmap_in_the_base(
    service: Service, boot: Boot, domain: str, folder: Path, *, enabled: bool
) -> None:
    """https://github.com/lxc/incus/issues/3741: the base was made read-only by a snapshot, and its bitmaps with it."""
    chain = build_chain(folder, 1, size=8 * MIB)
    qemu = boot(blockdev(chain))
    qemu.qmp("block-dirty-bitmap-add", node="n0", name="backup", persistent=True, disabled=not enabled)
    view = write_guest(qemu, chain.view, 3, 0, 4 * CLUSTER)
    snapshot(qemu, "n0", folder / "overlay.qcow2", "over")
    view = write_guest(qemu, view, 5, 2 * MIB, 8 * CLUSTER)
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == [str(folder / "overlay.qcow2"), chain.files[0]]
    job = service.wait_for_job(service.started(domain, **ACTIVE)["id"])
    assert (job["state"], job["error"]) == ("completed", None)
    qemu.quit()
    assert_same(read_image(chain.images[0]), view)
    assert bitmaps(chain.images[0]) == ["backup"]


@pytest.mark.parametrize("persistent", [True, False])
def test_a_checkpoint_made_while_the_machine_runs(
    service: Service, boot: Boot, domain: str, chain: Chain, *, persistent: bool
) -> None:
    """https://github.com/abbbi/virtnbdbackup/issues/185: a bitmap is lost that no header has yet; the plan says so."""
    qemu = boot(blockdev(chain))
    qemu.qmp("block-dirty-bitmap-add", node="n2", name="virtnbdbackup.0", persistent=persistent)
    plan = service.client.post(f"/domains/{domain}/disks/vda/commit?dry_run=true", json=ACTIVE).json()
    (lost,) = [warning["detail"] for warning in plan["warnings"] if warning["code"] == "bitmaps-lost"]
    assert "virtnbdbackup.0" in lost


def test_a_filter_of_a_backup(service: Service, boot: Boot, domain: str, chain: Chain, folder: Path) -> None:
    """https://github.com/LINBIT/linstor-proxmox/issues/63: QEMU aborts when it closes a node with a filter's bitmap.

    While a merge runs, QEMU takes no such filter.
    """
    qemu = boot(blockdev(chain))
    fleece = folder / "fleece.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(fleece), "8M"], check=True)
    qemu.qmp("blockdev-add", driver="qcow2", node_name="fleece", file={"driver": "file", "filename": str(fleece)})
    qemu.qmp("blockdev-add", driver="copy-before-write", node_name="cbw", file="n2", target="fleece")
    qemu.qmp("qom-set", path="/machine/peripheral/virtio0", property="drive", value="cbw")
    nodes = {node["node-name"]: node for node in qemu.qmp("query-named-block-nodes", flat=True)}
    if any("name" not in bitmap for bitmap in nodes["n2"].get("dirty-bitmaps", ())):
        refused = service.commit(domain, **ACTIVE)
        assert (refused.status_code, refused.json()["code"], refused.json()["used_by"]) == (409, "node-in-use", "cbw")
    else:
        # Newer versions keep the bitmaps with the filter.
        assert qemu.qmp("query-version")["qemu"]["major"] > 7
    below = service.wait_for_job(service.started(domain, top="vda[1]")["id"])
    assert (below["state"], below["error"]) == ("completed", None)
    view = write_guest(qemu, chain.view, 6, 2 * MIB, CLUSTER)
    qemu.quit()
    assert_same(read_image(chain.active), view)


@pytest.mark.parametrize("options", [",cache=none,aio=native", ",cache=directsync", ",cache=unsafe", ",aio=io_uring"])
def test_cache_modes(service: Service, boot: Boot, domain: str, chain: Chain, options: str) -> None:
    """https://github.com/dguerri/LibVirtKvm-scripts/issues/42: whether a merge got ready hung on the cache mode."""
    qemu = boot(drive(chain, extra=options))
    job = service.wait_for_job(service.started(domain, top="vda[1]")["id"])
    assert job["state"] == "completed"
    job = service.wait_for_job(service.started(domain, **ACTIVE)["id"])
    assert job["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


@pytest.mark.parametrize("body", [ACTIVE, {"top": "vda[1]"}], ids=["active", "below"])
def test_a_disk_with_a_thread_of_its_own(service: Service, boot: Boot, domain: str, chain: Chain, body: JSON) -> None:
    """https://github.com/kubevirt/enhancements/pull/322: merges on machines whose disks have I/O threads."""
    arguments = ["-object", "iothread,id=io0", *blockdev(chain)]
    arguments[-1] += ",iothread=io0"
    qemu = boot(arguments)
    view = write_guest(qemu, chain.view, 7, 3 * MIB, 4 * CLUSTER)
    job = service.wait_for_job(service.started(domain, **body)["id"])
    assert (job["state"], job["error"]) == ("completed", None)
    view = write_guest(qemu, view, 8, 5 * MIB, CLUSTER)
    qemu.quit()
    assert_same(read_image(chain.images[0] if body is ACTIVE else chain.active), view)


def test_a_snapshot_in_the_middle_is_deleted_again_and_again(
    service: Service, boot: Boot, domain: str, folder: Path
) -> None:
    """https://github.com/lxc/incus/issues/3188: a chain of live snapshots is shortened from the middle, and outward."""
    chain = build_chain(folder, 1, size=8 * MIB)
    qemu = boot(blockdev(chain))
    view = chain.view
    for number in range(1, 9):
        node = service.disk(domain)["chain"][0]["node"]
        snapshot(qemu, node, folder / f"s{number}.qcow2", f"snap{number}")
        view = write_guest(qemu, view, number, number * MIB - CLUSTER, 2 * CLUSTER if number < 8 else CLUSTER)
    for index in (4, 2, 5, 1, 3):
        files = [layer["file"] for layer in service.disk(domain)["chain"]]
        job = service.started(domain, top=f"vda[{index}]", base=f"vda[{index + 1}]", flags=["delete"])
        assert service.wait_for_job(job["id"])["state"] == "completed"
        left = [layer["file"] for layer in service.disk(domain)["chain"]]
        assert left == [file for file in files if file != files[index]]
        assert header_backing(left[index - 1]) == left[index]
        assert not Path(files[index]).exists()
    job = service.started(domain, flags=["active", "delete"], on_ready="pivot")
    assert service.wait_for_job(job["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.images[0]), view)
    assert sorted(path.name for path in folder.glob("s*.qcow2")) == []


FEATURES = {
    "subclusters": ["-o", "extended_l2=on,cluster_size=128k"],
    "zstd": ["-o", "compression_type=zstd"],
    "small-clusters": ["-o", "cluster_size=512"],
    "large-clusters": ["-o", "cluster_size=2M"],
    "lazy": ["-o", "lazy_refcounts=on"],
    "preallocated": ["-o", "preallocation=metadata"],
}


def with_feature(folder: Path, name: str) -> Chain:
    """A chain of three layers, one of which another tool has made."""
    chain = build_chain(folder, 3, size=8 * MIB)
    # An image with a backing file is not preallocated.
    place = 0 if name == "preallocated" else 1
    made, draft = chain.images[place], folder / "draft.qcow2"
    command = ["qemu-img", "convert", *(["-c"] if name == "zstd" else []), "-O", "qcow2", *FEATURES[name]]
    if place:
        command += ["-B", str(chain.images[0]), "-F", "qcow2"]
    subprocess.run([*command, str(made), str(draft)], check=True)
    draft.replace(made)
    return chain


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("active", [True, False], ids=["active", "below"])
def test_layers_of_different_features(service: Service, boot: Boot, folder: Path, *, name: str, active: bool) -> None:
    """https://github.com/dguerri/LibVirtKvm-scripts/issues/41: layers that different tools have made, in one chain."""
    domain = f"{name}-{active}"
    chain = with_feature(folder, name)
    qemu = boot(["-drive", f"file={chain.active},if=virtio,id=drive0"], name=domain)
    job = service.wait_for_job(service.started(domain, **(ACTIVE if active else {"top": "vda[1]"}))["id"])
    assert (job["state"], job["error"]) == ("completed", None)
    qemu.quit()
    assert_same(read_image(chain.images[0] if active else chain.active), chain.view)


def test_a_long_chain(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """https://github.com/dguerri/LibVirtKvm-scripts/issues/41: a chain of backups that nobody has ever shortened."""
    chain = build_chain(folder, 60, size=2 * MIB)
    qemu = boot(["-drive", f"file={chain.active},if=virtio,id=drive0"])
    assert len(service.disk(domain)["chain"]) == 60
    job = service.started(domain, top="vda[10]", base="vda[50]", flags=["delete"])
    assert service.wait_for_job(job["id"])["state"] == "completed"
    assert len(service.disk(domain)["chain"]) == 20
    job = service.started(domain, **ACTIVE)
    assert service.wait_for_job(job["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)
