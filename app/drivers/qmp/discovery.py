"""Finds monitors by themselves: every socket NAME.qmp in a folder is the domain NAME."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

import structlog

from app.hostfs.patience import Overdue, Workers

log = structlog.get_logger(__name__)

RESCAN: Final = 0.5
"""Seconds between two looks; sockets are to be noticed within one. A look at a folder of 200 costs 0.3 ms."""

SCAN_S: Final = 2.0
"""Seconds that one look may take: a link may lead to a file system that does not answer."""

DOMAIN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SUFFIX: Final = ".qmp"


class SocketDiscovery:
    """The sockets of a folder, which may come and go, as may the folder. None: nothing is discovered."""

    def __init__(self, qmp_dir: Path | None, workers: Workers | None = None) -> None:
        self._folder = qmp_dir
        self._refused: set[str] = set()
        self._workers = workers or Workers()

    def path_of(self, domain: str) -> str | None:
        """Where the socket of a domain of that id would be."""
        return str(self._folder / (domain + SUFFIX)) if self._folder else None

    async def looks(self) -> AsyncIterator[Mapping[str, str]]:
        """All sockets that are there (domain id -> path), first at once and then at each look."""
        while self._folder is not None:
            try:
                found = await self._workers.do(self._scan, self._folder, within=SCAN_S, owner=self._folder, most=1)
            except Overdue as error:
                # Nothing is known of any socket: what was there before may be there still.
                log.warning("folder of monitors silent", folder=str(self._folder), error=str(error))
            else:
                yield found
            await asyncio.sleep(RESCAN)

    def _scan(self, folder: Path) -> Mapping[str, str]:
        found: dict[str, str] = {}
        try:
            entries = list(os.scandir(folder))
        except OSError:
            return found
        for entry in entries:
            name = entry.name.removesuffix(SUFFIX)
            if name == entry.name:
                continue
            if not DOMAIN_ID.fullmatch(name):
                if entry.name not in self._refused:
                    self._refused.add(entry.name)
                    log.warning("not a domain id", file=entry.path)
                continue
            if _is_monitor(entry):
                found[name] = entry.path
        return found


def _is_monitor(entry: os.DirEntry[str]) -> bool:
    """Whether it is a socket, or a link to one that its maker could have opened.

    A link that somebody else has put there would have the service, which may open more, go where its maker may not.
    """
    try:
        own = entry.stat(follow_symlinks=False)
        if stat.S_ISSOCK(own.st_mode):
            return True
        if not stat.S_ISLNK(own.st_mode):
            return False
        leads_to = entry.stat()
    except OSError:
        return False
    return stat.S_ISSOCK(leads_to.st_mode) and own.st_uid in (0, os.geteuid(), leads_to.st_uid)
