"""The service dies by SIGKILL at each boundary where it stores or acts; restarted, it ends the job as if it had not."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, read_image, write_guest
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=2 * MIB, data=16 * CLUSTER)]

NUMBERS = itertools.count(1)
BUILD = ("tests.support.crashing",)

BODIES: Final[dict[str, JSON]] = {
    "intermediate": {"top": "vda[1]", "base": "vda[2]"},
    "active": {"flags": ["active"], "on_ready": "pivot"},
    "delete": {"flags": ["active", "delete"], "on_ready": "pivot"},
    "pull": {"base": "vda[2]"},
}
VERBS: Final = {"pull": "pull"}
"""What is not asked for as a commit."""

MERGED: Final = {"intermediate": [1], "active": [0, 1], "delete": [0, 1], "pull": [1]}
"""Which layers each kind of job takes out of the chain of three, the active one being 0."""


def stored(version: str, *events: str) -> list[str]:
    """The points at which a version of a job is stored, with the events that tell of it."""
    inside = [f"inside-store-{event}" for event in events]
    told = [f"{when}-publish-job.{EVENT.get(event, event)}" for when in ("before", "after") for event in events]
    return [f"before-store-{version}", *inside, *told, f"after-store-{version}"]


def around(command: str) -> list[str]:
    """The points of a command: before it is sent, while it is under way, and once its reply has been read."""
    return [f"{when}-{command}" for when in ("before", "sent", "after")]


EVENT: Final = {"running": "started"}
ACCEPTED: Final = [*stored("starting", "queued"), "qemu-event", *stored("running", "running")]
START: Final = [*ACCEPTED, *around("block-commit")]
PIVOT: Final = [*stored("pivoting", "ready", "pivoting"), *around("job-complete")]
PROOF: Final = around("read-chain")
JUDGED: Final = [*stored("judged"), *around("job-dismiss")]
UNLINK: Final = ["before-unlink-1", "before-unlink-2", "after-unlink"]
END: Final = stored("completed", "completed")

POINTS: Final[dict[str, list[str]]] = {
    "intermediate": [
        *START,
        *around("flush"),
        *around("job-finalize"),
        *PROOF,
        *JUDGED,
        *around("blockdev-del-1"),
        *around("blockdev-del-2"),
        *END,
    ],
    "active": [*START, *PIVOT, *PROOF, *JUDGED, *(p for n in range(1, 5) for p in around(f"blockdev-del-{n}")), *END],
}
POINTS["pull"] = [point.replace("block-commit", "block-stream") for point in POINTS["intermediate"]]
POINTS["delete"] = [*POINTS["active"][: -len(END)], *UNLINK, *END]
CASES: Final = [(kind, point) for kind, points in POINTS.items() for point in points]

TWICE: Final = [
    ("intermediate", "sent-block-commit", "inside-store-running"),
    ("intermediate", "after-job-dismiss", "before-blockdev-del-2"),
    ("pull", "sent-block-stream", "before-flush"),
    ("pull", "sent-job-finalize", "before-job-dismiss"),
    ("active", "before-publish-job.ready", "sent-job-complete"),
    ("active", "after-store-judged", "before-store-completed"),
    ("delete", "before-unlink-1", "before-unlink-2"),
    ("delete", "before-unlink-2", "after-unlink"),
    ("delete", "after-unlink", "inside-store-completed"),
]
"""Deaths during the recovery from a death."""

EVENTS: Final = {
    "intermediate": ["job.queued", "job.started", "job.completed"],
    "active": ["job.queued", "job.started", "job.ready", "job.pivoting", "job.completed"],
}
EVENTS["delete"] = EVENTS["active"]
EVENTS["pull"] = EVENTS["intermediate"]


class Mortal(Service):
    """A service that dies at the point that it is told."""

    @property
    def fuse(self) -> Path:
        """The file that holds the point."""
        return self.folder / "point"

    def born(self) -> None:
        """Start it; it does not die by itself."""
        self.fuse.write_text("")
        self.start(BUILD, {"CRASH_FILE": str(self.fuse)})

    def reborn(self, point: str) -> None:
        """Start it; it dies at `point`, which it comes to by itself, maybe before it answers anybody."""
        self.fuse.write_text(point)
        self.launch(BUILD, {"CRASH_FILE": str(self.fuse)})

    def died(self) -> None:
        """Wait until it has died; fails where it does not come to the point."""
        assert self.process is not None
        assert self.process.wait(30) == -9
        self.process = None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    """One state directory, whose journal sees every death of this module."""
    service = Mortal(tmp_path_factory.mktemp("service"))
    with ExitStack() as stack:
        stack.push(service)
        service.born()
        yield service


@pytest.fixture
def mortal(shared: Mortal) -> Mortal:
    """The service, alive."""
    if shared.process is None or shared.process.poll() is not None:
        shared.born()
    shared.fuse.write_text("")
    return shared


@contextmanager
def machine(service: Service, chain: Chain) -> Generator[tuple[str, Qemu]]:
    """A QEMU with the chain that the service knows, and its domain's id."""
    vm = f"vm{next(NUMBERS)}"
    with Qemu(service.qmp_dir / f"{vm}.qmp", blockdev(chain)) as qemu:
        service.wait_for_domain(vm)
        yield vm, qemu


