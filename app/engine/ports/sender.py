"""The way to the receivers of webhooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from app.core.outgoing import Answer


class Sender(Protocol):
    """Takes deliveries to their receivers."""

    async def check(self, url: str) -> str | None:
        """None if deliveries may go to `url` as far as can be told now, else why not. Never raises."""
        ...

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One attempt, bounded in time and in what is read of the answer. Never raises."""
        ...
