"""The header of a qcow2 image (docs/interop/qcow2.txt), read without QEMU."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from app.core.headers import NAME_MAX

MAGIC: Final = b"QFI\xfb"

BACKING_FORMAT: Final = 0xE2792ACA
"""The header extension that names the format of the backing image."""

VERSION_3: Final = 3
FEATURES_END: Final = 80
DATA_FILE_BIT: Final = 4
DIRTY_BIT: Final = 1
"""The incompatible features are the 8 bytes in front of that place, from version 3 on."""

FEATURES: Final = 0x6803F857
"""The header extension that names the features."""

FEATURES_SIZE: Final = 8 * 48
"""Bytes of that one, as QEMU 7.2 to 10 write it: eight features."""

FORMAT_MAX: Final = 16
"""Bytes of the longest format's name that is written (`host_cdrom`), in whole units of eight."""

HEADER_SIZE: Final = {2: 72, 3: 112}
"""Bytes of the header itself, by version."""


REFCOUNT_TABLE_MAX: Final = 8 << 20
"""Bytes of a refcount table, at most (block/qcow2.h: QCOW_MAX_REFTABLE_SIZE)."""

REFCOUNT_ORDER_MAX: Final = 6
"""A refcount takes 2^6 bits at most."""

REFCOUNT_BLOCK_AT: Final = 0xFFFFFFFFFFFFFE00
"""The bits of a table's entry that say where the block is (block/qcow2.h: REFT_OFFSET_MASK)."""


class NotQcow2(ValueError):
    """The bytes are no qcow2 header."""


class Damaged(NotQcow2):
    """They begin as one does, and then make no sense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a chain needs of a header. Sizes in bytes; `room` is the most that a name of a backing image may take."""

    virtual_size: int
    cluster_size: int
    backing: str | None
    backing_format: str | None
    room: int


def parse(head: bytes) -> Header:
    """The header from the first bytes of the file (64 KiB hold all of any header); raises `NotQcow2`, or `Damaged`."""
    if head[:4] != MAGIC:
        raise NotQcow2("the magic bytes of qcow2 are missing")
    if len(head) < 72:
        raise Damaged("the header is cut short")
    version, name_at, name_length, cluster_bits, virtual_size = struct.unpack_from(">IQIIQ", head, 4)
    if version not in (2, 3) or not 9 <= cluster_bits <= 21 or name_length > NAME_MAX:
        raise Damaged(f"version {version}, clusters of 2^{cluster_bits}, a name of {name_length} bytes: not a header")
    if name_at + name_length > len(head):
        raise Damaged("the backing file's name lies outside of the header")
    try:
        backing = head[name_at : name_at + name_length].decode() if name_at and name_length else None
    except UnicodeDecodeError as error:
        raise Damaged("the backing file's name is not UTF-8") from error
    if backing is not None and "\0" in backing:
        raise Damaged("the backing file's name holds a zero byte, as no path does")
    return Header(
        virtual_size=virtual_size,
        cluster_size=1 << cluster_bits,
        backing=backing,
        backing_format=_backing_format(head, version),
        room=_room(head, version, 1 << cluster_bits),
    )


def keeps_data_elsewhere(head: bytes) -> bool:
    """Whether the first bytes of a file are a qcow2 header that names another file for the data (or are cut short)."""
    return head[:4] == MAGIC and _has_feature(head, DATA_FILE_BIT)


def _has_feature(head: bytes, bit: int) -> bool:
    """Whether a header has that incompatible feature (or is cut short)."""
    version = int.from_bytes(head[4:8], "big")
    return version >= VERSION_3 and (len(head) < FEATURES_END or bool(head[FEATURES_END - 1] & bit))


def end(read: Callable[[int, int], bytes]) -> int:
    """Where an image ends in its file, in bytes: behind the last cluster that anything refers to.

    `read` returns so many bytes from an offset on. Raises `NotQcow2`, or `Damaged`, also where the reference counts are
    behind (lazy_refcounts).
    """
    head = read(0, HEADER_SIZE[3])
    cluster = parse(head + read(len(head), 65536 - len(head))).cluster_size
    table_at, table_clusters = struct.unpack_from(">QI", head, 48)
    order = struct.unpack_from(">I", head, 96)[0] if head[7] >= VERSION_3 else 4
    size = table_clusters * cluster
    if _has_feature(head, DIRTY_BIT):
        raise Damaged("the reference counts are behind")
    if size > REFCOUNT_TABLE_MAX or order > REFCOUNT_ORDER_MAX:
        raise Damaged(f"a refcount table of {size} bytes, refcounts of 2^{order} bits: not a header")
    table = read(table_at, size)
    counted = (cluster << 3) >> order
    for number in range(len(table) // 8 - 1, -1, -1):
        block_at = struct.unpack_from(">Q", table, number * 8)[0] & REFCOUNT_BLOCK_AT
        used = len(read(block_at, cluster).rstrip(b"\0")) if block_at else 0
        if used:
            # The bits of less than a byte are not told apart: the end is taken a few clusters too late then.
            return (number * counted + -(-(used << 3) >> order)) * cluster
    raise Damaged("no cluster is in use")


def _extensions(head: bytes, version: int) -> Iterator[tuple[int, bytes]]:
    at = struct.unpack_from(">I", head, 100)[0] if version == 3 and len(head) >= 104 else 72
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            return
        yield kind, head[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8


def _backing_format(head: bytes, version: int) -> str | None:
    found = next((data for kind, data in _extensions(head, version) if kind == BACKING_FORMAT), None)
    return None if found is None else found.decode(errors="replace")


def _room(head: bytes, version: int, cluster_size: int) -> int:
    """What QEMU leaves of the first cluster for a name, when it writes the header anew.

    It writes the extensions that are there, a table with the names of all features that it knows, the format of the
    backing image, and an end marker (block/qcow2.c: qcow2_update_header).
    """
    kept = [(kind, len(data)) for kind, data in _extensions(head, version) if kind not in (BACKING_FORMAT, FEATURES)]
    features = max([len(data) for kind, data in _extensions(head, version) if kind == FEATURES], default=0)
    sizes = [length for _, length in kept] + [FORMAT_MAX, 0]
    if version == 3:
        sizes.append(max(features, FEATURES_SIZE))
    taken = HEADER_SIZE[version] + sum(8 + (size + 7) // 8 * 8 for size in sizes)
    return max(0, min(NAME_MAX, cluster_size - taken))
