"""The service is killed, QEMU is killed, or QEMU hangs in the middle of a job: what is told afterwards is true."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, build_chain, drive, read_image
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

SLOW = 1 * MIB
"""Bytes a second: a job of this file takes many seconds at this speed, so that it is caught in the middle."""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Service]:
    """A service that the test may kill."""
    with Service(tmp_path / "service") as service:
        yield service


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """A chain with enough data to be caught at work."""
    return build_chain(tmp_path / "images", size=16 * MIB, data=128 * CLUSTER)


def slow(service: Service, **body: Any) -> JSON:
    """A job that is under way and far from its end."""
    job = service.started("web1", bandwidth=SLOW, flags=["bandwidth_bytes"], **body)
    deadline = time.monotonic() + 20
    while service.job(job["id"])["progress"]["current"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return job


def hurry(service: Service, job: JSON) -> JSON:
    """Lift the job's speed limit, and wait for its end."""
    assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    return service.wait_for_job(job["id"])


def types(service: Service, job: JSON) -> list[str]:
    """The job's stored events; their ids rise."""
    history = service.history(job["id"])
    ids = [int(event["id"]) for event in history]
    assert ids == sorted(set(ids))
    return [event["type"] for event in history]


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("opened", [drive, blockdev])
def test_a_running_job_goes_on_over_a_restart(
    own: Service, chain: Chain, opened: Callable[[Chain], list[str]], how: str
) -> None:
    """A job outlives the service, is one and the same afterwards, and all data is right."""
    with Qemu(own.qmp_dir / "web1.qmp", opened(chain)) as qemu:
        own.wait_for_domain("web1")
        job = slow(own, top=chain.at(1), base=chain.at(4))
        assert own.kill() is None if how == "kill" else own.stop() == 0
        own.start()
        own.wait_for_domain("web1")
        assert own.job(job["id"])["state"] == "running"
        assert [entry["id"] for entry in qemu.qmp("query-jobs")] == [job["id"]]
        assert own.commit("web1", flags=["active"]).json()["job"] == job["id"]
        assert hurry(own, job)["state"] == "completed"
        assert types(own, job) == ["job.queued", "job.started", "job.completed"]
        assert [layer["file"] for layer in own.disk("web1")["chain"]] == [chain.at(0), chain.at(4)]
        assert qemu.qmp("query-jobs") == []
        qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_a_ready_job_is_pivoted_after_a_restart(own: Service, chain: Chain) -> None:
    """A job that waits for its pivot still waits after a kill, and takes it."""
    with Qemu(own.qmp_dir / "web1.qmp", blockdev(chain)) as qemu:
        own.wait_for_domain("web1")
        job = own.started("web1", flags=["active"])
        own.wait_for_job(job["id"], "ready")
        own.kill()
        own.start()
        own.wait_for_domain("web1")
        assert own.job(job["id"])["state"] == "ready"
        assert own.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
        assert own.wait_for_job(job["id"])["state"] == "completed"
        assert types(own, job) == ["job.queued", "job.started", "job.ready", "job.pivoting", "job.completed"]
        qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


