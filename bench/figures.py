"""What a benchmark has found: series of measured values, tables, goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Row = Sequence[str]
JSON = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one kind, in the order in which they were measured; at least one."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def percentile(self, percent: float) -> float:
        """The value that so many percent of all do not exceed (nearest rank)."""
        return sorted(self.values)[max(0, math.ceil(len(self.values) * percent / 100) - 1)]

    @property
    def p95(self) -> float:
        """The 95th percentile."""
        return self.percentile(95)

    @property
    def p99(self) -> float:
        """The 99th percentile."""
        return self.percentile(99)

    @property
    def worst(self) -> float:
        """The largest value."""
        return max(self.values)

    def json(self) -> JSON:
        """For the file of results: the figures, and every value."""
        return {
            "n": len(self.values),
            "median": self.median,
            "p95": self.p95,
            "p99": self.p99,
            "worst": self.worst,
            "values": [round(value, 6) for value in self.values],
        }


@dataclass(frozen=True, slots=True)
class Goal:
    """Something that was aimed at, and what came of it."""

    aim: str
    found: str
    met: bool

    def json(self) -> JSON:
        """For the file of results."""
        return {"aim": self.aim, "found": self.found, "met": self.met}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header; `note` says how to read it."""

    header: Row
    rows: Sequence[Row]
    note: str = ""

    def markdown(self) -> str:
        """The table as it can stand in a document; all columns but the first are figures."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{text}\n\n{self.note}" if self.note else text


@dataclass(frozen=True, slots=True)
class Picture:
    """Horizontal bars in groups: `bars` maps a group to the bars in it, by their names.

    A bar whose name is empty is labelled with its group alone.
    """

    file: str
    title: str
    unit: str
    bars: Mapping[str, Mapping[str, float]]
    logarithmic: bool = False

    def json(self) -> JSON:
        """For the file of results, from which the picture can be drawn again."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Section:
    """All that one benchmark has to say."""

    name: str
    title: str
    tables: Sequence[Table]
    goals: Sequence[Goal] = ()
    pictures: Sequence[Picture] = ()
    figures: JSON = field(default_factory=dict[str, Any])


def ms(seconds: float) -> str:
    """Seconds as milliseconds, as precise as they are worth."""
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def mib(size: float) -> str:
    """Bytes as MiB."""
    value = size / (1 << 20)
    return f"{value:.0f} MiB" if value >= 100 else f"{value:.1f} MiB" if value >= 1 else f"{value * 1024:.0f} KiB"


def number(value: float) -> str:
    """A value with three digits, or all that stand before the decimal point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
