"""Jobs that run, and what can be done to them meanwhile: abort, pivot, pause, resume, another speed, waiting.

Where a test needs to see a job at work, it is slow, and ended by an abort or by taking its limit away.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.live.conftest import Boot
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    assert_same,
    blockdev,
    build_chain,
    drive_with_id,
    read_image,
    slow_down,
    write_guest,
)
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4, size=8 * MIB, data=96 * CLUSTER)]

SLOW: JSON = {"bandwidth": CLUSTER, "flags": ["bandwidth_bytes"], "top": "vda[1]"}
"""A merge below the active layer at 64 KiB/s, of which some MiB are to be done."""

SLOW_ACTIVE: JSON = {"bandwidth": CLUSTER, "flags": ["bandwidth_bytes", "active"]}


@pytest.fixture
def qemu(boot: Boot, chain: Chain) -> Qemu:
    """The QEMU of the test's `domain` with `chain`, nodes n0 to n3."""
    return boot(blockdev(chain))


def abort(service: Service, job: JSON, *, force: bool = False) -> httpx.Response:
    return service.client.delete(f"/jobs/{job['id']}", params={"force": "true"} if force else {})


def post(service: Service, job: JSON, verb: str) -> httpx.Response:
    return service.client.post(f"/jobs/{job['id']}/{verb}")


def set_speed(service: Service, job: JSON, bandwidth: int, *flags: str) -> httpx.Response:
    return service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": bandwidth, "flags": list(flags)})


def refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def types(service: Service, job: JSON) -> list[str]:
    return [event["type"] for event in service.history(job["id"])]


def until_moving(service: Service, job: JSON) -> JSON:
    """The job, once it runs and has copied something."""
    deadline = time.monotonic() + 10
    while (seen := service.wait_for_job(job["id"], "running"))["progress"]["current"] == 0:
        assert time.monotonic() < deadline, seen
        time.sleep(0.02)
    return seen


def valid(service: Service, domain: str) -> list[bool]:
    return [layer["valid"] for layer in service.disk(domain)["chain"]]


def files(service: Service, domain: str) -> list[str]:
    return [layer["file"] for layer in service.disk(domain)["chain"]]


# Abort ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("body", [SLOW, SLOW_ACTIVE], ids=["intermediate", "active"])
@pytest.mark.parametrize("opened", ["drive", "blockdev"])
def test_abort_while_running(
    service: Service, boot: Boot, domain: str, chain: Chain, *, opened: str, body: JSON, force: bool
) -> None:
    """An aborted merge leaves chain and guest as they were, and layers in between invalid; a new merge mends that."""
    qemu = boot(blockdev(chain) if opened == "blockdev" else drive_with_id(chain))
    digest = service.disk(domain)["digest"]
    job = service.started(domain, **body)
    running = until_moving(service, job)
    assert running["data_state"] == "base-modified"
    view = write_guest(qemu, chain.view, 0x21, 3 * MIB, CLUSTER)

    answer = abort(service, job, force=force)

    assert answer.status_code == 202
    assert answer.json()["state"] in ("aborting", "concluding", "canceled")
    done = service.wait_for_job(job["id"])
    assert (done["state"], done["error"], done["data_state"]) == ("canceled", None, "base-modified")
    assert done["progress"]["percent"] < 100
    assert (done["progress"]["rate"], done["progress"]["eta"], done["actions"]) == (0, None, [])
    assert done["result"]["chain"] == chain.files
    assert done["result"]["invalidated"] == done["result"]["deleted"] == []
    assert types(service, job) == ["job.queued", "job.started", "job.aborting", "job.canceled"]
    assert files(service, domain) == chain.files
    assert service.disk(domain)["digest"] == digest
    assert qemu.qmp("query-jobs") == []
    assert valid(service, domain) == [True, False, False, True]

    again = service.started(domain, flags=["active"], on_ready="pivot")
    assert service.wait_for_job(again["id"])["state"] == "completed"
    assert valid(service, domain) == [True]
    qemu.quit()
    assert_same(read_image(chain.images[0]), view)


