"""Which string the header of an overlay gets, so that the chain opens again tomorrow.

A string is proposed, resolved by QEMU's rules in QEMU's own view of the file system, and taken only if it leads to the
base (`app.core.headers.meaning` says where it leads; the house looks which file is there). Strings are proposed in this
order:

1. the one that leads to the base today, from the header of the layer right above it, if it suits;
2. the path of the base, relative or absolute as is wanted;
3. the string of 1 also if it does not suit: a name that works is worth more than a style;
4. QEMU's own description of the base (`json:{…}`), with the options that the base needs.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Sequence
from typing import Final

from app.core.chain import Layer
from app.core.errors import Code, Problem
from app.core.headers import NAME_MAX, HeaderFacts, Meaning, header_name, meaning
from app.core.kinds.layers import LayersSelection
from app.core.sameness import Sameness, same

REWRITTEN: Final = frozenset({"qcow2", "qed"})
"""The formats whose headers QEMU can change (block_int.h: bdrv_change_backing_file)."""

DESCRIPTORS: Final = ("/dev/fd/", "/dev/fdset/", "/proc/")
"""Where the names of descriptors begin, which only one process has."""


def proposals(selection: LayersSelection, *, given: str | None, relative: bool) -> tuple[str, ...]:
    """The strings for the header of the layer above `top`, best first; `given` is the one that the caller wants.

    Empty where no header is written. `relative`: the caller wants a name relative to the overlay's folder.
    """
    overlay, base = selection.overlay, selection.base
    if overlay is None:
        return ()
    if given is not None:
        return (given,)
    above = selection.disk.layers[selection.base_index - 1]
    today = [above.backing] if above.backing is not None and _means_the_same(above, overlay) else []
    wish = relative or overlay.relative
    suits = [name for name in today if above.relative == wish]
    composed = [header_name(overlay, base, relative=relative)]
    own = [base.name] if base.name.startswith("json:") else []
    return tuple(dict.fromkeys([*suits, *composed, *today, *own]))


def _means_the_same(above: Layer, overlay: Layer) -> bool:
    """Whether the string in the header of `above` means the same in the header of `overlay`."""
    return not above.relative or _folder(above) == _folder(overlay)


def _folder(layer: Layer) -> str:
    return layer.folder or posixpath.dirname(layer.file)


def header_string(
    selection: LayersSelection, names: Sequence[str], facts: HeaderFacts, *, given: bool
) -> str | Problem | None:
    """The first of the proposed `names` that leads to the base and fits into the overlay's header, or why none does.

    None where there are none, as no header will name anything.
    """
    overlay = selection.overlay
    if overlay is None:
        return None
    if overlay.format not in REWRITTEN:
        detail = f"{overlay.file} is a {overlay.format} image, whose header QEMU can't change; merge the active layer"
        return Problem(code=Code.OVERLAY_NOT_WRITABLE, detail=detail, extra={"file": overlay.file})
    if not names:
        return None
    base = selection.base
    whys: list[str] = []
    leads_on = _leads_on(selection.disk.layers[selection.base_index :], facts)
    for name in names:
        why = _unfit(name, overlay, base, facts, leads_on=leads_on)
        if why is None:
            return name
        whys.append(f"{_short(name)!r} {why}")
    return Problem(
        code=Code.BACKING_FILE_WRONG if given else Code.BACKING_FILE_IMPOSSIBLE,
        detail=f"no name for {base.file} can be written into the header of {overlay.file}: {'; '.join(whys)}",
        extra={"file": overlay.file, "base": base.file},
    )


def _leads_on(layers: Sequence[Layer], facts: HeaderFacts) -> bool:
    """Whether the headers of the base and of what is below name the images over which QEMU has opened them."""
    for layer, below in itertools.zip_longest(layers, layers[1:]):
        means = meaning(layer.backing, overlay=layer.file, folder=facts.folder) if layer.backing else None
        path = None if means is None or means.path is None else posixpath.normpath(means.path)
        if path != (None if below is None else below.file):
            return False
    return True


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}…"


def _unfit(name: str, overlay: Layer, base: Layer, facts: HeaderFacts, *, leads_on: bool) -> str | None:
    length, room = len(name.encode(errors="replace")), NAME_MAX if facts.room is None else facts.room
    if length > room:
        return f"has {length} bytes, and the header of the overlay has room for {room}"
    if any(ord(letter) < ord(" ") for letter in name):
        return "holds a control character"
    means = meaning(name, overlay=overlay.file, folder=facts.folder)
    needed = meaning(base.name, overlay=overlay.file, folder=facts.folder) if base.name.startswith("json:") else None
    if needed is not None and needed.options and (means is None or not means.options):
        return "lacks the options with which QEMU has opened the base"
    below = None if leads_on or needed is None else needed.backing
    if below is not None and (means is None or means.backing != below):
        return "does not say over which image QEMU has opened the base, and neither do the headers"
    found = same(facts.named.get(name), base.identity)
    if found is Sameness.SAME:
        return None
    if base.identity is not None:
        return "leads to another file" if found is Sameness.OTHER else "leads to no file that can be seen"
    return None if _by_name(name, means, base, facts) else "leads to no file that can be seen"


def _by_name(name: str, means: Meaning | None, base: Layer, facts: HeaderFacts) -> bool:
    """Whether a name leads to a base that nobody here can look at, as far as names tell."""
    if not base.file.startswith("/"):
        return name in (base.name, base.file)
    # A base that is missing in QEMU's own view, or a descriptor of QEMU's, has no name that lasts.
    if facts.seen or base.file.startswith(DESCRIPTORS) or means is None or means.path is None:
        return False
    return posixpath.normpath(means.path) == posixpath.normpath(base.file)
