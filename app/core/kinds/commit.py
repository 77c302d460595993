r"""Commit: merge the layers from `top` down into `base` (libvirt's virDomainBlockCommit, QAPI `block-commit`).

        before                       after, below the active layer      after, of the active layer and a pivot

    active  s3 <- guest              active  s3 <- guest
              |                                |
       top  s2  \                              |
              |  > merged into base           base                           base <- guest
            s1  /
              |
      base  base

QEMU copies the merged layers down into the base. Below the active layer it then writes the base's name into the header
of the overlay, the layer above `top`: that header proves the merge. It does so before the data is on the disk, and a
QEMU that is killed in between leaves a header that leads past it. So such a job is held at `pending` for a flush.

A commit of the active layer writes no header. It mirrors the guest's writes into the base, is `ready` once both are in
step, and ends in a pivot, or by leaving the overlay active. A pending job would hold up the guest's I/O; QEMU has the
data written before the pivot by itself. From a job's start on the layers above the base show a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Literal

from app.core.chain import Disk, Identity, NotDeleted
from app.core.errors import Code, Problem, invalid
from app.core.evidence import Evidence, Judgement, Proof
from app.core.flags import flag_names
from app.core.images import Access, Claim, DiskChain
from app.core.kinds.base import Capabilities, CleanUp, DiskRecord, LayerRecord
from app.core.kinds.layers import (
    LayersSelection,
    LayersSpec,
    absolute_header,
    base_below,
    common_fields,
    demand_on,
    find_top,
    nodes_to_release,
    run_of_layers,
    temporary,
    unusable,
)
from app.core.kinds.naming import header_string, proposals
from app.core.kinds.outcome import chain_proof, header_doubt, judged, pivot_doubt
from app.core.kinds.refusals import data_files, incomparable, no_room, refused, to_probe, undeletable
from app.core.kinds.warnings import merge_warnings
from app.core.orphan import OrphanJob
from app.core.plan import Facts, Inquiry, Plan, QemuCommand
from app.core.states import DataState, JobType, OnError, OnReady, State


class CommitFlag(IntFlag):
    """libvirt's flags, with libvirt's bits (virDomainBlockCommitFlags)."""

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
    verify: bool = False
    digests: frozenset[str] | None = None
    """The chain has to have one of these digests; None: whatever it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitSelection(LayersSelection):
    """The layers that a request means."""

    request: CommitRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitSpec(LayersSpec):
    """What a commit does to which nodes and files; enough to go on after a restart.

    `release` are the nodes to delete then, in that order, `backing_file` is the string for the overlay's header,
    `deletes` are the files to unlink once all is proven, and `undeletable` those that stay, each with the reason.
    """

    kind: Literal["commit"] = "commit"
    layout: Literal[1] = 1
    flags: CommitFlag = CommitFlag(0)
    backing_file: str | None = None
    verify: bool = False
    release: tuple[str, ...] = ()
    invalidates: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    undeletable: tuple[NotDeleted, ...] = ()

    @property
    def type(self) -> JobType:
        """What the job is called outside."""
        return JobType.ACTIVE_COMMIT if self.active else JobType.COMMIT

    @property
    def flag_names(self) -> list[str]:
        """The names of the request's flags."""
        return flag_names(self.flags)


# From a request to a plan. The checks stand in the order of the contract, in which clients see their codes. -----------


def request(
    *,
    base: str | None = None,
    top: str | None = None,
    bandwidth: int = 0,
    flags: int | Sequence[str] = (),
    on_ready: OnReady = OnReady.WAIT,
    on_error: OnError = OnError.REPORT,
    backing_file: str | None = None,
    verify: bool = False,
) -> CommitRequest | Problem:
    """The request from the fields of its body, or what is wrong with them. `""` as a layer is no layer."""
    fields = common_fields(flags, CommitFlag, CommitFlag.BANDWIDTH_BYTES, bandwidth, backing_file)
    if isinstance(fields, Problem):
        return fields
    parsed, speed = fields
    if base and CommitFlag.SHALLOW in parsed:
        detail = "`shallow` chooses the base: the layer right below `top`; leave out `base` or the flag"
        return Problem(code=Code.SHALLOW_WITH_BASE, detail=detail)
    made = CommitRequest(bandwidth=speed, flags=parsed, on_ready=on_ready, on_error=on_error, backing_file=backing_file)
    return replace(made, base=base or None, top=top or None, verify=verify)


