"""The service ends, by signal or by force, or QEMU does, or both: jobs go on, and their outcome is the true one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.conftest import NewChain
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    assert_same,
    blockdev,
    drive_with_id,
    header_backing,
    read_image,
    write_guest,
)
from tests.support.qemu import Qemu, QmpError
from tests.support.service import ENDED, JSON, Service, sse

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=5, size=8 * MIB, data=64 * CLUSTER)]

CRAWL: JSON = {"bandwidth": 4096, "flags": ["bandwidth_bytes"]}
"""A speed at which a job takes its first bite and then sits there for minutes."""
MIDDLE: JSON = {"top": "vda[1]", "base": "vda[4]"}
NUMBERS = itertools.count(1)
ACTIVE: JSON = {"flags": ["active"]}
WHOLE = ["job.queued", "job.started", "job.ready", "job.pivoting", "job.completed"]


class Own(Service):
    """A service that tests may end, and the id of the domain of the test that runs."""

    vm = ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    """A service that runs one job at a time."""
    with Own(tmp_path_factory.mktemp("service"), {"BLOCKJOBD_MAX_RUNNING_JOBS": "1"}) as running:
        yield running


@pytest.fixture
def own(shared: Own) -> Iterator[Own]:
    """The service, running, with a domain's id that no other test uses."""
    shared.vm = f"vm{next(NUMBERS)}"
    yield shared
    if shared.process is None:
        shared.start()
    # It runs one job at a time, so one that a failed test has left would hold up the next test.
    unfinished = shared.client.get("/jobs", params={"active": "true"})
    for job in unfinished.json()["items"]:
        shared.client.delete(f"/jobs/{job['id']}", params={"force": "true"})


@contextmanager
def machine(service: Own, chain: Chain, name: str | None = None, *, opened: Any = blockdev) -> Generator[Qemu]:
    """A QEMU with the chain that the service knows, as the test's domain or under another name."""
    name = name or service.vm
    with Qemu(service.qmp_dir / f"{name}.qmp", opened(chain)) as qemu:
        service.wait_for_domain(name)
        yield qemu


def end(service: Own, how: str) -> None:
    """End the service by SIGKILL or SIGTERM."""
    if how == "kill":
        service.kill()
    else:
        assert service.stop() == 0


def again(service: Own) -> None:
    """Start the service again, and wait until it has reached the domain."""
    service.start()
    service.wait_for_domain(service.vm)


def until(condition: Callable[[], object], seconds: float = 15, pause: float = 0.01) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(pause)


def crawling(service: Own, **body: Any) -> JSON:
    """A merge below the active layer that has begun and does not end by itself."""
    job = service.started(service.vm, **(CRAWL | MIDDLE | body))
    until(lambda: service.job(job["id"])["progress"]["current"] > 0)
    return job


def ready(service: Own, **body: Any) -> JSON:
    """A merge of the active layer that waits for its pivot."""
    job = service.started(service.vm, **(ACTIVE | body))
    return service.wait_for_job(job["id"], "ready")


def hurry(service: Own, job: JSON) -> JSON:
    """Lift the limit; the job at its end."""
    assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    return service.wait_for_job(job["id"])


def pivot(service: Own, job: JSON) -> JSON:
    """Have the job pivot; the job at its end."""
    assert service.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
    return service.wait_for_job(job["id"])


def types(service: Own, job: JSON) -> list[str]:
    return [event["type"] for event in service.history(job["id"])]


def status(qemu: Qemu, job: JSON) -> str | None:
    """What QEMU says of the job; None if it has none of that id."""
    return next((found["status"] for found in qemu.qmp("query-jobs") if found["id"] == job["id"]), None)


def last_id(service: Own) -> int:
    """The id of the last event that there is: an id from the future is answered with it."""
    with sse(service.client, f"/events?after={10**15}") as events:
        return int(next(events)["id"])


def files(service: Own) -> list[str]:
    return [layer["file"] for layer in service.disk(service.vm)["chain"]]


def assert_content(qemu: Qemu, image: Path | str, view: bytes) -> None:
    """End QEMU; the image on disk holds what the guest saw."""
    qemu.quit()
    assert_same(read_image(image), view)


