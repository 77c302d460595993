"""Defects of QEMU, by version, that can lose data in a job; whoever asks for one is told before."""

from __future__ import annotations

from typing import Final

from app.core.kinds.layers import LayersSelection
from app.core.plan import PlanWarning

Version = tuple[int, int, int]

MIRROR_LOSES_WRITES: Final[tuple[tuple[Version, Version], ...]] = (((8, 2, 0), (10, 0, 9)), ((10, 1, 0), (10, 2, 0)))
"""From which version to before which one a mirror may miss what the guest writes in its first instants."""

MIRROR_ADDRESS: Final = "https://bugs.debian.org/1129349"


def known_defects(selection: LayersSelection, version: Version) -> list[PlanWarning]:
    """Defects of that version of QEMU that can lose data in this job."""
    if not selection.active or not any(first <= version < cured for first, cured in MIRROR_LOSES_WRITES):
        return []
    shown = ".".join(str(part) for part in version)
    detail = (
        f"QEMU {shown} may miss what the guest writes in the first instants of a merge of the active layer "
        f"({MIRROR_ADDRESS}), unless its packager has cured it; stop the guest for the start, or update QEMU"
    )
    return [PlanWarning(code="qemu-known-defect", detail=detail)]
