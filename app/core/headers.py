"""How one image names the image below it in its own header."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, cast

from app.core.chain import Identity, Layer

NAME_MAX: Final = 1023
"""The longest name that fits into a qcow2 header, in bytes (docs/interop/qcow2.txt)."""


OPTIONLESS: Final = frozenset({"driver", "file", "backing", "filename", "node-name"})
"""Members of a described image that say where it is, and nothing of how it is to be read."""

PROTOCOLS: Final = frozenset({"file", "host_device"})
"""The drivers of local files and devices (QAPI `BlockdevDriver`)."""

FILTERS: Final = frozenset({"blkdebug", "blklogwrites", "blkverify", "compress", "preallocate", "throttle"})
"""Drivers that stand between a format and its file, and pass the data on."""

FILTERS_MAX: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What a backing string means by QEMU's rules.

    `path` is the local file that it names, None where it names none (a network, a descriptor of QEMU's). `driver` is
    the format that a `json:` string gives, None where it gives none. `options`: the string also says how the image is
    to be read, as no plain path could. `backing` is the name of the image below that one where the string gives one in
    place of its header's, empty where it says that there is none.
    """

    path: str | None
    driver: str | None = None
    options: bool = False
    backing: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderFacts:
    """What the host says of names for the header of an overlay.

    `named` are the files to which the names lead from there; a name that leads to no file that can be seen is None.
    `room` is the most bytes that the header has for a name, None where it can't be read. `folder` is QEMU's working
    directory, None where it can't be seen. `seen`: the service sees QEMU's process, and its files as that sees them.
    """

    named: Mapping[str, Identity | None] = field(default_factory=dict[str, "Identity | None"])
    room: int | None = None
    folder: str | None = None
    seen: bool = False


def meaning(string: str, *, overlay: str, folder: str | None = None) -> Meaning | None:
    """What `string` means in the header of the image that QEMU has opened as `overlay`; None where nobody can tell.

    The rules are those of block.c (bdrv_make_absolute_filename, path_has_protocol, path_combine). A relative path
    starts from the folder of the overlay. What is behind `file:` and in `json:` starts from QEMU's own `folder`.
    """
    if string.startswith("json:"):
        found = _described(string.removeprefix("json:"), folder)
        return found if found is None or _is_text(found.driver or "") else None
    if not string.startswith("/") and ":" in string.split("/", 1)[0]:
        rest = string.removeprefix("file:")
        return Meaning(path=None) if rest == string else _local(rest, folder)
    return _local(string, posixpath.dirname(overlay) if overlay.startswith("/") else None)


def _local(path: str, folder: str | None) -> Meaning | None:
    if not path or "\0" in path or (folder is None and not path.startswith("/")):
        return None
    if not _is_text(path):
        return None
    return Meaning(path=posixpath.join(folder or "/", path))


def _is_text(string: str) -> bool:
    """Whether the string has no half of a surrogate pair.

    Only `json:` can hold such a half, and QEMU refuses it (qobject/json-parser.c: parse_string). Python would find a
    file by it, and could write it into no answer and into no journal (os.fsencode: surrogateescape).
    """
    return not any("\ud800" <= character <= "\udfff" for character in string)


def _described(text: str, folder: str | None) -> Meaning | None:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    of = cast("Mapping[str, object]", found)
    # A protocol alone, or a format over one: as a member, or with its own members spelt with dots.
    file = of.get("file")
    if isinstance(file, dict):
        carrier = cast("Mapping[str, object]", file)
    elif "file.filename" in of or "file.driver" in of:
        carrier = {key.removeprefix("file."): of[key] for key in of if key.startswith("file.")}
    else:
        carrier = of
    for _ in range(FILTERS_MAX):
        # Filters pass the data on, and nobody needs them to read it.
        below = carrier.get("file", carrier.get("image"))
        if carrier is of or carrier.get("driver") not in FILTERS or not isinstance(below, dict):
            break
        carrier = cast("Mapping[str, object]", below)
    path, protocol, driver = carrier.get("filename"), carrier.get("driver", "file"), of.get("driver")
    if file is not None and carrier is of:
        # It names a node, which only one QEMU has.
        return None
    if protocol not in PROTOCOLS:
        return Meaning(path=None, options=True)
    where = _local(path, folder) if isinstance(path, str) else None
    if where is None or carrier is of:
        return where
    backing = _backing(of)
    options = any(key not in OPTIONLESS and not key.startswith(("file.", "backing.")) for key in of)
    return replace(where, driver=driver if isinstance(driver, str) else None, options=options, backing=backing)


def _backing(of: Mapping[str, object]) -> str | None:
    """What a described image says of the one below it; None where it leaves that to the header.

    QEMU writes that itself where an image was opened over another one than its header names (block.c:
    bdrv_refresh_filename, `backing_overridden`).
    """
    if "backing" not in of:
        dotted = {key.removeprefix("backing."): of[key] for key in of if key.startswith("backing.")}
        return "json:" + json.dumps(dotted) if dotted else None
    # One that names a node, which only one QEMU has, is nothing that could be followed.
    return "" if of["backing"] is None else "json:" + json.dumps(of["backing"])


def header_name(overlay: Layer, below: Layer, *, relative: bool) -> str:
    """The string by which the header of `overlay` is to name `below`, relative if wanted or if it was so before."""
    local = overlay.file.startswith("/") and below.file.startswith("/")
    return relative_name(below, seen_from=overlay) if (relative or overlay.relative) and local else below.file


def relative_name(target: Layer, *, seen_from: Layer) -> str:
    """The path of `target`'s image as the header of `seen_from` would name it, relative to its folder.

    The kernel resolves `..` after symlinks, so the folders are compared as they really are.
    """
    here = seen_from.folder or posixpath.dirname(seen_from.file)
    there = target.folder or posixpath.dirname(target.file)
    name = posixpath.relpath(posixpath.join(there, posixpath.basename(target.file)), here)
    # What is in front of a colon would be a protocol (block.c: path_has_protocol).
    return f"./{name}" if ":" in name.split("/", 1)[0] else name
