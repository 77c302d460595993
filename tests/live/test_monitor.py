"""The connection to a QMP monitor, with a real QEMU behind it, and with what only pretends to be one."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

from app.core.chain import Disk
from app.core.evidence import Process
from app.core.plan import Guest
from app.drivers.qmp.driver import NEEDED, QmpDriver
from app.drivers.qmp.events import FINAL_REPORTS_MAX, HINTS
from app.drivers.qmp.runner import QmpRunner
from app.engine.ports.driver import Address, Busy, Declined, Unanswered, Unreachable
from app.hostfs.identity import with_files
from app.hostfs.process import own_view, start_time
from tests.support.chains import blockdev, build_chain
from tests.support.qemu import Qemu
from tests.support.service import JSON

pytestmark = pytest.mark.live

MIB = 1 << 20
GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\n'
SHORT = 0.5
"""Seconds of patience, in tests that wait until it is over."""

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
Talk = Callable[[Reader, Writer], Awaitable[None]]
T = TypeVar("T")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a monitor's socket is to be."""
    return tmp_path / "vm.qmp"


@pytest.fixture
def qemu(path: Path) -> Iterator[Qemu]:
    """A QEMU whose monitor is free."""
    with Qemu(path, []) as running:
        yield running


def run(story: Coroutine[Any, Any, T]) -> T:
    """Run a story to its end; it leaves no task behind, and nothing that asyncio would complain of."""

    async def told() -> T:
        complaints: list[JSON] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        result = await story
        await asyncio.sleep(0)
        gc.collect()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert (complaints, left) == ([], set())
        return result

    return asyncio.run(told())


@asynccontextmanager
async def connected(
    path: Path, *, patience: float = 10, hint: Callable[[], None] = lambda: None
) -> AsyncGenerator[QmpRunner]:
    """A monitor that is closed at the end."""
    monitor = await QmpDriver(patience).connect(Address(unix=str(path)), hint)
    try:
        yield monitor
    finally:
        await monitor.close()


