"""QEMU is killed, leaves its socket, is replaced or hangs: each job's outcome is true, and no other file is touched."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.live.conftest import NewChain
from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, read_image
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=5, size=8 * MIB, data=64 * CLUSTER, folder="images")]

NUMBERS = itertools.count(1)
INNER: JSON = {"top": "vda[1]", "base": "vda[4]"}
CRAWL: JSON = INNER | {"bandwidth": 4096, "flags": ["bandwidth_bytes", "delete"]}
"""A merge below the active layer that takes its first bite and then sits there for minutes."""


@pytest.fixture
def second_chain(new_chain: NewChain, tmp_path: Path) -> Chain:
    """The same as `chain`, for another QEMU."""
    return new_chain(tmp_path / "other")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that soon gives up a command that is not answered."""
    with Service(tmp_path_factory.mktemp("service"), {"BLOCKJOBD_QMP_TIMEOUT": "2"}) as running:
        yield running


@pytest.fixture
def service(shared: Service) -> Iterator[Service]:
    """The service, which a test may end."""
    yield shared
    if shared.process is None:
        shared.start()


@pytest.fixture
def vm() -> str:
    """An id that no other test uses."""
    return f"gone{next(NUMBERS)}"


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@contextmanager
def machine(service: Service, vm: str, arguments: list[str], within: Sequence[str] = ()) -> Generator[Qemu]:
    with Qemu(service.qmp_dir / f"{vm}.qmp", arguments, within=within) as qemu:
        service.wait_for_domain(vm)
        yield qemu


def crawling(service: Service, vm: str) -> JSON:
    job = service.started(vm, **CRAWL)
    until(lambda: service.job(job["id"])["progress"]["current"] > 0)
    return job


def ready(service: Service, vm: str) -> JSON:
    return service.wait_for_job(service.started(vm, flags=["active"])["id"], "ready")


def post(service: Service, job: JSON, verb: str) -> httpx.Response:
    return service.client.post(f"/jobs/{job['id']}/{verb}")


def in_qemu(qemu: Qemu) -> list[tuple[str, str]]:
    return [(job["id"], job["status"]) for job in qemu.qmp("query-jobs")]


def finish(qemu: Qemu, job: JSON) -> None:
    """Lift the limit of the job in QEMU itself, and wait for its end there."""
    qemu.conclude(job["id"])


def types(service: Service, job: JSON) -> list[str]:
    return [event["type"] for event in service.history(job["id"])]


def files(service: Service, vm: str) -> list[str]:
    return [layer["file"] for layer in service.disk(vm)["chain"]]


# QEMU ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["running", "ready"])
@pytest.mark.parametrize("how", [(signal.SIGTERM,), (signal.SIGSTOP, signal.SIGKILL)], ids=["term", "stop-kill"])
def test_qemu_ends_by_a_signal(
    service: Service, vm: str, chain: Chain, how: tuple[signal.Signals, ...], kind: str
) -> None:
    """SIGTERM cancels the job, as QEMU says itself; killed while stopped, it says nothing: nothing was merged."""
    with machine(service, vm, blockdev(chain)) as qemu:
        job = crawling(service, vm) if kind == "running" else ready(service, vm)
        for number in how:
            qemu.process.send_signal(number)
        qemu.process.wait(20)
        ended = service.wait_for_job(job["id"])
        if signal.SIGTERM in how:
            assert (ended["state"], ended["error"]) == ("canceled", None)
        else:
            assert (ended["state"], ended["error"]["code"]) == ("failed", "domain-gone")
        assert ended["result"] == {"chain": chain.files, "invalidated": [], "deleted": [], "not_deleted": []}
    assert_same(read_image(chain.active), chain.view)
    with machine(service, vm, blockdev(chain)) as qemu:
        again = service.started(vm, flags=["active"], on_ready="pivot")
        assert service.wait_for_job(again["id"])["state"] == "completed"
        qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


# Its socket ----------------------------------------------------------------------------------------------------------


def test_the_socket_is_removed(service: Service, vm: str, chain: Chain) -> None:
    """A QEMU whose socket's file is removed goes on to be served as long as it runs."""
    with machine(service, vm, blockdev(chain)) as qemu:
        job = crawling(service, vm)
        qemu.monitor.unlink()
        # Once a newer socket has been noticed, so has this one's end.
        with machine(service, f"{vm}-later", []):
            found = service.client.get(f"/domains/{vm}").json()
            assert (found["state"], found["qemu"]["pid"]) == ("paused", qemu.pid)
            assert service.job(job["id"])["state"] == "running"
            assert post(service, job, "pause").status_code == 202
            service.wait_for_job(job["id"], "paused")
            assert post(service, job, "resume").status_code == 202
            finish_by_service(service, job)
        assert service.client.get(f"/domains/{vm}").json()["state"] == "paused"
        assert in_qemu(qemu) == []
        assert [image.exists() for image in chain.images] == [True, False, False, False, True]
        qemu.quit()
    assert_same(read_image(chain.active), chain.view)


