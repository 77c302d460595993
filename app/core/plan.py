"""What every kind of job is planned from, and what a plan is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from app.core.chain import Disk, Identity, Layer
from app.core.headers import HeaderFacts
from app.core.states import OnError, OnReady

S = TypeVar("S", covariant=True)  # noqa: PLC0105 - one letter says it


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """What a plan has to know of the host.

    `written` is the layer that the job writes to, `read` those whose data it copies, topmost first. `to_delete` are the
    files that the request would have deleted. `names` are those that the header of `overlay` might get.
    """

    written: Layer
    read: tuple[Layer, ...]
    to_delete: Mapping[str, Identity | None] = field(default_factory=dict[str, "Identity | None"])
    overlay: Layer | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The answers to an `Inquiry`. Sizes in bytes; None where an answer can't be had.

    `shared_with` names the other disk that uses the written layer; `locked` says that another process has it open.
    `bytes_to_copy` and `new_bytes` (those of them that have no place in the written layer yet) come from the images'
    own maps; without them the plan reckons with the layers' sizes on disk. `undeletable` are files that a deletion
    would leave, each with the reason.
    """

    shared_with: str | None = None
    locked: bool = False
    free: int | None = None
    bytes_to_copy: int | None = None
    new_bytes: int | None = None
    written_is_device: bool = False
    undeletable: Mapping[str, str] = field(default_factory=dict[str, str])
    header: HeaderFacts = field(default_factory=HeaderFacts)


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

    `invalidates` are files that must not be used any more afterwards, `deletes` those of them that are unlinked.
    `backing_file` is what the header of the overlay will say. `free` is None where it can't be seen.
    """

    spec: S
    disk: Disk
    on_ready: OnReady
    on_error: OnError
    bandwidth: int
    chain_after: tuple[str, ...]
    invalidates: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    demand: Demand
    free: int | None = None
    resizes_base_to: int | None = None
    backing_file: str | None = None
    warnings: tuple[PlanWarning, ...] = ()
    command: QemuCommand
