"""What stands in the way of taking layers out of a chain, and what the caller should know before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.core.chain import Layer, NotDeleted
from app.core.errors import Code, Problem
from app.core.kinds.layers import LayersSelection
from app.core.plan import Demand, Facts, PlanWarning


def unwritable(target: Layer, facts: Facts) -> Problem | None:
    """Why nothing may be written to a layer: somebody else needs its data, or holds it."""
    if facts.shared_with is not None:
        return Problem(
            code=Code.IMAGE_SHARED,
            detail=f"{target.file} is also a layer of {facts.shared_with}, whose data a merge into it would destroy",
            extra={"file": target.file, "used_by": facts.shared_with},
        )
    if facts.locked:
        return Problem(
            code=Code.IMAGE_LOCKED,
            detail=f"another process has {target.file} open; stop it, then try again",
            extra={"file": target.file},
        )
    return None


def no_room(demand: Demand, free: int | None) -> Problem | None:
    """Why the file system can't take the demand; nothing is refused where its free space can't be seen."""
    if free is None or demand.growth <= free:
        return None
    return Problem(
        code=Code.INSUFFICIENT_STORAGE,
        detail=f"{demand.file} may grow by {demand.growth} bytes, and its file system has {free} free; make space, "
        "or merge fewer layers",
        extra={"needed": demand.growth, "free": free},
    )


def data_files(selection: LayersSelection) -> tuple[NotDeleted, ...]:
    """The files that hold the data of merged images, which a deletion leaves."""
    return tuple(
        NotDeleted(file=layer.data_file, reason=f"it holds the data of {layer.file}, and may hold that of others")
        for layer in selection.merged
        if layer.data_file is not None
    )


def unread_header(selection: LayersSelection, files: Sequence[str], facts: Facts) -> dict[str, str]:
    """Why a deletion leaves the files, where the header that names them today can't be read back."""
    overlay = selection.overlay
    if overlay is None or facts.header.room is not None:
        return {}
    return dict.fromkeys(files, f"the service can't read the header of {overlay.file}, which names it today")


def growth_warnings(target: Layer, facts: Facts, grown: int) -> list[PlanWarning]:
    """What the caller should know of the growth of a layer."""
    found: list[PlanWarning] = []
    if grown:
        found.append(PlanWarning(code="base-grows", detail=f"{target.file} may grow by up to {grown} bytes"))
    if facts.free is None and not facts.written_is_device:
        detail = f"the service can't see the file system of {target.file}"
        found.append(PlanWarning(code="free-unknown", detail=detail))
    if facts.bytes_to_copy is None:
        detail = "the images' maps were not read; the sizes are what the layers take on disk"
        found.append(PlanWarning(code="size-estimated", detail=detail))
    return found


def merge_warnings(
    selection: LayersSelection, facts: Facts, grown: int, resize: int | None, undeletable: Mapping[str, str]
) -> list[PlanWarning]:
    """What the caller should know of a merge; `grown` and `resize` (the base's new size, or None) are in bytes."""
    base, layers = selection.base, selection.disk.layers
    filters = [name for layer in layers[selection.top_index + 1 : selection.base_index + 1] for name in layer.filters]
    disk_grows = selection.active and base.virtual_size > layers[0].virtual_size
    found = {
        "base-resized": resize is not None and f"{base.file} becomes {resize} bytes, also if the job is aborted",
        "disk-grows": disk_grows and f"after the pivot the guest sees a disk of {base.virtual_size} bytes",
        "filters-dropped": filters and f"QEMU drops the filters between the layers: {', '.join(filters)}",
    }
    warnings = [PlanWarning(code=code, detail=str(detail)) for code, detail in found.items() if detail]
    return (
        growth_warnings(base, facts, grown)
        + warnings
        + [PlanWarning(code="not-deletable", detail=f"{file}: {why}") for file, why in undeletable.items()]
    )
