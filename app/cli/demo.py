"""`blockjobd demo`: a real QEMU loses layers of its chain through HTTP, and every byte of its disk is verified."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import httpx
from httpx_sse import connect_sse
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from app.api.schemas import DiskOut, DomainOut, JobOut
from app.cli.stage import (
    DOMAIN,
    MIB,
    START,
    DemoFailed,
    DemoMonitor,
    check_tools,
    compare,
    expected_disk,
    fixed_directory,
    fresh_directory,
    last_words,
    make_chain,
    qemu,
    service,
)
from app.core.states import State

FOLDER: Final = Path("/tmp/blockjobd-demo")  # noqa: S108 - made for its owner only, and refused if it is another's
PORT: Final = 8470
DISK: Final = f"/domains/{DOMAIN}/disks/vda"

LIMIT: Final = 180
"""Seconds after which a demo that has not verified its disk gives up."""

ACTIVE: Final = '{"flags": ["active"]}'
PIVOT: Final = '{"flags": ["active"], "on_ready": "pivot", "bandwidth": 4}'


def curl_lines(url: str, token_file: Path) -> tuple[str, ...]:
    """What to try against the demo at `url`: lines for a shell."""
    curl = 'curl -s -H "Authorization: Bearer $TOKEN"'
    send = f"{curl} -H 'Content-Type: application/json'"
    return (
        f"TOKEN=$(cat {token_file})",
        f"{curl} {url}/domains",
        f"{curl} {url}{DISK}",
        f"{send} -d '{ACTIVE}' '{url}{DISK}/commit?dry_run=true'",
        f"{send} -d '{PIVOT}' {url}{DISK}/commit",
        f"{curl} '{url}/jobs?domain={DOMAIN}'",
    )


def run(*, once: bool, port: int | None) -> None:
    """Show it all; `once`: and return after the verification. Raises `DemoFailed`."""
    check_tools()
    console = Console()
    with _signals(), ExitStack() as stack:
        started = time.monotonic()
        if port is not None or not once:
            _check_port(port or PORT)
        folder = stack.enter_context(fresh_directory() if once else fixed_directory(FOLDER))
        sockets = folder / "qmp"
        sockets.mkdir()
        listen = f"unix:{folder}/api.sock" if once and port is None else f"127.0.0.1:{port or PORT}"

        console.print("Writing four layers with known data", highlight=False)
        expected = expected_disk()
        image = make_chain(folder)
        vm, monitor = stack.enter_context(qemu(image, folder, sockets))
        api = stack.enter_context(service(folder, sockets, listen))
        client = stack.enter_context(_client(listen))
        _wait_for(client, api, folder)
        story = _Story(console, client, monitor, folder, expected)
        compared = story.tell(to_the_end=once)
        signal.alarm(0)
        verified = f"verified {compared} bytes in {time.monotonic() - started:.1f} s"
        if once:
            # Everything is tidied before the last line says that all is well.
            stack.close()
            print(verified)  # noqa: T201 - for programs to read, so without rich
            return
        print(verified)  # noqa: T201
        print(f"\nThe demo stays up until Ctrl-C; its files are in {folder}. To try next:\n")  # noqa: T201
        print("\n".join(curl_lines(f"http://{listen}", folder / "state" / "token")), flush=True)  # noqa: T201
        _stay(vm, api, folder)


@contextmanager
def _signals() -> Generator[None]:
    """SIGTERM is taken as Ctrl-C is, so that processes and files are tidied; the alarm ends what takes too long."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def too_late(_number: int, _frame: FrameType | None) -> None:
        raise DemoFailed(f"not done after {LIMIT} s")

    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGALRM)]
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before:
            signal.signal(number, handler)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
            raise DemoFailed(f"port {port} on 127.0.0.1: {reason}; choose another one with --port") from error


@contextmanager
def _client(listen: str) -> Generator[httpx.Client]:
    unix = listen.removeprefix("unix:") if listen.startswith("unix:") else None
    transport = httpx.HTTPTransport(uds=unix)
    base_url = "http://blockjobd" if unix else f"http://{listen}"
    # An event stream says something every 15 s at least.
    with httpx.Client(transport=transport, base_url=base_url, timeout=30, trust_env=False) as client:
        yield client