@pytest.mark.parametrize("ending", ["completed", "canceled", "pivoted"])
def test_a_job_that_ended_while_the_service_was_away(own: Service, chain: Chain, ending: str) -> None:
    """What became of a job meanwhile is read from QEMU and the chain, not guessed."""
    with Qemu(own.qmp_dir / "web1.qmp", blockdev(chain)) as qemu:
        own.wait_for_domain("web1")
        if ending == "pivoted":
            job = own.started("web1", flags=["active"])
            own.wait_for_job(job["id"], "ready")
        else:
            job = slow(own, top=chain.at(1), base=chain.at(4))
        own.kill()
        if ending == "pivoted":
            qemu.qmp("job-complete", id=job["id"])
        elif ending == "canceled":
            qemu.qmp("job-cancel", id=job["id"])
        else:
            qemu.qmp("block-job-set-speed", device=job["id"], speed=0)
        deadline = time.monotonic() + 20
        while [entry["status"] for entry in qemu.qmp("query-jobs")] != ["concluded"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        own.start()
        assert own.wait_for_job(job["id"])["state"] == ("canceled" if ending == "canceled" else "completed")
        assert types(own, job)[-1] == f"job.{'canceled' if ending == 'canceled' else 'completed'}"
        own.wait_for_domain("web1")
        assert qemu.qmp("query-jobs") == []
        # The next job just works.
        top = own.disk("web1")["chain"][0]["file"]
        if len(own.disk("web1")["chain"]) > 1:
            again = own.started("web1", flags=["active"], on_ready="pivot")
            assert own.wait_for_job(again["id"])["state"] == "completed"
            top = own.disk("web1")["chain"][0]["file"]
        qemu.quit()
    assert_same(read_image(top), chain.view)


@pytest.mark.parametrize("away", [False, True])
def test_qemu_is_killed(own: Service, chain: Chain, *, away: bool) -> None:
    """A job whose QEMU is killed has failed, the guest's data is as it was, and a rerun just works."""
    with Qemu(own.qmp_dir / "web1.qmp", blockdev(chain)) as qemu:
        own.wait_for_domain("web1")
        job = slow(own, top=chain.at(1), base=chain.at(4))
        if away:
            own.kill()
        qemu.kill()
        if away:
            own.start()
        ended = own.wait_for_job(job["id"])
        assert (ended["state"], ended["error"]["code"]) == ("failed", "domain-gone")
        assert ended["data_state"] == "base-modified"
        assert own.client.get("/domains/web1").json()["state"] == "unreachable"
    assert_same(read_image(chain.active), chain.view)
    with Qemu(own.qmp_dir / "web1.qmp", blockdev(chain)) as qemu:
        own.wait_for_domain("web1")
        assert [layer["valid"] for layer in own.disk("web1")["chain"]] == [True, False, False, False, True]
        again = own.started("web1", top=chain.at(1), base=chain.at(4))
        assert own.wait_for_job(again["id"])["state"] == "completed"
        assert [layer["valid"] for layer in own.disk("web1")["chain"]] == [True, True]
        qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_qemu_is_shut_down(own: Service, chain: Chain) -> None:
    """QEMU cancels its jobs when it is told to quit, and so they are told to have been canceled."""
    with Qemu(own.qmp_dir / "web1.qmp", drive(chain)) as qemu:
        own.wait_for_domain("web1")
        job = slow(own, top=chain.at(1), base=chain.at(4))
        qemu.quit()
        assert own.wait_for_job(job["id"])["state"] == "canceled"
    assert_same(read_image(chain.active), chain.view)


def test_another_client_takes_the_job_away(own: Service, chain: Chain) -> None:
    """A job that another client cancels and dismisses while the service is away has not merged, and says so."""
    with Qemu(own.qmp_dir / "web1.qmp", drive(chain)) as qemu:
        own.wait_for_domain("web1")
        job = slow(own, top=chain.at(1), base=chain.at(4))
        own.kill()
        qemu.qmp("job-cancel", id=job["id"])
        deadline = time.monotonic() + 20
        while [entry["status"] for entry in qemu.qmp("query-jobs")] != ["concluded"]:
            assert time.monotonic() < deadline
        qemu.qmp("job-dismiss", id=job["id"])
        own.start()
        ended = own.wait_for_job(job["id"])
        assert (ended["state"], ended["error"]["code"]) == ("failed", "job-vanished")


def test_a_hung_qemu_delays_nobody_else(own: Service, chain: Chain, tmp_path: Path) -> None:
    """A QEMU that does not answer is shown as unreachable within 15 s, while another domain's merge just runs."""
    other = build_chain(tmp_path / "other")
    with (
        Qemu(own.qmp_dir / "web1.qmp", drive(chain)) as hung,
        Qemu(own.qmp_dir / "web2.qmp", drive(other)) as lively,
    ):
        own.wait_for_domain("web1")
        own.wait_for_domain("web2")
        job = slow(own, top=chain.at(1), base=chain.at(4))
        hung.pause()
        begin = time.monotonic()
        for position in (3, 2, 1):
            merged = own.started("web2", top=other.at(position), flags=["shallow"])
            assert own.wait_for_job(merged["id"], seconds=5)["state"] == "completed"
        assert own.client.get("/domains").status_code == 200
        assert time.monotonic() - begin < 5
        own.wait_for_domain("web1", "unreachable", seconds=15 - (time.monotonic() - begin))
        refused = own.commit("web1", top=chain.at(1))
        assert (refused.status_code, refused.json()["code"]) == (503, "monitor-unreachable")
        assert own.job(job["id"])["state"] == "running"
        hung.wake()
        own.wait_for_domain("web1")
        assert hurry(own, job)["state"] == "completed"
        hung.quit()
        lively.quit()
    assert_same(read_image(chain.active), chain.view)
    assert_same(read_image(other.active), other.view)


def test_registrations_and_history_are_kept(own: Service, chain: Chain, tmp_path: Path) -> None:
    """Registered domains, ended jobs and their events are there after a restart; the ids of events go on rising."""
    with Qemu(tmp_path / "elsewhere.qmp", drive(chain)) as qemu:
        put = own.client.put("/domains/web1", json={"qmp": {"unix": str(qemu.monitor)}})
        assert put.status_code == 201
        job = own.started("web1", top=chain.at(1))
        before = own.wait_for_job(job["id"])
        told = own.history(job["id"])
        own.kill()
        own.start()
        own.wait_for_domain("web1")
        assert own.job(job["id"]) == before
        assert own.history(job["id"]) == told
        again = own.started("web1", flags=["active"], on_ready="pivot")
        assert own.wait_for_job(again["id"])["state"] == "completed"
        assert int(own.history(again["id"])[0]["id"]) > int(told[-1]["id"])
        listed = own.client.get("/jobs").json()["items"]
        assert [entry["id"] for entry in listed] == [again["id"], job["id"]]


def test_a_second_service_on_the_same_state_refuses_to_start(own: Service) -> None:
    """Two services must not work on one journal; the second says why it does not start."""
    environ = own.settings | {"BLOCKJOBD_STATE_DIR": str(own.state_dir), "BLOCKJOBD_LISTEN": "127.0.0.1:0"}
    second = subprocess.run(
        [sys.executable, "-m", "app.cli.main", "serve"], env=environ, capture_output=True, text=True, check=False
    )
    assert second.returncode != 0
    assert str(own.state_dir) in second.stderr
    assert "Traceback" not in second.stderr
