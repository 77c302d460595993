"""A real QEMU for tests, with a monitor for the service and one for the test."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class QmpError(Exception):
    """QEMU refused the test's command."""


def as_user(name: str) -> list[str]:
    """The arguments by which QEMU becomes another user; newer ones have another name for that."""
    known = subprocess.run(["qemu-system-x86_64", "--help"], check=True, capture_output=True, text=True).stdout
    return ["-runas", name] if "-runas " in known else ["-run-with", f"user={name}"]


class Qemu:
    """One QEMU process; `arguments` are its disks and devices. The guest does not run unless `run` is set.

    `pass_fds` are descriptors that it inherits.
    `within` is a command that ends in becoming the one that follows it, as `unshare` does.
    """

    def __init__(
        self,
        monitor: Path,
        arguments: Sequence[str],
        *,
        machine: str = "q35",
        run: bool = False,
        cwd: Path | None = None,
        name: str | None = None,
        within: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.monitor = monitor
        self._own = monitor.with_suffix(".own")
        command = [*within, "qemu-system-x86_64", "-accel", "tcg", "-machine", machine, "-m", "32", "-nodefaults"]
        command += ["-display", "none", *([] if run else ["-S"]), *(["-name", name] if name else [])]
        for path in (monitor, self._own):
            path.unlink(missing_ok=True)
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        # `write_guest` has it print figures.
        out, err = subprocess.DEVNULL, subprocess.PIPE
        self.process = subprocess.Popen([*command, *arguments], cwd=cwd, stdout=out, stderr=err, pass_fds=pass_fds)
        self._socket: socket.socket | None = None
        self.events: list[dict[str, Any]] = []
        self._connect()

    def _connect(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            client = socket.socket(socket.AF_UNIX)
            try:
                client.connect(str(self._own))
                break
            except OSError:
                client.close()
                if self.process.poll() is not None or time.monotonic() > deadline:
                    assert self.process.stderr is not None
                    self.process.kill()
                    raise AssertionError(f"QEMU did not start: {self.process.stderr.read().decode()}") from None
                time.sleep(0.01)
        client.settimeout(20)
        self._socket, self._file = client, client.makefile("rw")
        json.loads(self._file.readline())
        self.qmp("qmp_capabilities")

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    def qmp(self, command: str, **arguments: object) -> Any:
        """Run a command over the test's own monitor; underscores in argument names are dashes in QMP's."""
        renamed = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": renamed}) + "\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            if not line:
                raise AssertionError("QEMU closed the test's monitor")
            message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(message["error"]["desc"])
            else:
                return message["return"]

    def conclude(self, job_id: str) -> None:
        """Have a merge below the active layer come to its end in here, as another client could."""
        self.qmp("block-job-set-speed", device=job_id, speed=0)
        deadline = time.monotonic() + 30
        while (status := {job["id"]: job["status"] for job in self.qmp("query-jobs")}.get(job_id)) != "concluded":
            assert time.monotonic() < deadline, status
            if status == "pending":
                self.qmp("job-finalize", id=job_id)
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self._end()

    def pause(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def quit(self) -> None:
        """Have it end in order, so that its images are complete on disk."""
        if self.process.poll() is None:
            self.qmp("quit")
        self._end()

    def _end(self) -> None:
        self.process.wait(10)
        if self._socket is not None:
            self._file.close()
            self._socket.close()
            self._socket = None
        if self.process.stderr is not None:
            self.process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.wake()
            self.process.kill()
        self._end()
        for path in (self.monitor, self._own):
            path.unlink(missing_ok=True)
