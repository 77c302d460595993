"""What is known of a job's outcome, piece by piece, and what follows from it.

Each piece says who said it. A piece that could not be had is None or `Sameness.UNKNOWN`, which is never equal to
anything: it counts neither as "the same" nor as "not there". A kind of job judges the pieces together
(`app.core.kinds`).

    piece              comes from                                         holds when
    QEMU's verdict     `concluded` seen, or its event heard, by us        the process is proven to have taken the job
    the same process   pid and start time, or the job's own id in it      known and equal; the id is our mark
    the graph          node-names and files of the same disk              read after the verdict
    the header         the overlay's own header, resolved                 read after the verdict
    heard to its end   a connection that QEMU itself ended                it had listed the job, no event was missed
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from app.core.chain import Identity
from app.core.errors import Problem
from app.core.sameness import Sameness, same
from app.core.states import DataState, Intent, State


class Verdict(StrEnum):
    """What QEMU said of the job at its end."""

    FINE = "fine"
    """Concluded, without error."""
    ERROR = "error"
    """Concluded, with an error; its text is in `Evidence.verdict_error`."""
    VANISHED = "vanished"
    """QEMU runs, and does not list the job any more."""
    GONE = "gone"
    """QEMU itself has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Which QEMU it is: another pid, start time (clock ticks since boot) or uuid is another process.

    `view` is where pid and start time hold, as `machine/boot/pid namespace`; None in records of 0.1.
    """

    pid: int | None
    started: int | None
    uuid: str | None
    view: str | None = None


def same_view(one: str | None, other: str | None) -> Sameness:
    """Whether numbers of processes mean the same in both views.

    OTHER: the machine was booted in between, so no process of the one is there in the other. What is not known, such as
    the machine in a container, tells nothing.
    """
    if one is None or other is None or one == other:
        return Sameness.SAME
    (machine, boot, _), (other_machine, other_boot, _) = one.split("/"), other.split("/")
    return Sameness.OTHER if machine and machine == other_machine and boot != other_boot else Sameness.UNKNOWN


def same_process(one: Process | None, other: Process | None) -> Sameness:
    """Whether both are the same QEMU.

    A uuid alone can't say yes: a domain keeps its uuid from one start to the next.
    """
    if one is None or other is None:
        return Sameness.UNKNOWN
    view, uuid = same_view(one.view, other.view), same(one.uuid, other.uuid)
    if Sameness.OTHER in (view, uuid):
        return Sameness.OTHER
    if view is Sameness.UNKNOWN:
        return Sameness.UNKNOWN
    pid, started = same(one.pid, other.pid), same(one.started, other.started)
    if Sameness.OTHER in (pid, started):
        return Sameness.OTHER
    return Sameness.SAME if pid is started is Sameness.SAME else Sameness.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReading:
    """The chain of the job's disk in QEMU's graph, active layer first, read after the verdict."""

    nodes: tuple[str, ...]
    files: tuple[str, ...]
    identities: tuple[Identity | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderReading:
    """Where an image's header leads: a path, and the file there if it can be seen; None: it names no image."""

    file: str | None
    identity: Identity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known when a job is judged.

    `intent` and `pivot_asked` say what was asked of QEMU. `process` says whether the QEMU that answers is the one that
    took the job, `ended` that the one that took it is known to have ended. `watched`: it was heard until it ended, over
    one connection, and never told that the job was about to take effect. `unplugged`: QEMU answers, and none of its
    disks has a layer of the job. `graph` and `header` are None where they were not read or could not be. `flushed`:
    QEMU has written to the disk all that it changed, not only to its own cache.
    """

    verdict: Verdict | None = None
    verdict_error: str | None = None
    intent: Intent = Intent.RUN
    pivot_asked: bool = False
    process: Sameness = Sameness.UNKNOWN
    ended: bool = False
    watched: bool = False
    unplugged: bool = False
    graph: GraphReading | None = None
    header: HeaderReading | None = None
    flushed: bool = False


class Proof(StrEnum):
    """What the chain, read again, shows of the job's work."""

    MERGED = "merged"
    UNCHANGED = "unchanged"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What follows from the evidence; kept with the job, so that a restart goes on where it was.

    `data_state` is None where the evidence says nothing new of it. `merged`: the chain is the shorter one. `durable`:
    what was merged is proven to be on the disk, and no header leads to the merged images: nothing else holds the only
    lasting copy. `because` says in
    words for a person what the outcome was read from.
    """

    state: State
    error: Problem | None = None
    data_state: DataState | None = None
    merged: bool = False
    durable: bool = False
    because: str = ""
