"""What every kind of job is planned from, and what a plan is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from app.core.chain import Disk, Identity, Layer
from app.core.headers import HeaderFacts
from app.core.states import OnError, OnReady

S = TypeVar("S", covariant=True)  # noqa: PLC0105 - one letter says it


class Guest(StrEnum):
    """What QEMU says of its guest (QAPI `RunState`, `MigrationStatus`)."""

    RUNNING = "running"
    PAUSED = "paused"
    MIGRATING = "migrating"
    """An outgoing migration runs, or has ended: the images are another QEMU's, or will be."""
    INCOMING = "incoming"
    """The guest has not arrived yet: the images are still another QEMU's."""


@dataclass(frozen=True, slots=True)
class Parent:
    """Who has a node below itself in QEMU's graph.

    `kind` is QAPI `XDbgBlockGraphNodeType`. `name` is a node's, a job's, or that of a device or an export; `role` is
    what the node is to it, and `shares_write` whether it lets others write to the node.
    """

    kind: str
    name: str
    role: str
    shares_write: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What QEMU says before a job that no reading of the disks shows. `version` is QEMU's own.

    `parents` are by node, and empty where QEMU does not tell. `unwritable` are those of the nodes asked about that QEMU
    can't open for writing, each with its words.
    """

    version: tuple[int, int, int] = (0, 0, 0)
    guest: Guest = Guest.RUNNING
    parents: Mapping[str, tuple[Parent, ...]] = field(default_factory=dict[str, "tuple[Parent, ...]"])
    unwritable: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """What a plan has to know of the host.

    `written` is the layer that the job writes to, `read` those whose data it copies, topmost first. `to_delete` are the
    files that the request would have deleted. `names` are those that the header of `overlay` might get.
    `probe` are the nodes that QEMU has open for reading, and will have to write to. `alone`: what `written` shows
    changes, so nobody else may use it. `upwards`: the `read` layers are below `written`, not above.
    """

    written: Layer
    read: tuple[Layer, ...]
    to_delete: Mapping[str, Identity | None] = field(default_factory=dict[str, "Identity | None"])
    overlay: Layer | None = None
    probe: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    alone: bool = True
    upwards: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The answers to an `Inquiry`. Sizes in bytes; None where an answer can't be had.

    `shared_with` names the other disk, or the file, that uses the written layer; `shared_because` says how that is
    known. `overlays_searched`: the folders that the service may look into were searched for such files. `locked` says
    that another process has it open. `bytes_to_copy` and `new_bytes` (those of them that have no place in the written
    layer yet) come from the images' own maps; without them the plan reckons with the layers' sizes on disk. `crowded`:
    clusters of the written layer stay when they are written over, as far as is known without the maps or by them.
    `undeletable` are files that a deletion would leave, each with the reason.
    """

    shared_with: str | None = None
    shared_because: str = ""
    overlays_searched: bool = True
    locked: bool = False
    free: int | None = None
    bytes_to_copy: int | None = None
    new_bytes: int | None = None
    crowded: bool = False
    written_is_device: bool = False
    undeletable: Mapping[str, str] = field(default_factory=dict[str, str])
    header: HeaderFacts = field(default_factory=HeaderFacts)
    survey: Survey = field(default_factory=Survey)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWarning:
    """Something that the caller should know before the job runs."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuCommand:
    """A QMP command, as a dry run shows it and a driver sends it; a driver adds the job's id."""

    execute: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a job asks of the host: `growth` more bytes in the file system of `file`, `copies` bytes moved at `speed`.

    `speed` is in bytes/s; 0 is no limit.
    """

    file: str
    growth: int
    copies: int
    speed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Generic[S]):
    """What a job will do. Files where not said otherwise; `chain_after` active layer first; sizes in bytes.

    `invalidates` are files that must not be used any more afterwards, `deletes` those of them that are unlinked,
    `unused` are files that the disk does not use any more, and that stay right (None: the kind leaves none such).
    `backing_file` is what the header of the layer above will say. `free` is None where it can't be seen. `commands` are
    those by which the job is started, in their order.
    """

    spec: S
    disk: Disk
    on_ready: OnReady
    on_error: OnError
    bandwidth: int
    chain_after: tuple[str, ...]
    invalidates: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    unused: tuple[str, ...] | None = None
    demand: Demand
    free: int | None = None
    resizes_base_to: int | None = None
    backing_file: str | None = None
    warnings: tuple[PlanWarning, ...] = ()
    commands: tuple[QemuCommand, ...]
