"""No space, where the base is or where the journal is: jobs wait or fail, say so, and no byte is lost."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.live.conftest import Boot, NewChain
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    assert_same,
    blockdev,
    fill,
    name_backing,
    read_image,
    slow_down,
    small_file_system,
    write_guest,
)
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=8 * MIB, data=48 * CLUSTER)]

ACTIVE: JSON = {"flags": ["active"]}
KINDS: dict[str, JSON] = {"intermediate": {"top": "vda[1]"}, "active": ACTIVE}
QEMUS_WORDS: JSON = {"class": "GenericError", "desc": "No space left on device"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that tests may kill."""
    with Service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def place(folder: Path) -> Iterator[Path]:
    """A small file system."""
    with small_file_system(folder, 16 * MIB) as small:
        yield small


@pytest.fixture
def small_base(chain: Chain, place: Path) -> Chain:
    """The test's `chain`; its base alone is moved to the small file system, so that the guest can always write."""
    chain.images[0] = Path(shutil.move(chain.images[0], place))
    name_backing(chain.images[1], chain.images[0])
    return chain


@pytest.fixture
def qemu(boot: Boot, small_base: Chain) -> Qemu:
    """The QEMU of the test's `domain` with `small_base`; the base can be slowed down."""
    return boot(blockdev(small_base, slow_base=True))


def post(service: Service, job: JSON, verb: str) -> httpx.Response:
    return service.client.post(f"/jobs/{job['id']}/{verb}")


def done(service: Service, job: JSON, verb: str) -> None:
    answer = post(service, job, verb)
    assert answer.status_code == 202, answer.text


def types(service: Service, job: JSON) -> list[str]:
    return [event["type"] for event in service.history(job["id"])]


def files(service: Service, domain: str) -> list[str]:
    return [layer["file"] for layer in service.disk(domain)["chain"]]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def full_in_the_midst(service: Service, domain: str, qemu: Qemu, place: Path, body: JSON) -> tuple[JSON, Path]:
    """A job whose base runs full while it copies, and the file that takes the space: no check has foreseen it."""
    slow_down(qemu, CLUSTER)
    job = service.started(domain, **body)
    until(lambda: service.job(job["id"])["progress"]["current"] > 0)
    filler = fill(place)
    slow_down(qemu, 0)
    return job, filler


def assert_paused(service: Service, job: JSON, *, times: int = 1, reason: str = "no-space") -> None:
    """It has paused at least that often, each time with an event, and says why and what can be done.

    A resume is sent twice, in case that the first one got lost, so a job may try and fall back once more.
    """

    def paused() -> bool:
        now = service.job(job["id"])
        seen.update(now)
        return now["state"] == "paused" and types(service, job).count("job.paused") >= times

    seen: JSON = {}
    until(paused)
    assert (seen["pause_reason"], seen["error"]) == (reason, None)
    assert seen["actions"] == ["resume", "abort", "set-speed"]
    pauses = [event["data"] for event in service.history(job["id"]) if event["type"] == "job.paused"]
    assert {(told["state"], told["pause_reason"]) for told in pauses} == {("paused", reason)}


def finish(service: Service, job: JSON) -> JSON:
    """The job at its end, pivoted if it is one to pivot."""
    if job["type"] == "active-commit" and job["on_ready"] == "wait":
        service.wait_for_job(job["id"], "ready")
        done(service, job, "pivot")
    return service.wait_for_job(job["id"], "completed")


def assert_merged(service: Service, domain: str, qemu: Qemu, chain: Chain, *, view: bytes, kind: str) -> None:
    """The chain is that of a merge of that kind, and what is left of it holds all data."""
    left = [chain.at(2)] if kind == "active" else [chain.at(0), chain.at(2)]
    assert files(service, domain) == left
    assert qemu.qmp("query-jobs") == []
    qemu.quit()
    assert_same(read_image(left[0]), view)
    check = subprocess.run(["qemu-img", "check", "-q", left[-1]], check=False)
    # Clusters that were taken for data that did not fit may be left over, which costs space and no data.
    assert check.returncode in (0, 3)