def rerun(service: Own, chain: Chain, view: bytes, opened: Any = blockdev) -> None:
    """After QEMU is started anew the same merge just works, and all data is there."""
    with Qemu(service.qmp_dir / f"{service.vm}.qmp", opened(chain)) as qemu:
        service.wait_for_domain(service.vm)
        job = service.wait_for_job(service.started(service.vm, **ACTIVE, on_ready="pivot")["id"])
        assert (job["state"], files(service)) == ("completed", [chain.at(4)])
        assert_content(qemu, chain.images[0], view)


# The service ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("kind", ["running", "ready"])
def test_events_without_a_seam(own: Own, chain: Chain, kind: str, how: str) -> None:
    """Who follows the events over a restart has each once: no id is missing, none comes twice, no job is told anew."""
    got: list[JSON] = []
    before = last_id(own)
    with machine(own, chain) as qemu:
        job = crawling(own) if kind == "running" else ready(own)
        last_before = own.history(job["id"])[-1]["id"]
        with sse(own.client, f"/events?after={before}") as events:
            for event in events:
                got += [event] if "id" in event else []
                if event.get("id") == last_before:
                    break
            end(own, how)
            # Killed, the stream breaks off; stopped, it ends in order.
            with suppress(httpx.TransportError) if how == "kill" else nullcontext():
                got += [event for event in events if "id" in event]
        assert status(qemu, job) == kind
        again(own)
        assert own.job(job["id"])["state"] == kind
        assert [found["id"] for found in qemu.qmp("query-jobs")] == [job["id"]]
        done = hurry(own, job) if kind == "running" else pivot(own, job)
        assert done["state"] == "completed"
        with sse(own.client, "/events", {"Last-Event-ID": got[-1]["id"]}) as events:
            while got[-1]["event"] != "job.completed":
                event = next(events)
                got += [event] if "id" in event else []
        assert [int(event["id"]) for event in got] == list(range(before + 1, before + len(got) + 1))
        own_events = [event["data"] for event in got if event["event"].startswith("job.")]
        assert own_events == own.history(job["id"])
        expected = ["job.queued", "job.started", "job.completed"] if kind == "running" else WHOLE
        assert [event["type"] for event in own_events] == expected
        versions = [event["data"]["version"] for event in own_events]
        assert versions == sorted(set(versions))
        assert qemu.qmp("query-jobs") == []
        assert_content(qemu, chain.active if kind == "running" else chain.images[0], chain.view)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_queued_job_stays_queued(own: Own, chain: Chain, new_chain: NewChain, tmp_path: Path, how: str) -> None:
    """A job that waits for its turn still waits after a restart, and has its turn when the other one has ended."""
    other = new_chain(tmp_path / "other")
    with machine(own, chain) as qemu, machine(own, other, f"{own.vm}-other") as second:
        first = crawling(own)
        waiting = own.started(f"{own.vm}-other", **ACTIVE, on_ready="pivot")
        assert waiting["state"] == "queued"
        end(own, how)
        again(own)
        own.wait_for_domain(f"{own.vm}-other")
        assert own.job(waiting["id"])["state"] == "queued"
        assert own.job(first["id"])["state"] == "running"
        assert second.qmp("query-jobs") == []
        assert hurry(own, first)["state"] == "completed"
        done = own.wait_for_job(waiting["id"])
        assert (done["state"], types(own, waiting)) == ("completed", WHOLE)
        assert done["started_at"] >= own.job(first["id"])["finished_at"]
        assert_content(qemu, chain.active, chain.view)
        assert_content(second, other.images[0], other.view)


def test_a_queued_job_whose_chain_has_changed(own: Own, chain: Chain, new_chain: NewChain, tmp_path: Path) -> None:
    """A job that waited over a restart is not started on another chain than the one it was accepted for."""
    other = new_chain(tmp_path / "other")
    with machine(own, chain) as qemu, machine(own, other, f"{own.vm}-other") as second:
        first = crawling(own)
        waiting = own.started(f"{own.vm}-other", **ACTIVE, on_ready="pivot")
        own.kill()
        snapshot = {"snapshot_file": str(tmp_path / "new.qcow2"), "snapshot_node_name": "n5", "format": "qcow2"}
        second.qmp("blockdev-snapshot-sync", node_name="n4", **snapshot)
        again(own)
        own.wait_for_domain(f"{own.vm}-other")
        assert hurry(own, first)["state"] == "completed"
        failed = own.wait_for_job(waiting["id"])
        assert (failed["state"], failed["error"]["code"], failed["data_state"]) == (
            "failed",
            "chain-changed",
            "untouched",
        )
        assert types(own, waiting) == ["job.queued", "job.failed"]
        assert second.qmp("query-jobs") == []
        assert_content(qemu, chain.active, chain.view)


