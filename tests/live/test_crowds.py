"""Clients without end and monitors without measure hurt nobody but themselves."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.live.conftest import NewChain
from tests.live.test_peers import GREETING, MIB, Peer, Talk, answers, event, eventually, requests, status_of, usual
from tests.support.chains import CLUSTER, Chain, blockdev, write_guest
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=8 * MIB, data=48 * CLUSTER)]


@pytest.fixture
def alone(folder: Path) -> Iterator[Service]:
    """A service of this test alone."""
    with Service(folder / "service") as running:
        yield running


@pytest.fixture
def vm(alone: Service, folder: Path, new_chain: NewChain) -> Iterator[tuple[Qemu, Chain]]:
    """A real QEMU that the service knows as `vm`."""
    chain = new_chain(folder / "images")
    with Qemu(alone.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
        alone.wait_for_domain("vm")
        yield qemu, chain


def answered(url: Callable[[], httpx.Response], seconds: float = 5) -> None:
    """It answers with 200 in that time, several times in a row."""
    for _ in range(5):
        began = time.monotonic()
        assert url().status_code == 200
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


def test_readers_hold_up_no_pivot(alone: Service, vm: tuple[Qemu, Chain]) -> None:
    """Sixteen clients read the disks without a pause; a job that is ready is pivoted all the same."""
    _, chain = vm
    over = threading.Event()
    counts: list[int] = []

    def read() -> None:
        count = 0
        while not over.is_set():
            assert reader.get("/domains/vm/disks").status_code == 200
            count += 1
        counts.append(count)

    reader = alone.as_role("read")
    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        job = alone.started("vm", flags=["active"], on_ready="pivot")
        alone.wait_for_job(job["id"], "completed", seconds=15)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        reader.close()
    assert len(counts) == 16
    assert min(counts) > 0
    assert [layer["file"] for layer in alone.disk("vm")["chain"]] == [str(chain.images[0])]


def test_a_read_shows_what_was_before_the_question(alone: Service, vm: tuple[Qemu, Chain], folder: Path) -> None:
    """Reads are shared by those only who ask before it begins: after a change nobody sees what was before."""
    qemu, chain = vm
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            reader.get("/domains/vm/disks/vda")

    reader = alone.as_role("read")
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(10):
            overlay = folder / f"snapshot{number}.qcow2"
            qemu.qmp(
                "blockdev-snapshot-sync",
                **{"node-name": alone.disk("vm")["chain"][0]["node"]},
                **{"snapshot-file": str(overlay), "format": "qcow2", "snapshot-node-name": f"s{number}"},
            )
            assert alone.disk("vm")["chain"][0]["file"] == str(overlay)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        reader.close()
    write_guest(qemu, chain.view, 7, 0, CLUSTER)


def many_values(size: int) -> Talk:
    """Answers with an array of empty objects of that many bytes."""
    said = b'{"return": [' + b"{}," * (size // 3) + b'{}], "id": '

    def answer(request: JSON) -> bytes:
        return said + json.dumps(request.get("id")).encode() + b"}\n"

    return answers(answer, "query-status")


@pytest.mark.parametrize("size", [60 * MIB, 15 * MIB], ids=["too-long", "too-many-values"])
def test_an_answer_of_nothing_but_values(alone: Service, vm: tuple[Qemu, Chain], size: int) -> None:
    """Each value takes a hundred times its bytes: it is never made; the service lives, and the next domain works."""
    assert vm[0].pid
    before = status_of(alone, "VmHWM")
    with Peer(alone.qmp_dir / "values.qmp", many_values(size)) as peer:
        eventually(lambda: peer.calls >= 2)
        answered(lambda: alone.client.get("/livez"), seconds=2)
        job = alone.started("vm", top="vda[1]")
        assert alone.wait_for_job(job["id"])["state"] == "completed"
        shown = alone.client.get("/domains/values").json()
        assert shown["state"] == "unreachable"
    assert status_of(alone, "VmHWM") - before < 200 * 1024


def test_an_endless_stream_of_events(alone: Service, vm: tuple[Qemu, Chain]) -> None:
    """Others' jobs go on beside it, and in the end the monitor counts as none."""
    assert vm[0].pid
    said = json.dumps(event("STOP")).encode() + b"\n"

    def talk(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        for request in requests(connection):
            connection.sendall(usual(request))
            if request["execute"] == "query-block":
                while True:
                    connection.sendall(said * 1000)

    with Peer(alone.qmp_dir / "flood.qmp", talk):
        alone.wait_for_domain("flood", "running", "paused", "unreachable")
        time.sleep(1)
        for _ in range(3):
            began = time.monotonic()
            plan = alone.client.post("/domains/vm/disks/vda/commit", params={"dry_run": "true"}, json={"top": "vda[1]"})
            assert plan.status_code == 200, plan.text
            assert time.monotonic() - began < 3
        job = alone.started("vm", top="vda[1]")
        assert alone.wait_for_job(job["id"], seconds=20)["state"] == "completed"


def test_a_monitor_that_comes_and_goes(alone: Service) -> None:
    """It is called less and less often, and few events tell of it."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        for request in requests(connection):
            connection.sendall(usual(request))
            if request["execute"] == "query-named-block-nodes":
                return

    with Peer(alone.qmp_dir / "flaps.qmp", talk) as peer:
        eventually(lambda: peer.calls >= 3)
        time.sleep(8)
        assert peer.calls <= 12


def test_connections_are_bounded(folder: Path) -> None:
    """One more than are served is told so and closed; when another client leaves there is room again."""
    with Service(folder / "service", {"BLOCKJOBD_MAX_CONNECTIONS": "6"}) as service, ExitStack() as stack:
        service.client.close()
        time.sleep(0.2)
        idle = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(6)]
        for each in idle:
            each.connect(str(service.socket))
        time.sleep(0.2)
        with socket.socket(socket.AF_UNIX) as more:
            more.connect(str(service.socket))
            more.settimeout(5)
            said = b""
            while data := more.recv(65536):
                said += data
        head, _, body = said.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in head
        assert json.loads(body)["code"] == "too-many-requests"
        idle.pop().close()
        time.sleep(0.2)
        found = subprocess.run(
            ["curl", "-s", "--unix-socket", str(service.socket), "http://x/livez"], capture_output=True, check=True
        )
        assert json.loads(found.stdout)["status"] == "ok"


def test_the_words_of_another_service(alone: Service) -> None:
    """What listens at a TCP address and is no monitor is not quoted to everybody who may read."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.sendall(b"220 internal.example secret-banner\r\n" * 3)
                    time.sleep(0.2)

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        made = alone.client.put("/domains/tcp", json={"qmp": {"tcp": f"127.0.0.1:{port}"}})
        assert made.status_code == 201, made.text
        eventually(lambda: "no QMP" in alone.client.get("/domains/tcp").text)
        assert "secret" not in alone.client.get("/domains/tcp").text
        server.shutdown(socket.SHUT_RDWR)


NAMES = {"nul": "/a\\u0000b/base.qcow2", "half": "/a\\ud800/base.qcow2", "deep": "/" + "x/" * 300}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_that_no_file_has(alone: Service, folder: Path, name: str) -> None:
    """A header can hold names that no file system has: the disk is refused, and the next request is answered."""
    overlay = folder / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), "8M"], check=True)
    backing = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"' + name + '"}}'
    subprocess.run(
        ["qemu-img", "rebase", "-q", "-u", "-F", "qcow2", "-b", backing, str(overlay)], check=True, capture_output=True
    )
    alone.client.put("/domains/off", json={"disks": {"vda": {"image": str(overlay)}}})
    for _ in range(3):
        found = alone.client.get("/domains/off/disks/vda", timeout=10)
        assert 400 <= found.status_code < 500, found.text
    assert alone.client.get("/readyz").status_code == 200
