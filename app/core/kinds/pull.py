r"""Pull: copy into `top` what the layers below it have, down to `base` (libvirt's virDomainBlockRebase).

        before                     after, with a base      after, without one

    active  s3 <- guest            s3 <- guest             s3 <- guest
              |                      |                       |
       top  s2                     s2                      s2
              |  \                   |
            s1    > copied into s2 |
              |  /                   |
      base  base                   base

`top` may be the active layer. It gets only what it does not have, so all layers show the same at any moment. What is
left out of the chain stays right, as others may use it: nothing is invalid, and nothing is deleted.

QEMU (QAPI `block-stream`) changes the header of `top` when the job takes effect, and not all of its tables are on the
disk then: killed at this moment, it leaves a header that leads past what was not written. So the job is held at
`pending` for a flush of `top`, and does not take effect without one.

To the house a pull is a job that takes the layers between out of the chain, of which `top` is the layer above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Literal

from app.core.chain import Disk, Identity, Layer
from app.core.errors import Code, Problem
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
    temporary,
    unusable,
)
from app.core.kinds.naming import header_string, proposals
from app.core.kinds.outcome import chain_proof, header_doubt, judged
from app.core.kinds.refusals import no_room, probed, pull_refused
from app.core.kinds.warnings import pull_warnings
from app.core.orphan import OrphanJob
from app.core.plan import Facts, Inquiry, Plan, QemuCommand
from app.core.states import DataState, JobType, OnError, OnReady, State


class PullFlag(IntFlag):
    """libvirt's flags, with libvirt's bits (virDomainBlockRebaseFlags)."""

    RELATIVE = 16
    """Keep the names in image headers relative."""
    BANDWIDTH_BYTES = 64
    """`bandwidth` is in bytes a second, not in MiB a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """What is asked for, checked as far as that goes without a disk. `bandwidth` is in bytes/s."""

    top: str | None = None
    base: str | None = None
    bandwidth: int = 0
    flags: PullFlag = PullFlag(0)
    on_error: OnError = OnError.REPORT
    backing_file: str | None = None
    digests: frozenset[str] | None = None
    """The chain has to have one of these digests; None: whatever it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSelection(LayersSelection):
    """The layers that a request means; `overlay` is the one that is copied into."""

    request: PullRequest

    @property
    def target(self) -> Layer:
        """The layer that is copied into."""
        return self.disk.layers[self.top_index - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSpec(LayersSpec):
    """What a pull does to which nodes and files; enough to go on after a restart.

    `release` are the nodes to delete then, in that order, `backing_file` is the string for the header, None without a
    base.
    """

    kind: Literal["pull"] = "pull"
    layout: Literal[1] = 1
    flags: PullFlag = PullFlag(0)
    backing_file: str | None = None
    release: tuple[str, ...] = ()

    @property
    def target(self) -> LayerRecord:
        """The layer that is copied into."""
        return self.disk.layers[self.top_index - 1]

    @property
    def type(self) -> JobType:
        """What the job is called outside."""
        return JobType.PULL

    @property
    def top_file(self) -> str:
        """The image that is copied into."""
        return self.target.file

    @property
    def base_file(self) -> str | None:
        """The image that is below it then."""
        return None if self.below is None else self.below.file

    @property
    def overlay_file(self) -> str | None:
        """The image above `top`."""
        return self.disk.layers[self.top_index - 2].file if self.top_index > 1 else None

    @property
    def flag_names(self) -> list[str]:
        """The names of the request's flags."""
        return flag_names(self.flags)


# From a request to a plan. The checks stand in the order of the contract, in which clients see their codes. -----------


def request(
    *,
    top: str | None = None,
    base: str | None = None,
    bandwidth: int = 0,
    flags: int | Sequence[str] = (),
    on_error: OnError = OnError.REPORT,
    backing_file: str | None = None,
) -> PullRequest | Problem:
    """The request from the fields of its body, or what is wrong with them. `""` as a layer is no layer."""
    fields = common_fields(flags, PullFlag, PullFlag.BANDWIDTH_BYTES, bandwidth, backing_file)
    if isinstance(fields, Problem):
        return fields
    parsed, speed = fields
    made = PullRequest(bandwidth=speed, flags=parsed, on_error=on_error, backing_file=backing_file)
    return replace(made, base=base or None, top=top or None)


def layer_names(request: PullRequest) -> tuple[str, ...]:
    """The names in a request that may be paths of layers."""
    return tuple(filter(None, (request.top, request.base)))