@asynccontextmanager
async def pretender(path: Path | None, talk: Talk) -> AsyncGenerator[int]:
    """A server on a unix socket (None: on a TCP port, which it yields) that treats each client as `talk` says."""
    ended: list[asyncio.Event] = []

    async def serve(reader: Reader, writer: Writer) -> None:
        end = asyncio.Event()
        ended.append(end)
        try:
            with suppress(OSError):
                await talk(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            end.set()

    if path is None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
    else:
        server = await asyncio.start_unix_server(serve, path)
    try:
        yield 0 if path else server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for end in ended:
            await end.wait()
        await server.wait_closed()


def test_ended_while_its_disks_are_read(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that ends between its last answer and the look at its files has no disks, rather than disks of no file."""
    chain = build_chain(tmp_path, 2)
    with Qemu(path, blockdev(chain)) as qemu:

        async def story() -> None:
            async with connected(path) as monitor:
                assert all(layer.identity for disk in await monitor.disks() for layer in disk.layers)

                def ends_first(disks: tuple[Disk, ...], process: Process | None) -> tuple[Disk, ...]:
                    qemu.kill()
                    return with_files(disks, process)

                monkeypatch.setattr("app.drivers.qmp.runner.with_files", ends_first)
                with pytest.raises(Unreachable):
                    await monitor.disks()

        run(story())


async def _requests(reader: Reader) -> AsyncGenerator[JSON]:
    """What a client sends: JSON objects, with nothing that ends them."""
    text, decoder = "", json.JSONDecoder()
    while data := await reader.read(65536):
        text += data.decode()
        with suppress(json.JSONDecodeError):
            while text:
                request, end = decoder.raw_decode(text)
                text = text[end:]
                yield request


def like_qemu(answers: Callable[[str], object] | None = None, *, events: bytes = b"") -> Talk:
    """Greets and answers as QEMU would: `answers` gives a command's return, None for no answer at all.

    `events` are sent after the answer to query-status.
    """
    usual: JSON = {
        "qmp_capabilities": {},
        "query-commands": [{"name": name} for name in NEEDED],
        "query-status": {"running": True},
        "query-chardev": [],
        "query-named-block-nodes": [],
    }

    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(GREETING)
        async for request in _requests(reader):
            command = request["execute"]
            value = answers(command) if answers else ...
            reply: JSON = {"return": usual.get(command) if value is ... else value}
            if value is ... and command not in usual:
                reply = {"error": {"class": "CommandNotFound", "desc": f"no {command}"}}
            if reply.get("return", ...) is None:
                continue
            reply |= {"id": request["id"]} if "id" in request else {}
            writer.write(json.dumps(reply).encode() + b"\n")
            if command == "query-status":
                writer.write(events)
            await writer.drain()

    return talk


def open_files() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def reached(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


# Nobody there --------------------------------------------------------------------------------------------------------


def test_no_socket(path: Path) -> None:
    """A socket that is missing is told as such, with its path."""

    async def story() -> None:
        with pytest.raises(Unreachable, match=rf"{path}.*No such file"):
            await QmpDriver(5).connect(Address(unix=str(path)), lambda: None)

    run(story())


def test_nobody_listens(path: Path) -> None:
    """A socket file that a dead process left, and a TCP port that nobody has, are unreachable."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def story() -> None:
        with pytest.raises(Unreachable, match=r"refused"):
            await QmpDriver(5).connect(Address(unix=str(path)), lambda: None)
        with pytest.raises(Unreachable):
            await QmpDriver(5).connect(Address(tcp=("127.0.0.1", port)), lambda: None)

    run(story())


def test_a_host_that_does_not_answer() -> None:
    """A TCP address where no connection comes about is unreachable, not held by another client."""

    async def story() -> None:
        with ExitStack() as stack:
            server = stack.enter_context(socket.socket())
            server.bind(("127.0.0.1", 0))
            server.listen(0)
            # Nobody accepts, so once the queue is full nothing is answered at all.
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(server.getsockname())
            with pytest.raises(Unreachable, match="no connection within"):
                await QmpDriver(SHORT).connect(Address(tcp=server.getsockname()), lambda: None)

    run(story())


def test_another_client_holds_the_monitor(path: Path, qemu: Qemu) -> None:
    """QEMU serves one client a monitor: who comes second gets no greeting, and is told to get a monitor of its own."""
    assert qemu.process.poll() is None

    async def story() -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        assert b"QMP" in await reader.readline()
        begin = time.monotonic()
        with pytest.raises(Busy, match="another client"):
            await QmpDriver(SHORT).connect(Address(unix=str(path)), lambda: None)
        assert SHORT <= time.monotonic() - begin < SHORT + 3
        writer.close()
        await writer.wait_closed()
        # The monitor is free again, also of the attempt that was given up.
        async with connected(path) as monitor:
            assert monitor.connected

    run(story())


def test_a_stopped_process(path: Path, qemu: Qemu) -> None:
    """A QEMU that SIGSTOP holds is not busy but unreachable, and says so; woken up, it takes the next attempt."""

    async def story() -> None:
        qemu.pause()
        with pytest.raises(Unreachable, match=f"{qemu.pid}.*stopped"):
            await QmpDriver(SHORT).connect(Address(unix=str(path)), lambda: None)
        qemu.wake()
        async with connected(path) as monitor:
            assert await monitor.guest() is Guest.PAUSED

    run(story())


# What is no QMP ------------------------------------------------------------------------------------------------------

GARBAGE = {
    "silence": b"",
    "a banner": b"220 mail.example.org ESMTP\r\n",
    "http": b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n",
    "bytes": bytes(range(256)) * 16 + b"\n",
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "nothing": b"\n",
    "an empty object": b"{}\n",
    "an empty greeting": b'{"QMP": {}}\n',
    "a wrong greeting": b'{"QMP": 3}\n',
    "an event": b'{"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 0}}\n',
    "a line without end": b'{"QMP": "' + b"x" * (2 * MIB),
    "deep nesting": b"[" * 100_000 + b"\n",
    "a greeting and garbage": GREETING + b"garbage\n",
    "a greeting and an orphan": GREETING + b'{"return": {}, "id": "nobody"}\n',
    "a greeting and a refusal": GREETING + b'{"error": {"class": "GenericError", "desc": "no"}}\n',
    "two greetings": GREETING + GREETING,
    "a greeting without a version": b'{"QMP": {"version": [], "capabilities": []}}\n{"return": {}}\n',
}


@pytest.mark.parametrize("hang_up", [False, True], ids=["stays", "hangs-up"])
@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_is_no_qmp(path: Path, said: bytes, *, hang_up: bool) -> None:
    """Whatever else listens there, the attempt ends in time as unreachable or busy, and leaves nothing behind."""

    async def talk(reader: Reader, writer: Writer) -> None:
        writer.write(said)
        await writer.drain()
        if not hang_up:
            await reader.read()

    async def story() -> None:
        async with pretender(path, talk):
            begin = time.monotonic()
            # Unanswered: what it said passed for a greeting and an answer to the negotiation.
            with pytest.raises((Unreachable, Busy, Unanswered)):
                await QmpDriver(SHORT).connect(Address(unix=str(path)), lambda: None)
            assert time.monotonic() - begin < SHORT + 3

    run(story())


@pytest.mark.parametrize("command", ["query-commands", "query-uuid", "query-name", "qom-list", "query-chardev"])
@pytest.mark.parametrize("value", [7, "text", [1], {"a": 1}, [{"a": 1}]], ids=str)
def test_answers_that_are_none_of_qemus(path: Path, command: str, value: object) -> None:
    """Who speaks QMP and answers nonsense is unreachable, or taken for a program that lacks what it should have."""

    async def story() -> None:
        async with pretender(path, like_qemu(lambda asked: value if asked == command else ...)):
            with suppress(Unreachable):
                async with connected(path) as monitor:
                    assert monitor.facts.managed_by is None

    run(story())


def test_lack_of_commands_is_told(path: Path) -> None:
    """A program that speaks QMP and is no system emulator is connected, and known for what it lacks."""

    async def story() -> None:
        few = [{"name": "query-commands"}]
        async with (
            pretender(path, like_qemu(lambda command: few if command == "query-commands" else ...)),
            connected(path) as monitor,
        ):
            assert monitor.facts.missing == NEEDED
            assert (monitor.facts.name, monitor.facts.uuid, monitor.facts.managed_by) == (None, None, None)

    run(story())


# A monitor that answers ----------------------------------------------------------------------------------------------


def test_who_answers(tmp_path: Path) -> None:
    """Name, uuid, version and the very process are known once connected; QEMU's refusal is told word for word."""
    path, uuid = tmp_path / "vm.qmp", "4a1b8e9c-8c6f-4a52-8e6d-3a3d5b7f1e00"
    with Qemu(path, ["-uuid", uuid], name="shop") as qemu:

        async def story() -> None:
            async with connected(path) as monitor:
                facts = monitor.facts
                assert (facts.name, facts.uuid, facts.managed_by, facts.missing) == ("shop", uuid, None, ())
                assert facts.process == Process(pid=qemu.pid, started=start_time(qemu.pid), uuid=uuid, view=own_view())
                version = qemu.qmp("query-version")["qemu"]
                assert facts.version == f"{version['major']}.{version['minor']}.{version['micro']}"
                assert await monitor.observe() == {}
                assert await monitor.disks() == ()
                with pytest.raises(Declined, match="bj-none") as declined:
                    await monitor.set_speed("bj-none", 1)
                qmp: Any = declined.value.problem.extra["qmp"]
                assert qmp["class"] == "DeviceNotActive"

        run(story())


@pytest.mark.parametrize(
    ("arguments", "manager"),
    [
        ([], None),
        (["-object", "secret,id=masterKey0,data=c2VjcmV0"], "libvirt"),
        (["-object", "secret,id=other0,data=c2VjcmV0"], None),
        (["-chardev", "null,id=charmonitor"], "libvirt"),
        (["-blockdev", "null-co,node-name=libvirt-1-storage"], "libvirt"),
        (["-blockdev", "null-co,node-name=not-libvirt-1-storage"], None),
    ],
    ids=["plain", "master-key", "other-secret", "monitor", "node", "other-node"],
)
def test_libvirts_own_are_recognised(path: Path, arguments: list[str], manager: str | None) -> None:
    """Each of the traces that libvirt leaves in a QEMU is enough, and nothing else is taken for one."""
    with Qemu(path, arguments):

        async def story() -> None:
            async with connected(path) as monitor:
                assert monitor.facts.managed_by == manager

        run(story())


def test_a_monitor_over_tcp() -> None:
    """A monitor may be at a TCP address; the process behind it is not known then."""

    async def story() -> None:
        async with pretender(None, like_qemu()) as port:
            monitor = await QmpDriver(5).connect(Address(tcp=("127.0.0.1", port)), lambda: None)
            assert await monitor.guest() is Guest.RUNNING
            assert monitor.facts.process.pid is None
            await monitor.close()

    run(story())


def test_hints_tell_that_something_happened(path: Path, qemu: Qemu) -> None:
    """QEMU's events come as hints, and what they are about can be asked."""

    async def story() -> None:
        hints: list[None] = []
        async with connected(path, hint=lambda: hints.append(None)) as monitor:
            assert await monitor.guest() is Guest.PAUSED
            await asyncio.to_thread(qemu.qmp, "cont")
            await reached(lambda: bool(hints))
            assert await monitor.guest() is Guest.RUNNING

    run(story())


def test_a_huge_reply(path: Path) -> None:
    """A reply of 12 MiB is read whole, and the connection goes on to serve."""

    def answers(command: str) -> object:
        return {"running": True, "status": "x" * (12 * MIB)} if command == "query-status" else ...

    async def story() -> None:
        async with pretender(path, like_qemu(answers)), connected(path) as monitor:
            for _ in range(2):
                assert await monitor.guest() is Guest.RUNNING
            assert monitor.connected

    run(story())


def test_thousands_of_events_keep_no_memory(path: Path) -> None:
    """Events cost nothing once they have been seen, however many come; of jobs' ends the last ones are kept."""
    stamp = {"seconds": 1, "microseconds": 2}
    ending = {"type": "commit", "len": 5, "offset": 5, "speed": 0}
    said: list[JSON] = [{"event": "BLOCK_JOB_ERROR", "data": {"device": "x" * 200}, "timestamp": stamp}] * 3000
    said += [
        {"event": "BLOCK_JOB_COMPLETED", "data": ending | {"device": f"job{number}"}, "timestamp": stamp}
        for number in range(2000)
    ]
    # What a job only passes through is no reason to look; what it stops at is.
    said += [
        {"event": "JOB_STATUS_CHANGE", "data": {"id": "x", "status": status}, "timestamp": stamp}
        for status in ["running", "ready", "waiting"] * 1000
    ]
    events = b"".join(json.dumps(event).encode() + b"\n" for event in said)

    async def story() -> None:
        hints = 0

        def hint() -> None:
            nonlocal hints
            hints += 1

        async with pretender(path, like_qemu(events=events)), connected(path, patience=60, hint=hint) as monitor:

            async def flood(times: int) -> None:
                nonlocal hints
                hints = 0
                for _ in range(times):
                    await monitor.guest()
                await reached(lambda: hints == 3000 * times, 60)

            await flood(1)
            gc.collect()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                await flood(2)
                gc.collect()
                grown = tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
            # 12,000 events that were kept would be some 10 MB.
            assert grown < MIB
            assert len(monitor.final_reports) <= FINAL_REPORTS_MAX
            assert monitor.final_reports["job1999"].status == "concluded"
            assert "job0" not in monitor.final_reports

    assert "BLOCK_JOB_ERROR" not in HINTS
    run(story())


# A monitor that answers no more --------------------------------------------------------------------------------------


def test_a_command_without_an_answer(path: Path) -> None:
    """A command that gets no reply in time is told as unanswered, and the connection stays for the next one."""
    silent = True

    def answers(command: str) -> object:
        return None if command == "query-status" and silent else ...

    async def story() -> None:
        nonlocal silent
        async with pretender(path, like_qemu(answers)), connected(path, patience=SHORT) as monitor:
            begin = time.monotonic()
            with pytest.raises(Unanswered, match="query-status"):
                await monitor.guest()
            assert SHORT <= time.monotonic() - begin < SHORT + 3
            assert monitor.connected
            silent = False
            assert await monitor.guest() is Guest.RUNNING

    run(story())


def test_a_process_that_stops_and_goes_on(path: Path, qemu: Qemu) -> None:
    """While QEMU is stopped its commands go unanswered; once it goes on, its late reply confuses nobody."""

    async def story() -> None:
        async with connected(path, patience=SHORT) as monitor:
            qemu.pause()
            with pytest.raises(Unanswered):
                await monitor.guest()
            qemu.wake()
            await asyncio.to_thread(qemu.qmp, "query-status")
            assert monitor.connected
            assert await monitor.guest() is Guest.PAUSED
            assert await monitor.observe() == {}

    run(story())


def test_a_killed_process(path: Path, qemu: Qemu) -> None:
    """The end of QEMU is a hint, the connection shows it, commands are unreachable at once, and so is the process."""

    async def story() -> None:
        hints: list[None] = []
        async with connected(path, hint=lambda: hints.append(None)) as monitor:
            process = monitor.facts.process
            assert QmpDriver(5).alive(process) is True
            qemu.kill()
            await reached(lambda: bool(hints) and not monitor.connected)
            with pytest.raises(Unreachable):
                await monitor.guest()
            assert QmpDriver(5).alive(process) is False

    run(story())


def test_the_end_in_the_middle_of_a_command(path: Path, qemu: Qemu) -> None:
    """A command that waits when the connection ends is told so, long before its time is over."""

    async def story() -> None:
        async with connected(path, patience=60) as monitor:
            qemu.pause()
            waiting = asyncio.create_task(monitor.guest())
            await asyncio.sleep(0)
            qemu.kill()
            with pytest.raises(Unreachable, match="query-status"):
                async with asyncio.timeout(10):
                    await waiting

    run(story())


@pytest.mark.parametrize("how", ["twice", "killed", "stopped", "waiting"])
def test_closing_never_raises(path: Path, qemu: Qemu, how: str) -> None:
    """The connection can be closed in any condition, in time, and nothing is left of it."""

    async def story() -> None:
        monitor = await QmpDriver(60).connect(Address(unix=str(path)), lambda: None)
        waiting: asyncio.Task[Guest] | None = None
        if how == "twice":
            await monitor.close()
        elif how == "killed":
            qemu.kill()
        else:
            qemu.pause()
            if how == "waiting":
                waiting = asyncio.create_task(monitor.guest())
                await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await monitor.close()
        assert not monitor.connected
        if waiting is not None:
            with pytest.raises(Unreachable):
                async with asyncio.timeout(5):
                    await waiting
        qemu.wake() if how in {"stopped", "waiting"} else None

    run(story())


def test_an_attempt_that_is_given_up(path: Path, qemu: Qemu) -> None:
    """An attempt that is canceled in the middle, at whatever point, leaves the monitor to the next client."""
    assert qemu.process.poll() is None

    async def story() -> None:
        for steps in range(12):
            attempt = asyncio.create_task(QmpDriver(5).connect(Address(unix=str(path)), lambda: None))
            for _ in range(steps * 3):
                await asyncio.sleep(0)
            attempt.cancel()
            # QEMU may still be answering the client before; whoever gets that for a greeting tries again, as actors do.
            with suppress(asyncio.CancelledError, Unreachable):
                await (await attempt).close()
        for _ in range(3):
            with suppress(Unreachable):
                async with connected(path) as monitor:
                    assert monitor.connected
                    return
        raise AssertionError("the monitor is not left to the next client")

    run(story())


def test_many_connections_leak_nothing(path: Path, qemu: Qemu) -> None:
    """Connecting again and again, also in vain, keeps no file open."""
    missing = path.with_suffix(".none")

    async def story() -> None:
        async with connected(path):
            pass
        before = open_files()
        for _ in range(20):
            async with connected(path):
                pass
            with pytest.raises(Unreachable):
                await QmpDriver(5).connect(Address(unix=str(missing)), lambda: None)
        await reached(lambda: open_files() <= before)

    assert qemu.process.poll() is None
    run(story())
