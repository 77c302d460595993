"""After a start: what was found is reported, what nobody knew is adopted, and a person judges what nothing proves."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.chains import Chain, assert_same, blockdev, build_chain, drive_with_id, read_image, slow_down
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = pytest.mark.live

ACTIVE: JSON = {"flags": ["active"]}
CRAWL: JSON = {"top": "vda[1]", "base": "vda[3]", "bandwidth": 4096, "flags": ["bandwidth_bytes"]}


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def found(service: Service, job_id: str) -> JSON:
    """What the report says of a job."""
    return next(item for item in report(service)["items"] if item["job"] == job_id)


def report(service: Service) -> JSON:
    response = service.client.get("/recovery")
    assert response.status_code == 200, response.text
    return response.json()


def chain_in(folder: Path) -> Chain:
    folder.mkdir()
    return build_chain(folder, 4)


def lost(service: Service, vm: str, chain: Chain) -> JSON:
    """A job of which nothing proves the outcome: its QEMU is killed after a pivot was asked for."""
    with Qemu(service.qmp_dir / f"{vm}.qmp", blockdev(chain, slow_base=True)) as qemu:
        service.wait_for_domain(vm)
        job = service.started(vm, **ACTIVE)
        service.wait_for_job(job["id"], "ready")
        # The pivot waits for what the guest has written meanwhile, and can't come to its end.
        slow_down(qemu, 1)
        qemu.qmp("human-monitor-command", command_line=WRITE)
        assert service.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
        service.wait_for_job(job["id"], "pivoting")
        qemu.kill()
    return service.wait_for_job(job["id"], "lost")


WRITE = 'qemu-io -d /machine/peripheral/virtio0/virtio-backend "write -P 7 0 64k"'


def test_the_report(tmp_path: Path) -> None:
    """Each unfinished job is in the report and in the log: going on, waiting, or finished and how that is known."""
    with Service(tmp_path / "service") as service:
        assert report(service) | {"started_at": ""} == {"started_at": "", "waiting": 0, "items": [], "next": None}
        chains = [chain_in(tmp_path / f"c{number}") for number in range(4)]
        qemus = [
            Qemu(service.qmp_dir / f"vm{number}.qmp", blockdev(chain, slow_base=True))
            for number, chain in enumerate(chains)
        ]
        with qemus[0] as running, qemus[1] as finishing, qemus[2] as killed, qemus[3] as stopped:
            for number in range(4):
                service.wait_for_domain(f"vm{number}")
            jobs = [service.started(f"vm{number}", **CRAWL) for number in range(4)]
            service.kill()
            finishing.conclude(jobs[1]["id"])
            killed.kill()
            stopped.pause()
            service.start()
            for number in (0, 1):
                service.wait_for_domain(f"vm{number}")
            until(lambda: found(service, jobs[2]["id"])["found"] == "finished")
            until(lambda: report(service)["waiting"] == 1)
            assert found(service, jobs[0]["id"]) | {"at": ""} == {
                "job": jobs[0]["id"],
                "domain": "vm0",
                "disk": "vda",
                "found": "re-adopted",
                "state": "running",
                "proof": None,
                "at": "",
            }
            while_away = found(service, jobs[1]["id"])
            assert (while_away["found"], while_away["state"]) == ("finished", "completed")
            assert (
                "without error; QEMU's block graph and the overlay's header showed the merged layers gone"
                in while_away["proof"]
            )
            gone = found(service, jobs[2]["id"])
            assert (gone["found"], gone["state"]) == ("finished", "failed")
            assert "its QEMU had ended; the overlay's header showed the chain unchanged" in gone["proof"]
            assert found(service, jobs[3]["id"])["found"] == "waiting"
            stopped.wake()
            until(lambda: report(service)["waiting"] == 0)
            assert found(service, jobs[3]["id"])["found"] == "re-adopted"
            lines = [line for line in service.log().splitlines() if '"event": "recovered"' in line]
            assert all(any(job["id"] in line for line in lines) for job in jobs)
            reader = service.as_role("read")
            assert reader.get("/recovery").status_code == 200
            reader.close()
            for qemu, job in ((running, jobs[0]), (stopped, jobs[3])):
                service.client.delete(f"/jobs/{job['id']}", params={"force": "true"})
                assert service.wait_for_job(job["id"])["state"] == "canceled"
                qemu.quit()


@pytest.mark.parametrize("opened", [blockdev, drive_with_id])
@pytest.mark.parametrize("stage", ["running", "concluded", "ready"])
def test_adopted(service: Service, tmp_path: Path, stage: str, opened: Callable[[Chain], list[str]]) -> None:
    """A job of ours that the journal does not know is adopted, told of, and steered to its end like any other."""
    vm = f"{stage}-{opened.__name__.replace('_', '-')}"
    chain = build_chain(tmp_path, 4)
    job_id = f"bj-{vm}"
    with Qemu(tmp_path / "m", opened(chain)) as qemu:
        nodes = {node["file"]: node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)[::-1]}
        names = ["n3", "n2", "n1", "n0"] if opened is blockdev else [nodes[file] for file in chain.files]
        arguments = {"device": names[0], "top_node": names[0] if stage == "ready" else names[1], "base_node": names[3]}
        qemu.qmp(
            "block-commit", job_id=job_id, **arguments, auto_dismiss=False, speed=4096 if stage == "running" else 0
        )
        until(lambda: qemu.qmp("query-jobs")[0]["status"] == stage)
        answer = service.client.put(f"/domains/{vm}", json={"qmp": {"unix": str(qemu.monitor)}})
        assert answer.status_code == 201, answer.text
        until(lambda: service.client.get(f"/jobs/{job_id}").status_code == 200)
        until(lambda: found(service, job_id)["found"] == "adopted")
        if stage == "ready":
            job = service.wait_for_job(job_id, "ready")
            assert (job["type"], job["top"], job["base"]) == ("active-commit", chain.at(0), chain.at(3))
            assert service.client.post(f"/jobs/{job_id}/pivot").status_code == 202
        elif stage == "running":
            job = service.job(job_id)
            assert (job["state"], job["bandwidth"], job["requested_by"]) == ("running", 4096, "unknown")
            assert (job["type"], job["top"], job["base"]) == ("commit", chain.at(1), chain.at(3))
            assert service.client.patch(f"/jobs/{job_id}", json={"bandwidth": 0}).status_code == 200
        done = service.wait_for_job(job_id)
        assert (done["state"], done["error"], done["result"]["deleted"]) == ("completed", None, [])
        assert done["result"]["chain"] == ([chain.at(3)] if stage == "ready" else [chain.at(0), chain.at(3)])
        told = [event["type"] for event in service.history(job_id)]
        middle = ["job.ready", "job.pivoting"] if stage == "ready" else []
        assert told == ["job.adopted", *middle, "job.completed"]
        assert qemu.qmp("query-jobs") == []
        again = service.started(vm, **ACTIVE) if stage != "ready" else None
        if again is not None:
            service.wait_for_job(again["id"], "ready")
            service.client.delete(f"/jobs/{again['id']}")
            assert service.wait_for_job(again["id"])["state"] == "canceled"
        qemu.quit()
        assert_same(read_image(done["result"]["chain"][0]), chain.view)


@pytest.mark.parametrize("base", ["n0", None])
def test_a_pull_is_adopted(service: Service, tmp_path: Path, base: str | None) -> None:
    """It is told by the layers that it holds, takes effect only flushed, and the active layer stays writable."""
    vm = f"pull-{base}"
    chain = build_chain(tmp_path, 4)
    job_id = f"bj-{vm}"
    with Qemu(tmp_path / "m", blockdev(chain)) as qemu:
        arguments = {"device": "n3"} | ({} if base is None else {"base_node": base, "backing_file": chain.at(3)})
        qemu.qmp("block-stream", job_id=job_id, **arguments, auto_finalize=False, auto_dismiss=False, speed=4096)
        service.client.put(f"/domains/{vm}", json={"qmp": {"unix": str(qemu.monitor)}})
        until(lambda: service.client.get(f"/jobs/{job_id}").status_code == 200)
        job = service.job(job_id)
        assert (job["type"], job["top"], job["base"]) == ("pull", chain.at(0), base and chain.at(3))
        assert service.client.patch(f"/jobs/{job_id}", json={"bandwidth": 0}).status_code == 200
        done = service.wait_for_job(job_id)
        assert (done["state"], done["error"]) == ("completed", None)
        assert done["result"]["chain"] == ([chain.at(0)] if base is None else [chain.at(0), chain.at(3)])
        nodes = {node["node-name"]: node["ro"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
        assert {name: ro for name, ro in nodes.items() if not name.startswith("f")} == (
            {"n3": False} if base is None else {"n3": False, "n0": True}
        )
        qemu.kill()
        assert_same(read_image(chain.active), chain.view)


def test_a_job_that_nobody_can_place(service: Service, tmp_path: Path) -> None:
    """A concluded job that holds no layer any more is reported, and left alone."""
    chain = build_chain(tmp_path, 3)
    with Qemu(tmp_path / "m", blockdev(chain)) as qemu:
        nodes = {"device": "n2", "top_node": "n2", "base_node": "n0"}
        qemu.qmp("block-commit", job_id="bj-placeless", **nodes, auto_dismiss=False)
        until(lambda: qemu.qmp("query-jobs")[0]["status"] == "ready")
        qemu.qmp("job-complete", id="bj-placeless")
        until(lambda: qemu.qmp("query-jobs")[0]["status"] == "concluded")
        service.client.put("/domains/placeless", json={"qmp": {"unix": str(qemu.monitor)}})
        until(lambda: any(item["job"] == "bj-placeless" for item in report(service)["items"]))
        item = found(service, "bj-placeless")
        assert (item["found"], item["disk"], item["state"]) == ("unknown", None, None)
        assert service.client.get("/jobs/bj-placeless").status_code == 404
        assert [job["id"] for job in qemu.qmp("query-jobs")] == ["bj-placeless"]


def test_verdicts_at_once(service: Service, tmp_path: Path) -> None:
    """Of verdicts on a job whose domain is forgotten one counts, and the others are told so."""
    jobs = [lost(service, f"at-once-{number}", chain_in(tmp_path / str(number))) for number in range(4)]
    for job in jobs:
        assert service.client.delete(f"/domains/{job['domain']}").status_code == 204
        with ThreadPoolExecutor(8) as pool:
            url = f"/jobs/{job['id']}/resolve"
            asked = [pool.submit(service.client.post, url, json={"as": "failed"}) for _ in range(8)]
            answers = [each.result() for each in asked]
        assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7, [each.text for each in answers]


@pytest.mark.parametrize("verdict", ["completed", "failed", "canceled"])
def test_a_verdict(service: Service, tmp_path: Path, verdict: str) -> None:
    """A lost job takes one verdict, of an admin, whose name is kept with it, over a restart and in an event."""
    vm = f"lost-{verdict}"
    job = lost(service, vm, build_chain(tmp_path, 3))
    url = f"/jobs/{job['id']}/resolve"
    assert (job["actions"], job["error"]["code"]) == (["resolve"], "outcome-unknown")
    operator = service.as_role("operate")
    assert operator.post(url, json={"as": verdict}).json()["code"] == "operation-denied"
    operator.close()
    for wrong in ({}, {"as": "lost"}, {"as": None}, {"as": verdict, "why": "I looked"}):
        answer = service.client.post(url, json=wrong)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
    answer = service.client.post(url, json={"as": verdict})
    assert answer.status_code == 200, answer.text
    judged = answer.json()
    assert (judged["state"], judged["resolved"]["by"], judged["actions"]) == (verdict, "admin", [])
    assert (judged["error"] is None) == (verdict != "failed")
    assert (judged["finished_at"], judged["version"]) == (job["finished_at"], job["version"] + 1)
    again = service.client.post(url, json={"as": "failed"})
    assert (again.status_code, again.json()["code"]) == (409, "job-not-lost")
    assert [event["type"] for event in service.history(job["id"])][-2:] == ["job.lost", f"job.{verdict}"]
    service.kill()
    service.start()
    assert service.job(job["id"]) == judged
