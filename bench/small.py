"""A small merge: from sending the request to knowing that it is done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import uvloop

from bench import bare
from bench.client import client
from bench.figures import Goal, Picture, Section, Series, Table, ms
from bench.libvirt import Libvirt, libvirt, missing
from bench.stage import MIB, Stage, image, settle
from tests.support.qemu import Qemu
from tests.support.service import Service

LAYER = 8 * MIB
SIZE = 64 * MIB
LAYERS = ("base", "s1", "s2")

KINDS = {"below the active layer": False, "active layer, with pivot": True}
"""Whether it is the active layer that is merged. Then 16 MiB are copied, else 8."""


def _template(folder: Path) -> None:
    below = None
    for number, name in enumerate(LAYERS):
        below = image(folder / f"{name}.qcow2", SIZE, backing=below, at=number * LAYER, data=LAYER, pattern=number + 1)


def _copy(template: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in LAYERS:
        shutil.copy(template / f"{name}.qcow2", folder)
    settle()
    return folder / f"{LAYERS[-1]}.qcow2"


def disk(active: Path, layers: Sequence[str]) -> list[str]:
    """The arguments that give QEMU a disk whose nodes have the names of its layers."""
    arguments = list[str]()
    below = None
    for name in layers:
        node = f"driver=qcow2,node-name={name},file.driver=file,file.filename={active.parent / name}.qcow2"
        arguments += ["-blockdev", f"{node},backing={below}" if below else node]
        below = name
    return [*arguments, "-device", f"virtio-blk-pci,drive={below},id=virtio0"]


def _bare(active: Path, socket: Path, *, pivot: bool) -> float:
    async def timed() -> float:
        async with bare.monitor(socket) as monitor:
            begin = time.perf_counter()
            await bare.merge(monitor, device="s2", top="s2" if pivot else "s1", base="base")
            return time.perf_counter() - begin

    with Qemu(socket, disk(active, LAYERS)):
        return uvloop.run(timed())


def _ours(running: Service, name: str, active: Path, *, pivot: bool) -> float:
    body: dict[str, object] = {"flags": ["active"], "on_ready": "pivot"} if pivot else {"top": "vda[1]"}

    async def timed() -> float:
        async with client(running) as asking:
            begin = time.perf_counter()
            await asking.merge(name, body)
            return time.perf_counter() - begin

    with Qemu(running.qmp_dir / f"{name}.qmp", disk(active, LAYERS)):
        running.wait_for_domain(name)
        return uvloop.run(timed())


def _virsh(daemon: Libvirt, name: str, active: Path, *, pivot: bool) -> float:
    layers = [str(active.parent / f"{layer}.qcow2") for layer in LAYERS]
    what = ("--active", "--pivot") if pivot else ("--top", layers[1], "--base", layers[0])
    daemon.create(name, active)
    begin = time.perf_counter()
    daemon.virsh("blockcommit", name, "vda", *what, "--wait")
    taken = time.perf_counter() - begin
    daemon.destroy(name)
    return taken


def run(stage: Stage) -> Section:
    """Three contenders, in turn, each time on a fresh copy of the same chain and in a fresh QEMU."""
    template = stage.new("template")
    _template(template)
    taken: dict[tuple[str, str], list[float]] = {}
    why_not = missing()
    with ExitStack() as stack:
        running = stack.enter_context(Service(stage.new("ours")))
        daemon = None if why_not else stack.enter_context(libvirt(stage.new("libvirt")))
        for number in range(stage.times(15, 1)):
            for kind, pivot in KINDS.items():
                name = f"r{number}{'a' if pivot else 'b'}"
                for contender in ("bare script", "blockjobd", "virsh"):
                    folder = stage.folder / f"{name}-{contender[0]}"
                    active = _copy(template, folder)
                    if contender == "bare script":
                        seconds = _bare(active, folder / "q.qmp", pivot=pivot)
                    elif contender == "blockjobd":
                        seconds = _ours(running, name, active, pivot=pivot)
                    elif daemon is not None:
                        seconds = _virsh(daemon, name, active, pivot=pivot)
                    else:
                        continue
                    taken.setdefault((kind, contender), []).append(seconds)
                    shutil.rmtree(folder)
    return _section({key: Series(tuple(values)) for key, values in taken.items()}, why_not)


def _section(taken: dict[tuple[str, str], Series], why_not: str | None) -> Section:
    rows: list[list[str]] = []
    goals: list[Goal] = []
    for kind in KINDS:
        script, ours = taken[kind, "bare script"], taken[kind, "blockjobd"]
        for (of, contender), series in taken.items():
            if of == kind:
                ratio = f"{series.median / script.median:.2f}"
                rows.append([f"{kind}: {contender}", ms(series.median), ms(series.p95), ratio, str(len(series.values))])
        over = ours.median - script.median
        goals.append(Goal(f"{kind}: at most 10 ms over the bare script", ms(over), over <= 0.010))
        if (kind, "virsh") in taken:
            times = taken[kind, "virsh"].median / ours.median
            goals.append(Goal(f"{kind}: at least 10 times faster than virsh", f"{times:.1f} times", times >= 10))
    note = "From sending the request to knowing that it is done; three layers of 8 MiB."
    if why_not:
        note += f" libvirt was not measured: {why_not}."
    bars = {
        kind: {contender: series.median * 1000 for (of, contender), series in taken.items() if of == kind}
        for kind in KINDS
    }
    return Section(
        name="small",
        title="A small merge",
        tables=[Table(["merge", "median", "p95", "to bare", "runs"], rows, note)],
        goals=goals,
        pictures=[
            Picture("bench-small.svg", "A small merge, request to outcome (median)", "ms", bars, logarithmic=True)
        ],
        figures={"seconds": {f"{kind}: {contender}": series.json() for (kind, contender), series in taken.items()}},
    )
