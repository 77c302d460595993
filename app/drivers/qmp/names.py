"""The target names of one QEMU's devices. A name stays with its device for the life of the process."""

from __future__ import annotations

from typing import Self

import structlog

from app.core.evidence import Process
from app.engine.ports.journal import JournalError
from app.engine.ports.names import DeviceNames

log = structlog.get_logger(__name__)


class Names(dict[str, str]):
    """Target names by device, which are kept over restarts where there is a place for them."""

    def __init__(self, process: str = "", place: DeviceNames | None = None) -> None:
        super().__init__()
        self._process = process
        self._place = place
        self._kept = 0

    @classmethod
    async def load(cls, process: Process, place: DeviceNames | None) -> Self:
        """The names that the devices of a process have had so far; raises `JournalError`."""
        names = cls(f"{process.view} {process.pid} {process.started}", place)
        if place is not None:
            names.update(await place.names_of(names._process))
        names._kept = len(names)
        return names

    async def keep(self) -> None:
        """Keep what is new; where that can't be done now, it is tried again with the next look."""
        if self._place is None or len(self) == self._kept:
            return
        count = len(self)
        try:
            await self._place.keep_names(self._process, dict(self))
        except JournalError as error:
            log.warning("names of devices not kept", process=self._process, error=str(error))
        else:
            self._kept = count
