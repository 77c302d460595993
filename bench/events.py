"""From QEMU's own event to the last subscriber that has it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from bench.figures import Goal, Picture, Section, Series, Table, mib, ms
from bench.small import disk
from bench.stage import MIB, Stage, image, memory
from tests.support.qemu import Qemu
from tests.support.service import Service

GOALS = {1: 0.005, 100: 0.05, 1000: 0.5}
"""The most seconds that the 99th percentile may be, by the number of subscribers."""

DATA = 64 << 10


@contextmanager
def _listeners(running: Service, count: int) -> Generator[subprocess.Popen[str]]:
    token = (running.state_dir / "token").read_text().strip()
    command = [sys.executable, "-m", "bench.listeners", str(running.socket), token, str(count), "job.ready"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n", "the streams did not open"
            yield process
        finally:
            process.kill()


def _one(running: Service, qemu: Qemu, listeners: subprocess.Popen[str]) -> float:
    """Seconds from the timestamp that QEMU gives its event to when the last subscriber had ours."""
    qemu.events.clear()
    job = running.commit("vm", flags=["active"], on_ready="wait").json()["id"]
    assert listeners.stdout is not None
    heard = float(listeners.stdout.readline())
    qemu.qmp("query-status")
    (ready,) = (event for event in qemu.events if event["event"] == "BLOCK_JOB_READY")
    assert running.client.delete(f"/jobs/{job}").status_code == 202
    ended = running.client.get(f"/jobs/{job}", headers={"Prefer": "wait=20"}).json()
    while ended["state"] == "aborting" or ended["state"] == "ready":
        ended = running.client.get(f"/jobs/{job}").json()
        time.sleep(0.002)
    return heard - (ready["timestamp"]["seconds"] + ready["timestamp"]["microseconds"] / 1e6)


def run(stage: Stage) -> Section:
    """One QEMU whose job is ready again and again, and more and more subscribers."""
    folder = stage.new("chain")
    base = image(folder / "base.qcow2", MIB, data=DATA)
    active = image(folder / "s1.qcow2", MIB, backing=base, data=DATA)
    counts = [1, 10] if stage.short else [1, 100, 1000]
    found: dict[int, Series] = {}
    each: dict[int, float] = {}
    with Service(stage.new("ours")) as running, Qemu(running.qmp_dir / "vm.qmp", disk(active, ("base", "s1"))) as qemu:
        running.wait_for_domain("vm")
        assert running.process is not None
        for count in counts:
            before = memory(running.process.pid)
            with _listeners(running, count) as listeners:
                times = stage.times(200 if count < 1000 else 100, 3)
                # The first is for warming up.
                values = [_one(running, qemu, listeners) for _ in range(times + 1)][1:]
                found[count] = Series(tuple(values))
                each[count] = (memory(running.process.pid) - before) / count
            time.sleep(stage.times(2, 1))
    return _section(found, each)


def _section(found: dict[int, Series], each: dict[int, float]) -> Section:
    rows = [
        [str(count), ms(of.median), ms(of.p95), ms(of.p99), ms(of.worst), str(len(of.values))]
        for count, of in found.items()
    ]
    most = max(each)
    goals = [
        Goal(
            f"{count} subscribers: 99th percentile under {ms(GOALS[count])}",
            ms(of.p99),
            of.p99 < GOALS[count],
        )
        for count, of in found.items()
        if count in GOALS
    ]
    note = (
        "From the timestamp of QEMU's BLOCK_JOB_READY to when the last of the subscribers has read `job.ready`: the "
        f"job is asked for, and its event is on the disk. Memory (PSS) a subscriber, of {most}: {mib(each[most])}."
    )
    return Section(
        name="events",
        title="Events",
        tables=[Table(["subscribers", "median", "p95", "p99", "worst", "events"], rows, note)],
        goals=goals,
        pictures=[
            Picture(
                "bench-events.svg",
                "From QEMU's event to the last subscriber",
                "ms",
                {
                    f"{count} subscribers": {"median": of.median * 1000, "p99": of.p99 * 1000}
                    for count, of in found.items()
                },
                logarithmic=True,
            )
        ],
        figures={
            "seconds": {str(count): of.json() for count, of in found.items()},
            "bytes_each": {str(count): size for count, size in each.items()},
        },
    )