def test_abort_of_an_intermediate_merge_and_the_same_again(
    service: Service, domain: str, qemu: Qemu, chain: Chain
) -> None:
    """The same merge, asked for again after an abort, completes, and all layers are valid then."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    assert abort(service, job).status_code == 202
    service.wait_for_job(job["id"], "canceled")
    again = service.started(domain, top="vda[1]")
    service.wait_for_job(again["id"], "completed")
    assert valid(service, domain) == [True, True]
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def test_the_guest_is_right_after_an_abort(service: Service, domain: str, qemu: Qemu, chain: Chain) -> None:
    """After an abort in the middle the active layer still shows all that the guest saw and wrote."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    view = write_guest(qemu, chain.view, 0x22, MIB, 3 * CLUSTER)
    abort(service, job)
    service.wait_for_job(job["id"], "canceled")
    view = write_guest(qemu, view, 0x23, 2 * MIB, CLUSTER)
    qemu.quit()
    assert_same(read_image(chain.active), view)


@pytest.mark.parametrize("force", [False, True])
def test_abort_when_ready(service: Service, domain: str, qemu: Qemu, chain: Chain, *, force: bool) -> None:
    """Aborted when ready, the overlay stays active; without force the base is a copy as of that moment."""
    job = service.started(domain, flags=["active"])
    service.wait_for_job(job["id"], "ready")
    view = write_guest(qemu, chain.view, 0x24, MIB, 2 * CLUSTER)
    assert abort(service, job, force=force).status_code == 202
    done = service.wait_for_job(job["id"])
    assert (done["state"], done["data_state"], done["error"]) == ("canceled", "base-modified", None)
    assert done["result"]["chain"] == chain.files
    assert files(service, domain) == chain.files
    assert valid(service, domain) == [True, False, False, True]
    assert types(service, job) == ["job.queued", "job.started", "job.ready", "job.aborting", "job.canceled"]
    after = write_guest(qemu, view, 0x25, 0, CLUSTER)
    qemu.quit()
    assert_same(read_image(chain.active), after)
    if not force:
        assert_same(read_image(chain.images[0]), view)


def test_abort_by_another_client(service: Service, domain: str, qemu: Qemu, chain: Chain) -> None:
    """A job that another client of QEMU cancels is canceled here as well."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    qemu.qmp("block-job-cancel", device=job["id"])
    done = service.wait_for_job(job["id"])
    assert (done["state"], done["error"]) == ("canceled", None)
    assert files(service, domain) == chain.files
    assert qemu.qmp("query-jobs") == []


def test_abort_again(service: Service, domain: str, qemu: Qemu) -> None:
    """Aborting or canceled already, an abort is answered with 200 and the job."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    answers = [abort(service, job) for _ in range(3)]
    service.wait_for_job(job["id"], "canceled")
    answers += [abort(service, job), abort(service, job, force=True)]
    assert [answer.status_code for answer in answers] == [202, 200, 200, 200, 200]
    assert {answer.json()["id"] for answer in answers} == {job["id"]}
    assert answers[-1].json()["state"] == "canceled"
    assert types(service, job).count("job.aborting") == 1
    assert qemu.qmp("query-jobs") == []


@pytest.mark.parametrize("force", [False, True])
def test_abort_of_a_completed_job(service: Service, domain: str, qemu: Qemu, *, force: bool) -> None:
    """A job that has completed can't be aborted any more."""
    job = service.started(domain, top="vda[1]")
    service.wait_for_job(job["id"], "completed")
    refused(abort(service, job, force=force), 409, "job-finished")
    assert service.job(job["id"])["state"] == "completed"
    assert len(service.disk(domain)["chain"]) == 2
    assert qemu.qmp("query-jobs") == []


