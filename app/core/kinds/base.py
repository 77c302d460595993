"""What the house asks of a kind of job, and the values in which it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from app.core.chain import Disk, Identity, NotDeleted
from app.core.errors import Problem
from app.core.evidence import Evidence, Judgement, Proof
from app.core.images import Claim, Image
from app.core.orphan import OrphanJob
from app.core.plan import Facts, Inquiry, Plan, QemuCommand
from app.core.states import DataState, JobType, OnError, OnReady


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """A layer as it was when the job was accepted. `identity` is None where QEMU's file could not be seen.

    `device` is the number of a block device, `born` when the file was made (ns since 1970).
    """

    file: str
    node: str
    identity: Identity | None = None
    device: int | None = None
    born: int | None = None
    format: str = ""
    virtual_size: int = 0
    read_only: bool = False

    @property
    def image(self) -> Image:
        """The image, as claims and marks name it."""
        return Image(self.file, self.identity, self.device, self.born)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRecord:
    """The disk as it was when the job was accepted, active layer first; enough to find it again after a restart.

    `node` is the node-name of the disk's root, `qdev` QEMU's name of the device, `backend` the `-drive` id.
    """

    node: str
    qdev: str | None
    backend: str | None
    digest: str
    layers: tuple[LayerRecord, ...]

    @classmethod
    def of(cls, disk: Disk) -> DiskRecord:
        """The record of a disk that was just read."""
        layers = tuple(
            LayerRecord(
                file=each.file,
                node=each.node,
                identity=each.identity,
                device=each.device,
                born=each.born,
                format=each.format,
                virtual_size=each.virtual_size,
                read_only=each.read_only,
            )
            for each in disk.layers
        )
        return cls(node=disk.node or "", qdev=disk.qdev, backend=disk.backend, digest=disk.digest, layers=layers)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the chain."""
        return tuple(layer.file for layer in self.layers)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The format nodes of the chain."""
        return tuple(layer.node for layer in self.layers)

    def image(self, file: str) -> Image:
        """Which image it was that the chain had under this name."""
        return next((layer.image for layer in self.layers if layer.file == file), Image(file))


class JobSpec(Protocol):
    """What every kind's spec has. `kind` and `layout` tell the journal how to read it; the rest is shown outside."""

    @property
    def kind(self) -> str:
        """The key of the kind in `app.core.kinds.KINDS`."""
        ...

    @property
    def layout(self) -> int:
        """The version of the spec's layout in the journal."""
        ...

    @property
    def disk(self) -> DiskRecord:
        """The disk that the job works on."""
        ...

    @property
    def type(self) -> JobType:
        """What the job is called outside."""
        ...

    @property
    def top_file(self) -> str:
        """The topmost image that the job works on."""
        ...

    @property
    def base_file(self) -> str | None:
        """The image at the bottom of what the job works on; None where nothing is below then."""
        ...

    @property
    def overlay_file(self) -> str | None:
        """The image above `top_file`; None where that is the active layer."""
        ...

    @property
    def flag_names(self) -> list[str]:
        """The names of the request's flags."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a job is capable of, and what the house has to do for it. Everything is asked of this, nothing of a type."""

    pivots: bool
    """It has a state `ready`, at which it waits in step with the guest, and can end in a pivot."""
    ends_because: str
    """Why there is nothing to pivot, as a predicate of the job; empty where it pivots."""
    held_at_pending: bool
    """QEMU holds it at `pending` until its data is flushed and it is finalized (`auto-finalize: false`)."""
    header_proves: bool
    """Its outcome can be read from the header of the layer above those that leave the chain."""
    only_flushed: bool
    """It must not take effect before its data is on the disk: a QEMU that ends right then would lose it."""
    data_at_start: DataState
    """What its start does to the images: QEMU may write at any moment from then on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanUp:
    """What is tidied up after a judgement.

    `release` are the nodes to delete, in that order, `read_only` those to be open for reading only again. `to_delete`
    are the files to unlink, each with the image that it must be. `compared` are the layers, topmost first, whose view
    has to be the same as that of the last of them before anything is deleted, as far as the layer above shows it
    (`compared_size` bytes). `chain` are the files of the chain as the
    judgement has it. `unused` are those that the disk does not use any more, of a kind that leaves them all right; None
    of any other.
    """

    release: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()
    to_delete: Mapping[str, Image] = field(default_factory=dict[str, Image])
    invalidated: tuple[str, ...] = ()
    not_deleted: tuple[NotDeleted, ...] = ()
    compared: tuple[LayerRecord, ...] = ()
    compared_size: int = 0
    chain: tuple[str, ...] = ()
    unused: tuple[str, ...] | None = None

    def without_deletions(self, why: str) -> CleanUp:
        """The same, with all files left for that reason."""
        left = tuple(NotDeleted(file=file, reason=why) for file in self.to_delete)
        return replace(self, to_delete={}, not_deleted=self.not_deleted + left)


class JobKind(Protocol):
    """A kind of job: one module of pure functions. `spec` is the kind's own class of spec.

    From `request(...)`, whose arguments are its own, over `select(disk, request, ...)` to `plan(selection, facts)`;
    between the last two the house answers `inquiry(selection)`.
    """

    @property
    def request(self) -> Callable[..., Any]:
        """Makes the request from the fields of its body, or the `Problem` of what is wrong with them."""
        ...

    def select(
        self, disk: Disk, request: Any, *, identities: Mapping[str, Identity] | None = None, conflict: str | None = None
    ) -> Any:
        """The layers that a request means, or the `Problem` of the first check that it fails."""
        ...

    def inquiry(self, selection: Any) -> Inquiry:
        """What has to be known of the host for a plan."""
        ...

    def plan(self, selection: Any, facts: Facts) -> Plan[Any] | Problem:
        """The `Plan`, or the `Problem` of the first check that fails."""
        ...

    def layer_names(self, request: Any) -> tuple[str, ...]:
        """The names in a request that may be paths of layers."""
        ...

    def again(self, spec: Any, disk: str, *, on_ready: OnReady, bandwidth: int) -> Any:
        """The request by which a job with this spec is planned anew on its disk, whose name is `disk` by now."""
        ...

    def capabilities(self, spec: Any) -> Capabilities:
        """What a job with this spec is capable of."""
        ...

    def command(self, spec: Any, *, bandwidth: int, on_error: OnError) -> QemuCommand:
        """The command that starts the job, for the dry run and the run alike; `bandwidth` in bytes/s."""
        ...

    def claims(self, spec: Any, domain: str, disk: str) -> tuple[Claim, ...]:
        """What the job does to which images, and to the chain of its disk, until it ends."""
        ...

    def mixed(self, spec: Any) -> tuple[LayerRecord, ...]:
        """The layers whose own content can't be relied on from the job's start to its completion."""
        ...

    def worthless(self, spec: Any) -> tuple[LayerRecord, ...]:
        """The layers that nobody needs any more once the job has completed, and whose content may be wrong then."""
        ...

    def written(self, spec: Any) -> LayerRecord:
        """The layer that the job copies into."""
        ...

    def flushes(self, spec: Any) -> str:
        """The node that has to be on the disk before the job may be finalized; empty where QEMU sees to it."""
        ...

    def header_file(self, spec: Any) -> str | None:
        """The image whose header proves the outcome; None where no header does."""
        ...

    def prove(self, spec: Any, evidence: Evidence) -> Proof:
        """What the chain alone shows of the job's work."""
        ...

    def judge(self, spec: Any, evidence: Evidence) -> Judgement:
        """The outcome that the pieces of evidence prove together."""
        ...

    def cleanup(self, spec: Any, judgement: Judgement) -> CleanUp:
        """What is to be tidied up then."""
        ...

    def adopt(self, orphan: OrphanJob) -> Plan[Any] | None:
        """The plan of a job of ours that QEMU has and the journal does not; None where the graph does not tell."""
        ...
