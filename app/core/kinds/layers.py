"""What kinds share that take a run of layers, from `top` down to `base`, out of a chain."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.core.chain import Disk, Identity, Layer
from app.core.errors import Code, Problem, invalid, invalid_together
from app.core.evidence import GraphReading, HeaderReading, Proof
from app.core.flags import F, bandwidth_in_bytes, parse_flags
from app.core.growth import growth
from app.core.headers import NAME_MAX
from app.core.kinds.base import DiskRecord, LayerRecord
from app.core.orphan import OrphanJob
from app.core.plan import Demand, Facts
from app.core.sameness import Sameness, same


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersSelection:
    """The layers that a request means: positions in the disk's chain, `top_index` above `base_index`.

    The layers from `top_index` down to the one above `base_index` leave the chain. What has nothing below itself then
    has the chain's length as `base_index`.
    """

    disk: Disk
    top_index: int
    base_index: int

    @property
    def active(self) -> bool:
        """Whether `top` is the active layer."""
        return self.top_index == 0

    @property
    def top(self) -> Layer:
        """The topmost layer."""
        return self.disk.layers[self.top_index]

    @property
    def base(self) -> Layer:
        """The bottom layer, of a kind that always has one."""
        return self.disk.layers[self.base_index]

    @property
    def below(self) -> Layer | None:
        """The layer right below those that leave the chain."""
        return next(iter(self.disk.layers[self.base_index :]), None)

    @property
    def beneath(self) -> Layer | None:
        """The layer right below the one below."""
        return next(iter(self.disk.layers[self.base_index + 1 :]), None)

    @property
    def overlay(self) -> Layer | None:
        """The layer above `top`."""
        return None if self.active else self.disk.layers[self.top_index - 1]

    @property
    def merged(self) -> tuple[Layer, ...]:
        """The layers from `top` down to the one above `base`."""
        return self.disk.layers[self.top_index : self.base_index]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersSpec:
    """The same for a job that was accepted. `top_index` and `base_index` are positions in `disk.layers`.

    `header_seen`: the service could read the header of the layer `above` then, so it has to be able to afterwards.
    """

    disk: DiskRecord
    top_index: int
    base_index: int
    header_seen: bool = False

    @property
    def active(self) -> bool:
        """Whether `top` is the active layer."""
        return self.top_index == 0

    @property
    def merged(self) -> tuple[LayerRecord, ...]:
        """The layers from `top` down to the one above `base`."""
        return self.disk.layers[self.top_index : self.base_index]

    @property
    def base(self) -> LayerRecord:
        """The bottom layer, of a kind that always has one."""
        return self.disk.layers[self.base_index]

    @property
    def above(self) -> LayerRecord | None:
        """The layer right above those that leave the chain, whose header leads to the one below afterwards."""
        return None if self.active else self.disk.layers[self.top_index - 1]

    @property
    def below(self) -> LayerRecord | None:
        """The layer right below those that leave the chain."""
        return next(iter(self.disk.layers[self.base_index :]), None)

    @property
    def top_file(self) -> str:
        """The topmost image that leaves the chain."""
        return self.disk.layers[self.top_index].file

    @property
    def base_file(self) -> str | None:
        """The image below those."""
        return None if self.below is None else self.below.file

    @property
    def overlay_file(self) -> str | None:
        """The image above `top`."""
        return None if self.above is None else self.above.file

    @property
    def lasting(self) -> LayerRecord:
        """A layer that is in the chain before and after: the one below, or else the one above."""
        lasting = self.below or self.above
        assert lasting is not None
        return lasting


# Asking ---------------------------------------------------------------------------------------------------------------


def common_fields(
    flags: int | Sequence[str], known: type[F], in_bytes: F, bandwidth: int, backing_file: str | None
) -> tuple[F, int] | Problem:
    """The flags, and the speed in bytes/s, or what is wrong with these fields of a request."""
    parsed = parse_flags(flags, known)
    # Without the flags the unit is not known; the wider of the two ranges is wrong in no case.
    speed = bandwidth_in_bytes(bandwidth, in_bytes=isinstance(parsed, Problem) or in_bytes in parsed)
    wrong = [found for found in (parsed, speed) if isinstance(found, Problem)]
    if backing_file is not None and not 0 < len(backing_file.encode()) <= NAME_MAX:
        wrong.append(invalid("/backing_file", f"expected 1 to {NAME_MAX} bytes, as an image header holds no more"))
    if isinstance(parsed, Problem) or isinstance(speed, Problem) or wrong:
        return invalid_together(wrong)
    return parsed, speed


# Choosing -------------------------------------------------------------------------------------------------------------


def unusable(disk: Disk, digests: frozenset[str] | None, conflict: str | None) -> Problem | None:
    """Why no job can work on the disk now.

    The chain has to have one of the `digests` (None: whatever it is). `conflict` is an unfinished job on the disk.
    """
    if not disk.layers:
        return Problem(code=Code.DISK_EMPTY, detail=f"the disk {disk.name} has no medium")
    if digests is not None and disk.digest not in digests:
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
    return None


def find_top(disk: Disk, name: str | None, identities: Mapping[str, Identity]) -> int | Problem:
    """The position of the layer called `name`; None is the active layer."""
    found = 0 if name is None else disk.find(name, identities.get(name))
    return Problem(code=Code.TOP_NOT_FOUND, detail=_no_layer(disk, name or "")) if found is None else found


def base_below(
    disk: Disk, top: int, name: str | None, identities: Mapping[str, Identity], *, default: int
) -> int | Problem:
    """The position of the layer called `name`, which has to be below `top`; None is `default`."""
    found = default if name is None else disk.find(name, identities.get(name))
    if found is None:
        return Problem(code=Code.BASE_NOT_FOUND, detail=_no_layer(disk, name or ""))
    if found <= top:
        return Problem(
            code=Code.BASE_NOT_BELOW_TOP,
            detail=f"{disk.layers[found].file} is not below {disk.layers[top].file}; layers are merged downwards",
        )
    return found


def absolute_header(disk: Disk, first: int, last: int) -> Problem | None:
    """Why the names from one layer down to another can't stay relative: a header in between is absolute."""
    absolute = next((layer for layer in disk.layers[first:last] if not layer.relative), None)
    if absolute is None:
        return None
    return Problem(
        code=Code.RELATIVE_IMPOSSIBLE,
        detail=f"the header of {absolute.file} names its backing image as {absolute.backing!r}, which is not "
        "relative; leave out the flag `relative`",
    )


