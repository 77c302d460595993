"""Pulls beside other hands, on odd disks and on storage that runs full."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import Boot, NewChain
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    assert_same,
    blockdev,
    build_chain,
    drive_with_id,
    explicit_nodes,
    fill,
    header_backing,
    read_image,
    small_file_system,
    write_guest,
)
from tests.support.qemu import Qemu, QmpError
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4)]

SLOW: JSON = {"bandwidth": 2 * CLUSTER, "flags": ["bandwidth_bytes"]}


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def running(service: Service, domain: str, **body: Any) -> JSON:
    """A slow pull that has copied something."""
    job = service.started(domain, verb="pull", **SLOW, **body)
    until(lambda: service.job(job["id"])["progress"]["current"] > 0)
    return job


def sped_up(service: Service, job: JSON) -> JSON:
    """The job at its end, without a limit."""
    assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    return service.wait_for_job(job["id"])


def open_images(qemu: Qemu) -> set[str]:
    """The images that the process has open."""
    links = (link.readlink() for link in Path(f"/proc/{qemu.pid}/fd").iterdir() if link.is_symlink())
    return {str(link) for link in links if str(link).endswith((".qcow2", ".img"))}


# Other clients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["job-cancel", "block-job-cancel"])
def test_canceled_by_others(service: Service, boot: Boot, chain: Chain, domain: str, command: str) -> None:
    """It is told as canceled, the chain is as it was, and the same pull works afterwards."""
    qemu = boot(blockdev(chain))
    job = running(service, domain)
    qemu.qmp(command, **({"id": job["id"]} if command == "job-cancel" else {"device": job["id"]}))
    canceled = service.wait_for_job(job["id"])
    assert (canceled["state"], canceled["result"]["chain"]) == ("canceled", chain.files)
    again = service.wait_for_job(service.started(domain, verb="pull")["id"])
    assert (again["state"], again["result"]["chain"]) == ("completed", [chain.at(0)])
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_dismissed_by_others_while_the_service_is_down(tmp_path: Path, chain: Chain) -> None:
    """The header and QEMU, which still runs, prove the outcome; QEMU is made to write it to the disk."""
    with Service(tmp_path / "service") as service:
        with Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
            service.wait_for_domain("vm")
            job = service.started("vm", verb="pull", base="vda[3]", **SLOW)
            service.kill()
            qemu.qmp("block-job-set-speed", device=job["id"], speed=0)
            until(lambda: qemu.qmp("query-jobs")[0]["status"] == "pending")
            qemu.qmp("job-finalize", id=job["id"])
            until(lambda: qemu.qmp("query-jobs")[0]["status"] == "concluded")
            qemu.qmp("job-dismiss", id=job["id"])
            service.start()
            done = service.wait_for_job(job["id"])
            assert (done["state"], done["result"]["chain"]) == ("completed", [chain.at(0), chain.at(3)])
            qemu.kill()
        service.stop()
    assert_same(read_image(chain.active), chain.view)


def test_killed_after_others_have_finalized(tmp_path: Path, chain: Chain) -> None:
    """Nobody knows whether it was on the disk: it is lost, and what its text says brings every byte back."""
    with Service(tmp_path / "service") as service:
        with Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
            service.wait_for_domain("vm")
            job = service.started("vm", verb="pull", **SLOW)
            service.kill()
            qemu.qmp("block-job-set-speed", device=job["id"], speed=0)
            until(lambda: qemu.qmp("query-jobs")[0]["status"] == "pending")
            qemu.qmp("job-finalize", id=job["id"])
            until(lambda: qemu.qmp("query-jobs")[0]["status"] == "concluded")
            qemu.kill()
        service.start()
        lost = service.wait_for_job(job["id"])
        assert (lost["state"], lost["error"]["code"]) == ("lost", "outcome-unknown")
        assert header_backing(chain.active) is None
        _, _, command = lost["error"]["detail"].partition("`qemu-img rebase")
        subprocess.run(["qemu-img", "rebase", *command.partition("`")[0].split()], check=True)
        service.stop()
    assert_same(read_image(chain.active), chain.view)


def test_the_disk_is_unplugged(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """A pull needs no guest: it ends well, and its nodes go."""
    qemu = boot(blockdev(chain), machine="pc")
    job = running(service, domain, base="vda[3]")
    qemu.qmp("device_del", id="virtio0")
    qemu.qmp("system_reset")
    until(lambda: any(event["event"] == "DEVICE_DELETED" for event in qemu.events) or not qemu.qmp("query-block"))
    done = sped_up(service, job)
    assert (done["state"], done["result"]["chain"]) == ("completed", [chain.at(0), chain.at(3)])
    names = {node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
    assert names == {"n3", "fn3", "n0", "fn0"}
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_others_read_a_layer_between(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """An export of it is no reason to refuse, and reads the same afterwards."""
    qemu = boot(blockdev(chain))
    socket = chain.active.parent / "nbd.sock"
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    qemu.qmp("block-export-add", type="nbd", id="exp", **{"node-name": "n1"}, name="mid")
    done = service.wait_for_job(service.started(domain, verb="pull")["id"])
    assert (done["state"], done["result"]["chain"]) == ("completed", [chain.at(0)])
    compare = ["qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2"]
    read = f"nbd+unix:///mid?socket={socket}"
    subprocess.run([*compare, read, chain.at(2)], check=True)
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize("how", ["pulled", "overlay", "two overlays"])
def test_an_export_above_what_is_merged_into(
    service: Service, boot: Boot, chain: Chain, domain: str, folder: Path, *, how: str
) -> None:
    """A backup that reads the base through layers in no chain keeps reading the same: the base is not written to."""
    qemu = boot(blockdev(chain))
    node, expected = ("n2", chain.views[2]) if how == "pulled" else ("n0", chain.views[0])
    for number in range(("pulled", "overlay", "two overlays").index(how)):
        image = folder / f"over{number}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M"], check=True)
        file = {"driver": "file", "filename": str(image)}
        over = f"over{number}"
        qemu.qmp("blockdev-add", driver="qcow2", node_name=over, file=file, backing=node, read_only=True)
        node = over
    socket = folder / "nbd.sock"
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
    qemu.qmp("block-export-add", type="nbd", id="backup", node_name=node, name="backup")
    if how == "pulled":
        job = service.started(domain, verb="pull", base="vda[3]")
        assert service.wait_for_job(job["id"])["state"] == "completed"
    for dry_run in ("true", "false"):
        url = f"/domains/{domain}/disks/vda/commit?dry_run={dry_run}"
        answer = service.client.post(url, json={"flags": ["active"], "on_ready": "pivot"})
        assert (answer.status_code, answer.json()["code"]) == (409, "image-shared"), answer.text
    seen = folder / "seen.raw"
    read = ["qemu-img", "convert", "-f", "raw", "-O", "raw", f"nbd+unix:///backup?socket={socket}", str(seen)]
    subprocess.run(read, check=True)
    assert_same(seen.read_bytes(), expected)
    qemu.qmp("block-export-del", id="backup")
    until(lambda: qemu.qmp("query-block-exports") == [])
    done = service.started(domain, flags=["active"], on_ready="pivot") if how == "pulled" else None
    if done is not None:
        # Nobody reads what the pull has left any more.
        assert service.wait_for_job(done["id"])["state"] == "completed"
    qemu.quit()


def test_snapshots_are_refused_by_qemu_meanwhile(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """What a backup tool tries in the middle of a pull hurts nobody."""
    qemu = boot(blockdev(chain))
    job = running(service, domain)
    with pytest.raises(QmpError):
        qemu.qmp(
            "blockdev-snapshot-sync",
            **{"node-name": "n3", "snapshot-file": str(chain.active.parent / "s.qcow2"), "snapshot-node-name": "s"},
        )
    assert sped_up(service, job)["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_a_snapshot_right_after_it_was_planned(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """A layer that is active in a dry run and below the active one in the run is pulled all the same, or refused."""
    qemu = boot(blockdev(chain))
    digest = service.disk(domain)["digest"]
    over = chain.active.parent / "over.qcow2"
    qemu.qmp("blockdev-snapshot-sync", **{"node-name": "n3", "snapshot-file": str(over), "snapshot-node-name": "over"})
    url = f"/domains/{domain}/disks/vda/pull"
    stale = service.client.post(url, json={"top": chain.at(0)}, headers={"If-Match": f'"{digest}"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "chain-changed")
    done = service.wait_for_job(service.started(domain, verb="pull", top=chain.at(0))["id"])
    assert done["result"]["chain"] == [str(over), chain.at(0)]
    view = write_guest(qemu, chain.view, 7, 0, CLUSTER)
    qemu.kill()
    assert_same(read_image(chain.active), chain.view)
    assert len(view) == len(chain.view)


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [0, 3])
def test_a_filter_on_the_disk(service: Service, boot: Boot, chain: Chain, domain: str, above: int) -> None:
    """A throttle filter on top of the disk, or of its base, stays."""
    root = "throttle" if above == 3 else "n3"
    boot_arguments = [
        *explicit_nodes(chain, throttle_above=above),
        "-device",
        f"virtio-blk-pci,drive={root},id=virtio0",
    ]
    qemu = boot(boot_arguments)
    done = service.wait_for_job(service.started(domain, verb="pull", base="vda[2]")["id"])
    assert (done["state"], done["result"]["chain"]) == ("completed", [chain.at(0), *chain.files[2:]])
    view = write_guest(qemu, chain.view, 9, MIB, CLUSTER)
    names = {node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
    assert "throttle" in names
    qemu.quit()
    assert_same(read_image(chain.active), view)


def test_a_disk_that_the_guest_only_reads(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """QEMU opens its image for writing, and for reading only again."""
    qemu = boot(
        [
            *("-drive", f"file={chain.active},format=qcow2,if=none,id=drive0,readonly=on"),
            *("-device", "virtio-blk-pci,drive=drive0,id=virtio0"),
        ]
    )
    done = service.wait_for_job(service.started(domain, verb="pull")["id"])
    assert (done["state"], done["result"]["chain"]) == ("completed", [chain.at(0)])
    assert service.disk(domain)["read_only"] is True
    node = next(node for node in qemu.qmp("query-named-block-nodes", flat=True) if node["drv"] == "qcow2")
    assert node["ro"] is True
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_nothing_is_held_open_afterwards(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """https://github.com/autotest/tp-qemu/pull/1868: what was pulled may be deleted, and takes no space then."""
    for number, opened in enumerate((blockdev, drive_with_id)):
        copy = build_chain(chain.active.parent / str(number), 4, seed=number)
        name = f"{domain}-{number}"
        qemu = boot(opened(copy), name=name)
        done = service.wait_for_job(service.started(name, verb="pull", base="vda[3]")["id"])
        assert open_images(qemu) == set(done["result"]["chain"])
        for file in done["result"]["unused"]:
            Path(file).unlink()
        again = service.wait_for_job(service.started(name, verb="pull")["id"])
        assert again["state"] == "completed"
        qemu.quit()
        assert_same(read_image(copy.active), copy.view)


