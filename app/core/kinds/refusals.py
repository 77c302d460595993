"""What stands in the way of taking layers out of a chain, and what the caller should know before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from app.core.chain import Layer, NotDeleted
from app.core.errors import LOCKED, Code, Problem
from app.core.kinds.layers import LayersSelection
from app.core.kinds.naming import DESCRIPTORS
from app.core.plan import Demand, Facts, Guest, Parent

ELSEWHERE: Final = frozenset({Guest.MIGRATING, Guest.INCOMING})
"""States of a guest whose images are another QEMU's."""

GROWING: Final = frozenset({"raw", "qcow2", "qed", "luks"})
"""The formats whose images QEMU makes longer (block_int.h: bdrv_co_truncate)."""


def refused(selection: LayersSelection, facts: Facts) -> Problem | None:
    """The first reason, in the contract's order, why the base must not be written to, or the merge can't end well."""
    return (
        _shared(selection, facts)
        or _migrating(facts)
        or _tracked(selection)
        or _in_use(selection, facts)
        or _unwritable(selection.base, facts)
        or _marked_corrupt((*selection.merged, selection.base))
        or _uncounted(selection.base, Code.IMAGE_CORRUPT)
        or _hidden(selection)
        or _cannot_grow(selection, facts)
        or _overlay(selection, facts)
    )


def pull_refused(selection: LayersSelection, facts: Facts) -> Problem | None:
    """The first reason, in the contract's order, why a pull into the layer above must not write to it, or can't end."""
    overlay = selection.overlay
    assert overlay is not None
    return (
        _locked(overlay, facts)
        or _migrating(facts)
        or _unwritable(overlay, facts)
        or _marked_corrupt((overlay, *selection.merged))
        or _uncounted(overlay, Code.IMAGE_CORRUPT)
        or _hidden(selection)
    )


def _shared(selection: LayersSelection, facts: Facts) -> Problem | None:
    base = selection.base
    used_by = facts.shared_with or next(iter(_readers(selection, facts, selection.base_index)), None)
    if used_by is None:
        others = (_overlays_of(selection, facts, at) for at in range(selection.top_index + 1, selection.base_index))
        used_by = next((name for names in others for name in names), None)
    if used_by is not None:
        return Problem(
            code=Code.IMAGE_SHARED,
            detail=f"{base.file} is also read by {used_by}, whose data a merge into it would destroy"
            + (f"; {facts.shared_because}" if facts.shared_with is not None and facts.shared_because else ""),
            extra={"file": base.file, "used_by": used_by},
        )
    return _locked(base, facts)


def _locked(written: Layer, facts: Facts) -> Problem | None:
    # While the guest is moved, it is the other QEMU that has the lock.
    if not facts.locked or facts.survey.guest in ELSEWHERE:
        return None
    return Problem(
        code=Code.IMAGE_LOCKED,
        detail=f"another process has {written.file} open; stop it, then try again",
        extra={"file": written.file},
    )


def _strangers(selection: LayersSelection, facts: Facts, at: int) -> list[Parent]:
    """Who has the layer at that position below itself, but for what the disk's own chain has above it."""
    layers, parents = selection.disk.layers, facts.survey.parents
    layer = layers[at]
    own = {layers[at - 1].node, *layer.filters} if at else set(layer.filters)
    found: list[Parent] = []
    todo, seen = [layer.node], {layer.node}
    while todo:
        for parent in parents.get(todo.pop(), ()):
            if parent.kind == "block-job" or (parent.kind == "block-driver" and parent.name in own):
                continue
            found.append(parent)
            # A filter reads nothing by itself, and neither does an overlay that a job has left over; but what is above
            # it may, as an export of a layer that a pull has taken out of the chain.
            passes_on = parent.role != "backing" or parent.shares_write
            if parent.kind == "block-driver" and passes_on and parent.name not in seen:
                seen.add(parent.name)
                todo.append(parent.name)
    return found


def _readers(selection: LayersSelection, facts: Facts, at: int) -> list[str]:
    """The exports, devices and overlays that read a layer, besides the disk itself."""
    found = _strangers(selection, facts, at)
    return [parent.name for parent in found if parent.kind == "block-backend" or _reads_below(parent)]


def _overlays_of(selection: LayersSelection, facts: Facts, at: int) -> list[str]:
    return [parent.name for parent in _strangers(selection, facts, at) if _reads_below(parent)]


def _reads_below(parent: Parent) -> bool:
    """Whether it is an overlay that relies on what is below; a node that a merge has left over lets others write."""
    return parent.role == "backing" and not parent.shares_write


def _migrating(facts: Facts) -> Problem | None:
    guest = facts.survey.guest
    if guest not in ELSEWHERE:
        return None
    why = "the guest is being moved away, or has been" if guest is Guest.MIGRATING else "the guest has not arrived yet"
    return Problem(
        code=Code.DOMAIN_MIGRATING,
        detail=f"{why}: its images are another QEMU's; send the request to the QEMU that runs the guest in the end",
    )