@pytest.mark.parametrize("verb", ["DELETE", "pivot", "pause", "resume", "PATCH", "GET"])
def test_a_job_that_nobody_knows(service: Service, *, verb: str) -> None:
    """Whatever is asked of a job that does not exist is answered with 404."""
    job = {"id": "bj-none"}
    answers = {
        "DELETE": lambda: abort(service, job),
        "PATCH": lambda: set_speed(service, job, 1),
        "GET": lambda: service.client.get("/jobs/bj-none"),
    }
    refused(answers.get(verb, lambda: post(service, job, verb))(), 404, "job-not-found")


# Pivot ---------------------------------------------------------------------------------------------------------------


def test_pivot_before_ready(service: Service, domain: str, qemu: Qemu, chain: Chain) -> None:
    """A pivot is taken once the job is ready, not before; what came too early does no harm."""
    job = service.started(domain, **SLOW_ACTIVE)
    until_moving(service, job)
    refused(post(service, job, "pivot"), 409, "job-not-ready")
    assert set_speed(service, job, 0).status_code == 200
    service.wait_for_job(job["id"], "ready")
    assert post(service, job, "pivot").status_code == 202
    service.wait_for_job(job["id"], "completed")
    refused(post(service, job, "pivot"), 409, "job-finished")
    qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


def test_pivot_of_an_intermediate_merge(service: Service, domain: str, qemu: Qemu) -> None:
    """A merge below the active layer has no pivot."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    refused(post(service, job, "pivot"), 409, "job-not-pivotable")
    abort(service, job)
    service.wait_for_job(job["id"], "canceled")
    refused(post(service, job, "pivot"), 409, "job-finished")
    assert qemu.qmp("query-jobs") == []


def test_pivot_of_a_job_that_keeps_the_overlay(service: Service, domain: str, qemu: Qemu) -> None:
    """A job with `on_ready: keep` ends by itself, and has no pivot."""
    job = service.started(domain, on_ready="keep", **SLOW_ACTIVE)
    assert "pivot" not in until_moving(service, job)["actions"]
    refused(post(service, job, "pivot"), 409, "job-not-pivotable")
    set_speed(service, job, 0)
    assert service.wait_for_job(job["id"], "completed")["actions"] == []
    assert qemu.qmp("query-jobs") == []


def test_pivot_in_the_name_of_another_client(service: Service, domain: str, qemu: Qemu, chain: Chain) -> None:
    """A ready job that another client of QEMU completes is completed here, and its chain is the merged one."""
    job = service.started(domain, flags=["active"])
    service.wait_for_job(job["id"], "ready")
    qemu.qmp("job-complete", id=job["id"])
    done = service.wait_for_job(job["id"])
    assert (done["state"], done["result"]["chain"]) == ("completed", [str(chain.images[0])])
    assert files(service, domain) == [str(chain.images[0])]
    assert qemu.qmp("query-jobs") == []


@pytest.fixture
def unfinished(service: Service, boot: Boot, domain: str, chain: Chain) -> tuple[Qemu, JSON, bytes]:
    """A ready job that can't end in order for some seconds, as the guest has written, with what the guest sees.

    QEMU heeds no job's speed once it is ready, so that the base itself is made slow.
    """
    qemu = boot(blockdev(chain, slow_base=True))
    job = service.started(domain, flags=["active"])
    service.wait_for_job(job["id"], "ready")
    slow_down(qemu, 4 * MIB)
    view = chain.view
    for at in (1, 3, 5, 7):
        view = write_guest(qemu, view, 0x50 + at, at * MIB, MIB)
    return qemu, job, view


def test_abort_while_pivoting(
    service: Service, domain: str, chain: Chain, unfinished: tuple[Qemu, JSON, bytes]
) -> None:
    """A pivot under way can't be aborted or paused; asked for again it is the same one."""
    qemu, job, view = unfinished
    answer = post(service, job, "pivot")
    assert (answer.status_code, answer.json()["state"], answer.json()["actions"]) == (202, "pivoting", [])
    assert files(service, domain) == chain.files
    for force in (False, True):
        refused(abort(service, job, force=force), 409, "job-pivoting")
    refused(post(service, job, "pause"), 409, "job-not-pausable")
    refused(post(service, job, "resume"), 409, "job-not-paused")
    assert post(service, job, "pivot").json()["state"] == "pivoting"
    service.wait_for_job(job["id"], "completed")
    assert types(service, job).count("job.pivoting") == 1
    qemu.quit()
    assert_same(read_image(chain.images[0]), view)