def test_an_overlay_of_another_format(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """QEMU can change the header of a qed image as well."""
    chain = build_chain(folder, 2)
    over = folder / "over.qed"
    create = ["qemu-img", "create", "-q", "-f", "qed", "-b", str(chain.active), "-F", "qcow2", str(over)]
    subprocess.run(create, check=True)
    qemu = boot(["-drive", f"file={over},format=qed,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,id=v0"])
    for body in ({"base": "vda[2]"}, {}):
        done = service.wait_for_job(service.started(domain, verb="pull", **body)["id"])
        assert (done["state"], len(done["result"]["chain"])) == ("completed", 2 if body else 1)
    qemu.quit()
    assert_same(read_image(over, "qed"), chain.view)


def test_a_deep_chain(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Sixty layers, pulled in the middle and then altogether."""
    chain = build_chain(folder, 60, size=MIB, data=4 * CLUSTER)
    qemu = boot(blockdev(chain))
    done = service.wait_for_job(service.started(domain, verb="pull", top="vda[20]", base="vda[50]")["id"])
    assert (done["state"], len(done["result"]["chain"])) == ("completed", 31)
    done = service.wait_for_job(service.started(domain, verb="pull")["id"])
    assert (done["state"], done["result"]["chain"]) == ("completed", [chain.at(0)])
    qemu.kill()
    assert_same(read_image(chain.active), chain.view)


def test_headers_in_other_folders(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """https://github.com/autotest/tp-libvirt/pull/1258: the new name is relative to the folder of its own image."""
    chain = build_chain(folder, 5, nested=True)
    qemu = boot(drive_with_id(chain))
    done = service.wait_for_job(service.started(domain, verb="pull", base="vda[3]", flags=["relative"])["id"])
    assert done["state"] == "completed"
    assert header_backing(chain.active) == "../../../l1.qcow2"
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_two_disks_of_one_chain(service: Service, boot: Boot, new_chain: NewChain, domain: str, folder: Path) -> None:
    """Disks that share layers are pulled at the same time."""
    chain = new_chain(folder / "a")
    others = folder / "b"
    others.mkdir()
    second = others / "top.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", chain.at(1), "-F", "qcow2", str(second)]
    subprocess.run(create, check=True)
    qemu = boot(
        [
            *("-drive", f"file={chain.active},format=qcow2,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,id=v0"),
            *("-drive", f"file={second},format=qcow2,if=none,id=d1", "-device", "virtio-blk-pci,drive=d1,id=v1"),
        ]
    )
    jobs = [service.started(domain, disk, verb="pull") for disk in ("vda", "vdb")]
    assert [service.wait_for_job(job["id"])["state"] for job in jobs] == ["completed"] * 2
    qemu.kill()
    assert_same(read_image(chain.active), chain.view)
    assert_same(read_image(second), chain.views[-2])


# Storage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["report", "enospc", "stop"])
def test_full_in_the_middle(
    service: Service, boot: Boot, domain: str, folder: Path, chain: Chain, *, on_error: str
) -> None:
    """It fails with QEMU's words, or pauses until there is space; the chain is right at any moment."""
    with small_file_system(folder, 12 * MIB) as place:
        top = place / "top.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(chain.active), "-F", "qcow2", str(top)]
        subprocess.run(create, check=True)
        qemu = boot(["-drive", f"file={top},format=qcow2,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,id=v0"])
        job = running(service, domain, on_error=on_error)
        filler = fill(place)
        assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
        if on_error == "report":
            failed = service.wait_for_job(job["id"])
            assert (failed["state"], failed["error"]["code"]) == ("failed", "insufficient-storage")
            assert failed["data_state"] == "untouched"
            refused = service.pull(domain)
            assert (refused.status_code, refused.json()["code"]) == (507, "insufficient-storage")
            filler.unlink()
            job = service.started(domain, verb="pull")
        else:
            paused = service.wait_for_job(job["id"], "paused")
            assert paused["pause_reason"] == "no-space"
            filler.unlink()
            assert service.client.post(f"/jobs/{job['id']}/resume").status_code == 202
        assert service.wait_for_job(job["id"])["state"] == "completed"
        qemu.quit()
        assert_same(read_image(top), chain.view)


def test_room_where_the_data_goes(service: Service, boot: Boot, domain: str, folder: Path, chain: Chain) -> None:
    """An image whose data is in a file elsewhere grows there."""
    with small_file_system(folder, 2 * MIB) as place:
        data = place / "data.raw"
        top = folder / "with-data.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", "-b", str(chain.active)]
        subprocess.run([*create, "-F", "qcow2", str(top)], check=True)
        fill(place, leave=256 << 10)
        qemu = boot(["-drive", f"file={top},format=qcow2,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0,id=v0"])
        answer = service.pull(domain)
        assert (answer.status_code, answer.json()["code"]) == (507, "insufficient-storage"), answer.text
        qemu.quit()
        info = json.loads(
            subprocess.run(
                ["qemu-img", "info", "--output=json", str(top)], check=True, capture_output=True, text=True
            ).stdout
        )
        assert info["backing-filename"] == str(chain.active)


@pytest.mark.parametrize("opened", [blockdev, drive_with_id])
def test_a_long_pull_below_the_active_layer(
    service: Service, boot: Boot, chain: Chain, domain: str, opened: Callable[[Chain], list[str]]
) -> None:
    """Whether its header can be written is not asked again in a way that would make it read-only before that."""
    qemu = boot(opened(chain))
    job = running(service, domain, top="vda[1]")
    time.sleep(1.5)
    done = sped_up(service, job)
    assert (done["state"], done["error"], done["result"]["chain"]) == ("completed", None, chain.files[:2])
    assert header_backing(chain.at(1)) is None
    qemu.kill()
    assert_same(read_image(chain.active), chain.view)
    assert_same(read_image(chain.at(1)), chain.views[-2])