def test_a_queued_job_whose_qemu_has_ended(own: Own, chain: Chain, new_chain: NewChain, tmp_path: Path) -> None:
    """A job that waits ends with its QEMU, also if nobody was there to see it."""
    other = new_chain(tmp_path / "other")
    with machine(own, chain), machine(own, other, f"{own.vm}-other") as second:
        first = crawling(own)
        waiting = own.started(f"{own.vm}-other", **ACTIVE)
        assert waiting["state"] == "queued"
        own.kill()
        second.kill()
        again(own)
        failed = own.wait_for_job(waiting["id"])
        assert (failed["state"], failed["error"]["code"]) == ("failed", "domain-gone")
        assert (failed["data_state"], types(own, waiting)) == ("untouched", ["job.queued", "job.failed"])
        assert hurry(own, first)["state"] == "completed"


def test_a_paused_job_stays_paused(own: Own, chain: Chain) -> None:
    """A job that somebody paused is found paused, with its speed, and goes on when it is resumed."""
    with machine(own, chain) as qemu:
        job = crawling(own)
        assert own.client.post(f"/jobs/{job['id']}/pause").status_code == 202
        own.wait_for_job(job["id"], "paused")
        own.kill()
        assert status(qemu, job) == "paused"
        again(own)
        found = own.job(job["id"])
        assert (found["state"], found["pause_reason"], found["bandwidth"]) == ("paused", "user", 4096)
        assert status(qemu, job) == "paused"
        assert own.client.post(f"/jobs/{job['id']}/resume").status_code == 202
        own.wait_for_job(job["id"], "running")
        assert hurry(own, job)["state"] == "completed"
        expected = ["job.queued", "job.started", "job.paused", "job.resumed", "job.completed"]
        assert types(own, job) == expected
        assert_content(qemu, chain.active, chain.view)


def test_a_wish_outlives_the_service(own: Own, chain: Chain) -> None:
    """A pivot, or an abort, that was taken just before the service is killed is carried out once it is back."""
    with machine(own, chain) as qemu:
        for wish in ("abort", "pivot"):
            job = ready(own)
            if wish == "pivot":
                assert own.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
            else:
                assert own.client.delete(f"/jobs/{job['id']}").status_code == 202
            own.kill()
            again(own)
            ended = own.wait_for_job(job["id"])
            assert ended["state"] == ("completed" if wish == "pivot" else "canceled")
            assert files(own) == ([chain.at(4)] if wish == "pivot" else chain.files)
            assert qemu.qmp("query-jobs") == []
        assert_content(qemu, chain.images[0], chain.view)


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03])
def test_killed_while_a_request_is_answered(own: Own, chain: Chain, delay: float) -> None:
    """Whenever the service dies, QEMU has no job that the journal does not know, and each has one true outcome."""
    with machine(own, chain) as qemu:

        def ask() -> None:
            with suppress(httpx.TransportError):
                own.commit(own.vm, top="vda[1]", base="vda[2]")

        asking = threading.Thread(target=ask)
        asking.start()
        # No state to wait for: the moments are to lie anywhere in the request.
        time.sleep(delay)
        own.kill()
        asking.join()
        in_qemu = {found["id"] for found in qemu.qmp("query-jobs")}
        again(own)
        jobs = own.client.get("/jobs", params={"domain": own.vm}).json()["items"]
        assert in_qemu <= {job["id"] for job in jobs}
        assert len(jobs) <= 1
        merged = [own.wait_for_job(job["id"])["state"] for job in jobs].count("completed")
        assert len(files(own)) == 5 - merged
        assert qemu.qmp("query-jobs") == []
        for job in jobs:
            assert own.job(job["id"])["state"] in ("completed", "failed")
            ending = types(own, job)
            assert ending.count("job.completed") + ending.count("job.failed") == 1
        job = own.wait_for_job(own.started(own.vm, **ACTIVE, on_ready="pivot")["id"])
        assert job["state"] == "completed"
        assert_content(qemu, chain.images[0], chain.view)


