"""The service that is killed and started again, over all rounds, and what the test knows of its journal."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tests.support.chains import Chain, build_chain
from tests.support.service import Service
from tests.torture.client import Client, Subscriber
from tests.torture.plan import LAYERS, SIZE, Fault, How

JSON = dict[str, Any]

SETTINGS = {
    # One fewer than there are domains, so that jobs wait for a place.
    "BLOCKJOBD_MAX_RUNNING_JOBS": "2",
    # Short, so that a QEMU that is stopped for a while leaves the outcome of commands unknown.
    "BLOCKJOBD_QMP_TIMEOUT": "1",
}
FILE = "journal.sqlite3"
APART = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Runs the service in a pid namespace of its own, from where it sees no QEMU's process."""
DEFECTS = ("Traceback", "actor failed", '"level": "critical"', "internal-error")
"""What the service's log must not hold."""


class Stage:
    """The service in `folder`, with a subscriber that never leaves; counts what is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.service = Service(folder, SETTINGS)
        self.client = Client(self.service.socket, self.service.state_dir / "token")
        self.template: Chain = build_chain(_made(folder / "template"), LAYERS, size=SIZE)
        self.counts: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.troubles: list[str] = []
        self.actions: list[str] = []
        self.closed = False
        self.blind = False
        self._log_read = 0
        self._speed = 0
        self._lock = threading.Lock()
        self._service_lock = threading.Lock()
        self._began = time.monotonic()
        self.service.start()
        self.subscriber = Subscriber(self.client)
        self._files_at_rest: dict[int, int] = {}
        self.note_rest()

    def close(self) -> None:
        """End everything."""
        self.subscriber.close()
        with self._service_lock:
            self.closed = True
            if self.service.process is not None:
                status = self.service.stop()
                if status != 0:
                    self.troubles.append(f"the service ended with {status}")
            self.service.client.close()
        self.check_journal(self.service.state_dir)

    # What happens -----------------------------------------------------------------------------------------------------

    def begin_round(self) -> None:
        """Count time and troubles from here."""
        self._began = time.monotonic()
        self.troubles.clear()
        self.actions.clear()
        self.blind = bool(self.service.within)

    def note(self, who: str, what: str) -> None:
        """Keep what was done, and when."""
        with self._lock:
            self.actions.append(f"{time.monotonic() - self._began:8.3f} {who}: {what}")

    def trouble(self, what: str) -> None:
        """Keep what is wrong."""
        with self._lock:
            self.troubles.append(what)

    def count(self, what: str, moments: Sequence[str] = ()) -> None:
        """Count what was done, and the states of the jobs that it hit."""
        with self._lock:
            self.counts[what] += 1
            self.moments.update(f"{what} | {moment}" for moment in (moments or ("no job",)))

    def new_speed(self, wanted: int) -> int:
        """A bandwidth of about `wanted` bytes/s (0: as good as unlimited) that no other request has."""
        with self._lock:
            self._speed += 1
            return (wanted or 1 << 40) + self._speed

    def end_service(self, fault: Fault, who: str) -> None:
        """Kill or stop the service, look at its journal, and start it again."""
        with self._service_lock:
            if self.closed:
                return
            self.note(who, fault.how.value)
            if fault.how is How.SERVICE_KILL:
                self.service.kill()
            elif (status := self.service.stop()) != 0:
                self.trouble(f"after SIGTERM the service ended with {status}")
            with tempfile.TemporaryDirectory(dir=self.folder) as copy:
                # Its files as they are now; whoever opens them repairs them, and that is the service's to do.
                for file in self.service.state_dir.glob(f"{FILE}*"):
                    shutil.copy(file, copy)
                self.check_journal(Path(copy))
                self.count(fault.how.value, _unfinished(Path(copy), None))
            time.sleep(fault.hold)
            for seconds in fault.starts:
                self.service.launch()
                time.sleep(seconds)
                self.service.kill()
                self.note(who, f"service killed {seconds:.3f} s after its start")
                self.counts["starts that were killed"] += 1
            self.service.within = APART if fault.apart else ()
            self.blind |= fault.apart
            self.service.start()
            self.note(who, "service started" + (" apart" if fault.apart else ""))
            with self._lock:
                self.counts["restarts of the service"] += 1

    def register(self, domain: str, body: JSON) -> None:
        """Have the service know a domain."""
        deadline = time.monotonic() + 30
        while (answer := self.client.ask("PUT", f"/domains/{domain}", body))[0] not in (200, 201):
            if time.monotonic() > deadline:
                self.trouble(f"{domain} can't be registered: {answer}")
                return
            time.sleep(0.05)

    def forget(self, domain: str) -> None:
        """Have the service forget a domain."""
        deadline = time.monotonic() + 30
        while (answer := self.client.ask("DELETE", f"/domains/{domain}"))[0] not in (204, 404):
            if time.monotonic() > deadline:
                self.trouble(f"{domain} can't be forgotten: {answer}")
                return
            time.sleep(0.05)

    # What is known ----------------------------------------------------------------------------------------------------

    def states(self, domain: str) -> list[str]:
        """The states of the domain's unfinished jobs, without asking the service."""
        with suppress(sqlite3.Error):
            return _unfinished(self.service.state_dir, domain)
        return []

    def wait_for_state(self, domain: str, state: str, seconds: float) -> None:
        """Return once the journal has an unfinished job of the domain in that state, or after so many seconds."""
        deadline = time.monotonic() + seconds
        with suppress(sqlite3.Error), closing(_read_only(self.service.state_dir)) as journal:
            while time.monotonic() < deadline:
                query = "SELECT 1 FROM jobs WHERE ended = 0 AND domain = ? AND state = ?"
                if journal.execute(query, (domain, state)).fetchone():
                    return
                # Some states last no longer than a few milliseconds.
                time.sleep(0.001)

    def check_journal(self, state_dir: Path) -> None:
        """SQLite's own check of the file."""
        with closing(sqlite3.connect(state_dir / FILE)) as journal:
            found = journal.execute("PRAGMA integrity_check").fetchall()
            broken = journal.execute("PRAGMA foreign_key_check").fetchall()
        if found != [("ok",)] or broken:
            self.trouble(f"the journal is damaged: {found} {broken}")

    def journal_events(self, after: int) -> list[tuple[int, str]]:
        """Ids and types of the stored events."""
        with closing(_read_only(self.service.state_dir)) as journal:
            return journal.execute("SELECT id, type FROM events WHERE id > ? ORDER BY id", (after,)).fetchall()

    def new_log(self) -> str:
        """What the service has logged since the last call."""
        text = self.service.log()
        new, self._log_read = text[self._log_read :], len(text)
        for line in new.splitlines():
            if any(word in line for word in DEFECTS):
                self.trouble(f"the service logged: {line}")
        return new

    # Leaks ------------------------------------------------------------------------------------------------------------

    def note_rest(self) -> None:
        """The service is idle now and has just the subscriber: so many files may be open whenever it is."""
        self.wait_until_empty()
        time.sleep(0.2)
        pid = self._pid
        self._files_at_rest.setdefault(pid, self._open_files(pid))
        self.allowed = max(self._files_at_rest.values())

    def check_rest(self) -> None:
        """No file and no process of the service is left over now that no domain is there."""
        self.wait_until_empty()
        pid = self._pid
        deadline = time.monotonic() + 10
        while (count := self._open_files(pid)) > self.allowed or _children(pid):
            if time.monotonic() > deadline:
                names = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]
                self.trouble(f"{count} open files where {self.allowed} are enough: {names}; children {_children(pid)}")
                return
            time.sleep(0.05)

    def wait_until_empty(self) -> None:
        """Have the service forget the machines that are off, and wait until it knows no domain."""
        deadline = time.monotonic() + 10
        while left := self.client.get("/domains")["items"]:
            for domain in left:
                if domain["state"] == "shutoff":
                    self.client.ask("DELETE", f"/domains/{domain['id']}")
            if time.monotonic() > deadline:
                self.trouble(f"domains that have gone are still there: {json.dumps(left)}")
                return
            time.sleep(0.05)

    @property
    def _pid(self) -> int:
        assert self.service.process is not None
        pid = self.service.process.pid
        return int(_children(pid)[0]) if self.service.within else pid

    def _open_files(self, pid: int) -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _children(pid: int) -> list[str]:
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def _read_only(state_dir: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{state_dir / FILE}?mode=ro", uri=True, timeout=5)


def _unfinished(state_dir: Path, domain: str | None) -> list[str]:
    with closing(_read_only(state_dir)) as journal:
        query = "SELECT state FROM jobs WHERE ended = 0 AND (?1 IS NULL OR domain = ?1) ORDER BY seq"
        return [state for (state,) in journal.execute(query, (domain,))]