def layer_names(request: CommitRequest) -> tuple[str, ...]:
    """The names in a request that may be paths of layers."""
    return tuple(filter(None, (request.top, request.base)))


def select(
    disk: Disk,
    request: CommitRequest,
    *,
    identities: Mapping[str, Identity] | None = None,
    conflict: str | None = None,
) -> CommitSelection | Problem:
    """The layers that `request` means on `disk`, or the first check that it fails.

    `identities` are those of the files at the paths in the request. `conflict` is an unfinished job on this disk that
    the journal knows; those that QEMU knows stand in `disk.running_jobs`.
    """
    seen = identities or {}
    refused = unusable(disk, request.digests, conflict)
    if refused is not None:
        return refused
    top = find_top(disk, request.top, seen)
    if isinstance(top, Problem):
        return top
    if request.base is None and top == len(disk.layers) - 1:
        detail = f"{disk.layers[top].file} has no backing image, so nothing to be merged into"
        return Problem(code=Code.NO_BACKING, detail=detail)
    shallow = CommitFlag.SHALLOW in request.flags
    base = base_below(disk, top, request.base, seen, default=top + 1 if shallow else len(disk.layers) - 1)
    if isinstance(base, Problem):
        return base
    chosen = CommitSelection(disk=disk, request=request, top_index=top, base_index=base)
    return _wrong_ending(chosen) or chosen


def _wrong_ending(chosen: CommitSelection) -> Problem | None:
    request, top, active = chosen.request, chosen.top, chosen.disk.layers[0]
    if chosen.active and CommitFlag.ACTIVE not in request.flags:
        detail = f"{top.file} is the active layer: its merge ends in a pivot; add the flag `active` to agree to that"
        return Problem(code=Code.ACTIVE_FLAG_REQUIRED, detail=detail)
    if not chosen.active and (CommitFlag.ACTIVE in request.flags or request.on_ready is not OnReady.WAIT):
        asked = "the flag `active`" if CommitFlag.ACTIVE in request.flags else f"`on_ready: {request.on_ready}`"
        detail = f"{asked} is for the active layer {active.file}, and `top` is {top.file}"
        return Problem(code=Code.TOP_NOT_ACTIVE, detail=detail)
    if CommitFlag.DELETE in request.flags and request.on_ready is OnReady.KEEP:
        detail = "`on_ready: keep` leaves the overlay in use, so no image can be deleted; leave out one of the two"
        return Problem(code=Code.DELETE_WITH_KEEP, detail=detail)
    for field, given in (("backing_file", request.backing_file), ("verify", request.verify)):
        if chosen.active and given:
            return invalid(f"/{field}", "it is for merges below the active layer; leave the field out")
    if not chosen.active and CommitFlag.RELATIVE in request.flags:
        absolute = absolute_header(chosen.disk, chosen.top_index - 1, chosen.base_index)
        if absolute is not None:
            return absolute
    unverifiable = incomparable(chosen) if request.verify else None
    return temporary(chosen.disk) if chosen.disk.temporary else unverifiable


def inquiry(selection: CommitSelection) -> Inquiry:
    """What has to be known of the host: the base is written to, the merged layers are read."""
    merged = selection.merged if CommitFlag.DELETE in selection.request.flags else ()
    return Inquiry(
        written=selection.base,
        read=selection.merged,
        to_delete={layer.file: layer.identity for layer in merged},
        overlay=selection.overlay,
        probe=to_probe(selection),
        names=_names(selection),
    )


def _names(selection: CommitSelection) -> tuple[str, ...]:
    asked = selection.request
    return proposals(selection, given=asked.backing_file, relative=CommitFlag.RELATIVE in asked.flags)


