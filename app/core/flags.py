"""Flags of requests, as names and as libvirt's bitmasks, and the bandwidth whose unit a flag decides."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag
from typing import Final, TypeVar

from app.core.errors import Problem, invalid, invalid_together

BANDWIDTH_MAX: Final = 2**63 - 1
"""The fastest speed that QEMU takes, in bytes a second: `speed` is an int64 in QAPI."""

MIB: Final = 1 << 20

F = TypeVar("F", bound=IntFlag)


def flag_names(flags: IntFlag) -> list[str]:
    """The names of the flags that are set, in the order of their bits."""
    return [flag.name.lower() for flag in type(flags) if flag in flags and flag.name]


def names_of(flags: type[IntFlag]) -> list[str]:
    """Every name that a kind of request knows, in the order of the bits."""
    return [flag.name.lower() for flag in flags if flag.name]


def parse_flags(value: int | Sequence[str], known: type[F], *, pointer: str = "/flags") -> F | Problem:
    """Flags from their names or from their bitmask; a `Problem` for one that `known` does not have."""
    by_name = {flag.name.lower(): flag for flag in known if flag.name}
    expected = ", ".join(f"{name} ({flag.value})" for name, flag in by_name.items())
    if isinstance(value, int):
        unknown = value & ~sum(by_name.values())
        if value < 0 or unknown:
            shown = str(value) if value < 0 else f"0x{unknown:x}"
            return invalid(pointer, f"unknown bits {shown}; expected a sum of {expected}")
        return known(value)
    flags = known(0)
    wrong: list[Problem] = []
    for position, name in enumerate(value):
        flag = by_name.get(name)
        if flag is None:
            wrong.append(invalid(f"{pointer}/{position}", f"unknown flag {name!r}; expected one of {expected}"))
        else:
            flags |= flag
    return invalid_together(wrong) if wrong else flags


def bandwidth_in_bytes(value: int, *, in_bytes: bool) -> int | Problem:
    """A bandwidth as the caller gave it (MiB/s, or bytes/s where `in_bytes`) in bytes/s; 0 is no limit."""
    unit, scale = ("bytes/s", 1) if in_bytes else ("MiB/s", MIB)
    if not 0 <= value <= BANDWIDTH_MAX // scale:
        return invalid("/bandwidth", f"{value} {unit} is out of range; expected 0 to {BANDWIDTH_MAX // scale} {unit}")
    return value * scale


class SpeedFlag(IntFlag):
    """The flag of a request that changes a job's speed."""

    BANDWIDTH_BYTES = 16
    """`bandwidth` is in bytes a second, not in MiB a second."""