# The base ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["stop", "enospc"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_job_waits_for_space(
    service: Service, domain: str, qemu: Qemu, chain: Chain, place: Path, *, kind: str, on_error: str
) -> None:
    """Out of space it pauses; resumed too early it pauses again; with space it completes, with all data right."""
    job, filler = full_in_the_midst(service, domain, qemu, place, KINDS[kind] | {"on_error": on_error})
    assert_paused(service, job)
    if on_error == "stop":
        service.kill()
        service.start()
        service.wait_for_domain(domain)
        assert_paused(service, job)
    done(service, job, "resume")
    assert_paused(service, job, times=2)
    view = write_guest(qemu, chain.view, 0x3C, 3 * CLUSTER, 2 * CLUSTER)
    filler.unlink()
    done(service, job, "resume")
    finish(service, job)
    told = [type_ for type_ in types(service, job) if type_ not in ("job.paused", "job.resumed")]
    ending = ["job.ready", "job.pivoting", "job.completed"] if kind == "active" else ["job.completed"]
    assert told == ["job.queued", "job.started", *ending]
    assert_merged(service, domain, qemu, chain, view=view, kind=kind)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_job_without_space_is_aborted(
    service: Service, domain: str, qemu: Qemu, chain: Chain, place: Path, *, kind: str
) -> None:
    """It ends at once, space or none; guest and chain are as they were, and the same merge works with space."""
    job, filler = full_in_the_midst(service, domain, qemu, place, KINDS[kind] | {"on_error": "enospc"})
    assert_paused(service, job)
    assert service.client.delete(f"/jobs/{job['id']}").status_code == 202
    canceled = service.wait_for_job(job["id"], "canceled")
    assert (canceled["data_state"], canceled["result"]["chain"]) == ("base-modified", chain.files)
    filler.unlink()
    finish(service, service.started(domain, **KINDS[kind]))
    assert_merged(service, domain, qemu, chain, view=chain.view, kind=kind)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_job_fails_without_space(
    service: Service, domain: str, qemu: Qemu, chain: Chain, place: Path, *, kind: str
) -> None:
    """With `report` it fails with QEMU's words; guest and chain are as they were, and with space the merge works."""
    job, filler = full_in_the_midst(service, domain, qemu, place, KINDS[kind])
    failed = service.wait_for_job(job["id"], "failed")
    assert (failed["data_state"], failed["result"]["chain"]) == ("base-modified", chain.files)
    assert (failed["error"]["code"], failed["error"]["qmp"]) == ("insufficient-storage", QEMUS_WORDS)
    assert failed["error"]["instance"] == f"/jobs/{job['id']}"
    assert types(service, job) == ["job.queued", "job.started", "job.failed"]
    assert [layer["valid"] for layer in service.disk(domain)["chain"]] == [True, False, True]
    refused = service.client.delete(f"/jobs/{job['id']}")
    assert (refused.status_code, refused.json()["code"]) == (409, "job-finished")
    again = service.commit(domain, **KINDS[kind])
    assert (again.status_code, again.json()["code"]) == (507, "insufficient-storage")
    filler.unlink()
    finish(service, service.started(domain, **KINDS[kind]))
    assert_merged(service, domain, qemu, chain, view=chain.view, kind=kind)


def full_at_ready(
    service: Service, domain: str, qemu: Qemu, chain: Chain, place: Path, *, on_error: str
) -> tuple[JSON, Path, bytes]:
    """A ready job, held in QEMU, under a guest that has written what does not fit into the base any more."""
    job = service.started(domain, **ACTIVE, on_error=on_error)
    service.wait_for_job(job["id"], "ready")
    qemu.qmp("job-pause", id=job["id"])
    filler = fill(place)
    nowhere = next(at for at in range(0, len(chain.view), CLUSTER) if not any(chain.view[at : at + CLUSTER]))
    return job, filler, write_guest(qemu, chain.view, 0x5A, nowhere, CLUSTER)


def test_a_ready_job_waits_for_space(service: Service, domain: str, qemu: Qemu, chain: Chain, place: Path) -> None:
    """A guest whose writes don't fit into the base goes on writing; the job waits, is ready again, and pivots."""
    job, filler, view = full_at_ready(service, domain, qemu, chain, place, on_error="enospc")
    qemu.qmp("job-resume", id=job["id"])
    assert_paused(service, job)
    view = write_guest(qemu, view, 0x5B, 0, CLUSTER)
    filler.unlink()
    done(service, job, "resume")
    finish(service, job)
    told = ["job.queued", "job.started", "job.ready", "job.paused", "job.ready", "job.pivoting", "job.completed"]
    assert types(service, job) == told
    assert_merged(service, domain, qemu, chain, view=view, kind="active")


