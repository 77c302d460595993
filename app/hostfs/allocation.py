"""How much room there is, and how much a merge takes."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from app.core.chain import Layer
from app.core.evidence import Process
from app.core.kinds.base import LayerRecord
from app.engine.ports.images import Measure
from app.hostfs import qcow2
from app.hostfs.headers import open_image
from app.hostfs.process import as_seen_by, stat_of
from app.hostfs.roots import Roots

SAID_MAX: Final = 1000
"""Characters that are kept of what the tool says."""

MAP_MAX: Final = 64 << 20
"""Bytes of an image's map that are read; that of a larger image is estimated instead."""


def free_bytes(path: str, process: Process | None, roots: Roots) -> int | None:
    """Bytes by which the image `path` can grow: those that are free in its file system, or behind it in its device.

    None where that can't be seen. May block.
    """
    if is_device(path, process):
        return _free_behind(path, process, roots)
    with suppress(OSError):
        found = os.statvfs(as_seen_by(path, process))
        return found.f_bavail * found.f_frsize
    return None


def _free_behind(path: str, process: Process | None, roots: Roots) -> int | None:
    """Bytes of a device that are behind the end of the qcow2 image on it; None where that can't be seen."""
    with suppress(OSError, ValueError):
        file = open_image(path, process, roots, None)
        try:
            size = os.lseek(file, 0, os.SEEK_END)
            return max(0, size - qcow2.end(lambda at, length: os.pread(file, length, at)))
        finally:
            os.close(file)
    return None


def is_device(path: str, process: Process | None) -> bool:
    """Whether `path` is a block device, which does not grow. May block."""
    with suppress(OSError):
        return stat.S_ISBLK(stat_of(path, process).st_mode)
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuImg:
    """The tool that reads images' maps; `timeout` is the most seconds that one may take."""

    program: str
    timeout: float

    async def map(self, image: Mapping[str, object], files: Sequence[int]) -> list[dict[str, Any]] | None:
        """The map of an image that is described as QAPI `BlockdevOptions`; None where it can't be had in time.

        `files` are the open files by which the description names all that is to be read.
        """
        arguments = ("map", "-U", "--output=json", "json:" + json.dumps(image))
        try:
            process = await asyncio.create_subprocess_exec(
                self.program,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                pass_fds=files,
            )
        except OSError:
            return None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self.timeout):
                text = bytearray()
                while chunk := await process.stdout.read(1 << 20):
                    text += chunk
                    if len(text) > MAP_MAX:
                        return None
                return json.loads(text) if await process.wait() == 0 else None
        except (TimeoutError, json.JSONDecodeError):
            return None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def compare(self, one: Mapping[str, object], other: Mapping[str, object], files: Sequence[int]) -> str | None:
        """Why two described images don't show the same, in the tool's own words; None if they do.

        It takes as long as it takes to read both; whoever waits may be canceled.
        """
        images = ("json:" + json.dumps(each) for each in (one, other))
        try:
            process = await asyncio.create_subprocess_exec(
                *(self.program, "compare", "-U", *images),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=files,
            )
        except OSError as error:
            return f"{self.program} can't be run: {error.strerror}"
        try:
            said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return None if process.returncode == 0 else said.decode(errors="replace").strip()[:SAID_MAX]


MAPPED: Final = frozenset({"raw", "qcow2", "qed"})
"""The formats that the tool is let loose on: what a monitor names may be anything."""


@dataclass(frozen=True, slots=True)
class Judged:
    """An image's file, open and judged, and whether it is a block device."""

    file: int
    device: bool


def judge(
    layers: Sequence[Layer] | Sequence[LayerRecord], process: Process | None, roots: Roots
) -> tuple[Judged, ...] | None:
    """The files of the layers, opened for reading after they were judged; None where one must not be read. May block.

    Who gets them closes them. An image that holds its data elsewhere would have the tool open what it names.
    """
    opened: list[Judged] = []
    for layer in layers:
        try:
            if layer.format not in MAPPED or layer.identity is None:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), layer.file)
            file = open_image(layer.file, process, roots, layer.identity)
        except (OSError, ValueError):
            for each in opened:
                os.close(each.file)
            return None
        opened.append(Judged(file, stat.S_ISBLK(os.fstat(file).st_mode)))
    heads = [os.pread(each.file, qcow2.FEATURES_END, 0) for each in opened]
    if any(map(qcow2.keeps_data_elsewhere, heads)):
        for each in opened:
            os.close(each.file)
        return None
    return tuple(opened)


async def compare(
    layers: Sequence[LayerRecord], judged: Sequence[Judged], qemu_img: QemuImg, *, size: int
) -> str | None:
    """Why the topmost layer, over all others, does not show what the last one shows; None if it does.

    Closes the files. What one of the two has beyond the end of the other, and before `size`, has to be zeros.
    """
    top, base = layers[0].virtual_size, layers[-1].virtual_size
    try:
        described = [_described(layer.format, each) for layer, each in zip(layers, judged, strict=True)]
        # The merge has made the base as long as the topmost layer.
        merged = _cut(_stacked(described), size if size < top else None)
        result = _cut(_stacked(described[-1:]), size if size < max(base, top) else None)
        return await qemu_img.compare(merged, result, [each.file for each in judged])
    finally:
        for each in judged:
            os.close(each.file)