def _wait_for(client: httpx.Client, api: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the service answers and has found the domain's disk."""
    token = folder / "state" / "token"
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and api.poll() is None:
        try:
            if client.get("/readyz").is_success:
                client.headers["Authorization"] = f"Bearer {token.read_text(encoding='utf-8').strip()}"
                answer = client.get(f"/domains/{DOMAIN}")
                if answer.is_success and DomainOut.model_validate_json(answer.content).disks:
                    return
        except (httpx.TransportError, FileNotFoundError):
            pass
        time.sleep(0.05)
    raise DemoFailed(f"the service did not get ready; its last words: {last_words(folder / 'service.log')}")


def _stay(vm: subprocess.Popen[bytes], api: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        while vm.poll() is None and api.poll() is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        return
    name = "qemu" if vm.poll() is not None else "service"
    raise DemoFailed(f"{name} has ended: {last_words(folder / f'{name}.log')}")


@dataclass(frozen=True, slots=True)
class _Story:
    """The acts of the demo, told on the console while they happen."""

    console: Console
    client: httpx.Client
    monitor: DemoMonitor
    folder: Path
    expected: bytes

    def tell(self, *, to_the_end: bool) -> int:
        """Merge two layers in the middle and, `to_the_end`, the active one too; how many bytes were compared."""
        domain = DomainOut.model_validate_json(self._ask("GET", f"/domains/{DOMAIN}"))
        running = f"QEMU {domain.qemu.version} (pid {domain.qemu.pid})" if domain.qemu else "QEMU"
        self.console.print(f"{running} runs the domain {domain.id}", highlight=False)
        self._show_chain("The chain, active layer first")
        self._merge("s2 and s1", {"top": "vda[1]", "base": "vda[3]", "bandwidth": 10}, left=("s3", "base"))
        compared = self._verify()
        if to_the_end:
            active = {"flags": ["active"], "on_ready": "pivot", "bandwidth": 16}
            self._merge("the active layer s3", active, left=("base",))
            compared += self._verify()
        return compared

    def _ask(self, method: str, path: str, body: object = None) -> bytes:
        answer = self.client.request(method, path, json=body)
        if not answer.is_success:
            raise DemoFailed(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.content

    def _disk(self) -> DiskOut:
        return DiskOut.model_validate_json(self._ask("GET", DISK))

    def _show_chain(self, title: str) -> None:
        table = Table(title=title, title_justify="left")
        for heading in ("", "layer", "format", "backing", "virtual", "on disk"):
            table.add_column(heading, justify="right" if heading in ("virtual", "on disk") else "left", no_wrap=True)
        for layer in self._disk().chain:
            sizes = [f"{size / MIB:.0f} MiB" for size in (layer.virtual_size, layer.actual_size)]
            table.add_row(f"vda[{layer.index}]", Path(layer.file).name, layer.format, layer.backing or "", *sizes)
        self.console.print(table)

    def _merge(self, what: str, body: Mapping[str, object], *, left: tuple[str, ...]) -> None:
        self.console.print(
            f"Merging {what} into base: POST {DISK}/commit {json.dumps(body)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        job = JobOut.model_validate_json(self._ask("POST", f"{DISK}/commit", body))
        with self._progress(job) as show, connect_sse(self.client, "GET", f"/jobs/{job.id}/events") as stream:
            if not stream.response.is_success:
                raise DemoFailed(f"the job's events: {stream.response.status_code} {stream.response.read().decode()}")
            for event in stream.iter_sse():
                show(JobOut.model_validate(json.loads(event.data)["data"]))
        job = JobOut.model_validate_json(self._ask("GET", f"/jobs/{job.id}"))
        if job.state is not State.COMPLETED:
            raise DemoFailed(f"the job {job.id} is {job.state}: {job.error.detail if job.error else 'no reason given'}")
        self._show_chain("The chain now")
        chain = tuple(Path(layer.file).stem for layer in self._disk().chain)
        if chain != left:
            raise DemoFailed(f"the chain is {', '.join(chain)}; it should be {', '.join(left)}")

    @contextmanager
    def _progress(self, job: JobOut) -> Generator[Callable[[JobOut], None]]:
        if not self.console.is_terminal:

            def tell(seen: JobOut) -> None:
                progress = seen.progress
                self.console.print(
                    f"  {seen.state:<10} {progress.percent:5.1f} %  "
                    f"{progress.current / MIB:5.1f} of {progress.end / MIB:.1f} MiB  {progress.rate / MIB:.1f} MiB/s",
                    highlight=False,
                )

            yield tell
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(None),
            TextColumn("{task.percentage:5.1f} %"),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[rate]:5.1f} MiB/s"),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(job.state, total=None, rate=0.0)

            def draw(seen: JobOut) -> None:
                progress = seen.progress
                bar.update(
                    task,
                    description=seen.state,
                    completed=progress.current,
                    total=progress.end or None,
                    rate=progress.rate / MIB,
                )

            yield draw

    def _verify(self) -> int:
        layer = self._disk().chain[0]
        compared = compare(self.monitor.read_disk(layer.node, self.folder), self.expected)
        self.console.print(f"The guest's disk: {compared} bytes read, each as it has to be\n", highlight=False)
        return compared
