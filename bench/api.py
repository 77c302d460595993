"""Requests a second, next to a route that answers with the same bytes and does nothing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.figures import Goal, Picture, Section, Series, Table, ms
from bench.past import job_id, service_with_past
from bench.small import disk
from bench.stage import MIB, Stage, image
from tests.support.qemu import Qemu
from tests.support.service import Service

JOBS = 100
DOMAINS = 10
CONNECTIONS = 8
DRY = '{"flags": ["active"]}'

SCRIPT = """
wrk.method = "{method}"
wrk.headers["Authorization"] = "Bearer {token}"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{body}'
done = function(summary, latency, requests)
  local e = summary.errors
  local wrong = e.status + e.connect + e.read + e.timeout
  local p99 = latency:percentile(99)
  io.write(string.format("FOUND [%d, %d, %d, %d]\\n", summary.requests, summary.duration, p99, wrong))
end
"""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of both; `rounds` fewer where an answer takes long."""

    name: str
    method: str
    path: str
    body: str = ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _bare(folder: Path) -> Generator[str]:
    port = _free_port()
    process = subprocess.Popen([sys.executable, "-m", "bench.route", str(port), str(folder)])
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "the bare route does not answer"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _load(url: str, script: Path, seconds: float) -> tuple[float, float]:
    """Requests a second, and the 99th percentile of the seconds that one took."""
    said = subprocess.run(
        ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "-s", str(script), url],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    line = next(line for line in said.splitlines() if line.startswith("FOUND "))
    requests, micros, p99, wrong = json.loads(line.removeprefix("FOUND "))
    assert not wrong, said
    return requests / micros * 1e6, p99 / 1e6


def run(stage: Stage) -> Section:
    """Each question to both, in turn."""
    if shutil.which("wrk") is None:
        note = "Not measured: wrk is not installed."
        return Section("api", "The API", [Table(["request"], [], note)])
    port = _free_port()
    past = service_with_past(stage.new("ours"), JOBS)
    service = Service(past.folder, {"BLOCKJOBD_LISTEN": f"127.0.0.1:{port}"})
    service.client.close()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with ExitStack() as stack:
        for number in range(DOMAINS):
            base = image(service.folder / f"b{number}.qcow2", 4 * MIB, data=MIB)
            active = image(service.folder / f"a{number}.qcow2", 4 * MIB, backing=base)
            arguments = disk(active, (f"b{number}", f"a{number}"))
            stack.enter_context(Qemu(service.qmp_dir / f"m{number}.qmp", arguments))
        stack.callback(_stop, service)
        service.launch()
        url = f"http://127.0.0.1:{port}"
        token = _token(service, url)
        asked = [
            _Asked("GET /jobs/{id}", "GET", f"/jobs/{job_id(1)}"),
            _Asked("GET /jobs", "GET", "/jobs"),
            _Asked("GET /domains", "GET", "/domains"),
            _Asked("POST …/commit?dry_run=true", "POST", "/domains/m0/disks/vda/commit?dry_run=true", DRY),
        ]
        answers = stage.new("answers")
        for number, each in enumerate(asked):
            answer = httpx.request(
                each.method,
                url + each.path,
                content=each.body or None,
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
                timeout=30,
            )
            assert answer.status_code == 200, answer.text
            (answers / str(number)).write_bytes(answer.content)
        bare = stack.enter_context(_bare(answers))
        script = stage.folder / "wrk.lua"
        seconds = stage.times(3, 1)
        for turn in range(stage.times(3, 1)):
            for number, each in enumerate(asked):
                script.write_text(SCRIPT.format(method=each.method, token=token, body=each.body))
                contenders = {"blockjobd": url + each.path, "bare route": f"{bare}/{number}"}
                for contender in sorted(contenders, reverse=bool(turn % 2)):
                    made = _load(contenders[contender], script, seconds)
                    found.setdefault(each.name, {}).setdefault(contender, []).append(made)
    return _section(found)


def _token(service: Service, url: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            token = (service.state_dir / "token").read_text().strip()
            answer = httpx.get(f"{url}/domains", headers={"Authorization": f"Bearer {token}"})
            # The domain of the stored past may be listed beside these, as the folder of its images has gone as a whole.
            states = [domain["state"] for domain in answer.json()["items"] if domain["state"] != "shutoff"]
            if states == ["paused"] * DOMAINS:
                return token
        except (OSError, httpx.TransportError):
            pass
        assert time.monotonic() < deadline, service.log()[-2000:]
        time.sleep(0.05)


def _stop(service: Service) -> None:
    if service.process is not None:
        service.stop()


def _section(found: dict[str, dict[str, list[tuple[float, float]]]]) -> Section:
    rows: list[list[str]] = []
    rates: dict[str, dict[str, float]] = {}
    for name, contenders in found.items():
        series = {contender: Series(tuple(rate for rate, _ in made)) for contender, made in contenders.items()}
        rates[name] = {contender: of.median for contender, of in series.items()}
        slow = {contender: Series(tuple(p99 for _, p99 in made)).median for contender, made in contenders.items()}
        rows.append(
            [
                name,
                f"{rates[name]['blockjobd']:.0f}/s",
                f"{rates[name]['bare route']:.0f}/s",
                f"{rates[name]['blockjobd'] / rates[name]['bare route']:.2f}",
                ms(slow["blockjobd"]),
                ms(slow["bare route"]),
            ]
        )
    first = next(iter(rates))
    ratio = rates[first]["blockjobd"] / rates[first]["bare route"]
    note = (
        f"wrk with {CONNECTIONS} connections over loopback, medians of the rounds. The bare route gives the same bytes "
        "on the same server, without token, log, journal and QEMU. A dry run asks QEMU, and has qemu-img read the maps."
    )
    header = ["request", "blockjobd", "bare route", "ratio", "p99", "p99, bare"]
    return Section(
        name="api",
        title="The API",
        tables=[Table(header, rows, note)],
        goals=[Goal(f"{first}: at least 0.6 of the bare route", f"{ratio:.2f}", ratio >= 0.6)],
        pictures=[Picture("bench-api.svg", "Requests a second (median)", "requests/s", rates, logarithmic=True)],
        figures={"requests": {name: dict(contenders) for name, contenders in found.items()}},
    )
