"""Merges under a real guest that writes and flushes all the time: what was acknowledged to it is never lost."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.chains import CLUSTER, MIB, Chain, blockdev, read_image, slow_down
from tests.support.guest import BLOCKS, Guest, assert_moment
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4, size=8 * MIB, data=96 * CLUSTER)]

ACTIVE: JSON = {"flags": ["active"]}
KINDS: dict[str, JSON] = {
    "intermediate": {"top": "vda[1]", "base": "vda[3]"},
    "abort": ACTIVE,
    "keep": ACTIVE | {"on_ready": "keep"},
    "pivot": ACTIVE,
}
"""The request for each kind of merge; `abort` and `pivot` take a second one, at `ready`."""

CRAWL = 4 * CLUSTER
"""Bytes/s at which no merge of these chains ends before it is told to hurry."""

NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that the tests kill."""
    with Service(tmp_path_factory.mktemp("service")) as service:
        yield service


class Scene:
    """A guest at work on a chain, in a domain that the service knows."""

    def __init__(self, service: Service, name: str, chain: Chain, qemu: Qemu, guest: Guest) -> None:
        self.service = service
        self.chain = chain
        self._name = name
        self._qemu = qemu
        self._guest = guest
        self._files = chain.files

    def more(self, writes: int = BLOCKS) -> int:
        """Let the guest go on by as many writes; the last that was acknowledged."""
        enough = self._guest.acknowledged() + writes
        until(lambda: self._guest.acknowledged() >= enough)
        return self._guest.acknowledged()

    def crawling(self, kind: str) -> JSON:
        """A job that has begun, under a guest that has written meanwhile, and that does not end by itself."""
        slow_down(self._qemu, CRAWL)
        job = self.service.started(self._name, **KINDS[kind])
        until(lambda: self.service.job(job["id"])["progress"]["current"] > 0)
        self.more()
        assert self.service.job(job["id"])["state"] == "running"
        return job

    def hurry(self) -> None:
        """Take the limit off the job."""
        slow_down(self._qemu, 0)

    def kill_service(self) -> None:
        """Kill the service and start it again; the guest goes on meanwhile."""
        self.service.kill()
        self.more(BLOCKS // 4)
        self.service.start()
        self.service.wait_for_domain(self._name)

    def steer(self, job: JSON, kind: str) -> None:
        """Pivot or abort a job once it is ready, and the guest has gone on; other kinds end by themselves."""
        if kind not in ("pivot", "abort"):
            return
        self.service.wait_for_job(job["id"], "ready")
        self.more()
        client, url = self.service.client, f"/jobs/{job['id']}"
        answer = client.post(f"{url}/pivot") if kind == "pivot" else client.delete(url)
        assert answer.status_code == 202, answer.text

    def ended(self, job: JSON, kind: str) -> None:
        """The job ends as it has to, told once, and the chain is what follows."""
        done = self.service.wait_for_job(job["id"])
        assert done["state"] == ("canceled" if kind == "abort" else "completed"), done
        types = [event["type"] for event in self.service.history(job["id"])]
        ready = [] if kind == "intermediate" else ["job.ready"]
        wish = {"pivot": ["job.pivoting"], "abort": ["job.aborting"]}.get(kind, [])
        assert types == ["job.queued", "job.started", *ready, *wish, f"job.{done['state']}"]
        files = self.chain.files
        self._files = {"intermediate": [files[0], files[-1]], "pivot": [files[-1]]}.get(kind, self._files)
        assert done["result"]["chain"] == self.files() == self._files

    def files(self) -> list[str]:
        """The chain, as the service shows it."""
        return [layer["file"] for layer in self.service.disk(self._name)["chain"]]

    def end(self) -> int:
        """Kill QEMU in the midst of the guest's writes: they are in the images; the moment that the guest's disk shows.

        Images that nobody has pulled the rug from under are without any fault, others without one that costs data.
        """
        self.more()
        files = self.files()
        self._qemu.kill()
        for file in files:
            check = ["qemu-img", "check", "--output=json", file]
            found = json.loads(subprocess.run(check, check=False, capture_output=True).stdout)
            assert found["check-errors"] == found.get("corruptions", 0) == 0, found
        return assert_moment(read_image(files[0]), self.chain.view, least=self._guest.acknowledged())

    def assert_copy(self, *, least: int, most: int) -> None:
        """The base holds the guest's disk as of one moment."""
        base = self.chain.images[0]
        assert least <= assert_moment(read_image(base), self.chain.view, least=least) <= most


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


@contextmanager
def scene(service: Service, chain: Chain, folder: Path) -> Generator[Scene]:
    """A guest that has written all its blocks at least once."""
    guest, name = Guest(folder), f"vm{next(NUMBERS)}"
    arguments = [*blockdev(chain, slow_base=True), *guest.arguments()]
    with Qemu(service.qmp_dir / f"{name}.qmp", arguments, run=True) as qemu:
        service.wait_for_domain(name)
        there = Scene(service, name, chain, qemu, guest)
        there.more()
        yield there


def test_every_kind_of_merge(running: Service, chain: Chain, tmp_path: Path) -> None:
    """A disk's layers are merged, the rest is aborted, copied and pivoted, and the guest never loses a write."""
    with scene(running, chain, tmp_path) as there:
        for kind in KINDS:
            job = there.crawling(kind)
            before = there.more(1)
            there.hurry()
            there.steer(job, kind)
            there.ended(job, kind)
            if kind == "keep":
                there.assert_copy(least=before, most=there.more())
        there.end()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_service_is_killed(running: Service, chain: Chain, tmp_path: Path, kind: str) -> None:
    """Killed in the midst of a job, and again when it has just been told how to end it, the service ends it right."""
    with scene(running, chain, tmp_path) as there:
        job = there.crawling(kind)
        there.kill_service()
        assert running.job(job["id"])["state"] == "running"
        before = there.more()
        there.hurry()
        there.steer(job, kind)
        there.kill_service()
        there.ended(job, kind)
        last = there.end()
        if kind == "keep":
            there.assert_copy(least=before, most=last)
