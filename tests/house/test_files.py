"""What no file of the project may name: it has to work, and to be read, on every machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

REGISTRIES = re.compile(
    r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|deb\.debian\.org|docker\.io|crates\.io|proxy\.golang\.org"
)
"""Hosts of package registries: what is installed comes from where pip and apt are told to look."""

MACHINE = re.compile(r"(?<![\w.}$])/(?:work|root|tmp/w|Users|opt/pypi)\b/")
"""Folders that one machine has."""


def files() -> Iterator[Path]:
    """All files of the project but git's own and those that `.gitignore` names."""
    ignored = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in ignored)]
        yield from (Path(folder, name) for name in names if not any(fnmatch(name, pattern) for pattern in ignored))


@pytest.mark.parametrize("words", [REGISTRIES, MACHINE], ids=["a registry's host", "a path of one machine"])
def test_it_is_named_nowhere(words: re.Pattern[str]) -> None:
    """Neither code, locks nor documents name it."""
    found = {
        f"{file.relative_to(ROOT)}:{number}": line.strip()
        for file in files()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if words.search(line)
    }
    assert found == {}


def test_all_files_are_looked_at() -> None:
    """The files that are searched are those of the project, and no others."""
    names = {str(file.relative_to(ROOT)) for file in files()}
    assert names >= {"Makefile", ".ci/run", "requirements.lock", "app/settings.py", "docs/architecture.md"}
    assert not [name for name in names if name.startswith((".venv", ".git/")) or "__pycache__" in name]
