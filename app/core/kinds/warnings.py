"""What the caller should know before a job runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.core.chain import Layer
from app.core.kinds.defects import known_defects
from app.core.kinds.layers import LayersSelection
from app.core.plan import Facts, PlanWarning


def growth_warnings(target: Layer, facts: Facts, grown: int, *, code: str = "base-grows") -> list[PlanWarning]:
    """What the caller should know of the growth of a layer."""
    found: list[PlanWarning] = []
    if grown:
        found.append(PlanWarning(code=code, detail=f"{target.file} may grow by up to {grown} bytes"))
    if facts.free is None and (grown or not facts.written_is_device):
        detail = f"the service can't see how far {target.file} can grow where it is"
        found.append(PlanWarning(code="free-unknown", detail=detail))
    if facts.bytes_to_copy is None:
        detail = "the images' maps were not read; the sizes are what the layers take on disk"
        found.append(PlanWarning(code="size-estimated", detail=detail))
    return found


def merge_warnings(
    selection: LayersSelection, facts: Facts, grown: int, resize: int | None, kept: Mapping[str, str]
) -> list[PlanWarning]:
    """What the caller should know of a merge; `grown` and `resize` (the base's new size, or None) are in bytes."""
    base, layers = selection.base, selection.disk.layers
    filters = [name for layer in layers[selection.top_index + 1 : selection.base_index + 1] for name in layer.filters]
    disk_grows = selection.active and base.virtual_size > layers[0].virtual_size
    found = {
        "base-resized": resize is not None and f"{base.file} becomes {resize} bytes, also if the job is aborted",
        "disk-grows": disk_grows and f"after the pivot the guest sees a disk of {base.virtual_size} bytes",
        "overlays-not-searched": not facts.overlays_searched
        and "there was no time to look at all files of image_roots for overlays that nobody has told of",
        "filters-dropped": filters and f"QEMU drops the filters between the layers: {', '.join(filters)}",
    }
    warnings = [PlanWarning(code=code, detail=str(detail)) for code, detail in found.items() if detail]
    for layer in selection.merged:
        if layer.snapshots:
            detail = f"{layer.file} has {layer.snapshots} internal snapshots, which are no part of what is merged"
            warnings.append(PlanWarning(code="internal-snapshots-lost", detail=detail))
    return (
        growth_warnings(base, facts, grown)
        + warnings
        + _bitmaps_lost(selection.merged, "are no part of what is merged")
        + known_defects(selection, facts.survey.version)
        + [PlanWarning(code="not-deletable", detail=f"{file}: {why}") for file, why in kept.items()]
    )


def _bitmaps_lost(layers: Sequence[Layer], what: str) -> list[PlanWarning]:
    found: list[PlanWarning] = []
    for layer in layers:
        bitmaps = dict.fromkeys((*layer.bitmaps, *filter(None, layer.tracking)))
        if bitmaps:
            detail = f"the dirty bitmaps of {layer.file} {what}: {', '.join(bitmaps)}"
            found.append(PlanWarning(code="bitmaps-lost", detail=detail))
    return found


def pull_warnings(selection: LayersSelection, facts: Facts, grown: int) -> list[PlanWarning]:
    """What the caller should know of a pull; `grown` is in bytes."""
    overlay = selection.overlay
    assert overlay is not None
    beneath = () if selection.below is None else (selection.below,)
    filters = [name for layer in (*selection.merged, *beneath) for name in layer.filters]
    dropped = f"QEMU drops the filters between the layers: {', '.join(filters)}"
    return (
        growth_warnings(overlay, facts, grown, code="top-grows")
        + ([PlanWarning(code="filters-dropped", detail=dropped)] if filters else [])
        + _bitmaps_lost(selection.merged, "are no part of the disk any more")
    )
