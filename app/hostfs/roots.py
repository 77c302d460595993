"""The folders outside which the service itself opens and deletes no image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.hostfs.opening import Walk, open_below
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
        """Whether an open file or folder is inside.

        Where it says that it is tells little: another process may have mounted anything under that name, for itself
        alone. So what this service has there, below the root and without a link, has to be the same file.
        """
        if not self.folders:
            return True
        place, status = place_of(file), os.fstat(file)
        return any(self._same(root, place, status) for root in self.folders if _is_below(place, root))

    @staticmethod
    def _same(root: str, place: str, status: os.stat_result) -> bool:
        try:
            folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            walk = Walk.BENEATH | Walk.NO_SYMLINKS | Walk.NO_MAGICLINKS
            found = open_below(folder, os.path.relpath(place, root), os.O_PATH, walk)
        except OSError:
            return False
        finally:
            os.close(folder)
        try:
            return os.path.samestat(os.fstat(found), status)
        finally:
            os.close(found)


def _is_below(place: str, root: str) -> bool:
    return place.startswith("/") and os.path.commonpath((place, root)) == root