def test_force_while_aborting(
    service: Service, domain: str, chain: Chain, unfinished: tuple[Qemu, JSON, bytes]
) -> None:
    """At ready an abort waits for a consistent copy, and with force it does not any more."""
    qemu, job, view = unfinished
    answer = abort(service, job)
    assert (answer.status_code, answer.json()["state"], answer.json()["actions"]) == (202, "aborting", [])
    assert abort(service, job).status_code == 200
    refused(post(service, job, "pivot"), 409, "job-not-ready")
    refused(post(service, job, "pause"), 409, "job-not-pausable")
    assert abort(service, job, force=True).is_success
    assert service.wait_for_job(job["id"])["state"] == "canceled"
    assert files(service, domain) == chain.files
    assert qemu.qmp("query-jobs") == []
    # A gentle end of a ready job is BLOCK_JOB_COMPLETED.
    assert "BLOCK_JOB_CANCELLED" in [event["event"] for event in qemu.events]
    qemu.quit()
    assert_same(read_image(chain.active), view)


# Pause, resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [SLOW, SLOW_ACTIVE], ids=["intermediate", "active"])
def test_pause_and_resume(service: Service, domain: str, qemu: Qemu, chain: Chain, *, body: JSON) -> None:
    """A paused job stands still, says why, and completes after a resume."""
    job = service.started(domain, **body, on_ready="pivot" if body is SLOW_ACTIVE else "wait")
    until_moving(service, job)
    refused(post(service, job, "resume"), 409, "job-not-paused")

    assert post(service, job, "pause").status_code == 202

    paused = service.wait_for_job(job["id"], "paused")
    assert paused["pause_reason"] == "user"
    assert sorted(paused["actions"]) == ["abort", "resume", "set-speed"]
    (there,) = qemu.qmp("query-jobs")
    assert there["status"] == "paused"
    # QEMU has no limit any more, so that only the pause holds the job.
    assert set_speed(service, job, 0).status_code == 200
    assert post(service, job, "pause").status_code == 202
    assert service.job(job["id"])["state"] == "paused"
    assert qemu.qmp("query-jobs")[0]["current-progress"] == there["current-progress"]
    refused(post(service, job, "pivot"), 409, "job-not-ready" if body is SLOW_ACTIVE else "job-not-pivotable")

    assert post(service, job, "resume").status_code == 202

    done = service.wait_for_job(job["id"], "completed")
    assert done["pause_reason"] is None
    told = [name for name in types(service, job) if name in ("job.started", "job.paused", "job.resumed")]
    assert told[:2] == ["job.started", "job.paused"]
    for verb in ("pause", "resume"):
        refused(post(service, job, verb), 409, "job-finished")
    qemu.quit()
    assert_same(read_image(chain.images[0] if body is SLOW_ACTIVE else chain.active), chain.view)