def select(
    disk: Disk,
    request: PullRequest,
    *,
    identities: Mapping[str, Identity] | None = None,
    conflict: str | None = None,
) -> PullSelection | Problem:
    """The layers that `request` means on `disk`, or the first check that it fails; the arguments are as of a commit."""
    seen = identities or {}
    refused = unusable(disk, request.digests, conflict)
    if refused is not None:
        return refused
    top = find_top(disk, request.top, seen)
    if isinstance(top, Problem):
        return top
    base = len(disk.layers)
    if request.base is not None:
        found = base_below(disk, top, request.base, seen, default=base)
        if isinstance(found, Problem):
            return found
        base = found
    if base == top + 1:
        below = "nothing" if base == len(disk.layers) else "the base"
        detail = f"right below {disk.layers[top].file} is {below} already; there is nothing to be copied into it"
        return Problem(code=Code.NOTHING_TO_PULL, detail=detail)
    chosen = PullSelection(disk=disk, request=request, top_index=top + 1, base_index=base)
    return _wrong_ending(chosen) or chosen


def _wrong_ending(chosen: PullSelection) -> Problem | None:
    if chosen.below is None and chosen.request.backing_file is not None:
        detail = (
            f"without `base` nothing is below {chosen.target.file} then, and its header names nothing; leave it out"
        )
        return Problem(code=Code.BACKING_FILE_IMPOSSIBLE, detail=detail)
    if chosen.below is not None and PullFlag.RELATIVE in chosen.request.flags:
        absolute = absolute_header(chosen.disk, chosen.top_index - 1, chosen.base_index)
        if absolute is not None:
            return absolute
    return temporary(chosen.disk) if chosen.disk.temporary else None


def inquiry(selection: PullSelection) -> Inquiry:
    """What has to be known of the host: `top` is written to, the layers between are read. It shows the same then."""
    target = selection.target
    return Inquiry(
        written=target,
        read=selection.merged,
        overlay=target,
        probe=(target.node,) if probed(target) else (),
        names=_names(selection),
        alone=False,
        upwards=True,
    )


def _names(selection: PullSelection) -> tuple[str, ...]:
    asked = selection.request
    if selection.below is None:
        return ()
    return proposals(selection, given=asked.backing_file, relative=PullFlag.RELATIVE in asked.flags)


def plan(selection: PullSelection, facts: Facts) -> Plan[PullSpec] | Problem:
    """The plan, or the reason why `top` can't take the data."""
    given = selection.request.backing_file is not None
    header = pull_refused(selection, facts) or header_string(selection, _names(selection), facts.header, given=given)
    if isinstance(header, Problem):
        return header
    planned = _planned(selection, facts, header)
    return no_room(planned.demand, facts.free) or planned


def _planned(selection: PullSelection, facts: Facts, header: str | None) -> Plan[PullSpec]:
    target, request, files = selection.target, selection.request, selection.disk.files
    # It writes only where the layer has no cluster, so nothing that has to stay is written over.
    facts = replace(facts, crowded=False)
    demand = demand_on(target, selection.merged, facts, size=target.virtual_size, speed=request.bandwidth)
    spec = PullSpec(
        disk=DiskRecord.of(selection.disk),
        top_index=selection.top_index,
        base_index=selection.base_index,
        flags=request.flags,
        backing_file=header,
        header_seen=facts.header.room is not None,
        release=nodes_to_release(selection.disk, selection.top_index, selection.base_index),
    )
    return Plan(
        spec=spec,
        disk=selection.disk,
        on_ready=OnReady.WAIT,
        on_error=request.on_error,
        bandwidth=request.bandwidth,
        chain_after=files[: selection.top_index] + files[selection.base_index :],
        unused=files[selection.top_index : selection.base_index],
        demand=demand,
        free=facts.free,
        backing_file=header,
        warnings=tuple(pull_warnings(selection, facts, demand.growth)),
        commands=(command(spec, bandwidth=request.bandwidth, on_error=request.on_error),),
    )


def again(spec: PullSpec, disk: str, *, on_ready: OnReady, bandwidth: int) -> PullRequest:  # noqa: ARG001 - it has none
    """The request for the same layers, with the same string for the header."""
    base = None if spec.below is None else f"{disk}[{spec.base_index}]"
    made = PullRequest(top=f"{disk}[{spec.top_index - 1}]", base=base, flags=spec.flags, bandwidth=bandwidth)
    return replace(made, backing_file=spec.backing_file)


