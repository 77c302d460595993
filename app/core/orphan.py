"""A block job of ours that the journal does not know, after the journal was restored from a backup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from app.core.chain import Disk, Layer

UNKNOWN: Final = "unknown"
"""Who has requested a job whose record is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanJob:
    """A job as QEMU's block graph shows it.

    `job_type` is QEMU's name of its kind (QAPI `JobType`), `held` the nodes that the job itself holds, by the role
    that QEMU gives them. `disks` are the domain's disks as they are now, `loose` the layers that the job holds and no
    chain has any more, by node. `speed` is in bytes/s.
    """

    job_type: str
    speed: int
    disks: tuple[Disk, ...]
    held: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    loose: Mapping[str, Layer] = field(default_factory=dict[str, Layer])