def plan(selection: CommitSelection, facts: Facts) -> Plan[CommitSpec] | Problem:
    """The plan, or the reason why the base can't take the data."""
    given = selection.request.backing_file is not None
    header = refused(selection, facts) or header_string(selection, _names(selection), facts.header, given=given)
    if isinstance(header, Problem):
        return header
    planned = _planned(selection, facts, header)
    return no_room(planned.demand, facts.free) or planned


def _planned(selection: CommitSelection, facts: Facts, header: str | None) -> Plan[CommitSpec]:
    base, top, request = selection.base, selection.top, selection.request
    size = max(base.virtual_size, top.virtual_size)
    demand = demand_on(base, selection.merged, facts, size=size, speed=request.bandwidth, beneath=selection.beneath)
    keep, files = request.on_ready is OnReady.KEEP, selection.disk.files
    invalidates = files[selection.top_index + keep : selection.base_index]
    delete = CommitFlag.DELETE in request.flags
    kept_files = undeletable(selection, invalidates, facts) if delete else {}
    spec = CommitSpec(
        disk=DiskRecord.of(selection.disk),
        top_index=selection.top_index,
        base_index=selection.base_index,
        flags=request.flags,
        backing_file=header,
        verify=request.verify,
        header_seen=facts.header.room is not None,
        release=nodes_to_release(selection.disk, selection.top_index, selection.base_index),
        invalidates=invalidates,
        deletes=tuple(file for file in invalidates if file not in kept_files) if delete else (),
        undeletable=tuple(NotDeleted(file=file, reason=why) for file, why in kept_files.items())
        + (data_files(selection) if delete else ()),
    )
    resize = top.virtual_size if top.virtual_size > base.virtual_size else None
    return Plan(
        spec=spec,
        disk=selection.disk,
        on_ready=request.on_ready,
        on_error=request.on_error,
        bandwidth=request.bandwidth,
        chain_after=files if keep else files[: selection.top_index] + files[selection.base_index :],
        invalidates=invalidates,
        deletes=spec.deletes,
        demand=demand,
        free=facts.free,
        resizes_base_to=resize,
        backing_file=header,
        warnings=tuple(merge_warnings(selection, facts, demand.growth, resize, kept_files)),
        commands=(command(spec, bandwidth=request.bandwidth, on_error=request.on_error),),
    )


def again(spec: CommitSpec, disk: str, *, on_ready: OnReady, bandwidth: int) -> CommitRequest:
    """The request for the same layers, with the same string for the header."""
    top, base, flags = f"{disk}[{spec.top_index}]", f"{disk}[{spec.base_index}]", spec.flags & ~CommitFlag.SHALLOW
    made = CommitRequest(top=top, base=base, flags=flags, bandwidth=bandwidth, on_ready=on_ready)
    return replace(made, backing_file=spec.backing_file, verify=spec.verify)


def adopt(orphan: OrphanJob) -> Plan[CommitSpec] | None:
    """The plan of a commit that QEMU has and the journal does not, by the nodes that the job holds.

    A commit below the active layer holds its base and the layers above until it is dismissed, also once it has merged
    them and no chain has them any more; one of the active layer holds its `source` and `target` until it concludes
    (block/commit.c, block/mirror.c). What the request said beyond the layers is lost, so the job gets the defaults that
    do no harm: at `ready` it waits for a person, and no file is deleted.
    """
    held = orphan.held
    base = next(iter([*held.get("base", ()), *held.get("target", ())]), None)
    merged = held.get("source", ()) or held.get("intermediate node", ())
    found = run_of_layers(orphan, merged, base) if orphan.job_type == "commit" and base is not None else None
    if found is None:
        return None
    disk, top, base_index = found
    asked = CommitRequest(bandwidth=orphan.speed, flags=CommitFlag(0) if top else CommitFlag.ACTIVE)
    # Nothing is asked: QEMU is writing to the base anyway, and has its string for the header.
    return _planned(CommitSelection(disk=disk, request=asked, top_index=top, base_index=base_index), Facts(), None)