def temporary(disk: Disk) -> Problem:
    """The disk's active layer is one that QEMU throws away."""
    detail = f"the active layer {disk.layers[0].file} is thrown away when QEMU ends (-snapshot)"
    return Problem(code=Code.TEMPORARY_OVERLAY, detail=detail)


def _no_layer(disk: Disk, name: str) -> str:
    known = ", ".join(f"{disk.name}[{index}] {layer.file}" for index, layer in enumerate(disk.layers))
    return f"no layer of the disk {disk.name} is called {name!r}; it has {known}"


# Planning -------------------------------------------------------------------------------------------------------------


def demand_on(
    target: Layer, read: Sequence[Layer], facts: Facts, *, size: int, speed: int, beneath: Layer | None = None
) -> Demand:
    """What copying the data of the `read` layers, topmost first, into `target` asks of the host.

    `size` is the virtual size that `target` has then, in bytes, `speed` in bytes/s. What a longer layer `beneath` has
    must not show where `target` grows, so that becomes zeros.
    """
    copied = facts.bytes_to_copy
    if copied is None:
        # What is beyond the end of a layer below the first one is copied as zeros.
        ends = [layer.virtual_size for layer in read]
        copied = sum(layer.actual_size for layer in read) + ends[0] - min(ends)
    new = copied if facts.new_bytes is None else facts.new_bytes
    on_device = facts.written_is_device and target.format == "raw"
    zeroed = 0 if beneath is None else max(0, min(beneath.virtual_size, size) - target.virtual_size)
    grown = 0 if on_device else growth(target, size, new, zeroed=zeroed, crowded=facts.crowded)
    return Demand(file=target.file, growth=grown, copies=copied, speed=speed)


