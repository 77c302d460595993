"""From a commit request to a plan, or to the first reason why not.

The checks stand in the order of the contract, which is the order in which clients see their codes. There are three
stages, because each needs facts that only the one before can name:

1. `commit_request`: the body alone;
2. `choose_layers`: the body and the disk's chain;
3. `plan_commit`: what the file systems and the other domains say of the chosen base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from app.core.chain import Disk, Identity, Layer, relative_name
from app.core.errors import Code, Problem, invalid, invalid_together
from app.core.flags import CommitFlag, bandwidth_in_bytes, parse_flags
from app.core.job import Job, JobType, NotDeleted, OnError, OnReady, State, Work

BACKING_FILE_MAX: Final = 1023
"""The longest name that fits into a qcow2 header, in bytes (docs/interop/qcow2.txt)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """What is asked for, checked as far as that goes without a disk. `bandwidth` is in bytes/s."""

    base: str | None = None
    top: str | None = None
    bandwidth: int = 0
    flags: CommitFlag = CommitFlag(0)
    on_ready: OnReady = OnReady.WAIT
    on_error: OnError = OnError.REPORT
    backing_file: str | None = None
    digests: frozenset[str] | None = None
    """The chain has to have one of these digests; None: whatever it is."""


def commit_request(
    *,
    base: str | None = None,
    top: str | None = None,
    bandwidth: int = 0,
    flags: int | Sequence[str] = (),
    on_ready: OnReady = OnReady.WAIT,
    on_error: OnError = OnError.REPORT,
    backing_file: str | None = None,
) -> CommitRequest | Problem:
    """Stage 1: the request from the fields of its body, or what is wrong with them. `""` as a layer is no layer."""
    parsed = parse_flags(flags)
    # Without the flags the unit is not known; the wider of the two ranges is wrong in no case.
    speed = bandwidth_in_bytes(bandwidth, CommitFlag.BANDWIDTH_BYTES if isinstance(parsed, Problem) else parsed)
    wrong = [found for found in (parsed, speed) if isinstance(found, Problem)]
    if backing_file is not None and not 0 < len(backing_file.encode()) <= BACKING_FILE_MAX:
        detail = f"expected 1 to {BACKING_FILE_MAX} bytes, as an image header holds no more"
        wrong.append(invalid("/backing_file", detail))
    if isinstance(parsed, Problem) or isinstance(speed, Problem) or wrong:
        return invalid_together(wrong)
    if base and CommitFlag.SHALLOW in parsed:
        return Problem(
            code=Code.SHALLOW_WITH_BASE,
            detail="`shallow` chooses the base: the layer right below `top`; leave out `base` or the flag",
        )
    return CommitRequest(
        base=base or None,
        top=top or None,
        bandwidth=speed,
        flags=parsed,
        on_ready=on_ready,
        on_error=on_error,
        backing_file=backing_file,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The layers that a request means: positions in the disk's chain, `top` above `base`."""

    disk: Disk
    request: CommitRequest
    top: int
    base: int

    @property
    def active(self) -> bool:
        """Whether the active layer is merged, so that the job ends in a pivot."""
        return self.top == 0

    @property
    def overlay(self) -> Layer | None:
        """The layer above `top`, whose header is to name `base`."""
        return None if self.active else self.disk.layers[self.top - 1]

    @property
    def merged(self) -> tuple[Layer, ...]:
        """The layers from `top` down to the one above `base`."""
        return self.disk.layers[self.top : self.base]

    @property
    def base_layer(self) -> Layer:
        """The layer that receives the data."""
        return self.disk.layers[self.base]


def choose_layers(
    disk: Disk,
    request: CommitRequest,
    *,
    identities: Mapping[str, Identity] | None = None,
    conflict: str | None = None,
) -> Selection | Problem:
    """Stage 2: the layers that `request` means on `disk`, or the first check that it fails.

    `identities` are those of the files at the paths in the request. `conflict` is an unfinished job on this disk that
    the journal knows; those that QEMU knows stand in `disk.running_jobs`.
    """
    found = _find_layers(disk, request, identities or {}, conflict)
    if isinstance(found, Problem):
        return found
    return _check_ending(found) or found


def _find_layers(
    disk: Disk, request: CommitRequest, identities: Mapping[str, Identity], conflict: str | None
) -> Selection | Problem:
    layers = disk.layers
    if not layers:
        return Problem(code=Code.DISK_EMPTY, detail=f"the disk {disk.name} has no medium")
    if request.digests is not None and disk.digest not in request.digests:
        return Problem(
            code=Code.CHAIN_CHANGED,
            detail=f"the chain of {disk.name} has the digest {disk.digest}, not that of If-Match; read the disk again",
            extra={"digest": disk.digest},
        )
    job = conflict or next(iter(disk.running_jobs), None)
    if job is not None:
        return Problem(
            code=Code.JOB_CONFLICT,
            detail=f"the job {job} works on the disk {disk.name}; wait for its end, or abort it",
            extra={"job": job},
        )
    top = 0 if request.top is None else disk.find(request.top, identities.get(request.top))
    if top is None:
        return Problem(code=Code.TOP_NOT_FOUND, detail=_no_layer(disk, request.top or ""))
    if request.base is None:
        if top == len(layers) - 1:
            return Problem(
                code=Code.NO_BACKING, detail=f"{layers[top].file} has no backing image, so nothing to be merged into"
            )
        base = top + 1 if CommitFlag.SHALLOW in request.flags else len(layers) - 1
        return Selection(disk=disk, request=request, top=top, base=base)
    named = disk.find(request.base, identities.get(request.base))
    if named is None:
        return Problem(code=Code.BASE_NOT_FOUND, detail=_no_layer(disk, request.base))
    if named <= top:
        return Problem(
            code=Code.BASE_NOT_BELOW_TOP,
            detail=f"{layers[named].file} is not below {layers[top].file}; layers are merged downwards",
        )
    return Selection(disk=disk, request=request, top=top, base=named)


def _no_layer(disk: Disk, name: str) -> str:
    known = ", ".join(f"{disk.name}[{index}] {layer.file}" for index, layer in enumerate(disk.layers))
    return f"no layer of the disk {disk.name} is called {name!r}; it has {known}"


def _check_ending(chosen: Selection) -> Problem | None:
    request, top = chosen.request, chosen.disk.layers[chosen.top]
    if chosen.active and CommitFlag.ACTIVE not in request.flags:
        return Problem(
            code=Code.ACTIVE_FLAG_REQUIRED,
            detail=f"{top.file} is the active layer: its merge ends in a pivot; add the flag `active` to agree to that",
        )
    if not chosen.active and (CommitFlag.ACTIVE in request.flags or request.on_ready is not OnReady.WAIT):
        asked = "the flag `active`" if CommitFlag.ACTIVE in request.flags else f"`on_ready: {request.on_ready}`"
        return Problem(
            code=Code.TOP_NOT_ACTIVE,
            detail=f"{asked} is for the active layer {chosen.disk.layers[0].file}, and `top` is {top.file}",
        )
    if CommitFlag.DELETE in request.flags and request.on_ready is OnReady.KEEP:
        return Problem(
            code=Code.DELETE_WITH_KEEP,
            detail="`on_ready: keep` leaves the overlay in use, so no image can be deleted; leave out one of the two",
        )
    if chosen.active and request.backing_file is not None:
        return invalid("/backing_file", "the merge of the active layer writes no header; leave the field out")
    if not chosen.active and CommitFlag.RELATIVE in request.flags:
        headers = chosen.disk.layers[chosen.top - 1 : chosen.base]
        absolute = next((layer for layer in headers if not layer.relative), None)
        if absolute is not None:
            return Problem(
                code=Code.RELATIVE_IMPOSSIBLE,
                detail=f"the header of {absolute.file} names its backing image as {absolute.backing!r}, which is not "
                "relative; leave out the flag `relative`",
            )
    if chosen.disk.temporary:
        return Problem(
            code=Code.TEMPORARY_OVERLAY,
            detail=f"the active layer {chosen.disk.layers[0].file} is thrown away when QEMU ends (-snapshot)",
        )
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the chosen layers beyond the chain. Sizes in bytes; None where it can't be known.

    `shared_with` names the other disk that uses the base; `locked` says that another process has it open.
    `bytes_to_copy` and `new_bytes` (those of them that have no place in the base yet) come from the images' own
    maps; without them the plan reckons with the layers' sizes on disk. `undeletable` are files that `delete` would
    leave, each with the reason.
    """

    shared_with: str | None = None
    locked: bool = False
    free: int | None = None
    bytes_to_copy: int | None = None
    new_bytes: int | None = None
    base_is_device: bool = False
    undeletable: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning:  # noqa: A001 - the contract's word
    """Something that the caller should know before the job runs."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a commit will do. Files where not said otherwise; `chain_*` active layer first; sizes in bytes.

    `undeletable` are those of the invalidated files that `delete` leaves in place.
    """

    selection: Selection
    chain_after: tuple[str, ...]
    invalidates: tuple[str, ...]
    deletes: tuple[str, ...]
    undeletable: tuple[NotDeleted, ...]
    bytes_to_copy: int
    base_growth_max: int
    free: int | None
    resizes_base_to: int | None
    backing_file: str | None
    warnings: tuple[Warning, ...]

    @property
    def type(self) -> JobType:
        """The kind of job that it becomes."""
        return JobType.ACTIVE_COMMIT if self.selection.active else JobType.COMMIT

    def job(self, *, id_: str, domain: str, requested_by: str, now: int) -> Job:
        """The job that carries this plan out, queued; `now` is in ms since 1970."""
        chosen, disk = self.selection, self.selection.disk
        request = chosen.request
        overlay = chosen.overlay
        return Job(
            id=id_,
            type=self.type,
            state=State.QUEUED,
            domain=domain,
            disk=disk.name,
            top=disk.layers[chosen.top].file,
            base=chosen.base_layer.file,
            overlay=overlay.file if overlay else None,
            flags=request.flags,
            on_ready=request.on_ready,
            on_error=request.on_error,
            bandwidth=request.bandwidth,
            requested_by=requested_by,
            created_at=now,
            work=Work(
                disk_node=disk.node or "",
                qdev=disk.qdev,
                backend=disk.backend,
                chain=disk.files,
                nodes=disk.nodes,
                top=chosen.top,
                base=chosen.base,
                release=_release(chosen),
                backing_file=self.backing_file,
                digest=disk.digest,
                invalidates=self.invalidates,
                deletes=self.deletes,
                undeletable=self.undeletable,
                identities=tuple(layer.identity for layer in disk.layers),
            ),
        )


def plan_commit(chosen: Selection, facts: Facts) -> Plan | Problem:
    """Stage 3: the plan, or the reason why the base can't take the data."""
    base, top = chosen.base_layer, chosen.disk.layers[chosen.top]
    if facts.shared_with is not None:
        return Problem(
            code=Code.IMAGE_SHARED,
            detail=f"{base.file} is also a layer of {facts.shared_with}, whose data a merge into it would destroy",
            extra={"file": base.file, "used_by": facts.shared_with},
        )
    if facts.locked:
        return Problem(
            code=Code.IMAGE_LOCKED,
            detail=f"another process has {base.file} open; stop it, then try again",
            extra={"file": base.file},
        )
    resize = top.virtual_size if top.virtual_size > base.virtual_size else None
    copied = sum(layer.actual_size for layer in chosen.merged) if facts.bytes_to_copy is None else facts.bytes_to_copy
    new = copied if facts.new_bytes is None else facts.new_bytes
    growth = 0 if facts.base_is_device else _growth(base, max(base.virtual_size, top.virtual_size), new)
    if facts.free is not None and growth > facts.free:
        return Problem(
            code=Code.INSUFFICIENT_STORAGE,
            detail=f"{base.file} may grow by {growth} bytes, and its file system has {facts.free} free; make space, "
            "or merge fewer layers",
            extra={"needed": growth, "free": facts.free},
        )
    keep = chosen.request.on_ready is OnReady.KEEP
    files = chosen.disk.files
    invalid_from = chosen.top + 1 if keep else chosen.top
    invalidates = files[invalid_from : chosen.base]
    delete = CommitFlag.DELETE in chosen.request.flags
    undeletable = {file: why for file, why in facts.undeletable.items() if delete and file in invalidates}
    return Plan(
        selection=chosen,
        chain_after=files if keep else files[: chosen.top] + files[chosen.base :],
        invalidates=invalidates,
        deletes=tuple(file for file in invalidates if file not in undeletable) if delete else (),
        undeletable=tuple(NotDeleted(file=file, reason=why) for file, why in undeletable.items()),
        bytes_to_copy=copied,
        base_growth_max=growth,
        free=facts.free,
        resizes_base_to=resize,
        backing_file=_backing_file(chosen),
        warnings=tuple(_warnings(chosen, facts, growth, resize, undeletable)),
    )


def _growth(base: Layer, size: int, new: int) -> int:
    """How much the file of the base can grow: the new data and, for qcow2, the tables that tell where it is.

    A table of 8-byte entries maps one cluster each, a refcount block of 2-byte entries counts one each; both come in
    whole clusters (docs/interop/qcow2.txt). No image grows beyond its full size and its tables.
    """
    if base.format != "qcow2":
        return max(0, min(new, size - base.actual_size)) if base.format == "raw" else new
    cluster = base.cluster_size
    l2 = -(-size // (cluster * cluster // 8))
    l1 = -(-l2 * 8 // cluster)
    counted = -(-size // cluster) + l2 + l1 + 1
    # Each refcount block counts itself too, and its entry in the table of them. One cluster more is for a last one
    # that the size does not fill.
    blocks = -(-counted // (cluster // 2 - 2))
    metadata = (l2 + l1 + 1 + blocks + -(-blocks * 8 // cluster) + 1) * cluster
    return min(new + metadata, max(0, size + metadata - base.actual_size)) if new else 0


def _backing_file(chosen: Selection) -> str | None:
    overlay = chosen.overlay
    if overlay is None:
        return None
    if chosen.request.backing_file is not None:
        return chosen.request.backing_file
    base = chosen.base_layer
    relative = overlay.relative or CommitFlag.RELATIVE in chosen.request.flags
    local = overlay.file.startswith("/") and base.file.startswith("/")
    return relative_name(base, seen_from=overlay) if relative and local else base.file


def _release(chosen: Selection) -> tuple[str, ...]:
    # Top-down, as a node can't be deleted while the one above it refers to it; QEMU drops the filters in between
    # from the chain, but not the nodes.
    nodes: list[str] = []
    for position in range(chosen.top, chosen.base):
        layer, beneath = chosen.disk.layers[position], chosen.disk.layers[position + 1]
        nodes += [layer.node, *layer.below, *beneath.filters]
    return tuple(nodes)


def _warnings(
    chosen: Selection, facts: Facts, growth: int, resize: int | None, undeletable: Mapping[str, str]
) -> list[Warning]:
    base, active = chosen.base_layer, chosen.disk.layers[0]
    found: list[Warning] = []
    if growth:
        found.append(Warning(code="base-grows", detail=f"{base.file} may grow by up to {growth} bytes"))
    if facts.free is None and not facts.base_is_device:
        found.append(Warning(code="free-unknown", detail=f"the service can't see the file system of {base.file}"))
    if facts.bytes_to_copy is None:
        found.append(
            Warning(
                code="size-estimated",
                detail="the images' maps were not read; the sizes are what the layers take on disk",
            )
        )
    if resize is not None:
        found.append(
            Warning(code="base-resized", detail=f"{base.file} becomes {resize} bytes, also if the job is aborted")
        )
    if chosen.active and base.virtual_size > active.virtual_size:
        found.append(
            Warning(code="disk-grows", detail=f"after the pivot the guest sees a disk of {base.virtual_size} bytes")
        )
    filters = [name for layer in chosen.disk.layers[chosen.top + 1 : chosen.base + 1] for name in layer.filters]
    if filters:
        found.append(
            Warning(code="filters-dropped", detail=f"QEMU drops the filters between the layers: {', '.join(filters)}")
        )
    return found + [Warning(code="not-deletable", detail=f"{file}: {why}") for file, why in undeletable.items()]