def jobs_in_qemu(qemu: Qemu) -> set[str]:
    """Every job that QEMU has ever made, by its events."""
    assert qemu.qmp("query-jobs") == []
    changes = (event["data"] for event in qemu.events if event["event"] == "JOB_STATUS_CHANGE")
    created = [change["id"] for change in changes if change["status"] == "created"]
    assert len(created) == len(set(created))
    return set(created)


def ask(service: Service, vm: str, kind: str) -> JSON | None:
    """Ask for a job; None where the service dies before it answers."""
    with suppress(httpx.TransportError):
        return service.started(vm, verb=VERBS.get(kind, "commit"), **BODIES[kind])
    return None


def judge(service: Service, vm: str, qemu: Qemu, chain: Chain, *, kind: str, told: JSON | None) -> None:
    """The request has led to one job that has completed, told once and whole; QEMU and the files are in that order."""
    jobs = service.client.get("/jobs", params={"domain": vm}).json()["items"]
    if not jobs:
        # Nothing of it was stored, and nobody was told that it was.
        assert told is None
        assert qemu.qmp("query-jobs") == []
        assert [layer["file"] for layer in service.disk(vm)["chain"]] == chain.files
        jobs = [service.started(vm, verb=VERBS.get(kind, "commit"), **BODIES[kind])]
    (job,) = jobs
    assert told is None or told["id"] == job["id"]
    job = service.wait_for_job(job["id"])
    assert (job["state"], job["error"], job["data_state"]) == ("completed", None, "merged")
    history = service.history(job["id"])
    assert [event["type"] for event in history] == EVENTS[kind]
    assert jobs_in_qemu(qemu) == {job["id"]}

    left = [file for position, file in enumerate(chain.files) if position not in MERGED[kind]]
    gone = [file for file in chain.files if file not in left]
    assert [layer["file"] for layer in service.disk(vm)["chain"]] == job["result"]["chain"] == left
    deleted = gone if kind == "delete" else []
    assert (sorted(job["result"]["deleted"]), job["result"]["not_deleted"]) == (sorted(deleted), [])
    assert [Path(file).exists() for file in gone] == [kind != "delete"] * len(gone)
    nodes = {node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)}
    layers = {2 - position for position in MERGED[kind]}
    assert not nodes & {name for layer in layers for name in (f"n{layer}", f"fn{layer}")}


def assert_events(service: Service) -> None:
    """All events of the journal: rising ids, none twice, and each job's versions in their order."""
    events: list[JSON] = []
    with service.client.stream("GET", "/events", params={"after": "0"}) as response:
        last = service.client.get("/jobs", params={"limit": 1}).json()["items"][0]
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                if events[-1]["subject"] == f"jobs/{last['id']}" and events[-1]["type"] == "job.completed":
                    break
    ids = [int(event["id"]) for event in events]
    assert ids == sorted(set(ids))
    versions: dict[str, int] = {}
    for event in events:
        if event["type"].startswith("job."):
            assert event["data"]["version"] > versions.get(event["subject"], 0)
            versions[event["subject"]] = event["data"]["version"]


