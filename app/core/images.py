"""Which images are used, who may do what to them, and whose content can be relied on.

Three records, which outlive actors, restarts and the retention of jobs:

- An `ImageUse` says that a disk has an image at a place of its chain.
- A `Claim` says what an unfinished job does to an image, or to the shape of a disk's chain.
- An `InvalidMark` says that an image shows a mixture, because the layers below it were written to.

All three name an image by an `Image`. `same_image` says whether two of them are the same image, as far as can be told.
Nothing here opens a file.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from app.core.chain import Disk, Identity, Layer
from app.core.headers import PROTOCOLS
from app.core.sameness import Sameness, same


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it was seen at some moment.

    `path` is the path in QEMU's view of the file system, or another name that QEMU gives (`nbd://…`, `json:{…}`).
    `identity` is (st_dev, st_ino), and None if the service could not see the file. `device` is the number of a block
    device (st_rdev), and None if the image is no block device, or could not be seen. `born` is when the file was made,
    in ns since 1970, and None if nobody can tell.
    """

    path: str
    identity: Identity | None = None
    device: int | None = None
    born: int | None = None

    def __post_init__(self) -> None:
        # QEMU joins the folder of an overlay and the name in its header: `/images/web1/../base.qcow2`. The journal
        # looks for equal paths, so a path needs to have one spelling.
        if self.path.startswith("/"):
            object.__setattr__(self, "path", "/" + posixpath.normpath(self.path).lstrip("/"))

    @classmethod
    def of(cls, layer: Layer) -> Image:
        """The image of a layer."""
        return cls(layer.file, layer.identity, layer.device, layer.born)


def same_image(one: Image, other: Image) -> Sameness:
    """Whether both are the same image.

    Block devices are compared by their numbers: a device may have several nodes, each with an inode of its own. The
    numbers of devices, and with them st_dev of a file system, may be others after the host has been restarted. So other
    numbers under an equal path (of files: with an equal inode number) prove nothing.
    """
    if one.device is not None and other.device is not None:
        if one.device == other.device:
            return Sameness.SAME
        return Sameness.UNKNOWN if one.path == other.path else Sameness.OTHER
    if one.identity is None or other.identity is None:
        return Sameness.UNKNOWN
    if one.identity == other.identity:
        # A file system gives the number of a file that was deleted to a new one.
        return Sameness.OTHER if same(one.born, other.born) is Sameness.OTHER else Sameness.SAME
    renumbered = one.path == other.path and one.identity[1] == other.identity[1]
    return Sameness.UNKNOWN if renumbered else Sameness.OTHER


def may_be_same(one: Image, other: Image, *, one_view: bool = True) -> bool:
    """Whether both have to be treated as the same image; if nobody can tell, equal paths decide.

    Equal paths say that only within `one_view` of the file system: QEMUs in other containers or on other hosts have
    other files under the same paths.
    """
    answer = same_image(one, other)
    return answer is Sameness.SAME or (answer is Sameness.UNKNOWN and one_view and one.path == other.path)


def one_view(domain: str | None, other: str | None) -> bool:
    """Whether the paths of two domains are known to be seen in the same way; None is any domain."""
    return domain is None or other is None or domain == other


# Uses -----------------------------------------------------------------------------------------------------------------

HEADERLESS: Final = PROTOCOLS | {"raw", "vpc"}
"""Drivers that give the guest an image from its first byte on (QAPI `BlockdevDriver`; `vpc` where its size is fixed).

The guest may write there what looks like the header of another format. So nobody may believe it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageUse:
    """A disk has an image in its chain, as it was read at `seen_at` (ms since 1970).

    `place` is the position in the chain; 0 is the active layer. `image` is None if the chain goes on at that place and
    nobody could find out with which image; it may be any image then. `format` is the driver with which QEMU had the
    image open; None if QEMU has never told, which is so for what was only found in headers.
    """

    domain: str
    disk: str
    place: int
    image: Image | None
    seen_at: int
    format: str | None = None


def uses_by(domain: str, disk: Disk, *, seen_at: int) -> tuple[ImageUse, ...]:
    """The uses of a disk's chain. What a process names that it does not have open is no use of the image."""
    return tuple(
        ImageUse(
            domain=domain,
            disk=disk.name,
            place=place,
            image=Image.of(layer),
            seen_at=seen_at,
            format=layer.format,
        )
        for place, layer in enumerate(disk.layers)
        if not layer.unheld
    )


def has_image(disk: Disk, image: Image) -> bool:
    """Whether a layer of the disk is, or may be, the image; both are seen by one process."""
    return any(may_be_same(Image.of(layer), image) for layer in disk.layers)


def format_of(image: Image, uses: Iterable[ImageUse], domain: str) -> str | None:
    """The format that QEMU has told of the image: that of the first of the `uses` that tells; None if none does.

    `domain` is whose image it is. Another domain's use counts only if its image is surely the same: to take an overlay
    for a raw image would mean that the image below has no user.
    """
    return next(
        (
            use.format
            for use in uses
            if use.format is not None
            and use.image is not None
            and may_be_same(use.image, image, one_view=use.domain == domain)
        ),
        None,
    )