def adopt(orphan: OrphanJob) -> Plan[PullSpec] | None:
    """The plan of a pull that QEMU has and the journal does not, by the nodes that the job holds.

    It holds the layer that it copies into, and those between, until it is dismissed (block/stream.c). What is below the
    last of them is the base; once the job has taken effect, that is what is below the layer itself.
    """
    held, disks = orphan.held, orphan.disks
    target = next(iter(held.get("active node", ())), None)
    between = held.get("intermediate node", ())
    disk = next((disk for disk in disks if target in disk.nodes), None)
    if orphan.job_type != "stream" or target is None or disk is None or not between:
        return None
    at = disk.nodes.index(target) + 1
    there = [disk.nodes.index(name) for name in between if name in disk.nodes]
    if there:
        if sorted(there) != list(range(at, at + len(there))) or len(there) != len(between):
            return None
        base = at + len(there)
    else:
        if any(name not in orphan.loose for name in between):
            return None
        layers = tuple(orphan.loose[name] for name in between)
        disk, base = replace(disk, layers=(*disk.layers[:at], *layers, *disk.layers[at:])), at + len(layers)
    asked = PullRequest(bandwidth=orphan.speed)
    # Nothing is asked: QEMU is copying anyway, and has its string for the header.
    return _planned(PullSelection(disk=disk, request=asked, top_index=at, base_index=base), Facts(), None)


# What an accepted pull is, and how it ends ----------------------------------------------------------------------------


def capabilities(spec: PullSpec) -> Capabilities:  # noqa: ARG001 - all pulls are alike
    """A pull ends by itself, is proven by a header, and makes nothing wrong while it runs."""
    return Capabilities(
        pivots=False,
        ends_because="copies layers upwards",
        held_at_pending=True,
        header_proves=True,
        only_flushed=True,
        data_at_start=DataState.UNTOUCHED,
    )


def command(spec: PullSpec, *, bandwidth: int, on_error: OnError) -> QemuCommand:
    """QAPI `block-stream`. The job stays in QEMU once it has concluded, so that a crash of ours loses no outcome."""
    arguments: dict[str, object] = {"device": spec.target.node}
    if spec.below is not None:
        arguments["base-node"] = spec.below.node
    if spec.backing_file is not None:
        arguments["backing-file"] = spec.backing_file
    if bandwidth > 0:
        arguments["speed"] = bandwidth
    ending = {"on-error": on_error.value, "auto-finalize": False, "auto-dismiss": False}
    return QemuCommand(execute="block-stream", arguments=arguments | ending)


def claims(spec: PullSpec, domain: str, disk: str) -> tuple[Claim, ...]:
    """The chain gets another shape, `top` is written to, what is below it is read."""
    read = spec.merged if spec.below is None else (*spec.merged, spec.below)
    return (
        Claim(DiskChain(domain, disk), Access.WRITE),
        Claim(spec.target.image, Access.WRITE),
        *(Claim(layer.image, Access.READ) for layer in read),
    )


def mixed(spec: PullSpec) -> tuple[LayerRecord, ...]:  # noqa: ARG001
    """None: `top` gets what shines through it anyway."""
    return ()


def worthless(spec: PullSpec) -> tuple[LayerRecord, ...]:  # noqa: ARG001
    """None: what is left out of the chain stays right."""
    return ()


def written(spec: PullSpec) -> LayerRecord:
    """The layer that is copied into."""
    return spec.target


def flushes(spec: PullSpec) -> str:
    """Its node."""
    return spec.target.node


def header_file(spec: PullSpec) -> str | None:
    """The same image: its header leads to the base then."""
    return spec.target.file


def prove(spec: PullSpec, evidence: Evidence) -> Proof:
    """What QEMU's graph and the header show together."""
    return chain_proof(spec, evidence, header_proves=True)


def judge(spec: PullSpec, evidence: Evidence) -> Judgement:
    """The ending that QEMU's last word and the chain prove together."""
    return judged(spec, evidence, capabilities(spec), doubt=lambda said: _doubt(spec, evidence, said))


def _doubt(spec: PullSpec, evidence: Evidence, said: str) -> str:
    if prove(spec, evidence) is not Proof.MERGED:
        return header_doubt(spec, said)
    target, first = spec.target.file, spec.merged[0].file
    return (
        f"{said}, and the header of {target} leads past the layers that were copied, but nobody knows whether all of "
        "the copy was on the disk by then: what is missing reads as older data or zeros. Nothing is lost, the layers "
        f"are still there: with the domain off, `qemu-img rebase -u -b {first} -F {spec.merged[0].format or 'FORMAT'} "
        f"{target}` puts them back below it, and the pull can be made again."
    )


def cleanup(spec: PullSpec, judgement: Judgement) -> CleanUp:
    """After a pull: the nodes that QEMU keeps. No file is touched."""
    before, read_only = spec.disk.files, (spec.target.node,) if spec.target.read_only else ()
    if judgement.state is not State.COMPLETED:
        return CleanUp(chain=before, read_only=read_only)
    return CleanUp(
        release=spec.release,
        read_only=read_only,
        chain=before[: spec.top_index] + before[spec.base_index :],
        unused=before[spec.top_index : spec.base_index],
    )
