"""Pictures are drawn as text, the same each time, and show what was measured."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pytest

from bench.__main__ import DOCUMENTS, RESULTS
from bench.figures import Picture, number
from bench.report import draw, read_pictures

PICTURE = Picture("it.svg", "Two ways", "ms", {"here": {"blockjobd": 1.5, "virsh": 1234.5}, "there": {"": 20}})


def test_the_same_picture_gives_the_same_file(tmp_path: Path) -> None:
    """A picture changes in the repository only if its figures change: the file has no date, chance or version."""
    for folder in ("first", "second"):
        draw(PICTURE, tmp_path / folder)
    first = (tmp_path / "first" / "it.svg").read_text()
    assert (tmp_path / "second" / "it.svg").read_text() == first
    assert "<metadata>" not in first


def test_text_is_text(tmp_path: Path) -> None:
    """Whoever reads a change of a picture sees its words and figures; glyphs drawn as paths show neither."""
    draw(PICTURE, tmp_path)
    drawn = (tmp_path / "it.svg").read_text()
    for text in ("Two ways", "ms", "here: blockjobd", "1.5", "here: virsh", "1,234", "there", "20"):
        assert f">{text}</text>" in drawn
    assert drawn.count("\n") < 250


@pytest.mark.parametrize("picture", read_pictures(RESULTS), ids=lambda picture: picture.file)
def test_a_picture_shows_what_was_measured(picture: Picture) -> None:
    """Each picture in the documentation has the labels and values that the file of results has."""
    drawn = (DOCUMENTS / "pictures" / picture.file).read_text()
    for group, bars in picture.bars.items():
        for name, value in bars.items():
            label = f"{group}: {name}" if name else group
            for text in (picture.title, picture.unit, label, number(value)):
                assert f">{escape(text, quote=False)}</text>" in drawn
