"""The journal tells the truth about itself, to who asks over HTTP, on a disk that fails and in other hands."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.live.conftest import NewChain
from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, fill, read_image, small_file_system
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service, sse

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=8 * MIB, data=48 * CLUSTER)]

ACTIVE: JSON = {"flags": ["active"]}
FAILING = ("tests.support.failing",)


def until(happened: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Failing(Service):
    """The service on a disk that fails when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.order = folder / "disk.json"
        super().__init__(folder, {"DISK_FILE": str(self.order)}, FAILING)

    def tell(self, **order: object) -> None:
        """What the disk does from now on."""
        draft = self.order.with_suffix(".draft")
        draft.write_text(json.dumps(order))
        draft.replace(self.order)
        until(lambda: not self.order.exists())


@pytest.fixture
def failing(folder: Path) -> Iterator[Failing]:
    """Such a service, of this test alone."""
    with Failing(folder / "service") as running:
        yield running


@pytest.fixture
def alone(folder: Path) -> Iterator[Service]:
    """A service of this test alone."""
    with Service(folder / "service") as running:
        yield running


@pytest.fixture
def vm(folder: Path, new_chain: NewChain) -> Iterator[tuple[Qemu, Chain]]:
    """A QEMU that any service in `folder/service` finds as `vm`."""
    (folder / "service" / "qmp").mkdir(parents=True)
    chain = new_chain(folder / "images")
    with Qemu(folder / "service" / "qmp" / "vm.qmp", blockdev(chain)) as qemu:
        yield qemu, chain


def jobs_of(service: Service) -> list[JSON]:
    return service.client.get("/jobs").json()["items"]


@pytest.mark.parametrize(("failures", "code"), [(1, "journal-full"), (1000, "journal-uncertain")])
def test_what_was_refused_is_not_done_after_a_crash(
    vm: tuple[Qemu, Chain], failing: Failing, failures: int, code: str
) -> None:
    """SQLite had written all of the job into its log when the sync failed; a start after a kill does not find it."""
    qemu, chain = vm
    failing.wait_for_domain("vm")
    time.sleep(1)
    failing.tell(fail_sync=failures, only="-wal")
    answer = failing.commit("vm", **ACTIVE, on_ready="pivot")
    assert answer.json()["code"] == code, answer.text
    assert answer.status_code == (507 if failures == 1 else 503)
    assert "the same key" in answer.text or failures == 1
    assert (answer.headers.get("Retry-After") is not None) == (failures != 1)
    failing.kill()
    failing.start()
    failing.wait_for_domain("vm")
    time.sleep(1.5)
    assert jobs_of(failing) == []
    assert qemu.qmp("query-jobs") == []
    assert_same(read_image(chain.active), chain.view)


def test_reads_that_fail_end_no_supervision(vm: tuple[Qemu, Chain], failing: Failing) -> None:
    """While nothing can be read the service says so; then a job is pivoted as ever."""
    _, chain = vm
    failing.wait_for_domain("vm")
    job = failing.started("vm", **ACTIVE)
    failing.wait_for_job(job["id"], "ready")
    failing.tell(fail_read=100000, only="")
    answers = set[tuple[int, str]]()
    for _ in range(10):
        answer = failing.client.get("/jobs?state=failed")
        answers.add((answer.status_code, answer.json().get("code", "")))
        time.sleep(0.2)
    assert answers <= {(200, ""), (503, "journal-unreadable")}
    failing.tell(fail_read=0)
    until(lambda: failing.client.get("/readyz").status_code == 200)
    assert failing.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
    assert failing.wait_for_job(job["id"])["state"] == "completed"
    assert_same(read_image(chain.images[0]), chain.view)


