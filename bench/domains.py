"""Many domains that nobody works on: what it costs to know them."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.figures import Goal, Picture, Section, Table, mib
from bench.libvirt import Libvirt, libvirt, missing
from bench.small import disk
from bench.stage import MIB, Stage, image, memory, processor_seconds, settle
from tests.support.qemu import Qemu
from tests.support.service import Service

LAYERS = ("base", "active")
REST = 3.0
"""Seconds that pass before the processor time is counted."""


def _template(folder: Path) -> None:
    below = None
    for name in LAYERS:
        below = image(folder / f"{name}.qcow2", 64 * MIB, backing=below, data=MIB)


def _chain(template: Path, folder: Path) -> Path:
    shutil.copytree(template, folder)
    return folder / f"{LAYERS[-1]}.qcow2"


def _idle(pid: int, seconds: float) -> float:
    """The part of a core that a process takes while nothing is asked of it."""
    time.sleep(REST)
    before, begin = processor_seconds([pid]), time.monotonic()
    time.sleep(seconds)
    return (processor_seconds([pid]) - before) / (time.monotonic() - begin)


def _known(running: Service, count: int) -> bool:
    answer = running.client.get("/domains", params={"limit": "1000"})
    assert answer.status_code == 200, answer.text
    domains = answer.json()["items"]
    return len([domain for domain in domains if domain["state"] == "paused"]) == count


class _Found:
    """What one contender was found to take, by the number of domains."""

    def __init__(self) -> None:
        self.start: dict[int, float] = {}
        self.idle: dict[int, float] = {}
        self.memory: dict[int, int] = {}

    def each(self, count: int) -> float:
        """The memory that each domain adds after the first, with which both load most of their code; in bytes."""
        return (self.memory[count] - self.memory[1]) / (count - 1)


def _ours(stage: Stage, template: Path, counts: list[int], seconds: float) -> _Found:
    found = _Found()
    folder = stage.new("ours")
    sockets = Service(folder).qmp_dir
    with ExitStack() as machines:
        for count in counts:
            for number in range(len(list(sockets.glob("*.qmp"))), count):
                active = _chain(template, folder / f"m{number}")
                machines.enter_context(Qemu(sockets / f"m{number}.qmp", disk(active, LAYERS)))
            settle()
            begin = time.perf_counter()
            with Service(folder) as running:
                while not _known(running, count):
                    time.sleep(0.02)
                found.start[count] = time.perf_counter() - begin
                assert running.process is not None
                found.idle[count] = _idle(running.process.pid, seconds)
                found.memory[count] = memory(running.process.pid)
    return found


def _libvirtd(daemon: Libvirt, stage: Stage, template: Path, counts: list[int], seconds: float) -> _Found:
    found = _Found()
    folder = stage.new("theirs")
    there = 0

    def create(number: int) -> None:
        daemon.create(f"m{number}", _chain(template, folder / f"m{number}"))

    for count in counts:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(create, range(there, count)))
        there = count
        settle()
        found.idle[count] = _idle(daemon.process.pid, seconds)
        found.memory[count] = memory(daemon.process.pid)
    return found


def run(stage: Stage) -> Section:
    """One contender after the other: two sets of so many QEMUs would not fit side by side."""
    template = stage.new("template")
    _template(template)
    counts = [0, 1, 3] if stage.short else [0, 1, 50, 200]
    seconds = 1.0 if stage.short else 10.0
    found = {"blockjobd": _ours(stage, template, counts, seconds)}
    why_not = missing()
    if not why_not:
        with libvirt(stage.new("libvirt")) as daemon:
            found["libvirtd"] = _libvirtd(daemon, stage, template, counts, seconds)
    return _section(found, counts, why_not)


def _section(found: dict[str, _Found], counts: list[int], why_not: str | None) -> Section:
    rows = [
        [
            f"{count}: {contender}",
            f"{of.start[count]:.2f} s" if of.start else "-",
            f"{of.idle[count] * 100:.1f} %",
            mib(of.memory[count]),
            mib(of.each(count)) if count > 1 else "-",
        ]
        for count in counts
        for contender, of in found.items()
    ]
    most = counts[-1]
    ours = found["blockjobd"]
    goals = [
        Goal(f"idle with {most} domains: under 2 % of a core", f"{ours.idle[most] * 100:.1f} %", ours.idle[most] < 0.02)
    ]
    note = (
        "Start: from starting the process until all are known. Memory: PSS of the daemon, without the QEMUs; then what "
        "each domain after the first adds to it."
    )
    if why_not:
        note += f" libvirt was not measured: {why_not}."
    else:
        part = ours.each(most) / found["libvirtd"].each(most)
        goals.append(Goal("memory a domain: under a quarter of libvirtd's", f"{part:.2f} of it", part < 0.25))
    return Section(
        name="domains",
        title="Many domains",
        tables=[Table(["domains", "start", "idle, of a core", "memory", "a domain"], rows, note)],
        goals=goals,
        pictures=[
            Picture(
                "bench-domains.svg",
                f"Memory of the daemon for each of {most} domains",
                "KiB",
                {"a domain": {contender: of.each(most) / 1024 for contender, of in found.items()}},
            )
        ],
        figures={
            "counts": counts,
            "contenders": {
                contender: {"start": of.start, "idle": of.idle, "memory": of.memory} for contender, of in found.items()
            },
        },
    )