def test_resume_shows_a_running_job(service: Service, domain: str, qemu: Qemu) -> None:
    """After a resume a slow job is `running` again, and can be paused again."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    for _ in range(2):
        assert post(service, job, "pause").status_code == 202
        service.wait_for_job(job["id"], "paused")
        assert post(service, job, "resume").status_code == 202
        assert service.wait_for_job(job["id"], "running")["pause_reason"] is None
        refused(post(service, job, "resume"), 409, "job-not-paused")
    assert types(service, job)[2:] == ["job.paused", "job.resumed"] * 2
    abort(service, job)
    service.wait_for_job(job["id"], "canceled")
    assert qemu.qmp("query-jobs") == []


@pytest.mark.parametrize("force", [False, True])
def test_abort_while_paused(service: Service, domain: str, qemu: Qemu, chain: Chain, *, force: bool) -> None:
    """A paused job can be aborted without a resume."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    post(service, job, "pause")
    service.wait_for_job(job["id"], "paused")
    assert abort(service, job, force=force).status_code == 202
    done = service.wait_for_job(job["id"])
    assert (done["state"], done["pause_reason"]) == ("canceled", None)
    assert files(service, domain) == chain.files
    assert qemu.qmp("query-jobs") == []


def test_a_ready_job_takes_no_pause(service: Service, domain: str, qemu: Qemu) -> None:
    """A job that is ready has nothing left to pause."""
    job = service.started(domain, flags=["active"])
    service.wait_for_job(job["id"], "ready")
    refused(post(service, job, "pause"), 409, "job-not-pausable")
    refused(post(service, job, "resume"), 409, "job-not-paused")
    abort(service, job)
    service.wait_for_job(job["id"], "canceled")
    assert qemu.qmp("query-jobs") == []


# Speed ---------------------------------------------------------------------------------------------------------------


def test_speed_while_running(service: Service, domain: str, qemu: Qemu, chain: Chain) -> None:
    """A speed is shown in bytes/s and reaches QEMU; without a limit a slow job is over soon."""
    job = service.started(domain, **SLOW)
    assert until_moving(service, job)["bandwidth"] == CLUSTER

    def speed() -> int:
        (there,) = qemu.qmp("query-block-jobs")
        return there["speed"]

    for bandwidth, flags, expected in ((3, [], 3 * MIB), (2 * CLUSTER, ["bandwidth_bytes"], 2 * CLUSTER)):
        answer = set_speed(service, job, bandwidth, *flags)
        assert (answer.status_code, answer.json()["bandwidth"]) == (200, expected)
        assert answer.json()["version"] > job["version"]
        assert speed() == expected
    begun = time.monotonic()
    assert set_speed(service, job, 0).json()["bandwidth"] == 0
    service.wait_for_job(job["id"], "completed")
    # At the speed before it would have taken half a minute.
    assert time.monotonic() - begun < 10
    refused(set_speed(service, job, 5), 409, "job-finished")
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, ["/bandwidth"]),
        ({"bandwidth": -1}, ["/bandwidth"]),
        ({"bandwidth": 8796093022208}, ["/bandwidth"]),
        ({"bandwidth": 1, "flags": ["active"]}, ["/flags/0"]),
        ({"bandwidth": 1, "flags": 1}, ["/flags"]),
        ({"bandwidth": 1, "speed": 1}, ["/speed"]),
    ],
)
def test_wrong_speeds(service: Service, *, body: JSON, pointers: list[str]) -> None:
    """What is no speed is refused before the job is looked up."""
    answer = service.client.patch("/jobs/bj-none", json=body)
    refused(answer, 422, "invalid-request")
    assert [error["pointer"] for error in answer.json()["errors"]] == pointers