@pytest.mark.parametrize("ending", ["pivot", "abort"])
def test_a_pivot_waits_for_space(
    service: Service, domain: str, qemu: Qemu, chain: Chain, place: Path, *, ending: str
) -> None:
    """A pivot that lacks space for the guest's last writes says so, and can be resumed or given up."""
    job, filler, view = full_at_ready(service, domain, qemu, chain, place, on_error="enospc")
    done(service, job, "pivot")
    assert_paused(service, job)
    done(service, job, "resume")
    assert_paused(service, job, times=2)
    if ending == "pivot":
        filler.unlink()
        done(service, job, "resume")
        service.wait_for_job(job["id"], "completed")
    else:
        assert service.client.delete(f"/jobs/{job['id']}").status_code == 202
        service.wait_for_job(job["id"], "canceled")
        filler.unlink()
        finish(service, service.started(domain, **ACTIVE))
    told = ["job.queued", "job.started", "job.ready", *["job.pivoting", "job.paused"] * 2]
    assert types(service, job)[:7] == told
    assert_merged(service, domain, qemu, chain, view=view, kind="active")


@pytest.mark.parametrize(("wish", "on_error"), [("pivot", "report"), ("abort", "report"), ("abort", "enospc")])
def test_an_end_without_space(
    service: Service, domain: str, qemu: Qemu, chain: Chain, place: Path, *, wish: str, on_error: str
) -> None:
    """A pivot with `report` fails, and no abort waits for space; the guest keeps its overlay and all that it wrote."""
    job, filler, view = full_at_ready(service, domain, qemu, chain, place, on_error=on_error)
    if wish == "pivot":
        done(service, job, "pivot")
    else:
        assert service.client.delete(f"/jobs/{job['id']}").status_code == 202
    ended = service.wait_for_job(job["id"])
    assert (ended["data_state"], ended["result"]["chain"]) == ("base-modified", chain.files)
    if on_error == "report":
        assert (ended["state"], ended["error"]["qmp"]) == ("failed", QEMUS_WORDS)
    else:
        assert (ended["state"], ended["error"]) == ("canceled", None)
    filler.unlink()
    finish(service, service.started(domain, **ACTIVE))
    assert_merged(service, domain, qemu, chain, view=view, kind="active")