@pytest.mark.parametrize("take", ["journal.sqlite3", "journal.sqlite3-wal", "lock"])
def test_a_journal_that_was_taken_away(vm: tuple[Qemu, Chain], alone: Service, take: str) -> None:
    """Nothing is taken that a restart would not find, and no second service comes in."""
    qemu, _ = vm
    alone.wait_for_domain("vm")
    kept = alone.state_dir / take
    kept.rename(alone.state_dir / "elsewhere")
    answer = alone.commit("vm", **ACTIVE)
    assert (answer.status_code, answer.json()["code"]) == (503, "journal-replaced"), answer.text
    assert str(kept) in answer.json()["detail"]
    assert qemu.qmp("query-jobs") == []
    ready = alone.client.get("/readyz")
    assert ready.status_code == 503
    assert "journal-replaced" in ready.text
    if take == "lock":
        second = subprocess.run(
            [sys.executable, "-m", "app.cli.main", "serve"],
            env=os.environ | {"BLOCKJOBD_STATE_DIR": str(alone.state_dir), "BLOCKJOBD_LISTEN": "unix:/nowhere/x"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        assert "another blockjobd serves" in second.stderr
    # Put back, it is the open file again, and all goes on.
    (alone.state_dir / "elsewhere").rename(kept)
    assert alone.commit("vm", **ACTIVE).status_code == 202


def test_a_damaged_journal_is_not_served(folder: Path) -> None:
    """One line says what it is and what to do, and the exit code tells too."""
    service = Service(folder / "service")
    with service:
        for number in range(40):
            service.client.put(f"/domains/vm{number}", json={"disks": {"vda": {"image": f"/nowhere/{number}"}}})
    path = service.state_dir / "journal.sqlite3"
    content = bytearray(path.read_bytes())
    for page in range(10, len(content) // 4096, 2):
        content[page * 4096 + 50 : page * 4096 + 150] = bytes(range(100))
    path.write_bytes(content)
    service.launch()
    assert service.process is not None
    assert service.process.wait(30) == 1
    service.process = None
    last = service.log().strip().splitlines()[-1]
    assert last.startswith("blockjobd: journal-damaged: ")
    assert "blockjobd journal restore FILE" in last


def test_backup_and_restore(vm: tuple[Qemu, Chain], alone: Service, folder: Path) -> None:
    """A copy is made while the service runs; once it is put back, ids go on and subscribers start anew."""
    _, chain = vm

    def journal(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app.cli.main", "journal", *arguments],
            env=os.environ | {"BLOCKJOBD_STATE_DIR": str(alone.state_dir)},
            capture_output=True,
            text=True,
            check=False,
        )

    alone.wait_for_domain("vm")
    copy = str(folder / "copy")
    assert journal("backup", copy).returncode == 0
    refused = journal("restore", copy)
    assert refused.returncode == 1
    assert "another blockjobd serves" in refused.stderr
    # A job begins after the copy was made, and outlives the service.
    job = alone.started("vm", **ACTIVE)
    alone.wait_for_job(job["id"], "ready")
    known = alone.history(job["id"])[-1]["id"]
    alone.stop()
    done = journal("restore", copy)
    assert done.returncode == 0, done.stderr
    alone.start()
    with sse(alone.client, f"/events?after={known}") as events:
        first = next(events)
        assert first["event"] == "stream.reset"
        assert int(first["id"]) > int(known)
        ids = [int(first["id"])]
        for event in events:
            ids.append(int(event["id"]))
            if event["event"] == "job.adopted":
                break
        assert ids == sorted(ids)
    assert alone.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
    alone.wait_for_job(job["id"], "completed")
    assert_same(read_image(chain.images[0]), chain.view)


def test_a_full_disk_after_a_clean_stop(vm: tuple[Qemu, Chain], folder: Path) -> None:
    """The start finds room for what SQLite needs first, and a job that waits at ready can be pivoted."""
    _, chain = vm
    with small_file_system(folder, 16 * MIB) as place:
        service = Service(folder / "service")
        service.state_dir = place / "state"
        with service:
            service.wait_for_domain("vm")
            job = service.started("vm", **ACTIVE)
            service.wait_for_job(job["id"], "ready")
            service.stop()
            fill(place)
            service.start(check="/livez")
            until(lambda: service.job(job["id"])["state"] == "ready")
            service.wait_for_domain("vm")
            assert service.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
            service.wait_for_job(job["id"], "completed")
    assert_same(read_image(chain.images[0]), chain.view)


def test_another_program_s_lock(vm: tuple[Qemu, Chain], alone: Service) -> None:
    """It is named as what it is, nobody waits for long, a ready job is pivoted later, and SIGTERM ends the service."""
    alone.wait_for_domain("vm")
    assert vm[0].pid
    with closing(sqlite3.connect(alone.state_dir / "journal.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        answer = alone.commit("vm", **ACTIVE)
        assert (answer.status_code, answer.json()["code"]) == (503, "journal-busy"), answer.text
        assert time.monotonic() - began < 4
        assert "another program" in answer.json()["detail"]
        assert alone.client.get("/domains/vm").status_code == 200
        began = time.monotonic()
        assert alone.stop() == 0
        assert time.monotonic() - began < 6
        other.execute("ROLLBACK")
    alone.start()
    alone.wait_for_domain("vm")
    assert alone.commit("vm", **ACTIVE).status_code == 202


def test_sizes_are_measured(alone: Service) -> None:
    """What the journal takes up is among the figures, by part."""
    until(lambda: alone.client.get("/readyz").status_code == 200)
    figures = alone.client.get("/metrics").text
    for part in ("file", "log", "free"):
        assert f'blockjobd_journal_bytes{{part="{part}"}}' in figures
