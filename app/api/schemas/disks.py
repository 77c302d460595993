"""The JSON of disks and their chains."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from app.api.schemas.base import Out
from app.engine.views import DiskView


class LayerOut(Out):
    """One image of a chain. Sizes in bytes."""

    index: int
    file: str
    format: str
    node: str
    virtual_size: int
    actual_size: int
    backing: str | None = Field(description="the string in the image's own header")
    valid: bool = Field(description="false once a commit has modified the layer below and has not finished")


class DiskOut(Out):
    """A disk and its chain, active layer first."""

    name: str
    aliases: Sequence[str]
    node: str | None
    read_only: bool
    virtual_size: int
    chain: Sequence[LayerOut]
    digest: str = Field(description="changes whenever the chain changes; also the `ETag`")
    job: str | None = Field(description="the unfinished job on this disk")


class Disks(Out):
    """A page of disks."""

    items: Sequence[DiskOut]
    next: str | None


def disk_out(view: DiskView) -> DiskOut:
    """The JSON of a disk."""
    disk = view.disk
    chain = [
        LayerOut(
            index=index,
            file=layer.file,
            format=layer.format,
            node=layer.node,
            virtual_size=layer.virtual_size,
            actual_size=layer.actual_size,
            backing=layer.backing,
            valid=valid,
        )
        for index, (layer, valid) in enumerate(zip(disk.layers, view.valid, strict=True))
    ]
    return DiskOut(
        name=disk.name,
        aliases=disk.aliases,
        node=disk.node,
        read_only=disk.read_only,
        virtual_size=disk.virtual_size,
        chain=chain,
        digest=disk.digest,
        job=view.job,
    )


def disk_json(view: DiskView) -> str:
    """The JSON text of a disk."""
    return disk_out(view).model_dump_json()
