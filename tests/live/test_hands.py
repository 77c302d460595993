"""Others have their hands on QEMU too: what they do to a job or a disk is told, and what is theirs is left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
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
    drive_with_id,
    read_image,
    write_guest,
)
from tests.support.qemu import Qemu, QmpError
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4, size=8 * MIB, data=64 * CLUSTER)]

CRAWL: JSON = {"bandwidth": 4096, "flags": ["bandwidth_bytes"], "top": "vda[1]"}


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def crawling(service: Service, domain: str) -> JSON:
    job = service.started(domain, **CRAWL)
    until(lambda: service.job(job["id"])["progress"]["current"] > 0)
    return job


def ready(service: Service, domain: str) -> JSON:
    return service.wait_for_job(service.started(domain, flags=["active"])["id"], "ready")


def begun(service: Service, domain: str, kind: str) -> JSON:
    return crawling(service, domain) if kind == "running" else ready(service, domain)


def finish(service: Service, job: JSON) -> JSON:
    """Let the job go on to its end."""
    if job["type"] == "active-commit":
        assert service.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
    else:
        assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    return service.wait_for_job(job["id"])


def in_qemu(qemu: Qemu) -> dict[str, str]:
    return {job["id"]: job["status"] for job in qemu.qmp("query-jobs")}


def files(service: Service, domain: str) -> list[str]:
    return [layer["file"] for layer in service.disk(domain)["chain"]]


def types(service: Service, job: JSON) -> list[str]:
    return [event["type"] for event in service.history(job["id"])]


# Jobs ----------------------------------------------------------------------------------------------------------------


def test_a_job_of_another_client_is_its_own(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """Another client's job is named as a conflict, can't be steered here, and stays until that client dismisses it."""
    qemu = boot(blockdev(chain))
    foreign: dict[str, Any] = {"job_id": "theirs", "device": "n3", "top_node": "n1", "base_node": "n0", "speed": 1}
    qemu.qmp("block-commit", **foreign, auto_dismiss=False)
    answer = service.commit(domain, flags=["active"])
    assert (answer.status_code, answer.json()["code"], answer.json()["job"]) == (409, "job-conflict", "theirs")
    for answer in (service.client.delete("/jobs/theirs"), service.client.post("/jobs/theirs/pivot")):
        assert (answer.status_code, answer.json()["code"]) == (404, "job-not-found")
    assert in_qemu(qemu) == {"theirs": "running"}
    qemu.qmp("block-job-set-speed", device="theirs", speed=0)
    until(lambda: in_qemu(qemu) == {"theirs": "concluded"})
    qemu.qmp("job-dismiss", id="theirs")
    qemu.qmp("block-commit", **foreign | {"job_id": "failed", "top_node": "n2"}, auto_dismiss=False)
    qemu.qmp("job-cancel", id="failed")
    until(lambda: in_qemu(qemu) == {"failed": "concluded"})
    job = service.started(domain, flags=["active"], on_ready="pivot")
    assert service.wait_for_job(job["id"])["state"] == "completed"
    assert in_qemu(qemu) == {"failed": "concluded"}
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


def test_another_client_steers_a_running_job(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """Pause, resume and speed by another client show in the record, and the job ends as it should."""
    qemu = boot(blockdev(chain))
    job = crawling(service, domain)
    qemu.qmp("job-pause", id=job["id"])
    assert service.wait_for_job(job["id"], "paused")["pause_reason"] == "user"
    qemu.qmp("job-resume", id=job["id"])
    service.wait_for_job(job["id"], "running")
    qemu.qmp("block-job-set-speed", device=job["id"], speed=0)
    assert service.wait_for_job(job["id"])["state"] == "completed"
    assert types(service, job) == ["job.queued", "job.started", "job.paused", "job.resumed", "job.completed"]
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize("kind", ["running", "ready"])
def test_another_client_cancels_and_dismisses(
    service: Service, boot: Boot, domain: str, chain: Chain, *, kind: str
) -> None:
    """A job that another client cancels, and has QEMU forget at once, is canceled: QEMU has told so before."""
    qemu = boot(blockdev(chain))
    job = begun(service, domain, kind)
    qemu.qmp("job-cancel", id=job["id"])

    def dismissed() -> bool:
        with suppress(QmpError):
            qemu.qmp("job-dismiss", id=job["id"])
        return in_qemu(qemu) == {}

    until(dismissed)
    done = service.wait_for_job(job["id"])
    assert (done["state"], done["error"]) == ("canceled", None)
    assert files(service, domain) == chain.files
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [blockdev, drive_with_id])
@pytest.mark.parametrize("kind", ["running", "ready"])
def test_a_snapshot_during_a_job(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, kind: str, opened: Any
) -> None:
    """A snapshot on top, where QEMU takes one, is shown, and the job ends with its own outcome all the same."""
    qemu = boot(opened(chain))
    job = begun(service, domain, kind)
    node = qemu.qmp("query-block")[0]["inserted"]["node-name"]
    taken = True
    try:
        qemu.qmp("blockdev-snapshot-sync", node_name=node, snapshot_file=str(folder / "new"), snapshot_node_name="new")
    except QmpError:
        taken = False
    above = [str(folder / "new")] if taken else []
    assert files(service, domain) == above + chain.files
    view = write_guest(qemu, chain.view, 0x42, MIB, CLUSTER)
    done = finish(service, job)
    assert (done["state"], done["error"]) == ("completed", None)
    left = above + ([chain.at(0), chain.at(3)] if kind == "running" else [chain.at(3)])
    assert (files(service, domain), done["result"]["chain"]) == (left, left)
    qemu.quit()
    assert_same(read_image(left[0]), view)


@pytest.mark.parametrize("opened", [blockdev, drive_with_id])
@pytest.mark.parametrize("kind", ["running", "ready"])
def test_a_disk_is_unplugged_during_a_job(
    service: Service, boot: Boot, domain: str, chain: Chain, *, kind: str, opened: Any
) -> None:
    """Without its device a job goes on, or QEMU cancels it; no outcome is claimed that nothing proves."""
    qemu = boot(opened(chain), machine="pc")
    job = begun(service, domain, kind)
    qemu.qmp("device_del", id="virtio0")
    qemu.qmp("system_reset")
    until(lambda: any(event["event"] == "DEVICE_DELETED" for event in qemu.events) or not qemu.qmp("query-block"))
    if opened is drive_with_id:
        done = service.wait_for_job(job["id"])
        # QEMU cancels a ready job gently, which looks like a pivot once the disk can't be read any more.
        assert done["state"] in ({"canceled"} if kind == "running" else {"canceled", "lost"})
        assert done["result"]["deleted"] == []
    else:
        assert in_qemu(qemu) == {job["id"]: kind}
        done = finish(service, job)
        # No guest is on the disk any more whose writes could be missing.
        assert (done["state"], done["error"]) == ("completed", None)
        assert in_qemu(qemu) == {}
        left = [*chain.files[: 1 if kind == "running" else 0], chain.at(3)]
        assert done["result"]["chain"] == left
        nodes = {node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
        assert nodes == ({"n3", "fn3", "n0", "fn0"} if kind == "running" else {"n0", "fn0"})
    qemu.quit()
    assert_same(
        read_image(chain.images[0]) if opened is blockdev and kind == "ready" else read_image(chain.active), chain.view
    )


# The guest -----------------------------------------------------------------------------------------------------------


def test_the_guest_is_stopped_and_reset(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A guest that is stopped, reset or goes on leaves its disk's job as it is."""
    qemu = boot(blockdev(chain), run=True)
    job = ready(service, domain)
    for command, state in (("stop", "paused"), ("system_reset", "paused"), ("cont", "running")):
        qemu.qmp(command)
        service.wait_for_domain(domain, state)
        assert service.job(job["id"])["state"] == "ready"
    qemu.qmp("system_reset")
    assert finish(service, job)["state"] == "completed"
    assert in_qemu(qemu) == {}
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


@pytest.mark.parametrize("kind", ["running", "ready"])
def test_the_guest_is_migrated_during_a_job(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, kind: str
) -> None:
    """QEMU moves no guest whose disk a job works on: the migration fails, and the job goes on to its true end."""
    source = boot(blockdev(chain), run=True)
    job = begun(service, domain, kind)
    place = f"unix:{folder}/migration"
    with Qemu(folder / "there.qmp", [*blockdev(chain), "-incoming", place]):
        source.qmp("migrate", uri=place)
        until(lambda: source.qmp("query-migrate").get("status") in ("completed", "failed"))
        assert source.qmp("query-migrate")["status"] == "failed"
    assert in_qemu(source) == {job["id"]: kind}
    service.wait_for_domain(domain, "running")
    assert finish(service, job)["state"] == "completed"
    left = files(service, domain)[0]
    source.quit()
    assert_same(read_image(left), chain.view)
