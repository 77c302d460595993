"""A receiver of webhooks in a process of its own, which can be told how to behave, killed and started again.

Each request is on the disk before it is answered, so what a receiver has taken outlives it.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from standardwebhooks.webhooks import Webhook

JSON = dict[str, Any]
LONG = "x" * 5000
FINE = ("ok", "slow", "drip")


class Receiver:
    """The receiver on a port of 127.0.0.1, with its log and what it is to do in `folder`.

    It does what `mode` names: `ok`, `slow` (0.3 s), a status such as `500` or `410`, `redirect` (to itself), `hang`,
    `cut` (hangs up), `drip` (200, and then a body without end).
    """

    def __init__(self, folder: Path, *, tls: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._tls = tls
        self._log = folder / "received.jsonl"
        self._log.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.behave("ok")

    @property
    def url(self) -> str:
        """Where to send to."""
        return f"http://127.0.0.1:{self.port}/in"

    def behave(self, mode: str) -> None:
        """Do so from the next request on."""
        draft = self.folder / ".mode"
        draft.write_text(mode)
        draft.replace(self.folder / "mode")

    def start(self) -> Self:
        """Start it, and return once it listens."""
        command = [
            sys.executable,
            "-m",
            "tests.support.receiver",
            str(self.folder),
            str(self.port),
            str(self._tls or ""),
        ]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            assert time.monotonic() < deadline, "the receiver does not listen"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def received(self) -> list[JSON]:
        """Every request that it got: {"path", "headers" (names in lower case), "body", "mode", "at"}."""
        lines = self._log.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def taken(self, secret: str, path: str = "/in") -> list[JSON]:
        """Those to `path` that were answered with 2xx, each verified with the published package.

        `event` is the body, parsed.
        """
        fine = [request for request in self.received() if request["mode"] in FINE and request["path"] == path]
        for request in fine:
            request["event"] = Webhook(secret).verify(request["body"], request["headers"])
        return fine

    def wait_for(self, count: int, *, mode: str = "", seconds: float = 30) -> list[JSON]:
        """The requests (those in a mode), once there are so many."""
        deadline = time.monotonic() + seconds
        while True:
            found = [request for request in self.received() if mode in ("", request["mode"])]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{len(found)} of {count} requests came"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class _Handler(http.server.BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take a delivery."""
        size = int(self.headers.get("content-length", "0"))
        sent = self.rfile.read(size)
        if len(sent) < size:
            # The sender was killed while it sent, so nothing has come.
            self.close_connection = True
            return
        body = sent.decode()
        mode = (self.folder / "mode").read_text()
        self._note({"mode": mode, "path": self.path, "headers": self._named(), "body": body, "at": time.time()})
        if mode == "hang":
            time.sleep(60)
            return
        if mode == "cut":
            self.close_connection = True
            return
        if mode == "slow":
            time.sleep(0.3)
        if mode == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(600):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
            return
        status = {"ok": 200, "slow": 204, "redirect": 307}.get(mode) or int(mode)
        answer = b"" if status == 204 else LONG.encode()
        self.send_response(status)
        if mode == "redirect":
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _named(self) -> Mapping[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def _note(self, request: JSON) -> None:
        with (self.folder / "received.jsonl").open("a") as log:
            log.write(json.dumps(request) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def log_message(self, *_arguments: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Senders are killed in tests."""


def main(folder: str, port: str, tls: str) -> None:
    """Take requests until killed; `tls` is a file with a key and its certificate."""
    _Handler.folder = Path(folder)
    with _Server(("127.0.0.1", int(port)), _Handler) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