# Progress, versions, actions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [SLOW, SLOW_ACTIVE], ids=["intermediate", "active"])
def test_progress_rate_and_eta(service: Service, domain: str, qemu: Qemu, *, body: JSON) -> None:
    """While a job runs its progress rises, with a rate and the seconds that are left; `percent` stays below 100."""
    faster: JSON = {**body, "bandwidth": 8 * CLUSTER}
    job = service.started(domain, **faster)
    seen: list[JSON] = []
    deadline = time.monotonic() + 10
    while len({progress["current"] for progress in seen}) < 4 or not seen[-1]["rate"]:
        assert time.monotonic() < deadline, seen
        now = service.job(job["id"])
        assert now["state"] in ("starting", "running")
        seen.append(now["progress"])
        time.sleep(0.02)
    assert [progress["current"] for progress in seen] == sorted(progress["current"] for progress in seen)
    assert all(progress["current"] <= progress["end"] and progress["percent"] < 100 for progress in seen)
    last = seen[-1]
    assert last["percent"] == pytest.approx(100 * last["current"] / last["end"], abs=0.11)
    assert 0 < last["rate"] < 64 * MIB
    assert last["eta"] == pytest.approx((last["end"] - last["current"]) / last["rate"], rel=0.5)
    abort(service, job)
    service.wait_for_job(job["id"], "canceled")
    assert qemu.qmp("query-jobs") == []


def test_versions(service: Service, domain: str, qemu: Qemu) -> None:
    """`version` is the ETag, rises with each stored change, and stays with mere progress."""
    job = service.started(domain, **SLOW)
    first = service.client.get(f"/jobs/{job['id']}")
    assert first.headers["ETag"] == f'"{first.json()["version"]}"'
    until_moving(service, job)
    assert service.job(job["id"])["version"] == first.json()["version"]
    faster = set_speed(service, job, 1)
    assert faster.headers["ETag"] == f'"{first.json()["version"] + 1}"'
    abort(service, job)
    done = service.wait_for_job(job["id"], "canceled")
    stored = [event["data"]["version"] for event in service.history(job["id"])]
    assert stored == sorted(set(stored))
    assert stored[-1] == done["version"] > faster.json()["version"]
    assert qemu.qmp("query-jobs") == []


def test_times(service: Service, domain: str, qemu: Qemu) -> None:
    """The times of a job are in order, in UTC, and set as it goes."""
    job = service.started(domain, flags=["active"])
    ready = service.wait_for_job(job["id"], "ready")
    assert (ready["finished_at"], job["ready_at"]) == (None, None)
    post(service, job, "pivot")
    done = service.wait_for_job(job["id"], "completed")
    times = [done[f"{name}_at"] for name in ("created", "started", "ready", "finished")]
    assert times == sorted(times)
    assert all(len(at) == len("2026-01-01T00:00:00.000Z") and at.endswith("Z") for at in times)
    assert qemu.qmp("query-jobs") == []


def test_actions(service: Service, domain: str, qemu: Qemu) -> None:
    """A job says what it takes in each state, and takes that."""
    job = service.started(domain, **SLOW_ACTIVE)
    assert sorted(until_moving(service, job)["actions"]) == ["abort", "pause", "set-speed"]
    post(service, job, "pause")
    assert sorted(service.wait_for_job(job["id"], "paused")["actions"]) == ["abort", "resume", "set-speed"]
    post(service, job, "resume")
    set_speed(service, job, 0)
    ready = service.wait_for_job(job["id"], "ready")
    assert sorted(ready["actions"]) == ["abort", "pivot", "set-speed"]
    assert set_speed(service, job, 7).json()["bandwidth"] == 7 * MIB
    post(service, job, "pivot")
    assert service.wait_for_job(job["id"], "completed")["actions"] == []
    assert qemu.qmp("query-jobs") == []


# Waiting -------------------------------------------------------------------------------------------------------------


def wait(service: Service, job: JSON, seconds: int) -> tuple[JSON, float]:
    """The job by `Prefer: wait`, and how many seconds the answer took."""
    begun = time.monotonic()
    answer = service.client.get(f"/jobs/{job['id']}", headers={"Prefer": f"wait={seconds}"})
    assert answer.status_code == 200
    assert answer.headers["Preference-Applied"] == f"wait={seconds}"
    return answer.json(), time.monotonic() - begun


def test_wait_until_the_end(service: Service, domain: str, qemu: Qemu) -> None:
    """A wait is answered when the job ends, and at once if it has."""
    job = service.started(domain, top="vda[1]")
    done, took = wait(service, job, 30)
    assert (done["state"], took < 10) == ("completed", True)
    again, took = wait(service, job, 30)
    assert (again, took < 1) == (done, True)
    assert qemu.qmp("query-jobs") == []


