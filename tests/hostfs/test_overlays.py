"""Looking for overlays of which nobody has told."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

from app.hostfs.identity import image_at
from app.hostfs.overlays import OverlayIndex, overlays_on
from app.hostfs.roots import Roots


def test_what_does_not_count_is_a_file_and_not_its_number(tmp_path: Path) -> None:
    """A file system gives the number of a deleted raw image to a new overlay, which counts."""
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.write_bytes(b"data")
    fields = struct.pack(">4sIQIIQ", b"QFI\xfb", 2, 200, 4, 16, 65536)
    overlay.write_bytes(fields.ljust(200, b"\0") + b"base")
    index, found = OverlayIndex(Roots.of([tmp_path])), image_at(str(overlay), None)
    assert found.born is not None
    images = [image_at(str(base), None)]
    assert overlays_on(index, images, []).files == (found,)
    assert overlays_on(index, images, [replace(found, path="/raw.img")]).files == ()
    assert overlays_on(index, images, [replace(found, born=found.born - 1)]).files == (found,)
