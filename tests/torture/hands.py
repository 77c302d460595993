"""Others who have their hands on a domain: another client of its QEMU, and another domain on its base."""

from __future__ import annotations

import socket
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.support.chains import read_image
from tests.support.qemu import Qemu, QmpError
from tests.torture.plan import Hand
from tests.torture.stage import Stage


class Done(StrEnum):
    """What came of it."""

    NO_JOB = "there is no job"
    REFUSED = "refused"
    TAKEN = "taken"


def meddle(qemu: Qemu, hand: Hand) -> Done:
    """Do that to the service's last job in this QEMU, over the test's own monitor."""
    jobs = [job["id"] for job in qemu.qmp("query-jobs") if job["id"].startswith("bj-")]
    if not jobs:
        return Done.NO_JOB
    arguments: dict[str, Any] = {"id": jobs[-1]}
    if hand in (Hand.CANCEL_GENTLY, Hand.SPEED):
        arguments = {"device": jobs[-1]}
    if hand is Hand.SPEED:
        arguments["speed"] = 1 << 30
    try:
        qemu.qmp(hand.value, **arguments)
    except QmpError:
        return Done.REFUSED
    return Done.TAKEN


def free_port() -> int:
    """A TCP port of the loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Neighbour:
    """A domain that is off, with an overlay of its own on another domain's base."""

    def __init__(self, stage: Stage, base: Path, of: str) -> None:
        self.name = f"{of}-neighbour"
        self._stage = stage
        self._overlay = base.with_name("neighbour.qcow2")
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(self._overlay)]
        subprocess.run(create, check=True)
        self._view = read_image(self._overlay)
        stage.register(self.name, {"disks": {"vda": {"image": str(self._overlay)}}})
        self._there = True

    def leave(self) -> str | None:
        """Have the service forget it; what is wrong with its data by then."""
        if not self._there:
            return None
        self._there = False
        wrong = None if read_image(self._overlay) == self._view else f"{self.name} reads other data than before"
        self._stage.forget(self.name)
        return wrong

    def close(self) -> None:
        """Leave nothing of it."""
        self._overlay.unlink(missing_ok=True)
