"""How one image names the image below it in its own header."""

from __future__ import annotations

import posixpath
from typing import Final

from app.core.chain import Layer

NAME_MAX: Final = 1023
"""The longest name that fits into a qcow2 header, in bytes (docs/interop/qcow2.txt)."""


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
    return posixpath.relpath(posixpath.join(there, posixpath.basename(target.file)), here)
