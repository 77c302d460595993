"""Prints what was found, and writes it as JSON and as pictures."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.figures import Picture, Section, number

COLOURS = {"blockjobd": "#1f6feb", "bare script": "#8b949e", "bare route": "#8b949e", "virsh": "#d29922"}
OTHERS = ("#1f6feb", "#2da44e", "#d29922", "#8250df")
# The same picture gives the same file, and text stays text: drawn as outlines it would be most of the file.
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["svg.hashsalt"] = "blockjobd"
mpl.rcParams["font.sans-serif"] = ["DejaVu Sans"]
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def versions() -> Mapping[str, str]:
    """Of everything that the figures depend on."""
    with Path("/proc/cpuinfo").open() as info:
        cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    return {
        "processor": f"{os.cpu_count()} x {cpu}",
        "kernel": platform.release(),
        "QEMU": _said("qemu-system-x86_64", "--version").removeprefix("QEMU emulator version "),
        "libvirt": _said("libvirtd", "--version").rpartition(" ")[2],
        "wrk": _said("wrk", "--version").removeprefix("wrk ").partition(" [")[0],
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        **{name: version(name) for name in ("blockjobd", "fastapi", "uvicorn", "uvloop", "httpx", "qemu.qmp")},
    }


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not there"
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else "unknown"


def markdown(section: Section) -> str:
    """A section as it is printed, and as it can stand in a document."""
    parts = [f"## {section.title}", *[table.markdown() for table in section.tables]]
    if section.goals:
        parts.append(
            "\n".join(f"- {'met' if goal.met else 'NOT MET'}: {goal.aim}: {goal.found}" for goal in section.goals)
        )
    return "\n\n".join(parts) + "\n"


def write_results(path: Path, sections: Sequence[Section], *, seconds: float) -> None:
    """All figures as JSON; sections that were not run keep what is in the file."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results: dict[str, Any] = known.get("sections", {})
    for section in sections:
        results[section.name] = {
            "title": section.title,
            "tables": [
                {"header": list(table.header), "rows": [list(row) for row in table.rows]} for table in section.tables
            ],
            "goals": [goal.json() for goal in section.goals],
            "pictures": [picture.json() for picture in section.pictures],
            **section.figures,
        }
    document = {"versions": versions(), "seconds": round(seconds, 1), "sections": dict(sorted(results.items()))}
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_pictures(path: Path) -> list[Picture]:
    """The pictures of all sections that are in the file of results."""
    results: dict[str, Any] = json.loads(path.read_text())["sections"]
    return [Picture(**picture) for section in results.values() for picture in section["pictures"]]


def write_tables(page: Path, sections: Sequence[Section]) -> None:
    """Put the tables into a page, each between `<!-- bench: NAME -->` and `<!-- end -->`, and the versions likewise."""
    text = page.read_text()
    parts = {section.name: markdown(section).partition("\n\n")[2] for section in sections}
    parts["versions"] = "\n".join(f"- {name}: {said}" for name, said in versions().items()) + "\n"
    for name, part in parts.items():
        begin = f"<!-- bench: {name} -->\n"
        before, mark, after = text.partition(begin)
        if mark:
            text = f"{before}{mark}{part}<!-- end -->{after.partition('<!-- end -->')[2]}"
    page.write_text(text)


def draw(picture: Picture, folder: Path) -> None:
    """Write a picture as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    _figure(picture).savefig(folder / picture.file, metadata=METADATA)


def _figure(picture: Picture) -> Any:
    """The picture as matplotlib's figure, whose stubs are typed in parts only."""
    rows = [(group, name, value) for group, bars in picture.bars.items() for name, value in bars.items()]
    figure: Any = Figure(figsize=(8, 0.9 + 0.34 * len(rows) + 0.2 * len(picture.bars)), layout="constrained")
    axes = figure.subplots()
    at, places, labels = 0.0, list[float](), list[str]()
    before = rows[0][0]
    names = list(dict.fromkeys(name for _, name, _ in rows))
    for group, name, value in rows:
        at += 1.6 if group != before else 1.0
        before = group
        colour = COLOURS.get(name, OTHERS[names.index(name) % len(OTHERS)])
        axes.barh(at, value, color=colour)
        axes.annotate(number(value), (value, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
        places.append(at)
        labels.append(f"{group}: {name}" if name else group)
    axes.set_yticks(places, labels, fontsize=9)
    axes.invert_yaxis()
    if picture.logarithmic:
        axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.margins(x=0.12)
    axes.set_xlabel(picture.unit)
    axes.set_title(picture.title, fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