def test_many_restarts_during_one_job(own: Own, chain: Chain) -> None:
    """However often the service dies during a job, it is one job, told once."""
    with machine(own, chain) as qemu:
        job = crawling(own)
        for how in ("kill", "stop", "kill"):
            end(own, how)
            own.start()
        assert [found["id"] for found in qemu.qmp("query-jobs")] == [job["id"]]
        own.wait_for_domain(own.vm)
        assert hurry(own, job)["state"] == "completed"
        assert types(own, job) == ["job.queued", "job.started", "job.completed"]
        assert_content(qemu, chain.active, chain.view)


# What happens meanwhile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [True, False], ids=["by-another", "waiting"])
def test_completed_meanwhile(own: Own, chain: Chain, *, ended: bool) -> None:
    """A job that ends while the service is away, or has only its end to come, is settled when it is back."""
    with machine(own, chain) as qemu:
        job = crawling(own, flags=["bandwidth_bytes", "delete"])
        own.kill()
        if ended:
            qemu.conclude(job["id"])
        else:
            qemu.qmp("block-job-set-speed", device=job["id"], speed=0)
            until(lambda: status(qemu, job) == "pending")
            assert header_backing(chain.active) == "l3.qcow2"
        assert all(image.exists() for image in chain.images)
        again(own)
        done = own.wait_for_job(job["id"])
        assert (done["state"], done["error"]) == ("completed", None)
        assert sorted(done["result"]["deleted"]) == sorted(chain.files[1:4])
        assert [image.exists() for image in chain.images] == [True, False, False, False, True]
        assert files(own) == [chain.at(0), chain.at(4)]
        assert qemu.qmp("query-jobs") == []
        assert_content(qemu, chain.active, chain.view)


@pytest.mark.parametrize(
    ("command", "arguments", "state", "away"),
    [
        ("job-complete", {}, "completed", False),
        ("job-complete", {}, "completed", True),
        ("block-job-complete", {}, "completed", False),
        ("block-job-cancel", {}, "canceled", False),
        ("block-job-cancel", {}, "canceled", True),
        ("block-job-cancel", {"force": True}, "canceled", False),
        ("job-cancel", {}, "canceled", False),
        ("job-cancel", {}, "canceled", True),
    ],
)
def test_another_client_ends_a_ready_job(
    own: Own, chain: Chain, *, command: str, arguments: JSON, state: str, away: bool
) -> None:
    """A job that another client ends has the outcome that the client has caused, seen or unseen."""
    with machine(own, chain) as qemu:
        job = ready(own)
        view = write_guest(qemu, chain.view, 0x77, MIB, CLUSTER)
        if away:
            own.kill()
        key = "id" if command.startswith("job-") else "device"
        qemu.qmp(command, **{key: job["id"]}, **arguments)
        if away:
            until(lambda: status(qemu, job) == "concluded")
            again(own)
        ended = own.wait_for_job(job["id"])
        assert (ended["state"], ended["data_state"]) == (state, "merged" if state == "completed" else "base-modified")
        assert files(own) == ([chain.at(4)] if state == "completed" else chain.files)
        until(lambda: qemu.qmp("query-jobs") == [])
        assert_content(qemu, chain.images[0] if state == "completed" else chain.active, view)