def finish_by_service(service: Service, job: JSON) -> None:
    assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    assert service.wait_for_job(job["id"])["state"] == "completed"


@pytest.mark.parametrize("kind", ["running", "ready"])
def test_another_qemu_while_the_first_one_lives(
    service: Service, vm: str, chain: Chain, second_chain: Chain, *, kind: str
) -> None:
    """A job stays with its QEMU: another one at its socket gets no command for it, and proves nothing of it."""
    other = second_chain
    spare = [part for number in range(5) for part in ("-blockdev", f"driver=null-co,node-name=n{number}")]
    with machine(service, vm, blockdev(chain)) as first:
        job = crawling(service, vm) if kind == "running" else ready(service, vm)
        with Qemu(first.monitor, [*blockdev(other, "o"), *spare]) as second:
            # The connection that stands goes on.
            assert service.client.get(f"/domains/{vm}").json()["qemu"]["pid"] == first.pid
            service.kill()
            service.start()
            service.wait_for_domain(vm)
            found = service.client.get(f"/domains/{vm}").json()
            assert (found["qemu"]["pid"], files(service, vm)) == (second.pid, other.files)
            for answer in (post(service, job, "pivot"), service.client.delete(f"/jobs/{job['id']}")):
                expected = {"monitor-unreachable"} if kind == "ready" else {"monitor-unreachable", "job-not-pivotable"}
                assert answer.json()["code"] in expected
            answer = service.commit(vm, flags=["active"])
            assert (answer.status_code, answer.json()["job"]) == (409, job["id"])
            if kind == "running":
                finish(first, job)
            assert service.job(job["id"])["state"] == kind
            first.kill()
            ended = service.wait_for_job(job["id"])
            if kind == "running":
                assert (ended["state"], ended["result"]["chain"]) == ("completed", [chain.at(0), chain.at(4)])
                # Nobody can ask any more whether all of them is in the base on the disk.
                assert [left["file"] for left in ended["result"]["not_deleted"]] == chain.files[1:4]
            else:
                # Nobody has heard it to its end: another client may have had it pivot.
                assert (ended["state"], ended["error"]["code"]) == ("lost", "outcome-unknown")
                assert ended["result"]["chain"] == chain.files
            assert in_qemu(second) == []
            nodes = {node["node-name"] for node in second.qmp("query-named-block-nodes", flat=True)}
            assert {f"n{number}" for number in range(5)} <= nodes
            assert files(service, vm) == other.files
            done = service.started(vm, flags=["active"], on_ready="pivot")
            assert service.wait_for_job(done["id"])["state"] == "completed"
            second.quit()
    assert_same(read_image(chain.active), chain.view)
    assert_same(read_image(other.images[0]), other.view)


# Its files -----------------------------------------------------------------------------------------------------------