def unlinked(point: str) -> int:
    """How many files are gone once the service has died at `point`."""
    if point.startswith("before-unlink-"):
        return int(point.removeprefix("before-unlink-")) - 1
    after = [*UNLINK[-1:], *END]
    return 2 if point in after else 0


@pytest.mark.parametrize(("kind", "point"), CASES, ids=[f"{kind}-{point}" for kind, point in CASES])
def test_death_at(mortal: Mortal, chain: Chain, kind: str, point: str) -> None:
    """Dead at that point, alive again: one request, one job in QEMU, one outcome; no file is deleted too early."""
    with machine(mortal, chain) as (vm, qemu):
        mortal.fuse.write_text(point)
        told = ask(mortal, vm, kind)
        mortal.died()
        missing = sum(not image.exists() for image in chain.images)
        assert missing == (unlinked(point) if kind == "delete" else 0)
        mortal.born()
        mortal.wait_for_domain(vm)
        judge(mortal, vm, qemu, chain, kind=kind, told=told)
        if kind in {"intermediate", "pull"}:
            again = mortal.wait_for_job(mortal.started(vm, **BODIES["active"])["id"])
            assert again["state"] == "completed"
        active = mortal.disk(vm)["chain"][0]["file"]
        qemu.quit()
        assert_same(read_image(active), chain.view)


@pytest.mark.parametrize(("kind", "point", "second"), TWICE)
def test_death_during_recovery(mortal: Mortal, chain: Chain, kind: str, point: str, second: str) -> None:
    """Dead at one point, and once more while it finds its way back."""
    with machine(mortal, chain) as (vm, qemu):
        mortal.fuse.write_text(point)
        told = ask(mortal, vm, kind)
        mortal.died()
        mortal.reborn(second)
        mortal.died()
        mortal.born()
        mortal.wait_for_domain(vm)
        judge(mortal, vm, qemu, chain, kind=kind, told=told)
        active = mortal.disk(vm)["chain"][0]["file"]
        qemu.quit()
        assert_same(read_image(active), chain.view)


@pytest.mark.parametrize("kind", POINTS)
def test_these_are_all_points(mortal: Mortal, chain: Chain, kind: str) -> None:
    """A merge passes no point but those at which a death is tried, and passes them all."""
    passed = mortal.fuse.with_suffix(".passed")
    with machine(mortal, chain) as (vm, qemu):
        passed.write_text("")
        judge(mortal, vm, qemu, chain, kind=kind, told=ask(mortal, vm, kind))
        seen = passed.read_text().split()
        # A command is under way to QEMU at no point of the code's own.
        expected = {point for point in POINTS[kind] if not point.startswith("sent-")}
        assert set(seen) == expected
        # Once is enough, and what takes longest in a small merge.
        assert seen.count("before-flush") == POINTS[kind].count("before-flush")
        assert_events(mortal)


@pytest.mark.parametrize("ends", [False, True], ids=["runs", "ended"])
@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("point", ["before-unlink-1", "before-unlink-2", "after-unlink"])
def test_names_that_are_taken_again(mortal: Mortal, chain: Chain, point: str, place: int, *, ends: bool) -> None:
    """A snapshot that was taken between a death and the recovery is called as a merged file was: it is not deleted."""
    with machine(mortal, chain) as (vm, qemu):
        mortal.fuse.write_text(point)
        ask(mortal, vm, "delete")
        mortal.died()
        root = qemu.qmp("query-block")[0]["inserted"]["node-name"]
        new = chain.images[place]
        time.sleep(0.02)
        qemu.qmp("blockdev-snapshot-sync", node_name=root, snapshot_file=str(new), snapshot_node_name="new")
        view = write_guest(qemu, chain.view, 0x42, MIB, CLUSTER)
        if ends:
            qemu.quit()
        mortal.born()
        (job,) = mortal.client.get("/jobs", params={"domain": vm}).json()["items"]
        job = mortal.wait_for_job(job["id"])
        assert job["state"] == "completed"
        assert new.exists()
        if not ends:
            assert [layer["file"] for layer in mortal.disk(vm)["chain"]] == [str(new), chain.files[-1]]
            qemu.quit()
        assert_same(read_image(new), view)