def test_wait_until_ready_or_paused(service: Service, domain: str, qemu: Qemu) -> None:
    """A wait is answered when the job pauses or is ready, and at once if it is."""
    job = service.started(domain, **SLOW_ACTIVE)
    until_moving(service, job)
    post(service, job, "pause")
    for _ in range(2):
        paused, took = wait(service, job, 30)
        assert (paused["state"], took < 5) == ("paused", True)
    set_speed(service, job, 0)
    post(service, job, "resume")
    service.wait_for_job(job["id"], "running", "ready")
    for _ in range(2):
        ready, took = wait(service, job, 30)
        assert (ready["state"], took < 10) == ("ready", True)
    post(service, job, "pivot")
    service.wait_for_job(job["id"], "completed")
    assert qemu.qmp("query-jobs") == []


def test_wait_until_the_seconds_are_over(service: Service, domain: str, qemu: Qemu) -> None:
    """A wait for a job that goes on is answered after the seconds that were asked for; 0 and nonsense wait not."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    running, took = wait(service, job, 1)
    assert running["state"] == "running"
    assert 1 <= took < 3
    assert wait(service, job, 0)[1] < 0.8
    begun = time.monotonic()
    for preference in ("wait=soon", "respond-async", ""):
        answer = service.client.get(f"/jobs/{job['id']}", headers={"Prefer": preference})
        assert answer.status_code == 200
        assert "Preference-Applied" not in answer.headers
    assert time.monotonic() - begun < 0.8
    abort(service, job)
    service.wait_for_job(job["id"], "canceled")
    assert qemu.qmp("query-jobs") == []


def test_wait_does_not_hold_others_up(service: Service, domain: str, qemu: Qemu) -> None:
    """While one client waits, another's abort gets through, and ends the wait."""
    job = service.started(domain, **SLOW)
    until_moving(service, job)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(wait, service, job, 30) for _ in range(3)]
        for _ in range(5):
            assert service.job(job["id"])["state"] == "running"
        assert not any(one.done() for one in waiting)
        assert abort(service, job).status_code == 202
        for ended, took in (one.result(20) for one in waiting):
            assert (ended["state"], took < 10) == ("canceled", True)
    assert qemu.qmp("query-jobs") == []


# The queue -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that runs one job at a time."""
    with Service(tmp_path_factory.mktemp("narrow"), {"BLOCKJOBD_MAX_RUNNING_JOBS": "1"}) as running:
        yield running


@pytest.fixture
def three(narrow: Service, domain: str, folder: Path) -> Iterator[Qemu]:
    """A QEMU with three disks, known to `narrow` as `domain`."""
    arguments: list[str] = []
    for number, prefix in enumerate("abc"):
        chain = build_chain(folder, 2, prefix=prefix)
        arguments += blockdev(chain, prefix, device=f"virtio{number}")
    with Qemu(folder / "three.qmp", arguments) as qemu:
        assert narrow.client.put(f"/domains/{domain}", json={"qmp": {"unix": str(qemu.monitor)}}).is_success
        narrow.wait_for_domain(domain)
        yield qemu
        assert qemu.qmp("query-jobs") == []


QUEUED: JSON = {"flags": ["active", "bandwidth_bytes"], "on_ready": "pivot"}


