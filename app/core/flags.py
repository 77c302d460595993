"""The flags of a block commit, as names and as libvirt's bitmask (virDomainBlockCommitFlags)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

from app.core.errors import Problem, invalid, invalid_together

BANDWIDTH_MAX = 2**63 - 1
"""The fastest speed that QEMU takes, in bytes a second: `speed` is an int64 in QAPI."""

MIB = 1 << 20


class CommitFlag(IntFlag):
    """libvirt's flags, with libvirt's bits."""

    SHALLOW = 1
    """Without `base`: merge into the layer right below `top` only."""
    DELETE = 2
    """Unlink the files that the merge has made worthless, once it is proven."""
    ACTIVE = 4
    """Says that the caller knows that `top` is the active layer, and that the job ends in a pivot."""
    RELATIVE = 8
    """Keep the names in image headers relative."""
    BANDWIDTH_BYTES = 16
    """`bandwidth` is in bytes a second, not in MiB a second."""


NAMES = {flag.name.lower(): flag for flag in CommitFlag if flag.name}


ALL_FLAGS = CommitFlag(31)


def flag_names(flags: CommitFlag) -> list[str]:
    """The names of the flags that are set, in the order of their bits."""
    return [name for name, flag in NAMES.items() if flag in flags]


def parse_flags(
    value: int | Sequence[str], *, allowed: CommitFlag = ALL_FLAGS, pointer: str = "/flags"
) -> CommitFlag | Problem:
    """Flags from their names or from their bitmask; a `Problem` for one that is unknown or not in `allowed`."""
    expected = ", ".join(f"{name} ({flag.value})" for name, flag in NAMES.items() if flag in allowed)
    if isinstance(value, int):
        unknown = value & ~allowed.value
        if value < 0 or unknown:
            shown = str(value) if value < 0 else f"0x{unknown:x}"
            return invalid(pointer, f"unknown bits {shown}; expected a sum of {expected}")
        return CommitFlag(value)
    flags = CommitFlag(0)
    wrong: list[Problem] = []
    for position, name in enumerate(value):
        flag = NAMES.get(name)
        if flag is None or flag not in allowed:
            wrong.append(invalid(f"{pointer}/{position}", f"unknown flag {name!r}; expected one of {expected}"))
        else:
            flags |= flag
    return invalid_together(wrong) if wrong else flags


def bandwidth_in_bytes(value: int, flags: CommitFlag) -> int | Problem:
    """A bandwidth as the caller gave it (MiB/s, or bytes/s with `bandwidth_bytes`) in bytes/s; 0 is no limit."""
    unit = "bytes/s" if CommitFlag.BANDWIDTH_BYTES in flags else "MiB/s"
    scale = 1 if CommitFlag.BANDWIDTH_BYTES in flags else MIB
    if not 0 <= value <= BANDWIDTH_MAX // scale:
        return invalid("/bandwidth", f"{value} {unit} is out of range; expected 0 to {BANDWIDTH_MAX // scale} {unit}")
    return value * scale
