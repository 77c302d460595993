"""Whose image is it: a base that another machine needs is not written to, on or off, known now or from before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, read_image
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=8 * MIB, data=16 * CLUSTER)]

ACTIVE: JSON = {"flags": ["active"], "on_ready": "pivot"}
BELOW: JSON = {"top": "vda[1]"}


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path / "service") as running:
        yield running


def overlay_on(base: Path | str, overlay: Path) -> Path:
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay, "8M")
    return overlay


def opened(image: Path) -> list[str]:
    return ["-drive", f"file={image},format=qcow2,if=none,id=d", "-device", "virtio-blk-pci,drive=d,id=virtio0"]


def refused(service: Service, user: str, body: JSON, code: str = "image-shared") -> JSON:
    url = "/domains/a/disks/vda/commit"
    for answer in (service.client.post(url, params={"dry_run": "true"}, json=body), service.commit("a", **body)):
        assert (answer.status_code, answer.json().get("code")) == (409, code), answer.text
        assert user in answer.json()["used_by"], answer.text
    return answer.json()


def lived(service: Service, name: str, image: Path) -> None:
    """A machine of that name runs on the image, is seen, and is shut down."""
    with Qemu(service.qmp_dir / f"{name}.qmp", opened(image)) as qemu:
        service.wait_for_domain(name)
        assert service.disk(name)
        qemu.quit()
    (service.qmp_dir / f"{name}.qmp").unlink(missing_ok=True)


def works(service: Service, body: JSON) -> None:
    job = service.wait_for_job(service.started("a", **body)["id"])
    assert (job["state"], job["error"]) == ("completed", None)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_machine_that_was_found_and_has_gone(
    service: Service, chain: Chain, tmp_path: Path, *, restarted: bool
) -> None:
    """It stays, as off, as long as its image is there, and its base is not merged into."""
    other = overlay_on(chain.images[0], tmp_path / "b.qcow2")
    lived(service, "b", other)
    with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)) as qemu:
        if restarted:
            service.stop()
            service.start()
        service.wait_for_domain("a")
        off = service.wait_for_domain("b", "shutoff")
        assert off["since"] is not None
        assert service.disk("b")["chain"][0]["file"] == str(other)
        refused(service, "b/vda", ACTIVE)
        assert "DELETE /domains/b" in refused(service, "b/vda", BELOW)["detail"]
        assert service.client.delete("/domains/b").status_code == 204
        assert service.client.get("/domains/b").status_code == 404
        works(service, ACTIVE)
        qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


def test_it_is_forgotten_with_its_image(service: Service, chain: Chain, tmp_path: Path) -> None:
    """Nobody can start it again."""
    other = overlay_on(chain.images[0], tmp_path / "b.qcow2")
    lived(service, "b", other)
    service.wait_for_domain("b", "shutoff")
    other.unlink()
    until(lambda: service.client.get("/domains/b").status_code == 404)
    with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)):
        service.wait_for_domain("a")
        works(service, ACTIVE)


@pytest.mark.parametrize("restarted", [False, True])
def test_its_image_was_made_anew(service: Service, chain: Chain, tmp_path: Path, *, restarted: bool) -> None:
    """A copy in the image's place, as one makes it to have a file back in one piece, needs the same base."""
    other, witness = (overlay_on(chain.images[0], tmp_path / f"{name}.qcow2") for name in "bc")
    lived(service, "b", other)
    lived(service, "c", witness)
    copy = tmp_path / "copy"
    copy.write_bytes(other.read_bytes())
    copy.rename(other)
    witness.unlink()
    if restarted:
        service.stop()
        service.start()
    until(lambda: service.client.get("/domains/c").status_code == 404)
    assert service.wait_for_domain("b", "shutoff")["disks"] == ["vda"]
    with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)) as qemu:
        service.wait_for_domain("a")
        refused(service, "b/vda", ACTIVE)
        qemu.quit()


def test_registered_by_its_monitor_only(service: Service, chain: Chain, tmp_path: Path) -> None:
    """What it had when it ran is known over a restart of the service."""
    other = overlay_on(chain.images[0], tmp_path / "b.qcow2")
    socket = tmp_path / "b.sock"
    with Qemu(socket, opened(other)) as qemu:
        service.client.put("/domains/b", json={"qmp": {"unix": str(socket)}})
        service.wait_for_domain("b")
        assert service.disk("b")
        qemu.quit()
    service.stop()
    service.start()
    with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)):
        service.wait_for_domain("a")
        service.wait_for_domain("b", "shutoff")
        refused(service, "b/vda", ACTIVE)


UNREADABLE = 'json:{"driver":"qcow2","file":"a-node-of-qemu"}'


def test_a_chain_that_can_not_be_read_to_its_end(service: Service, chain: Chain, tmp_path: Path) -> None:
    """It may lead to any base; what it leads to by a name that is understood, is followed."""
    known = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(chain.images[0])}})
    first = overlay_on(f"json:{known}", tmp_path / "b.qcow2")
    with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)):
        service.wait_for_domain("a")
        service.client.put("/domains/b", json={"disks": {"vda": {"image": str(first)}}})
        refused(service, "b/vda", ACTIVE)
        service.client.delete("/domains/b")
        blind = overlay_on(UNREADABLE, tmp_path / "blind.qcow2")
        service.client.put("/domains/c", json={"disks": {"vda": {"image": str(blind)}}})
        detail = refused(service, "c", ACTIVE)["detail"]
        assert all(way in detail for way in ("make it readable", "register c anew", "DELETE /domains/c"))
        # A network ends a chain, and so does a file that is missing.
        for end in ("nbd://127.0.0.1:9/x", str(tmp_path / "none.qcow2")):
            overlay_on(end, blind)
            service.client.put("/domains/c", json={"disks": {"vda": {"image": str(blind)}}})
            answer = service.client.post("/domains/a/disks/vda/commit", params={"dry_run": "true"}, json=ACTIVE)
            assert answer.status_code == 200, answer.text