MOUNT = 'mount --bind "$0" "$1" && shift && exec "$@"'


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("away", [True, False], ids=["away", "there"])
def test_files_of_a_qemu_with_mounts_of_its_own(
    service: Service, vm: str, chain: Chain, tmp_path: Path, *, away: bool
) -> None:
    """Files that are called as those of a QEMU with other mounts are neither deleted nor taken for its own."""
    seen = chain.images[0].parent
    own = tmp_path / "own"
    shutil.copytree(seen, own)
    # By its header, the host's own image looks as if the merge had been done.
    rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "l0.qcow2", "-F", "qcow2", str(chain.active)]
    subprocess.run(rebase, check=True)
    before = {image.name: image.read_bytes() for image in chain.images}
    within = ("unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNT, str(own), str(seen))
    with machine(service, vm, blockdev(chain), within=within) as qemu:
        job = crawling(service, vm)
        if away:
            service.kill()
            qemu.kill()
            service.start()
            ended = service.wait_for_job(job["id"])
            assert (ended["state"], ended["error"]["code"]) == ("lost", "outcome-unknown")
            assert ended["result"]["deleted"] == []
        else:
            finish_by_service(service, job)
            assert service.job(job["id"])["result"]["deleted"] == chain.files[1:4]
            assert sorted(file.name for file in own.iterdir()) == ["l0.qcow2", "l4.qcow2"]
            qemu.quit()
            assert_same(read_image(own / "l4.qcow2"), chain.view)
    assert {image.name: image.read_bytes() for image in chain.images} == before


def test_a_file_that_has_come_under_the_name(service: Service, vm: str, chain: Chain, tmp_path: Path) -> None:
    """A file that was put in the place of one that QEMU has open is somebody else's: it is left."""
    with machine(service, vm, blockdev(chain)) as qemu:
        job = crawling(service, vm)
        chain.images[2].rename(tmp_path / "moved")
        chain.images[2].write_text("precious")
        finish_by_service(service, job)
        result = service.job(job["id"])["result"]
        assert result["deleted"] == [chain.at(1), chain.at(3)]
        assert [item["file"] for item in result["not_deleted"]] == [chain.at(2)]
        assert chain.images[2].read_text() == "precious"
        qemu.quit()
    assert_same(read_image(chain.active), chain.view)


# QEMU hangs ----------------------------------------------------------------------------------------------------------


class Relay:
    """Passes QMP on from a TCP port to QEMU's socket, each message for which `before` returns true."""

    def __init__(self, monitor: Path, before: Callable[[bytes], bool]) -> None:
        self._monitor = monitor
        self._before = before
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> str:
        self._threads[0].start()
        return self.address

    def __exit__(self, *_args: object) -> None:
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                qemu = socket.socket(socket.AF_UNIX)
                self._open += [client, qemu]
                qemu.connect(str(self._monitor))
                for source, target, check in ((client, qemu, self._before), (qemu, client, None)):
                    self._threads.append(threading.Thread(target=self._pass, args=(source, target, check)))
                    self._threads[-1].start()

    def _pass(self, source: socket.socket, target: socket.socket, check: Callable[[bytes], bool] | None) -> None:
        with suppress(OSError):
            # The service sends one message at a time, without a line's end.
            while message := source.recv(1 << 20):
                if check is None or check(message):
                    target.sendall(message)
            target.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("arrives", [True, False], ids=["late", "never"])
def test_the_command_that_starts_a_job_is_not_answered(
    service: Service, vm: str, chain: Chain, tmp_path: Path, *, arrives: bool
) -> None:
    """Whether QEMU got the command is unknown then, and not a failure: it is found out, and there is one job."""
    starts: list[bytes] = []

    def before(message: bytes) -> bool:
        if b'"block-commit"' not in message:
            return True
        starts.append(message)
        if len(starts) == 1 and arrives:
            qemu.pause()
        return arrives or len(starts) > 1

    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu, Relay(qemu.monitor, before) as address:
        assert service.client.put(f"/domains/{vm}", json={"qmp": {"tcp": address}}).status_code == 201
        service.wait_for_domain(vm)
        job = service.started(vm, **INNER)
        assert (job["state"], job["error"]) == ("starting", None)
        if arrives:
            found = service.wait_for_domain(vm, "unreachable")
            assert found["error"]["code"] == "monitor-unreachable"
            assert service.job(job["id"])["state"] == "starting"
            qemu.wake()
        done = service.wait_for_job(job["id"])
        assert (done["state"], done["error"], len(starts)) == ("completed", None, 1 if arrives else 2)
        assert types(service, job) == ["job.queued", "job.started", "job.completed"]
        service.wait_for_domain(vm)
        assert (in_qemu(qemu), files(service, vm)) == ([], [chain.at(0), chain.at(4)])
        qemu.quit()
        until(lambda: service.client.delete(f"/domains/{vm}").status_code == 204)
    assert_same(read_image(chain.active), chain.view)


@pytest.mark.parametrize("stage", ["running", "pivoting", "aborting"])
def test_qemu_hangs(service: Service, vm: str, chain: Chain, second_chain: Chain, *, stage: str) -> None:
    """A stopped QEMU's job is where it was, others work on; what was asked of it meanwhile is done once it wakes."""
    other = second_chain
    fine = f"{vm}-fine"
    with machine(service, vm, blockdev(chain)) as qemu, machine(service, fine, blockdev(other)) as second:
        job = crawling(service, vm) if stage == "running" else ready(service, vm)
        qemu.pause()
        if stage == "pivoting":
            assert post(service, job, "pivot").status_code == 202
        elif stage == "aborting":
            assert service.client.delete(f"/jobs/{job['id']}").status_code == 202
        done = service.started(fine, flags=["active"], on_ready="pivot")
        assert service.wait_for_job(done["id"])["state"] == "completed"
        found = service.wait_for_domain(vm, "unreachable", seconds=60)
        assert found["error"]["code"] == "monitor-unreachable"
        assert service.job(job["id"])["state"] == stage
        answer = service.commit(vm, **INNER)
        assert (answer.status_code, answer.json()["code"]) == (503, "monitor-unreachable")
        qemu.wake()
        if stage == "running":
            service.wait_for_domain(vm)
            finish_by_service(service, job)
        ended = service.wait_for_job(job["id"])
        assert (ended["state"], ended["error"]) == ("canceled" if stage == "aborting" else "completed", None)
        assert len(types(service, job)) == len(set(types(service, job)))
        assert in_qemu(qemu) == []
        left = {"running": [chain.at(0), chain.at(4)], "pivoting": [chain.at(4)], "aborting": chain.files}[stage]
        service.wait_for_domain(vm)
        assert files(service, vm) == left
        qemu.quit()
        second.quit()
    assert_same(read_image(left[0]), chain.view)
    assert_same(read_image(other.images[0]), other.view)
