"""What listens where a QEMU should, and is none: the service goes on to serve the others, and keeps nothing of it."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from app.drivers.qmp.driver import NEEDED
from tests.support.chains import blockdev, build_chain
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = pytest.mark.live

MIB = 1 << 20
GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\n'
STAMP = {"seconds": 1, "microseconds": 2}
USUAL: JSON = {
    "qmp_capabilities": {},
    "query-commands": [{"name": name} for name in NEEDED],
    "query-status": {"running": True},
    "query-block": [],
    "query-blockstats": [],
    "query-block-jobs": [],
    "query-jobs": [],
    "query-chardev": [],
    "query-named-block-nodes": [],
    "qom-list": [],
}

Talk = Callable[[socket.socket], object]
Answer = Callable[[JSON], bytes]


class Peer:
    """Listens on a unix socket and treats whoever comes as `talk` says, in a thread for each; `calls` counts them."""

    def __init__(self, path: Path, talk: Talk) -> None:
        self.calls = 0
        self._path = path
        self._talk = talk
        self._listener = socket.socket(socket.AF_UNIX)
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink()
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        self._listener.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                self._open.add(connection)
                self.calls += 1
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            self._talk(connection)
        self._open.discard(connection)


def requests(connection: socket.socket) -> Iterator[JSON]:
    """What a client asks: JSON objects, with nothing that ends them."""
    text, decoder = "", json.JSONDecoder()
    while data := connection.recv(65536):
        text += data.decode()
        with suppress(json.JSONDecodeError):
            while text:
                request, end = decoder.raw_decode(text)
                text = text[end:]
                yield request


def says(said: bytes, *, stay: bool = True) -> Talk:
    """Says one thing, and then nothing."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(said)
        while stay and connection.recv(65536):
            pass

    return talk


def usual(request: JSON) -> bytes:
    """What a QEMU without disks would answer."""
    command = request["execute"]
    reply: JSON = {"error": {"class": "CommandNotFound", "desc": f"no {command}"}}
    if command in USUAL:
        reply = {"return": USUAL[command]}
    return json.dumps(reply | {"id": request["id"]} if "id" in request else reply).encode() + b"\n"


def answers(answer: Answer, *commands: str) -> Talk:
    """Greets and negotiates as QEMU does, then gives its own answer to the commands; to all if none are named."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        for request in requests(connection):
            command = request["execute"]
            own = command in commands if commands else command != "qmp_capabilities"
            connection.sendall(answer(request) if own else usual(request))

    return talk


def returns(value: object, *commands: str) -> Talk:
    """Returns something else than QEMU would."""
    return answers(lambda request: json.dumps({"return": value, "id": request.get("id")}).encode() + b"\n", *commands)


def tells(*events: object, times: int = 1) -> Talk:
    """Answers as QEMU does, and sends events once it has been asked for its disks."""
    said = b"".join(json.dumps(event).encode() + b"\n" for event in events) * times
    return answers(lambda request: usual(request) + said, "query-block")


def leaves_sooner_or_later() -> Talk:
    """Hangs up after one command more each time."""
    patience = itertools.cycle(range(len(USUAL) + 4))

    def talk(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        for request, _left in zip(requests(connection), range(next(patience)), strict=False):
            connection.sendall(usual(request))

    return talk


def event(name: object, **data: object) -> JSON:
    """An event of QMP's shape."""
    return {"event": name, "data": data, "timestamp": STAMP}