def test_jobs_beyond_the_limit_wait_in_order(narrow: Service, domain: str, three: Qemu) -> None:
    """Beyond `max_running_jobs` jobs are `queued`, unknown to QEMU, and start in the order in which they came."""
    first = narrow.started(domain, "vda", bandwidth=CLUSTER, **QUEUED)
    second, third = (narrow.started(domain, disk, **QUEUED) for disk in ("vdc", "vdb"))
    assert [job["state"] for job in (second, third)] == ["queued", "queued"]
    for job in (second, third):
        assert (job["started_at"], job["data_state"], job["progress"]["percent"]) == (None, "untouched", 0)
        assert sorted(job["actions"]) == ["abort", "set-speed"]
    assert [job["id"] for job in three.qmp("query-jobs")] == [first["id"]]
    assert narrow.disk(domain, "vdc")["job"] == second["id"]
    refused(narrow.commit(domain, "vdc", **QUEUED), 409, "job-conflict")
    refused(post(narrow, second, "pause"), 409, "job-not-pausable")
    refused(post(narrow, second, "resume"), 409, "job-not-paused")
    refused(post(narrow, second, "pivot"), 409, "job-not-ready")
    assert set_speed(narrow, second, 5).json()["bandwidth"] == 5 * MIB
    waiting = narrow.client.get("/jobs", params={"domain": domain, "state": "queued"}).json()["items"]
    assert [job["id"] for job in waiting] == [third["id"], second["id"]]

    assert set_speed(narrow, first, 0).status_code == 200

    done = [narrow.wait_for_job(job["id"], "completed") for job in (first, second, third)]
    for before, after in itertools.pairwise(done):
        assert before["finished_at"] <= after["started_at"]
    assert types(narrow, second)[:2] == ["job.queued", "job.started"]


def test_abort_in_the_queue(narrow: Service, domain: str, three: Qemu) -> None:
    """A queued job that is aborted ends at once and untouched, and the one behind it moves up."""
    first = narrow.started(domain, "vda", bandwidth=CLUSTER, **QUEUED)
    second, third = (narrow.started(domain, disk, **QUEUED) for disk in ("vdb", "vdc"))
    answer = abort(narrow, second)
    assert (answer.status_code, answer.json()["state"]) == (202, "canceled")
    assert (answer.json()["data_state"], answer.json()["result"]) == ("untouched", None)
    assert types(narrow, second) == ["job.queued", "job.canceled"]
    assert all(layer["valid"] for layer in narrow.disk(domain, "vdb")["chain"])
    assert narrow.disk(domain, "vdb")["job"] is None
    assert narrow.job(third["id"])["state"] == "queued"
    assert abort(narrow, first).status_code == 202
    narrow.wait_for_job(first["id"], "canceled")
    narrow.wait_for_job(third["id"], "completed")
    assert abort(narrow, second).status_code == 200


def test_a_ready_job_gives_its_place(narrow: Service, domain: str, three: Qemu) -> None:
    """A job that waits for a person holds nobody up, and pivots without waiting for a place."""
    first = narrow.started(domain, "vda", flags=["active"])
    narrow.wait_for_job(first["id"], "ready")
    second = narrow.started(domain, "vdb", **QUEUED)
    assert second["state"] != "queued"
    narrow.wait_for_job(second["id"], "completed")
    assert narrow.job(first["id"])["state"] == "ready"
    post(narrow, first, "pivot")
    narrow.wait_for_job(first["id"], "completed")
    assert three.qmp("query-jobs") == []


def test_a_chain_that_changed_in_the_queue(narrow: Service, domain: str, folder: Path, three: Qemu) -> None:
    """A queued job whose chain is another one when its turn comes fails with `chain-changed`, and touches nothing."""
    first = narrow.started(domain, "vda", bandwidth=CLUSTER, **QUEUED)
    second = narrow.started(domain, "vdb", **QUEUED)
    three.qmp(
        "blockdev-snapshot-sync", node_name="b1", snapshot_file=str(folder / "new.qcow2"), snapshot_node_name="new"
    )
    abort(narrow, first)
    narrow.wait_for_job(first["id"], "canceled")
    failed = narrow.wait_for_job(second["id"], "failed")
    assert (failed["error"]["code"], failed["data_state"]) == ("chain-changed", "untouched")
    assert len(narrow.disk(domain, "vdb")["chain"]) == 3
