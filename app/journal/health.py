"""What the journal's last writes and reads have shown of it, so that nobody has to write in order to ask."""

from __future__ import annotations

import time
from typing import Final

import structlog

from app.core.errors import Code
from app.engine.ports.journal import JournalError

PROVEN_S: Final = 10.0
"""Seconds for which a write that went well proves that the next one would."""

AGAIN_S: Final = 1.0
"""Seconds after which a write that failed is tried again by who asks for the journal's health."""

LOG_WARNED: Final = 64 << 20
"""Bytes of SQLite's log from which on its growth is told. It is given back once no program reads an old state of it."""

log = structlog.get_logger("blockjobd.journal")


class Health:
    """Noted by the journal's threads, read by anybody."""

    def __init__(self) -> None:
        self.damage: JournalError | None = None
        self.sizes: dict[str, int] = {"file": 0, "log": 0, "free": 0}
        self._failure: JournalError | None = None
        self._at = float("-inf")
        self._warned = LOG_WARNED

    def check(self) -> None:
        """Raise `JournalError` where damage was seen: what is written to such a file may make it worse."""
        if self.damage is not None:
            raise JournalError(self.damage.code, str(self.damage))

    def note(self, failure: JournalError | None, *, wrote: bool = True) -> None:
        """A write, or a read, has gone well (None) or failed."""
        if failure is not None and failure.code is Code.JOURNAL_DAMAGED and self.damage is None:
            self.damage = failure
            log.critical("journal-damaged", error=str(failure))
        if wrote:
            if failure is not None and (self._failure is None or self._failure.code is not failure.code):
                log.error(failure.code.value, error=str(failure))
            elif failure is None and self._failure is not None:
                log.info("journal can be written again")
            self._failure, self._at = failure, time.monotonic()

    def known(self) -> tuple[bool, JournalError | None]:
        """(whether that is recent enough to be believed, why the journal can't be written)."""
        if self.damage is not None:
            return True, self.damage
        age = time.monotonic() - self._at
        return age < (PROVEN_S if self._failure is None else AGAIN_S), self._failure

    def grown(self, sizes: dict[str, int]) -> None:
        """The sizes of the files by now, in bytes."""
        self.sizes.update(sizes)
        if self.sizes["log"] < LOG_WARNED:
            self._warned = LOG_WARNED
        elif self.sizes["log"] >= self._warned:
            log.warning("the journal's log grows; does a program read the journal for long?", bytes=self.sizes["log"])
            self._warned = 2 * self.sizes["log"]