async def measure(layers: Sequence[Layer], judged: Sequence[Judged], qemu_img: QemuImg) -> Measure | None:
    """Read the maps of a run of layers, topmost first, and close their files; None where they can't be had in time."""
    try:
        files = [each.file for each in judged]
        described = [_described(layer.format, each) for layer, each in zip(layers, judged, strict=True)]
        base_map = await qemu_img.map(_stacked(described[-1:]), files)
        top_map = await qemu_img.map(_stacked(described), files)
    finally:
        for each in judged:
            os.close(each.file)
    if base_map is None or top_map is None:
        return None
    depth, cluster = len(layers) - 1, layers[-1].cluster_size
    # What is compressed, or also an internal snapshot's, is not written over in its place (block/qcow2-cluster.c:
    # count_single_write_clusters). Of what is compressed QEMU before 8.2 tells no more than that it has no offset.
    shared = layers[-1].snapshots > 0
    held = [entry for entry in base_map if entry["data"]]
    in_place = [] if shared else [each for each in held if "offset" in each and not each.get("compressed")]
    # A place that was given out beforehand (preallocation=metadata) may be a hole in the file.
    taken = [(entry["start"], entry["start"] + entry["length"]) for entry in in_place if not entry["zero"]]
    end = max((entry["start"] + entry["length"] for entry in base_map), default=0)
    copied = [
        (entry["start"], entry["start"] + entry["length"])
        for entry in top_map
        if entry["depth"] < depth and entry.get("present", True)
    ]
    copied = _with_zeros(copied, layers[:-1])
    new = new_bytes(copied, whole(taken, cluster, end), cluster)
    return Measure(
        bytes_to_copy=sum(end - start for start, end in copied),
        new_bytes=new,
        crowded=shared or len(in_place) < len(held),
    )


async def measure_pull(layers: Sequence[Layer], judged: Sequence[Judged], qemu_img: QemuImg) -> Measure | None:
    """As `measure`, of a pull into the first layer of what the others have and it does not."""
    try:
        described = [_described(layer.format, each) for layer, each in zip(layers, judged, strict=True)]
        found = await qemu_img.map(_stacked(described), [each.file for each in judged])
    finally:
        for each in judged:
            os.close(each.file)
    if found is None:
        return None
    # A cluster that the layer has is kept, also one of zeros: nothing is written over.
    pulled = [
        (entry["start"], entry["start"] + entry["length"])
        for entry in found
        if entry["depth"] > 0 and entry.get("present", True)
    ]
    held = [(entry["start"], entry["start"] + entry["length"]) for entry in found if entry["depth"] == 0]
    pulled = _without(_with_zeros(pulled, layers[1:]), held, layers[0].virtual_size)
    return Measure(
        bytes_to_copy=sum(end - start for start, end in pulled), new_bytes=new_bytes(pulled, (), layers[0].cluster_size)
    )


def _with_zeros(copied: Sequence[tuple[int, int]], read: Sequence[Layer]) -> list[tuple[int, int]]:
    """What is copied of the `read` layers, topmost first: also the zeros beyond the end of one below the first.

    No map tells of them: to QEMU they are a part of the layer that is too short (block/io.c:
    bdrv_co_common_block_status_above).
    """
    end, last = min(layer.virtual_size for layer in read), read[0].virtual_size
    if end >= last:
        return list(copied)
    return [*((start, min(stop, end)) for start, stop in copied if start < end), (end, last)]


def _without(ranges: Sequence[tuple[int, int]], held: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """The parts of the ranges that are not `held`, before `end`; all in rising order."""
    left: list[tuple[int, int]] = []
    for first, last in ranges:
        at = first
        for start, stop in (*held, (end, last)):
            if start > at and at < min(start, last):
                left.append((at, min(start, last)))
            at = max(at, stop)
    return left


def _described(driver: str, judged: Judged) -> dict[str, object]:
    protocol = "host_device" if judged.device else "file"
    file = {"driver": protocol, "filename": f"/proc/self/fd/{judged.file}", "locking": "off"}
    return {"driver": driver, "file": file}


def _cut(image: dict[str, object], size: int | None) -> dict[str, object]:
    """The image up to `size` bytes, or all of it."""
    return image if size is None else {"driver": "raw", "size": size, "file": image}


def _stacked(described: Sequence[dict[str, object]]) -> dict[str, object]:
    """The layers as one image, each over the next, whatever their headers say; the last without a backing image."""
    stack: dict[str, object] | None = None
    for layer in reversed(described):
        stack = layer | ({"backing": stack} if layer["driver"] != "raw" else {})
    assert stack is not None
    return stack


def whole(ranges: Sequence[tuple[int, int]], cluster: int, end: int) -> list[tuple[int, int]]:
    """The ranges, narrowed to whole clusters: one that is a hole in part takes room when it is written.

    `end` is where the image ends, in bytes, whether or not it fills its last cluster.
    """
    narrowed: list[tuple[int, int]] = []
    for first, last in ranges:
        start, stop = -(-first // cluster) * cluster, last if last == end else last // cluster * cluster
        if start < stop:
            narrowed.append((start, stop))
    return narrowed


def new_bytes(copied: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]], cluster: int) -> int:
    """Bytes of those clusters of the base that `copied` touches and `taken` does not hold.

    Both are byte ranges in rising order, as an image's map gives them.
    """
    held = _clusters(taken, cluster)
    new, at = 0, 0
    for start, end in _clusters(copied, cluster):
        new += end - start
        while at < len(held) and held[at][1] <= start:
            at += 1
        look = at
        while look < len(held) and held[look][0] < end:
            new -= min(end, held[look][1]) - max(start, held[look][0])
            look += 1
    return new


def _clusters(ranges: Sequence[tuple[int, int]], cluster: int) -> list[tuple[int, int]]:
    """The ranges, widened to whole clusters, those that meet made one."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        first, last = start // cluster * cluster, -(-end // cluster) * cluster
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
