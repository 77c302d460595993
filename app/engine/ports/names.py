"""The target names that devices have had, over restarts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class DeviceNames(Protocol):
    """Names by device, for each process that has had one. Calls raise `JournalError`."""

    async def names_of(self, process: str) -> Mapping[str, str]:
        """What the devices of a process were called; empty where it was never seen."""
        ...

    async def keep_names(self, process: str, names: Mapping[str, str]) -> None:
        """Keep what the devices of a process are called, in place of what was kept."""
        ...