@pytest.mark.usefixtures("small_base")
@pytest.mark.parametrize("on_error", ["stop", "enospc"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_io_error(service: Service, boot: Boot, domain: str, chain: Chain, *, kind: str, on_error: str) -> None:
    """A disk that fails one write pauses a job with `stop`, which can be resumed; others fail with QEMU's words."""
    qemu = boot(with_faulty_base(chain))
    job = service.started(domain, **KINDS[kind], on_error=on_error)
    if on_error == "stop":
        assert_paused(service, job, reason="io-error")
        done(service, job, "resume")
        finish(service, job)
    else:
        failed = service.wait_for_job(job["id"], "failed")
        assert failed["error"]["qmp"]["desc"] == "Input/output error"
        finish(service, service.started(domain, **KINDS[kind]))
    assert_merged(service, domain, qemu, chain, view=chain.view, kind=kind)


def with_faulty_base(chain: Chain) -> list[str]:
    """A QEMU to whose base's file the first write fails."""
    arguments = blockdev(chain)
    error = {"event": "none", "iotype": "write", "errno": 5, "once": True}
    faulty = {"driver": "blkdebug", "node-name": "faulty", "image": "fn0", "inject-error": [error]}
    base = json.loads(arguments[3]) | {"file": "faulty"}
    return [*arguments[:2], "-blockdev", json.dumps(faulty), "-blockdev", json.dumps(base), *arguments[4:]]


# The journal ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cramped(folder: Path, place: Path) -> Iterator[Service]:
    """A service with its state directory on the small file system."""
    service = Service(folder / "cramped")
    service.state_dir = place / "state"
    with service:
        yield service


@contextmanager
def opened(service: Service, chain: Chain, name: str) -> Generator[Qemu]:
    """A QEMU with the chain that the service knows under that name."""
    with Qemu(service.qmp_dir / f"{name}.qmp", blockdev(chain)) as qemu:
        service.wait_for_domain(name)
        yield qemu


def no_room(service: Service, place: Path) -> Path:
    """Fill the journal's file system, until the service has noticed."""
    filler = fill(place)
    until(lambda: service.client.get("/readyz").status_code == 503)
    return filler


def status(qemu: Qemu) -> list[str]:
    return [job["status"] for job in qemu.qmp("query-jobs")]


def assert_nothing_changes(service: Service, running: JSON, ready: JSON) -> None:
    """Each change is refused, each read is answered, and who asks whether the service is ready learns why not."""
    changes: list[tuple[str, str, JSON | None]] = [
        ("POST", "/domains/idle/disks/vda/commit", ACTIVE),
        ("PUT", "/domains/new", {"disks": {"vda": {"image": "/nowhere"}}}),
        ("DELETE", "/domains/kept", None),
        ("PATCH", f"/jobs/{running['id']}", {"bandwidth": 0}),
        ("POST", f"/jobs/{running['id']}/pause", None),
        ("DELETE", f"/jobs/{running['id']}", None),
        ("POST", f"/jobs/{ready['id']}/pivot", None),
        ("DELETE", f"/jobs/{ready['id']}", None),
    ]
    for method, url, body in changes:
        answer = service.client.request(method, url, json=body)
        assert (answer.status_code, answer.json()["code"]) == (507, "journal-full"), (url, answer.text)
    reads = ["/livez", "/domains", "/domains/idle", "/domains/idle/disks/vda", "/jobs", f"/jobs/{ready['id']}/history"]
    for url in reads:
        assert service.client.get(url).status_code == 200, url
    plan = service.client.post("/domains/idle/disks/vda/commit", params={"dry_run": "true"}, json=ACTIVE)
    assert plan.status_code == 200, plan.text
    answer = service.client.get("/readyz")
    assert (answer.status_code, list(answer.json()["checks"])) == (503, ["journal"])
    assert service.job(running["id"])["state"] == "running"
    assert service.job(ready["id"])["state"] == "ready"
    assert service.client.get("/domains/new").status_code == 404


def assert_sound(service: Service) -> None:
    """The journal of a service that has ended is whole, and no id is missing among its events."""
    with closing(sqlite3.connect(service.state_dir / "journal.sqlite3")) as journal:
        assert journal.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert journal.execute("PRAGMA foreign_key_check").fetchall() == []
        last, count = journal.execute("SELECT coalesce(max(id), 0), count(*) FROM events").fetchone()
        assert last == count


@pytest.mark.parametrize("meanwhile", ["nothing", "kill", "stop"])
def test_the_journal_has_no_room(
    cramped: Service, new_chain: NewChain, folder: Path, place: Path, meanwhile: str
) -> None:
    """Jobs go on in QEMU, changes are refused, reads work; with room again each job has its true end, told once."""
    service = cramped
    lower, upper, unused = (new_chain(folder / name) for name in ("running", "ready", "idle"))
    with (
        opened(service, lower, "running") as first,
        opened(service, upper, "ready") as second,
        opened(service, unused, "idle") as third,
    ):
        crawl: JSON = {"top": "vda[1]", "bandwidth": 4096, "flags": ["bandwidth_bytes", "delete"]}
        running = service.started("running", **crawl)
        ready = service.wait_for_job(service.started("ready", **ACTIVE)["id"], "ready")
        until(lambda: service.job(running["id"])["progress"]["current"] > 0)

        kept: JSON = {"disks": {"vda": {"image": str(unused.active)}}}
        assert service.client.put("/domains/kept", json=kept).status_code == 201
        filler = no_room(service, place)
        assert_nothing_changes(service, running, ready)
        assert (status(first), status(second), status(third)) == (["running"], ["ready"], [])
        first.qmp("block-job-set-speed", device=running["id"], speed=0)
        second.qmp("job-complete", id=ready["id"])
        until(lambda: status(first) == status(second) == ["concluded"])
        assert_nothing_changes(service, running, ready)
        if meanwhile != "nothing":
            service.kill() if meanwhile == "kill" else service.stop()
            service.start(check="/livez")
            service.wait_for_domain("idle")
            assert_nothing_changes(service, running, ready)
        assert all(image.exists() for image in lower.images)

        filler.unlink()
        until(lambda: service.client.get("/readyz").status_code == 200)
        assert service.wait_for_job(running["id"])["result"]["deleted"] == [lower.at(1)]
        assert service.wait_for_job(ready["id"])["data_state"] == "merged"
        assert types(service, running) == ["job.queued", "job.started", "job.completed"]
        assert types(service, ready) == ["job.queued", "job.started", "job.ready", "job.completed"]
        finish(service, service.started("idle", **ACTIVE))
        assert_merged(service, "running", first, lower, view=lower.view, kind="intermediate")
        assert_merged(service, "ready", second, upper, view=upper.view, kind="active")
        assert_merged(service, "idle", third, unused, view=unused.view, kind="active")
    assert service.stop() == 0
    assert_sound(service)


def test_a_start_without_room(cramped: Service, place: Path) -> None:
    """Where no page fits, and the reserve is used up, the service says so and ends; with room it starts as ever."""
    assert cramped.stop() == 0
    (cramped.state_dir / "reserve").unlink()
    filler = fill(place)
    with pytest.raises(AssertionError, match=r"journal\.sqlite3 can't be opened: .*; its file system may be full"):
        cramped.start()
    filler.unlink()
    cramped.start()
    assert cramped.stop() == 0
    assert_sound(cramped)
