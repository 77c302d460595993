"""A real `blockjobd serve`, in a process of its own, and a client for it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

ENDED = ("completed", "failed", "canceled", "lost")
JSON = dict[str, Any]
SERVE = ("app.cli.main", "serve")
QUIET = 60
"""Seconds after which a test that waits for an event has failed."""


class Service:
    """The service on a unix socket in `folder`, with `folder/qmp` watched for domains; `build` is the module to run.

    `within` is a command that runs the one that follows it, and ends with it.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str] | None = None,
        build: Sequence[str] = SERVE,
        *,
        within: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.build = build
        self.within = within
        self.qmp_dir = folder / "qmp"
        self.state_dir = folder / "state"
        self.socket = folder / "api.sock"
        self.qmp_dir.mkdir(parents=True, exist_ok=True)
        self.settings = dict(settings or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.client = self._client("")

    def start(
        self, build: Sequence[str] | None = None, environ: Mapping[str, str] | None = None, *, check: str = "/readyz"
    ) -> Self:
        """Start it (or another build of it), and return once it answers that check with 200."""
        self.launch(build, environ)
        assert self.process is not None
        deadline = time.monotonic() + 60
        while not (self._listens() and self.client.get(check).status_code == 200):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the service does not answer: {self.log()[-2000:]}")
            time.sleep(0.02)
        self.client.close()
        self.client = self._client((self.state_dir / "token").read_text().strip())
        return self

    def launch(self, build: Sequence[str] | None = None, more: Mapping[str, str] | None = None) -> None:
        """Start it, and don't wait."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("BLOCKJOBD_")}
        environ |= (
            {
                "BLOCKJOBD_LISTEN": f"unix:{self.socket}",
                "BLOCKJOBD_STATE_DIR": str(self.state_dir),
                "BLOCKJOBD_QMP_DIR": str(self.qmp_dir),
                "BLOCKJOBD_LOG_FORMAT": "json",
            }
            | self.settings
            | dict(more or {})
        )
        with (self.folder / "service.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", *(build or self.build)], env=environ, stdout=log, stderr=log
            )

    def _listens(self) -> bool:
        # Asked without httpx, which leaves the socket of a failed attempt open until it is collected.
        with socket.socket(socket.AF_UNIX) as attempt:
            return attempt.connect_ex(str(self.socket)) == 0

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self._terminate()
        status = self.process.wait(10)
        self.process = None
        return status

    def _terminate(self) -> None:
        assert self.process is not None
        pid = self.process.pid
        if self.within and (children := self._children()):
            # What it runs in waits for the service, and takes no signals for it.
            pid = int(children[0])
        os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        ends = [os.pidfd_open(int(child)) for child in self._children()] if self.within else []
        self.process.kill()
        self.process.wait()
        self.process = None
        for end in ends:
            # What it has run in has ended before it.
            select.select([end], [], [], 10)
            os.close(end)

    def _children(self) -> list[str]:
        assert self.process is not None
        pid = self.process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def log(self) -> str:
        """What it has written to its log."""
        return (self.folder / "service.log").read_text()

    def _client(self, token: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)),
            base_url="http://blockjobd",
            headers=headers,
            timeout=60,
        )

    def as_role(self, role: str) -> httpx.Client:
        """A client with a new token of that role."""
        name = f"{role}-{time.monotonic_ns()}"
        made = subprocess.run(
            [sys.executable, "-m", "app.cli.main", "token", "create", "--role", role, "--name", name],
            env=os.environ | {"BLOCKJOBD_STATE_DIR": str(self.state_dir)},
            check=True,
            capture_output=True,
            text=True,
        )
        return self._client(made.stdout.strip().splitlines()[-1])

    # Shorthands -------------------------------------------------------------------------------------------------------

    def wait_for_domain(self, domain: str, *states: str, seconds: float = 15) -> JSON:
        """The domain, once it is in one of the states (running or paused if none are given)."""
        wanted = states or ("running", "paused")
        deadline = time.monotonic() + seconds
        answer: JSON = {}
        while time.monotonic() < deadline:
            response = self.client.get(f"/domains/{domain}")
            answer = response.json()
            if response.status_code == 200 and answer["state"] in wanted:
                return answer
            time.sleep(0.02)
        raise AssertionError(f"{domain} did not become {wanted}: {answer}")

    def disk(self, domain: str, disk: str = "vda") -> JSON:
        """A disk."""
        response = self.client.get(f"/domains/{domain}/disks/{disk}")
        assert response.status_code == 200, response.text
        return response.json()

    def commit(self, domain: str, disk: str = "vda", **body: object) -> httpx.Response:
        """Ask for a commit."""
        return self.client.post(f"/domains/{domain}/disks/{disk}/commit", json=body)

    def pull(self, domain: str, disk: str = "vda", **body: object) -> httpx.Response:
        """Ask for a pull."""
        return self.client.post(f"/domains/{domain}/disks/{disk}/pull", json=body)

    def started(self, domain: str, disk: str = "vda", *, verb: str = "commit", **body: object) -> JSON:
        """Ask for a job that has to be accepted; the job."""
        response = self.client.post(f"/domains/{domain}/disks/{disk}/{verb}", json=body)
        assert response.status_code == 202, response.text
        return response.json()

    def job(self, job_id: str) -> JSON:
        """A job."""
        response = self.client.get(f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def wait_for_job(self, job_id: str, *states: str, seconds: float = 60) -> JSON:
        """The job, once it is in one of the states (ended if none are given)."""
        wanted = states or ENDED
        deadline = time.monotonic() + seconds
        job = self.job(job_id)
        while job["state"] not in wanted:
            if job["state"] in ENDED or time.monotonic() > deadline:
                raise AssertionError(f"the job did not become {wanted}: {json.dumps(job)}\n{self.log()[-3000:]}")
            time.sleep(0.02)
            job = self.job(job_id)
        return job

    def history(self, job_id: str) -> list[JSON]:
        """The stored events of a job."""
        response = self.client.get(f"/jobs/{job_id}/history")
        assert response.status_code == 200, response.text
        return response.json()["items"]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process is not None:
            self._terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
                raise


@contextmanager
def sse(client: httpx.Client, url: str, headers: Mapping[str, str] | None = None) -> Generator[Iterator[JSON]]:
    """The events of a stream: {"id", "event", "data"} each, data parsed; comments are left out."""
    with client.stream("GET", url, headers=dict(headers or {})) as response:
        assert response.status_code == 200, response.read()
        yield _events(response)


def _events(response: httpx.Response) -> Iterator[JSON]:
    event: JSON = {}
    last = time.monotonic()
    for line in response.iter_lines():
        # A stream that is idle goes on for ever, and the client's own timeout never comes.
        assert time.monotonic() < last + QUIET, f"no event for {QUIET} s: {response.url}"
        if not line:
            if "data" in event:
                yield event
                last = time.monotonic()
            event = {}
        elif not line.startswith(":"):
            key, _, value = line.partition(": ")
            event[key] = json.loads(value) if key == "data" else value