def _in_use(selection: LayersSelection, facts: Facts) -> Problem | None:
    if not selection.active and selection.top.filters:
        # QEMU gives the filter another node below itself, and leaves the overlay's header as it is.
        name = selection.top.filters[-1]
        return Problem(
            code=Code.NODE_IN_USE,
            detail=f"the filter {name} stands between {selection.top.file} and the layer above, whose header QEMU "
            "would not change; remove the filter, then try again",
            extra={"node": selection.top.node, "used_by": name},
        )
    root = selection.disk.node
    above = [parent for parent in facts.survey.parents.get(root or "", ()) if parent.kind == "block-driver"]
    users = [(root, parent.name) for parent in above]
    for at in range(selection.top_index + 1, selection.base_index):
        users += [(selection.disk.layers[at].node, name) for name in _readers(selection, facts, at)]
    if not selection.active:
        users += [(selection.top.node, name) for name in _overlays_of(selection, facts, selection.top_index)]
    if not users:
        return None
    node, user = users[0]
    return Problem(
        code=Code.NODE_IN_USE,
        detail=f"{user} uses the node {node}, which the merge would take away from it; end that use, then try again",
        extra={"node": node, "used_by": user},
    )


def _tracked(selection: LayersSelection) -> Problem | None:
    """A pivot has QEMU close the merged nodes. With another node's bitmap on one it aborts (block.c: bdrv_close)."""
    layer = next((layer for layer in selection.merged if "" in layer.tracking), None)
    if layer is None or not selection.active:
        return None
    filters = selection.top.filters
    name = filters[-1] if filters else "another node or job"
    return Problem(
        code=Code.NODE_IN_USE,
        detail=f"{name} keeps a dirty bitmap on {layer.file}, without which QEMU can't let go of it after the pivot; "
        "end the backup that it belongs to (remove its filter), then try again",
        extra={"node": layer.node, "used_by": name},
    )


def _reopened(layer: Layer, facts: Facts) -> str | None:
    """Why QEMU can't have a layer open for writing that it has open for reading only; None if it can.

    To do so it opens the name anew (block/file-posix.c: raw_reconfigure_getfd), whatever is called so by now, and goes
    on with what it knows of the image before.
    """
    if layer.replaced and layer.read_only:
        return "another file than the one that it has open has this name by now; give the image its name back"
    if layer.packed:
        return "it is a stream-optimized vmdk image, which is written once; convert it"
    return facts.survey.unwritable.get(layer.node)


def _unwritable(written: Layer, facts: Facts) -> Problem | None:
    words = _reopened(written, facts)
    if words is None:
        return None
    locked = LOCKED.search(words) is not None
    return Problem(
        code=Code.IMAGE_LOCKED if locked else Code.IMAGE_READ_ONLY,
        detail=f"QEMU can't open {written.file} for writing: {words}",
        extra={"file": written.file},
    )


def _marked_corrupt(layers: Sequence[Layer]) -> Problem | None:
    layer = next((layer for layer in layers if layer.corrupt), None)
    if layer is None:
        return None
    return Problem(
        code=Code.IMAGE_CORRUPT,
        detail=f"{layer.file} is marked corrupt: QEMU would not open it for writing the next time; repair it offline "
        "(qemu-img check -r all), or copy what can be read of it",
        extra={"file": layer.file},
    )


def _uncounted(layer: Layer, code: Code) -> Problem | None:
    """Reference counts that are behind (lazy_refcounts, a killed writer): writing takes used places for free.

    QEMU counts anew when it opens an image for writing; where it has it open for reading only, and makes that writable,
    it does not, and takes the mark away afterwards (block/qcow2.c: qcow2_do_open, qcow2_reopen_prepare).
    """
    if not (layer.dirty and layer.read_only):
        return None
    return Problem(
        code=code,
        detail=f"the last program that wrote to {layer.file} did not close it, and QEMU would write over what it "
        "holds; repair it offline (qemu-img check -r all), then try again",
        extra={"file": layer.file},
    )


FIXED: Final = re.compile(r"(nbd|iscsi)[:+]|json:.*\"driver\": ?\"(nbd|iscsi)\"")
"""QEMU's names of what has the size of a device, on the network (block/nbd.c: nbd_co_truncate, block/iscsi.c)."""


def _hidden(selection: LayersSelection) -> Problem | None:
    """The layers that leave the chain hide a part of the base, and leave nothing in its place.

    Beyond its end an image reads as zeros (block/io.c: bdrv_co_common_block_status_above). From beyond the end of the
    topmost of them nothing is copied, neither up nor down; zeros of those below it are.
    """
    below, top, overlay = selection.below, selection.top, selection.overlay
    if below is None or overlay is None or top.virtual_size >= min(below.virtual_size, overlay.virtual_size):
        return None
    return Problem(
        code=Code.SIZES_UNSAFE,
        detail=f"{top.file} has {top.virtual_size} bytes, less than {below.file} below and {overlay.file} above: "
        "what the guest reads as zeros beyond its end would become what the base holds there",
        extra={"file": top.file},
    )