def run_of_layers(orphan: OrphanJob, merged: Sequence[str], base: str) -> tuple[Disk, int, int] | None:
    """The disk as it was before the job, and the positions of `top` and `base` in its chain; None where none tells.

    `merged` and `base` are nodes that the job holds. Where the merged nodes are in no chain any more they are put back.
    """
    disk = next((disk for disk in orphan.disks if base in disk.nodes), None)
    if disk is None or not merged:
        return None
    at = disk.nodes.index(base)
    there = [disk.nodes.index(name) for name in merged if name in disk.nodes]
    if there:
        # QEMU's own graph has the base below the merged layers; another program's may have anything.
        return (disk, min(there), at) if min(there) < at else None
    if any(name not in orphan.loose for name in merged):
        return None
    layers = tuple(orphan.loose[name] for name in merged)
    return replace(disk, layers=(*disk.layers[:at], *layers, *disk.layers[at:])), at, at + len(layers)


def nodes_to_release(disk: Disk, top_index: int, base_index: int) -> tuple[str, ...]:
    """The nodes that QEMU keeps of layers that left the chain, in the order in which they can be deleted.

    That is top-down, as a node can't be deleted while the one above refers to it. QEMU drops the filters in between
    from the chain, and keeps their nodes.
    """
    nodes: list[str] = []
    for position in range(top_index, base_index):
        layer, beneath = disk.layers[position], disk.layers[position + 1 : position + 2]
        nodes += [layer.node, *layer.below, *(name for below in beneath for name in below.filters)]
    return tuple(nodes)


# Proving --------------------------------------------------------------------------------------------------------------


def proof_of_graph(spec: LayersSpec, graph: GraphReading) -> Proof:
    """What the disk's chain in QEMU's graph says of the job.

    Other layers may have come on top meanwhile (a snapshot right after the merge), so only the job's own layers count:
    merged, if those between are gone and the one that lasts is there; unchanged, if all are there in their order. A
    node of the same name with another file is another layer, and a merged file under another node's name is still
    there.
    """
    nodes, seen = graph.nodes, dict(zip(graph.nodes, graph.identities, strict=False))
    merged, below, lasting = tuple(layer.node for layer in spec.merged), spec.below, spec.lasting
    if lasting.node not in nodes or any(
        same(seen.get(layer.node), layer.identity) is Sameness.OTHER for layer in (*spec.merged, lasting)
    ):
        return Proof.UNKNOWN
    if not set(merged) & set(nodes):
        if below is None and nodes[-1] != lasting.node:
            return Proof.UNKNOWN
        files = {layer.identity for layer in spec.merged if layer.identity is not None}
        return Proof.UNKNOWN if files.intersection(graph.identities) else Proof.MERGED
    start = nodes.index(merged[0]) if merged[0] in nodes else 0
    whole = merged if below is None else (*merged, below.node)
    there = nodes[start:] if below is None else nodes[start : start + len(whole)]
    return Proof.UNCHANGED if there == whole else Proof.UNKNOWN


def proof_of_header(spec: LayersSpec, header: HeaderReading | None) -> Proof:
    """What the header of the layer above says of the job: it leads to the layer below, or still to those between.

    A header may name a file in other ways than QEMU does (links, `..`). Names decide only where neither file was seen.
    """
    if header is None:
        return Proof.UNKNOWN

    def leads_to(layer: LayerRecord) -> bool:
        if header.file is None:
            return False
        if header.identity is None and layer.identity is None:
            return os.path.normpath(header.file) == os.path.normpath(layer.file)
        return same(header.identity, layer.identity) is Sameness.SAME

    if header.file is None if spec.below is None else leads_to(spec.below):
        return Proof.MERGED
    return Proof.UNCHANGED if leads_to(spec.disk.layers[spec.top_index]) else Proof.UNKNOWN