@pytest.mark.parametrize("away", [True, False], ids=["away", "there"])
@pytest.mark.parametrize("kind", ["intermediate", "active"])
def test_another_client_dismisses_a_completed_job(own: Own, chain: Chain, kind: str, *, away: bool) -> None:
    """Where another client has QEMU forget a job that has merged, its header proves it; without one nobody knows."""
    with machine(own, chain) as qemu:
        job = crawling(own) if kind == "intermediate" else ready(own)
        if away:
            own.kill()
        if kind == "active":
            qemu.qmp("job-complete", id=job["id"])
        elif away:
            qemu.conclude(job["id"])
        else:
            qemu.qmp("block-job-set-speed", device=job["id"], speed=0)

        def dismissed() -> bool:
            with suppress(QmpError):
                qemu.qmp("job-dismiss", id=job["id"])
            return status(qemu, job) is None

        until(dismissed)
        if away:
            again(own)
        done = own.wait_for_job(job["id"])
        if away and kind == "active":
            assert (done["state"], done["error"]["code"]) == ("lost", "outcome-unknown")
        else:
            assert (done["state"], done["error"], done["data_state"]) == ("completed", None, "merged")
        assert files(own) == ([chain.at(0), chain.at(4)] if kind == "intermediate" else [chain.at(4)])
        assert_content(qemu, files(own)[0], chain.view)


# QEMU ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [True, False], ids=["away", "there"])
@pytest.mark.parametrize("kind", ["running", "ready"])
def test_qemu_is_killed(own: Own, chain: Chain, kind: str, *, away: bool) -> None:
    """A job whose QEMU is killed has failed, no byte of the guest's is lost, and the same merge then works."""
    opened = blockdev if away else drive_with_id
    with machine(own, chain, opened=opened) as qemu:
        job = crawling(own) if kind == "running" else ready(own)
        view = write_guest(qemu, chain.view, 0x99, 2 * MIB, 2 * CLUSTER)
        # What a guest has not flushed may be lost with its machine, also without a job.
        flush = 'qemu-io -d /machine/peripheral/virtio0/virtio-backend "flush"'
        assert not qemu.qmp("human-monitor-command", command_line=flush)
        if away:
            own.kill()
        qemu.kill()
        if away:
            own.start()
        failed = own.wait_for_job(job["id"])
        # Nobody has heard it to its end then: another client may have had it pivot.
        unknown = away and kind == "ready"
        expected = ("lost", "outcome-unknown") if unknown else ("failed", "domain-gone")
        assert (failed["state"], failed["error"]["code"]) == expected
        assert (failed["data_state"], failed["result"]["chain"]) == ("base-modified", chain.files)
        assert types(own, job)[-1] == f"job.{expected[0]}"
    assert_same(read_image(chain.active), view)
    rerun(own, chain, view, opened)


def test_qemu_is_killed_after_the_merge(own: Own, chain: Chain) -> None:
    """Where the header above the merged layers proves the merge, the job has completed although QEMU is gone.

    The merged images stay: QEMU can't be asked any more whether all of them is in the base on the disk.
    """
    with machine(own, chain) as qemu:
        job = crawling(own, flags=["bandwidth_bytes", "delete"])
        own.kill()
        qemu.conclude(job["id"])
        qemu.kill()
        own.start()
        done = own.wait_for_job(job["id"])
        assert (done["state"], done["error"]) == ("completed", None)
        assert done["result"]["chain"] == [chain.at(0), chain.at(4)]
        assert [left["file"] for left in done["result"]["not_deleted"]] == chain.files[1:4]
        assert all(image.exists() for image in chain.images)
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize("away", [True, False], ids=["away", "there"])
def test_qemu_is_killed_before_the_header_is_changed(own: Own, chain: Chain, *, away: bool) -> None:
    """A merge below the active layer does not take effect before its data is on the disk, whenever QEMU is killed."""
    with machine(own, chain) as qemu:
        job = crawling(own)
        if away:
            own.kill()
            qemu.qmp("block-job-set-speed", device=job["id"], speed=0)
            until(lambda: status(qemu, job) == "pending")
            qemu.kill()
            own.start()
        else:
            assert own.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
            until(lambda: header_backing(chain.active) == "l0.qcow2", pause=0)
            qemu.kill()
        ended = own.wait_for_job(job["id"])
        assert ended["state"] == ("failed" if away else "completed")
        assert ended["result"]["chain"] == (chain.files if away else [chain.at(0), chain.at(4)])
    assert_same(read_image(chain.active), chain.view)


def with_writable_base(chain: Chain) -> list[str]:
    """As `blockdev`, with the layer 1 left writable, as QEMU 7.2 leaves a base into which a merge was aborted."""
    return [
        argument.replace('"read-only": true', '"read-only": false') if '"node-name": "n1"' in argument else argument
        for argument in blockdev(chain)
    ]