NO_QEMU: dict[str, Talk] = {
    "silence": says(b""),
    "hangs-up": says(b"", stay=False),
    "long-garbage": says(b"x" * (60 * MIB) + b"\n"),
    "garbage": says(bytes(range(256)) * 64 + b"\n"),
    "half-a-greeting": says(GREETING[:40]),
    "half-and-gone": says(GREETING[:40], stay=False),
    "greeting-alone": says(GREETING),
    "many-greetings": says(GREETING * 1000),
    "no-line-ends": says(b"x" * (80 * MIB)),
    "reply-without-end": answers(lambda _request: b'{"return": "' + b"x" * (80 * MIB), "query-uuid"),
    "wrong-ids": answers(lambda request: usual(request | {"id": "nobody's"})),
    "no-ids": answers(lambda request: usual({"execute": request["execute"]})),
    "no-object": answers(lambda _request: b"[1, 2]\n"),
    "a-number": answers(lambda _request: b"7\n"),
    "neither-return-nor-error": answers(lambda request: json.dumps({"id": request["id"]}).encode() + b"\n"),
    "error-of-no-shape": answers(lambda request: json.dumps({"error": 7, "id": request["id"]}).encode() + b"\n"),
    "deep": answers(lambda _request: b'{"return": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"),
    "no-utf-8": answers(lambda _request: b'{"return": "\xff\xfe\xc3"}\n'),
    "text-for-commands": returns("text", "query-commands"),
    "numbers-for-commands": returns([1, 2], "query-commands"),
    "text-for-disks": returns("text", "query-block"),
    "disks-of-no-shape": returns([{"device": 7, "qdev": [1], "inserted": 3}], "query-block"),
    "status-of-no-shape": returns([], "query-status"),
    "jobs-of-no-shape": returns([{"id": 7}], "query-jobs"),
    "leaves": leaves_sooner_or_later(),
}
"""Nothing of this can be worked with."""

STRANGE: dict[str, Talk] = {
    "huge-replies": returns({"running": True, "status": "x" * (12 * MIB)}, "query-status"),
    "answers-twice": answers(lambda request: usual(request) + usual(request), "query-uuid"),
    "unknown-events": tells(event("NEVER_HEARD_OF", deep={"x": [1, None]}), event("", x=1), times=100),
    "event-without-data": tells({"event": "BLOCK_JOB_COMPLETED", "timestamp": STAMP}),
    "event-of-no-shape": tells(event("BLOCK_JOB_COMPLETED", device=[], len="x", offset={})),
    "event-without-name": tells({"event": [], "timestamp": STAMP}),
    "event-flood": tells(event("BLOCK_JOB_ERROR", device="x"), event("JOB_STATUS_CHANGE", id="x"), times=50_000),
}
"""This can."""


def status_of(service: Service, field: str) -> int:
    """A figure of /proc/PID/status, in KiB."""
    assert service.process is not None
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{service.process.pid}/status").read_text())
    assert found is not None
    return int(found[1])


def open_files(service: Service) -> int:
    """How many files the service has open."""
    assert service.process is not None
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


def eventually(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_monitors_that_are_none(tmp_path: Path) -> None:
    """Many hostile monitors at once: each is shown for what it is, a real domain works on, nothing leaks or grows."""
    chain = build_chain(tmp_path, 4)
    with Service(tmp_path / "service") as service, Qemu(service.qmp_dir / "good.qmp", blockdev(chain)):
        service.wait_for_domain("good")

        def shown() -> dict[str, JSON]:
            return {domain["id"]: domain for domain in service.client.get("/domains").json()["items"]}

        before = open_files(service)
        with ExitStack() as stack:
            peers = {
                name: stack.enter_context(Peer(service.qmp_dir / f"{name}.qmp", talk))
                for name, talk in (NO_QEMU | STRANGE).items()
            }

            def all_seen() -> bool:
                assert service.disk("good")["name"] == "vda"
                now = shown()
                wrong = [name for name in NO_QEMU if name in now and now[name]["state"] in ("unreachable", "busy")]
                right = [name for name in STRANGE if name in now and now[name]["state"] == "running"]
                return len(wrong) == len(NO_QEMU) and len(right) == len(STRANGE)

            eventually(all_seen)
            for name in NO_QEMU:
                # It is tried again and again, and may be connected for a moment.
                eventually(lambda name=name: shown()[name]["error"] is not None)
            job = service.started("good", top="vda[1]")
            assert service.wait_for_job(job["id"])["state"] == "completed"
            eventually(lambda: peers["no-line-ends"].calls >= 3 and peers["leaves"].calls >= 6)
        eventually(lambda: set(shown()) == {"good"})
        eventually(lambda: open_files(service) <= before)
        # A reply may have 64 MiB, and three peers have sent about that at the same time, again and again.
        assert status_of(service, "VmHWM") < 600 * 1024
        assert service.stop() == 0
        for line in service.log().splitlines():
            entry = json.loads(line)
            assert entry["level"] in ("info", "warning"), line
