"""Many subscribers in one process: `python -m bench.listeners SOCKET TOKEN COUNT TYPE`.

Prints `open` once all streams are open, and for each event the time at which the last of them had it, in seconds since
1970. It reads as little as it can, so that it is not what is measured.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import uvloop

REQUEST = (
    "GET /events?types={type} HTTP/1.1\r\nHost: blockjobd\r\nAuthorization: Bearer {token}\r\n"
    "Accept: text/event-stream\r\n\r\n"
)


class _Count:
    """Of those who have something; says so when it is all of them."""

    def __init__(self, of: int) -> None:
        self._of = of
        self._have = 0

    def one_more(self, say: str | None = None) -> None:
        """One more has it."""
        self._have += 1
        if self._have == self._of:
            self._have = 0
            print(say or f"{time.time():.6f}", flush=True)


class _Listener(asyncio.Protocol):
    def __init__(self, request: bytes, mark: bytes, opened: _Count, heard: _Count) -> None:
        self._request, self._mark = request, mark
        self._opened, self._heard = opened, heard
        self._tail = b""
        self._open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        # uvloop's transports are none of asyncio's classes.
        cast(asyncio.WriteTransport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count the events; one may come in pieces."""
        data = self._tail + data
        if not self._open and b"\r\n\r\n" in data:
            assert data.startswith(b"HTTP/1.1 200"), data
            self._open = True
            self._opened.one_more("open")
        for _ in range(data.count(self._mark)):
            self._heard.one_more()
        at = data.rfind(self._mark)
        self._tail = data[at + len(self._mark) :][-200:] if at >= 0 else data[-200:]


async def main(path: str, token: str, count: str, type_: str) -> None:
    """Listen until ended."""
    request = REQUEST.format(type=type_, token=token).encode()
    opened, heard = _Count(int(count)), _Count(int(count))
    loop = asyncio.get_running_loop()
    kept = [
        await loop.create_unix_connection(
            lambda: _Listener(request, f'"type": "{type_}"'.encode(), opened, heard), path
        )
        for _ in range(int(count))
    ]
    await asyncio.Event().wait()
    del kept


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