@pytest.mark.parametrize("flags", [[], ["delete"]], ids=["kept", "deleted"])
def test_qemu_is_killed_after_a_merge_into_a_writable_base(own: Own, chain: Chain, flags: list[str]) -> None:
    """What is completed is on the disk, also where QEMU does not flush the base by itself at a job's end."""
    with machine(own, chain, opened=with_writable_base) as qemu:
        done = own.wait_for_job(own.started(own.vm, top="vda[1]", base="vda[3]", flags=flags)["id"])
        qemu.kill()
        assert (done["state"], len(done["result"]["deleted"])) == ("completed", 2 if flags else 0)
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize("kind", ["running", "ready"])
def test_qemu_quits(own: Own, chain: Chain, kind: str) -> None:
    """A QEMU that is told to quit cancels its jobs itself, and so it is told."""
    with machine(own, chain) as qemu:
        job = crawling(own) if kind == "running" else ready(own)
        view = write_guest(qemu, chain.view, 0x11, 3 * MIB, CLUSTER)
        qemu.quit()
        ended = own.wait_for_job(job["id"])
        assert (ended["state"], ended["result"]["chain"]) == ("canceled", chain.files)
        assert types(own, job)[-1] == "job.canceled"
    assert_same(read_image(chain.active), view)
    rerun(own, chain, view)


def test_qemu_quits_while_the_service_is_away(own: Own, chain: Chain) -> None:
    """Nobody has heard QEMU's last words then: the chain is unchanged, and the job has failed with its domain."""
    with machine(own, chain) as qemu:
        job = crawling(own)
        own.stop()
        qemu.quit()
        own.start()
        failed = own.wait_for_job(job["id"])
        assert (failed["state"], failed["error"]["code"]) == ("failed", "domain-gone")
    assert_same(read_image(chain.active), chain.view)
    rerun(own, chain, chain.view)


@pytest.mark.parametrize("away", [True, False], ids=["away", "there"])
def test_another_qemu_in_its_place(own: Own, chain: Chain, *, away: bool) -> None:
    """A QEMU that has come in the place of the one with the job is not taken for it."""
    with machine(own, chain) as qemu:
        job = ready(own)
        if away:
            own.kill()
        qemu.kill()
        with Qemu(own.qmp_dir / f"{own.vm}.qmp", blockdev(chain)) as other:
            if away:
                own.start()
            failed = own.wait_for_job(job["id"])
            expected = ("lost", "outcome-unknown") if away else ("failed", "domain-gone")
            assert (failed["state"], failed["error"]["code"]) == expected
            until(lambda: own.wait_for_domain(own.vm)["qemu"]["pid"] == other.pid)
            assert other.qmp("query-jobs") == []
            assert files(own) == chain.files
            assert [layer["valid"] for layer in own.disk(own.vm)["chain"]] == [True, False, False, False, True]
            done = own.wait_for_job(own.started(own.vm, **ACTIVE, on_ready="pivot")["id"])
            assert done["state"] == "completed"
            assert_content(other, chain.images[0], chain.view)


def test_all_that_was_is_remembered(own: Own, chain: Chain) -> None:
    """Ended jobs of every kind, their errors and their histories are the same before and after restarts."""
    with machine(own, chain) as qemu:
        ended = [own.wait_for_job(own.started(own.vm, top="vda[3]")["id"])]
        canceled = ready(own)
        assert own.client.delete(f"/jobs/{canceled['id']}").status_code == 202
        ended.append(own.wait_for_job(canceled["id"]))
        gone = ready(own)
        qemu.kill()
        ended.append(own.wait_for_job(gone["id"]))
        assert [job["state"] for job in ended] == ["completed", "canceled", "failed"]
        told = [own.history(job["id"]) for job in ended]
        for how in ("kill", "stop"):
            end(own, how)
            own.start()
            assert own.client.get("/jobs", params={"domain": own.vm}).json()["items"] == ended[::-1]
            assert [own.job(job["id"]) for job in ended] == ended
            assert [own.history(job["id"]) for job in ended] == told
        assert all(job["state"] in ENDED for job in ended)
