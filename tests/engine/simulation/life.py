"""One life of the service, from its start to its end."""

from __future__ import annotations

import asyncio


class Life:
    """Whether the service that calls is still there: one that was killed calls nobody any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.over = False

    def check(self) -> None:
        """Raise where the service has been killed."""
        if self.over:
            raise asyncio.CancelledError
