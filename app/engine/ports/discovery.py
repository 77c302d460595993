"""Monitors that are found by themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol


class Discovery(Protocol):
    """Finds monitors by themselves."""

    def looks(self) -> AsyncIterator[Mapping[str, str]]:
        """All sockets that are there (domain id -> path), first at once and then at each look."""
        ...

    def path_of(self, domain: str) -> str | None:
        """Where the socket of a domain of that id would be; None if nothing is discovered."""
        ...