# What an accepted commit is, and how it ends --------------------------------------------------------------------------


def capabilities(spec: CommitSpec) -> Capabilities:
    """A commit of the active layer pivots; one below it ends by itself, and is proven by a header."""
    return Capabilities(
        pivots=spec.active,
        ends_because="" if spec.active else "merges below the active layer",
        held_at_pending=not spec.active,
        header_proves=not spec.active,
        only_flushed=False,
        data_at_start=DataState.BASE_MODIFIED,
    )


def command(spec: CommitSpec, *, bandwidth: int, on_error: OnError) -> QemuCommand:
    """QAPI `block-commit`. The job stays in QEMU once it has concluded, so that a crash of ours loses no outcome."""
    arguments: dict[str, object] = {
        "device": spec.disk.node,
        "top-node": spec.disk.layers[spec.top_index].node,
        "base-node": spec.base.node,
    }
    if spec.backing_file is not None:
        arguments["backing-file"] = spec.backing_file
    if bandwidth > 0:
        arguments["speed"] = bandwidth
    finalized = not capabilities(spec).held_at_pending
    ending = {"on-error": on_error.value, "auto-finalize": finalized, "auto-dismiss": False}
    return QemuCommand(execute="block-commit", arguments=arguments | ending)


def claims(spec: CommitSpec, domain: str, disk: str) -> tuple[Claim, ...]:
    """The chain gets another shape, the base is written to, the merged layers are read, and some of them deleted."""
    return (
        Claim(DiskChain(domain, disk), Access.WRITE),
        Claim(spec.base.image, Access.WRITE),
        *(Claim(layer.image, Access.DELETE if layer.file in spec.deletes else Access.READ) for layer in spec.merged),
    )


def mixed(spec: CommitSpec) -> tuple[LayerRecord, ...]:
    """The merged layers but the active one: all that is copied down is in the active layer as well."""
    return spec.disk.layers[max(spec.top_index, 1) : spec.base_index]


def worthless(spec: CommitSpec) -> tuple[LayerRecord, ...]:
    """The merged layers: the base has what they had, and is written to."""
    return spec.merged


def written(spec: CommitSpec) -> LayerRecord:
    """The base."""
    return spec.base


def flushes(spec: CommitSpec) -> str:
    """The base's node, below the active layer."""
    return "" if spec.active else spec.base.node


def header_file(spec: CommitSpec) -> str | None:
    """The overlay; a commit of the active layer writes no header."""
    return spec.overlay_file


def prove(spec: CommitSpec, evidence: Evidence) -> Proof:
    """What QEMU's graph and the overlay's header show together."""
    return chain_proof(spec, evidence, header_proves=capabilities(spec).header_proves)


def judge(spec: CommitSpec, evidence: Evidence) -> Judgement:
    """The ending that QEMU's last word and the chain prove together."""
    doubt = pivot_doubt if spec.active else header_doubt
    return judged(spec, evidence, capabilities(spec), doubt=lambda said: doubt(spec, said))


def cleanup(spec: CommitSpec, judgement: Judgement) -> CleanUp:
    """After a merge: the nodes that QEMU keeps, and the files. What may be the only lasting copy stays."""
    before = spec.disk.files
    if judgement.state is not State.COMPLETED:
        return CleanUp(chain=before)
    reason = "it is not proven that the base on the disk has all of its data, and that no header names it"
    unsafe = () if judgement.durable else tuple(NotDeleted(file=file, reason=reason) for file in spec.deletes)
    return CleanUp(
        release=spec.release if judgement.merged else (),
        to_delete={file: spec.disk.image(file) for file in spec.deletes if judgement.durable},
        invalidated=spec.invalidates,
        not_deleted=spec.undeletable + unsafe,
        compared=spec.disk.layers[spec.top_index : spec.base_index + 1] if spec.verify and judgement.merged else (),
        compared_size=0 if spec.above is None else spec.above.virtual_size,
        chain=before[: spec.top_index] + before[spec.base_index :] if judgement.merged else before,
    )
