"""The folders outside which the service itself opens and deletes no image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.hostfs.process import place_of


@dataclass(frozen=True, slots=True)
class Roots:
    """The `folders` as they really are, with symlinks resolved. Without any folder, every place is inside."""

    folders: tuple[str, ...]

    @classmethod
    def of(cls, folders: Iterable[str | Path]) -> Roots:
        """The roots that the settings name."""
        return cls(tuple(os.path.realpath(folder) for folder in folders))

    def allow(self, path: str) -> bool:
        """Whether there is a file at `path`, and it is inside. May block."""
        with suppress(OSError):
            file = os.open(path, os.O_PATH)
            try:
                return self.hold(file)
            finally:
                os.close(file)
        return False

    def hold(self, file: int) -> bool:
        """Whether an open file or folder is inside."""
        place = place_of(file)
        return not self.folders or any(os.path.commonpath((place, root)) == root for root in self.folders)