def users_of(uses: Iterable[ImageUse], image: Image, *, besides: Sequence[ImageUse] = ()) -> tuple[ImageUse, ...]:
    """The uses that are, or may be, uses of the image, in their order.

    `besides` are the uses of the disk that asks. Its own uses don't count, and neither do the uses of a disk with the
    same active layer: that is the same disk, known by another registration or from before a restart.
    """
    uses = tuple(uses)
    active = [use.image for use in besides if use.place == 0 and use.image is not None]
    own = {(use.domain, use.disk) for use in besides}
    own |= {
        (use.domain, use.disk)
        for use in uses
        if use.place == 0 and use.image is not None and any(may_be_same(use.image, each) for each in active)
    }
    return tuple(
        use
        for use in uses
        if (use.domain, use.disk) not in own and (use.image is None or may_be_same(use.image, image))
    )


# Claims ---------------------------------------------------------------------------------------------------------------


class Access(StrEnum):
    """What a job does to what it has a claim on."""

    READ = "read"
    WRITE = "write"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class DiskChain:
    """The shape of a disk's chain: which layers it has, in which order. A job that merges layers writes it."""

    domain: str
    disk: str


Resource = Image | DiskChain


@dataclass(frozen=True, slots=True)
class Claim:
    """What a job does to an image, or to the shape of a chain."""

    resource: Resource
    access: Access


@dataclass(frozen=True, slots=True, kw_only=True)
class JobClaims:
    """The claims of an unfinished job of a domain. `parent` is the job that has started it as one of its steps."""

    job_id: str
    domain: str | None = None
    parent: str | None = None
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two claims that exclude each other; `job_id` is the job that has `theirs`."""

    job_id: str
    mine: Claim
    theirs: Claim


def conflicts(mine: Claim, theirs: Claim, *, one_view: bool = True) -> bool:
    """Whether two claims exclude each other: they are on the same resource, and one of them is more than a read.

    `one_view`: as in `may_be_same`.
    """
    if mine.access is Access.READ and theirs.access is Access.READ:
        return False
    if isinstance(mine.resource, Image) and isinstance(theirs.resource, Image):
        return may_be_same(mine.resource, theirs.resource, one_view=one_view)
    return mine.resource == theirs.resource


def related(mine: JobClaims, theirs: JobClaims) -> bool:
    """Whether two jobs don't exclude each other: they are one job, or a job and a step of it."""
    return mine.job_id in (theirs.job_id, theirs.parent) or mine.parent == theirs.job_id


def find_conflict(mine: JobClaims, others: Iterable[JobClaims]) -> Conflict | None:
    """The first claim of another, unrelated job that excludes one of mine."""
    for other in others:
        if related(mine, other):
            continue
        together = one_view(mine.domain, other.domain)
        for theirs in other.claims:
            for claim in mine.claims:
                if conflicts(claim, theirs, one_view=together):
                    return Conflict(job_id=other.job_id, mine=claim, theirs=theirs)
    return None


# Validity -------------------------------------------------------------------------------------------------------------


class InvalidReason(StrEnum):
    """Why the content of an image can't be relied on."""

    BASE_MODIFIED = "base-modified"
    """A job has written to a layer below, and the merge has not completed."""
    KEPT = "kept"
    """A layer below has become a copy of the active layer, which stays in use (`on_ready: keep`)."""
    MERGED = "merged"
    """It was merged, and left in place: nobody needs it any more, and its content was right until the base changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidMark:
    """An image shows a mixture since the job `job_id` of the domain.

    It belongs to the image, and ends when the image is deleted, merged, or replaced by another file under its path.
    """

    image: Image
    job_id: str
    domain: str
    reason: InvalidReason


@dataclass(frozen=True, slots=True)
class MarkChange:
    """Which marks are set, and which images are valid or gone now: all marks of theirs end first.

    `domain` is the domain in whose view the images to `remove` are named; None: in any.
    """

    add: tuple[InvalidMark, ...] = ()
    remove: tuple[Image, ...] = ()
    domain: str | None = None


def marks_of(images: Iterable[Image], *, job_id: str, domain: str, reason: InvalidReason) -> tuple[InvalidMark, ...]:
    """The marks of images that show a mixture since a job."""
    return tuple(InvalidMark(image=image, job_id=job_id, domain=domain, reason=reason) for image in images)


def marks_of_merge(
    chain: Sequence[Image], *, top: int, base: int, job_id: str, domain: str, reason: InvalidReason
) -> tuple[InvalidMark, ...]:
    """The marks that a merge of the layers from `top` down to `base` sets once it writes to the base.

    `chain` is the whole chain before the job, active layer first. The merged layers become invalid, `top` included
    (see virDomainBlockCommit). The active layer stays right: it has all that was copied down.
    """
    return marks_of(chain[max(top, 1) : base], job_id=job_id, domain=domain, reason=reason)


def valid_layers(disk: Disk, marks: Iterable[InvalidMark], domain: str | None = None) -> tuple[bool, ...]:
    """For each layer of a domain's disk whether its content can be relied on.

    The active layer is always right: the guest reads what it shows.
    """
    marked = [(mark.image, one_view(domain, mark.domain)) for mark in marks if mark.reason is not InvalidReason.MERGED]
    return tuple(
        place == 0 or not any(may_be_same(Image.of(layer), image, one_view=together) for image, together in marked)
        for place, layer in enumerate(disk.layers)
    )
