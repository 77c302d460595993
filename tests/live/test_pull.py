"""Pulls on real QEMUs: every byte is compared, also when QEMU is killed at the worst moment."""

from __future__ import annotations

import json
import subprocess
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
    drive,
    explicit_nodes,
    header_backing,
    header_format,
    read_image,
    write_guest,
)
from tests.support.qemu import Qemu
from tests.support.service import Service, sse

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=5)]


def plan_of(service: Service, domain: str, **body: object) -> dict[str, Any]:
    """What a dry run answers."""
    answer = service.client.post(f"/domains/{domain}/disks/vda/pull?dry_run=true", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pulled(service: Service, domain: str, **body: Any) -> dict[str, Any]:
    """A pull that was planned, and has completed as planned."""
    plan = plan_of(service, domain, **body)
    job = service.wait_for_job(service.started(domain, verb="pull", **body)["id"])
    assert job["state"] == "completed", job
    assert (job["type"], job["result"]["chain"]) == ("pull", plan["chain_after"])
    assert job["result"]["unused"] == plan["unused"]
    assert (job["result"]["invalidated"], job["result"]["deleted"]) == ([], [])
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == plan["chain_after"]
    return job


@pytest.mark.parametrize("arguments", [drive, blockdev], ids=["drive", "blockdev"])
@pytest.mark.parametrize(("top", "base"), [(0, None), (0, 4), (0, 2), (1, 3), (1, None), (2, 4)], ids=str)
def test_every_byte_is_there(
    service: Service, boot: Boot, chain: Chain, domain: str, *, top: int, base: int | None, arguments: Any
) -> None:
    """All layers show what they showed, the header leads to the base, and the next job on the disk just works."""
    qemu = boot(arguments(chain))
    before = {image: image.read_bytes() for image in chain.images[:-1]}
    body: dict[str, Any] = {"top": f"vda[{top}]", "base": None if base is None else f"vda[{base}]"}

    job = pulled(service, domain, **body)

    files = chain.files
    assert job["result"]["unused"] == files[top + 1 : len(files) if base is None else base]
    assert header_backing(files[top]) == (None if base is None else Path(files[base]).name)
    assert header_format(files[top]) == (None if base is None else "qcow2")
    assert qemu.qmp("query-jobs") == []
    names = {node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
    assert not {f"n{4 - at}" for at in range(top + 1, len(files) if base is None else base)} & names
    for file, view in zip(files[1:], reversed(chain.views[:-1]), strict=True):
        assert_same(read_image(file), view)
    assert all(image.read_bytes() == content for image, content in before.items() if str(image) != files[top])
    seen = write_guest(qemu, chain.view, 0xA5, 3 * CLUSTER, CLUSTER) if arguments is blockdev else chain.view
    active = files[0]
    if len(job["result"]["chain"]) > 1:
        again = service.started(domain, flags=["active"], on_ready="pivot")
        [active] = service.wait_for_job(again["id"], "completed")["result"]["chain"]
    qemu.quit()
    assert_same(read_image(active), seen)


def test_a_layer_below_is_read_only_again(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """QEMU 10 leaves it writable."""
    qemu = boot(blockdev(chain))
    pulled(service, domain, top="vda[1]", base="vda[3]")
    node = next(node for node in qemu.qmp("query-named-block-nodes", flat=True) if node["node-name"] == "n3")
    assert node["ro"] is True


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize(("top", "base"), [(0, None), (0, 3), (1, 3)])
def test_killed_right_after_completed(
    service: Service, boot: Boot, chain: Chain, domain: str, *, attempt: int, top: int, base: int | None
) -> None:
    """What is told to be completed is on the disk."""
    del attempt
    qemu = boot(blockdev(chain))
    body: dict[str, Any] = {"top": f"vda[{top}]", "base": None if base is None else f"vda[{base}]"}
    with sse(service.client, "/events?types=job.completed") as events:
        job = service.started(domain, verb="pull", **body)
        told = next(event for event in events if event["data"]["subject"] == f"jobs/{job['id']}")["data"]
        qemu.kill()
    assert told["data"]["state"] == "completed"
    files = chain.files
    for file in job["top"], *told["data"]["result"]["unused"]:
        assert_same(read_image(file), chain.views[len(files) - 1 - files.index(file)])
    subprocess.run(["qemu-img", "check", "-q", files[top]], check=True)


def test_a_kill_in_the_middle(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """The chain is as it was, and says so."""
    qemu = boot(blockdev(chain))
    job = service.started(domain, verb="pull", bandwidth=CLUSTER, flags=["bandwidth_bytes"])
    service.wait_for_job(job["id"], "running")
    qemu.kill()
    failed = service.wait_for_job(job["id"])
    assert (failed["state"], failed["error"]["code"], failed["data_state"]) == ("failed", "domain-gone", "untouched")
    assert_same(read_image(chain.active), chain.view)
    assert header_backing(chain.active) == "l3.qcow2"


@pytest.mark.parametrize("force", ["true", "false"])
def test_aborted(service: Service, boot: Boot, chain: Chain, domain: str, force: str) -> None:
    """It ends as canceled, the chain is as it was, and it can be pulled again."""
    qemu = boot(blockdev(chain))
    job = service.started(domain, verb="pull", bandwidth=CLUSTER, flags=["bandwidth_bytes"])
    service.wait_for_job(job["id"], "running")
    assert "pivot" not in service.job(job["id"])["actions"]
    assert service.client.post(f"/jobs/{job['id']}/pivot").json()["code"] == "job-not-pivotable"
    assert service.client.delete(f"/jobs/{job['id']}", params={"force": force}).status_code == 202
    assert service.wait_for_job(job["id"])["state"] == "canceled"
    pulled(service, domain)
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)
    assert header_backing(chain.active) is None


def test_paused_and_sped_up(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """A pull takes what a commit takes."""
    qemu = boot(blockdev(chain))
    job = service.started(domain, verb="pull", bandwidth=CLUSTER, flags=["bandwidth_bytes"])
    service.wait_for_job(job["id"], "running")
    assert service.client.post(f"/jobs/{job['id']}/pause").status_code == 202
    service.wait_for_job(job["id"], "paused")
    assert service.client.post(f"/jobs/{job['id']}/resume").status_code == 202
    assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    assert service.wait_for_job(job["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_a_guest_that_writes(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """What is written while the pull runs is there."""
    qemu = boot(blockdev(chain))
    job = service.started(domain, verb="pull", bandwidth=MIB, flags=["bandwidth_bytes"])
    view = chain.view
    for number in range(40):
        view = write_guest(qemu, view, number + 1, (number * 7 % 60) * CLUSTER + 4096, 8192)
    assert service.wait_for_job(job["id"])["state"] == "completed"
    qemu.quit()
    assert_same(read_image(chain.active), view)


def test_a_filter_between(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """QEMU drops it from the chain; its node is released."""
    arguments = [*explicit_nodes(chain, throttle_above=2), "-device", "virtio-blk-pci,drive=n4,id=virtio0"]
    qemu = boot(arguments)
    plan = plan_of(service, domain, base="vda[4]")
    assert "filters-dropped" in {warning["code"] for warning in plan["warnings"]}
    pulled(service, domain, base="vda[4]")
    names = {node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
    assert not names & {"throttle", "n1", "n2", "n3", "fn1", "fn2", "fn3"}
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"top": "vda[4]"}, "nothing-to-pull"),
        ({"top": "vda[1]", "base": "vda[2]"}, "nothing-to-pull"),
        ({"top": "nope"}, "top-not-found"),
        ({"base": "nope"}, "base-not-found"),
        ({"top": "vda[2]", "base": "vda[1]"}, "base-not-below-top"),
        ({"backing_file": "x.qcow2"}, "backing-file-impossible"),
        ({"base": "vda[3]", "backing_file": "nowhere.qcow2"}, "backing-file-wrong"),
        ({"flags": ["active"]}, "invalid-request"),
        ({"flags": 8}, "invalid-request"),
        ({"on_ready": "pivot"}, "invalid-request"),
        ({"bandwidth": -1}, "invalid-request"),
    ],
)
def test_refusals(service: Service, boot: Boot, chain: Chain, domain: str, *, body: dict[str, Any], code: str) -> None:
    """Each is refused by a dry run and by the run alike, and nothing was done."""
    boot(blockdev(chain))
    for dry_run in ("true", "false"):
        answer = service.client.post(f"/domains/{domain}/disks/vda/pull", params={"dry_run": dry_run}, json=body)
        assert (answer.json()["code"], answer.status_code) == (code, 422), answer.text
    assert service.client.get("/jobs", params={"domain": domain}).json()["items"] == []


def test_a_plan(service: Service, boot: Boot, chain: Chain, domain: str) -> None:
    """The bytes are those that the layers between have, and `top` has not; the growth is not below what it grows."""
    boot(blockdev(chain))
    plan = plan_of(service, domain, base="vda[4]", bandwidth=7, flags=16)
    command = ["qemu-img", "map", "-U", "--output=json", chain.files[0]]
    mapped = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert plan["bytes_to_copy"] == sum(
        entry["length"] for entry in mapped if 0 < entry["depth"] < 4 and entry.get("present", True)
    )
    assert plan["qmp"] == [
        {
            "execute": "block-stream",
            "arguments": {
                "device": "n4",
                "base-node": "n0",
                "backing-file": "l0.qcow2",
                "speed": 7 * MIB,
                "on-error": "report",
                "auto-finalize": False,
                "auto-dismiss": False,
            },
        }
    ]
    assert (plan["type"], plan["top"], plan["base"], plan["overlay"]) == ("pull", chain.at(0), chain.at(4), None)
    assert (plan["flags"], plan["backing_file"]) == (["relative"], "l0.qcow2")
    assert (plan["invalidates"], plan["deletes"], plan["unused"]) == ([], [], chain.files[1:4])
    size = chain.active.stat().st_blocks * 512
    pulled(service, domain, base="vda[4]")
    assert chain.active.stat().st_blocks * 512 - size <= plan["base_growth_max"]


def test_above_a_shared_base(service: Service, boot: Boot, chain: Chain, domain: str, folder: Path) -> None:
    """Another machine runs on the base: a pull does not touch it."""
    other = folder / "other.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(chain.images[0]), "-F", "qcow2", str(other)]
    subprocess.run(create, check=True)
    boot(blockdev(Chain([chain.images[0], other], chain.views[:1] * 2, ["qcow2"] * 2)), name=f"{domain}-other")
    qemu = boot(blockdev(chain))
    assert service.commit(domain, flags=["active"]).json()["code"] == "image-shared"
    content = chain.images[0].read_bytes()
    pulled(service, domain, base="vda[4]")
    pulled(service, domain)
    qemu.quit()
    assert chain.images[0].read_bytes() == content
    assert_same(read_image(chain.active), chain.view)


def test_the_service_is_killed(tmp_path: Path, chain: Chain) -> None:
    """The job goes on in QEMU, and its end is found out."""
    with Service(tmp_path / "service") as service:
        with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)) as qemu:
            service.wait_for_domain("a")
            job = service.started("a", verb="pull", bandwidth=MIB, flags=["bandwidth_bytes"])
            service.wait_for_job(job["id"], "running")
            service.kill()
            service.start()
            assert service.wait_for_job(job["id"])["state"] == "completed"
            assert [layer["file"] for layer in service.disk("a")["chain"]] == [chain.at(0)]
            qemu.kill()
        service.stop()
    assert_same(read_image(chain.active), chain.view)