def _cannot_grow(selection: LayersSelection, facts: Facts) -> Problem | None:
    base, top, beneath = selection.base, selection.top, selection.beneath
    if top.virtual_size <= base.virtual_size:
        return None
    why = None
    if base.format == "raw" and (facts.written_is_device or FIXED.match(base.file)):
        why = "it is a device"
    elif base.format not in GROWING:
        why = f"QEMU can't make images of the format {base.format} longer"
    elif base.broken_bitmaps:
        why = f"its bitmaps are inconsistent, and have to be removed before: {', '.join(base.broken_bitmaps)}"
    elif base.version_2 and base.snapshots:
        why = "it is a qcow2 image of version 2 with internal snapshots"
    elif base.version_2 and beneath is not None and beneath.virtual_size > base.virtual_size:
        # What is below would show there, and it has no zeros to hide it (block/qcow2.c: qcow2_co_truncate).
        why = f"it is a qcow2 image of version 2, and {beneath.file} below it is longer"
    elif base.format == "raw" and base.name.startswith("json:") and PART.search(base.name):
        why = "QEMU has opened a part of a file"
    if why is None:
        return None
    return Problem(
        code=Code.BASE_CANNOT_GROW,
        detail=f"{base.file} would have to grow from {base.virtual_size} to {top.virtual_size} bytes, and {why}",
        extra={"file": base.file, "needed": top.virtual_size},
    )


def _overlay(selection: LayersSelection, facts: Facts) -> Problem | None:
    overlay = selection.overlay
    if overlay is None:
        return None
    words = _reopened(overlay, facts)
    if words is None:
        return _uncounted(overlay, Code.OVERLAY_NOT_WRITABLE)
    return Problem(
        code=Code.OVERLAY_NOT_WRITABLE,
        detail=f"QEMU can't open {overlay.file} for writing, whose header has to name another image then: {words}",
        extra={"file": overlay.file},
    )


def incomparable(selection: LayersSelection) -> Problem | None:
    """Why the service could not compare the merged layers with the base afterwards, which says nothing of them."""
    for layer in (*selection.merged, selection.base):
        why = None
        if layer.format not in COMPARED:
            why = f"it is a {layer.format} image"
        elif layer.encrypted:
            why = "it is encrypted, and the service has no key"
        elif layer.data_file is not None:
            why = "it keeps its data in another file"
        elif layer.format == "raw" and layer.name.startswith("json:") and PART.search(layer.name):
            why = "QEMU has opened a part of a file"
        if why is not None:
            detail = f"`verify` can't be carried out: the service can't compare {layer.file}: {why}; leave it out"
            return Problem(code=Code.NOT_SUPPORTED, detail=detail, extra={"file": layer.file})
    return None


COMPARED: Final = frozenset({"raw", "qcow2", "qed"})
"""The formats of the images that the service reads."""

PART: Final = re.compile(r'"(offset|size)"')
"""Options of a raw image that is a part of its file (QAPI `BlockdevOptionsRaw`)."""


def to_probe(selection: LayersSelection) -> tuple[str, ...]:
    """The nodes that QEMU has open for reading only, and that the merge has it open for writing.

    An image with persistent bitmaps is left alone: it is written to when it is opened for writing. So is one that is
    dirty: the mark would be gone afterwards, and nothing repaired. One that was replaced would be another one then.
    """
    written = [selection.base] + ([] if selection.overlay is None else [selection.overlay])
    return tuple(layer.node for layer in written if probed(layer))


def probed(layer: Layer) -> bool:
    """Whether QEMU is to be asked if it can write to the layer, which does no harm to it."""
    changes = layer.bitmaps or layer.dirty or layer.replaced
    # QEMU would keep the lock of the descriptor for writing.
    return layer.read_only and not changes and not layer.file.startswith(DESCRIPTORS)


def no_room(demand: Demand, free: int | None) -> Problem | None:
    """Why the file system can't take the demand; nothing is refused where its free space can't be seen."""
    if free is None or demand.growth <= free:
        return None
    return Problem(
        code=Code.INSUFFICIENT_STORAGE,
        detail=f"{demand.file} may grow by {demand.growth} bytes, and where it is {free} are free; make space, "
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


def undeletable(selection: LayersSelection, files: Sequence[str], facts: Facts) -> dict[str, str]:
    """Those of the `files` that a deletion leaves, each with the reason."""
    found = {file: why for file, why in facts.undeletable.items() if file in files}
    overlay = selection.overlay
    if overlay is not None and facts.header.room is None:
        why = f"the service can't read the header of {overlay.file}, which names it today"
        found |= dict.fromkeys(files, why)
    for layer in selection.merged:
        if layer.snapshots and layer.file in files:
            found[layer.file] = f"it holds {layer.snapshots} internal snapshots"
    return found
