"""A client of the service that knows of each request whether it was sent, and follows the events over restarts."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON = dict[str, Any]


class Unsent(Exception):
    """The service took no connection within a long time."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("blockjobd", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """Talks to the service on `socket`, one connection a request."""

    def __init__(self, path: Path, token_file: Path) -> None:
        self.path = path
        self.token_file = token_file

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.token_file.read_text().strip()}", "Content-Type": "application/json"}

    def open(self, timeout: float, patience: float) -> _Connection:
        """A connection, once there is somebody to take it."""
        deadline = time.monotonic() + patience
        while True:
            connection = _Connection(self.path, timeout)
            try:
                connection.connect()
            except OSError:
                connection.close()
                if time.monotonic() > deadline:
                    raise Unsent(f"nobody at {self.path}") from None
                time.sleep(0.01)
            else:
                return connection

    def ask(self, method: str, path: str, body: JSON | None = None) -> tuple[int | None, JSON]:
        """Status and JSON of the answer; status None: it was sent, and no answer came."""
        connection = self.open(30, 60)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, self.headers())
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else {}
        except (OSError, http.client.HTTPException):
            return None, {}
        finally:
            connection.close()

    def get(self, path: str) -> JSON:
        """What is there, asked as often as it takes."""
        for _ in range(10):
            status, answer = self.ask("GET", path)
            if status == 200:
                return answer
            if status is not None:
                raise AssertionError(f"GET {path}: {status} {answer}")
        raise AssertionError(f"GET {path}: never answered")

    def items(self, path: str) -> list[JSON]:
        """All items of a list."""
        found: list[JSON] = []
        cursor = ""
        while True:
            page = self.get(f"{path}{'&' if '?' in path else '?'}limit=1000{cursor}")
            found += page["items"]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"


class Subscriber:
    """Follows all events from the first on, and comes back with the last id that it got whenever it is cut off."""

    def __init__(self, client: Client) -> None:
        self.returns = 0
        self._client = client
        self._events: list[JSON] = []
        self._last = 0
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._connection: _Connection | None = None
        self._thread = threading.Thread(target=self._follow, name="subscriber", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._ended.set()
        connection = self._connection
        if connection is not None and connection.sock is not None:
            # The thread reads from it; this ends its wait.
            connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)

    def wait_for(self, last: int, seconds: float) -> None:
        """Wait until the event `last` has come, or the seconds are over."""
        with self._changed:
            self._changed.wait_for(lambda: self._last >= last, seconds)

    def take(self, last: int) -> list[JSON]:
        """The events up to the id `last` that have come since the last call."""
        with self._changed:
            taken = [event for event in self._events if int(event["id"]) <= last]
            self._events = [event for event in self._events if int(event["id"]) > last]
            return taken

    def _follow(self) -> None:
        while not self._ended.is_set():
            try:
                self._connection = self._client.open(60, 1)
            except Unsent:
                continue
            try:
                self._read(self._connection)
            except (OSError, http.client.HTTPException, ValueError):
                # Cut off in the middle of a line or between two: what was whole has been taken.
                pass
            finally:
                self._connection.close()
            self.returns += 1

    def _read(self, connection: _Connection) -> None:
        headers = self._client.headers() | {"Last-Event-ID": str(self._last)}
        connection.request("GET", "/events", headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            # It may be shutting down.
            time.sleep(0.05)
            return
        for event in _parsed(response):
            if event["event"] == "job.progress":
                continue
            with self._changed:
                self._events.append(event)
                self._last = int(event["id"])
                self._changed.notify_all()


def _parsed(response: http.client.HTTPResponse) -> Iterator[JSON]:
    event: JSON = {}
    while raw := response.readline():
        line = raw.decode().rstrip("\r\n")
        if not line:
            if "data" in event:
                yield event
            event = {}
        elif not line.startswith(":"):
            key, _, value = line.partition(": ")
            event[key] = json.loads(value) if key == "data" else value