def test_a_queued_job_is_judged_again(tmp_path: Path, chain: Chain) -> None:
    """Whoever has come to need the base while the job waited is heard when it starts."""
    images = tmp_path / "first"
    images.mkdir()
    first = overlay_on(chain.images[0], tmp_path / "b.qcow2")
    with (
        Service(tmp_path / "service", {"BLOCKJOBD_MAX_RUNNING_JOBS": "1"}) as service,
        Qemu(service.qmp_dir / "a.qmp", blockdev(chain)),
    ):
        busy = tmp_path / "busy"
        shutil.copytree(
            chain.images[0].parent, busy, ignore=lambda _folder, names: [n for n in names if n == "service"]
        )
        copies = [busy / image.name for image in chain.images]
        for above, below in zip(copies[1:], copies, strict=False):
            run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", above)
        with Qemu(service.qmp_dir / "slow.qmp", opened(copies[-1])):
            service.wait_for_domain("a")
            service.wait_for_domain("slow")
            slow = service.started("slow", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes"])
            queued = service.started("a", **ACTIVE)
            assert queued["state"] == "queued"
            service.client.put("/domains/b", json={"disks": {"vda": {"image": str(first)}}})
            service.client.delete(f"/jobs/{slow['id']}")
            ended = service.wait_for_job(queued["id"])
            assert (ended["state"], ended["error"]["code"]) == ("failed", "image-shared"), ended
            assert (ended["data_state"], ended["started_at"]) == ("untouched", None)


def test_overlays_that_nobody_has_told_of(tmp_path: Path, chain: Chain) -> None:
    """In the service's own folders it looks by itself; what a merge has left behind is nobody's."""
    roots = json.dumps([str(chain.images[0].parent)])
    with (
        Service(tmp_path / "service", {"BLOCKJOBD_IMAGE_ROOTS": roots}) as service,
        Qemu(service.qmp_dir / "a.qmp", blockdev(chain)) as qemu,
    ):
        service.wait_for_domain("a")
        works(service, {"top": "vda[1]"})
        # It still leads to the base, and does not count.
        assert chain.images[1].exists()
        hidden = overlay_on(chain.images[0], chain.images[0].parent / "hidden.qcow2")
        assert refused(service, str(hidden), ACTIVE)["used_by"] == str(hidden)
        hidden.unlink()
        link = chain.images[0].parent / "link"
        link.symlink_to(chain.images[0])
        through = overlay_on(link.name, chain.images[0].parent / "through.qcow2")
        refused(service, str(through), ACTIVE)
        through.unlink()
        works(service, ACTIVE)
        qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


def test_a_fresh_image_under_the_number_of_an_invalid_one(service: Service, chain: Chain) -> None:
    """A mark belongs to the image and not to the number that its file system gave to the file."""
    with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)):
        service.wait_for_domain("a")
        job = service.wait_for_job(service.started("a", flags=["active"])["id"], "ready")
        service.client.delete(f"/jobs/{job['id']}")
        assert service.wait_for_job(job["id"])["state"] == "canceled"
        assert [layer["valid"] for layer in service.disk("a")["chain"]] == [True, False, True]
    old = chain.images[1].stat().st_ino
    chain.images[1].unlink()
    for _ in range(50):
        overlay_on(chain.images[0], chain.images[1])
        if chain.images[1].stat().st_ino == old:
            break
        chain.images[1].rename(chain.images[1].with_suffix(f".{time.monotonic_ns()}"))
    else:
        overlay_on(chain.images[0], chain.images[1])
    with Qemu(service.qmp_dir / "a.qmp", opened(chain.active)):
        service.wait_for_domain("a")
        assert [layer["valid"] for layer in service.disk("a")["chain"]] == [True, True, True]


def test_hard_links_and_other_names(service: Service, chain: Chain, tmp_path: Path) -> None:
    """A base is the same file under each of its names, also where a machine that is off has another one."""
    other_name = tmp_path / "hard.qcow2"
    os.link(chain.images[0], other_name)
    lived(service, "b", overlay_on(other_name, tmp_path / "b.qcow2"))
    with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)):
        service.wait_for_domain("a")
        refused(service, "b/vda", ACTIVE)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_registration_follows_a_pivot(service: Service, chain: Chain, tmp_path: Path, *, restarted: bool) -> None:
    """Whoever starts the machine from what is registered gets the image that has its data, not the old overlay."""
    socket = tmp_path / "a.sock"
    disks = {"vda": {"image": str(chain.active)}, "vdb": {"image": str(tmp_path / "other.qcow2")}}
    overlay_on(chain.images[0], tmp_path / "other.qcow2").unlink()
    with Qemu(socket, blockdev(chain)) as qemu:
        service.client.put("/domains/a", json={"qmp": {"unix": str(socket)}, "disks": disks})
        service.wait_for_domain("a")
        works(service, ACTIVE)
        qemu.quit()
    if restarted:
        service.stop()
        service.start()
    service.wait_for_domain("a", "shutoff")
    assert [layer["file"] for layer in service.disk("a")["chain"]] == [str(chain.images[0])]
