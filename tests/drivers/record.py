"""Records what a real QEMU says, as samples for tests: `python -m tests.drivers.record > tests/drivers/qemu-7.2.json`.

The QEMU has a disk of three layers, of which a job is merging two while another job has been canceled, with a filter
between two layers, and a drive without a medium.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

from app.drivers.qmp.driver import NEEDED
from tests.support.chains import build_chain, explicit_nodes
from tests.support.qemu import Qemu

ARGUMENTS: Final[dict[str, dict[str, object]]] = {
    "query-name": {},
    "query-uuid": {},
    "query-version": {},
    "query-status": {},
    "query-commands": {},
    "query-chardev": {},
    "qom-list": {"path": "/objects"},
    "qom-get": {"path": "/machine/peripheral/virtio0", "property": "type"},
    "human-monitor-command": {"command_line": "info kvm"},
    "query-jobs": {},
    "query-block-jobs": {},
    "query-block": {},
    "query-blockstats": {},
    "query-named-block-nodes": {"flat": True},
    "x-debug-query-block-graph": {},
    "query-migrate": {},
    "query-block-exports": {},
}
UNUSED: Final = ("cache", "dirty-bitmaps", "stats", "timed_stats")
EVENTS: Final = ("JOB_STATUS_CHANGE", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_READY")


def until(qemu: Qemu, job: str, status: str) -> None:
    """Wait until the job has that status."""
    deadline = time.monotonic() + 10
    while {each["id"]: each["status"] for each in qemu.qmp("query-jobs")}[job] != status:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def record(folder: Path) -> dict[str, Any]:
    """The replies by command, and of each kind of event the first."""
    chain = build_chain(folder, 3)
    disk = [*explicit_nodes(chain, throttle_above=0), "-device", "virtio-blk-pci,drive=n2,id=virtio0"]
    with Qemu(folder / "vm.qmp", [*disk, "-device", "ide-cd,id=cd0"], name="sample") as qemu:
        commit = {"device": "n2", "base_node": "n0", "auto_dismiss": False}
        qemu.qmp("block-commit", job_id="bj-1", top_node="n1", speed=1, **commit)
        qemu.qmp("job-cancel", id="bj-1")
        until(qemu, "bj-1", "concluded")
        qemu.qmp("block-commit", job_id="bj-2", top_node="n1", speed=1, **commit)
        replies = {command: qemu.qmp(command, **arguments) for command, arguments in ARGUMENTS.items()}
        qemu.qmp("block-job-set-speed", device="bj-2", speed=0)
        until(qemu, "bj-2", "concluded")
        qemu.qmp("query-status")
        events = {event["event"]: event for event in reversed(qemu.events) if event["event"] in EVENTS}
    replies["query-commands"] = [each for each in replies["query-commands"] if each["name"] in NEEDED]
    return {"replies": shortened(replies), "events": events}


def shortened(value: Any) -> Any:
    """The value without most of what nobody uses."""
    if isinstance(value, list):
        return [shortened(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in cast("dict[str, Any]", value).items() if key not in UNUSED}
    return value


def in_lines(said: dict[str, Any]) -> str:
    """The recording as JSON, a line for each reply and each event."""
    parts = [
        f'"{part}": {{\n' + ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in values.items()) + "\n}"
        for part, values in said.items()
    ]
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        sys.stdout.write(in_lines(record(Path(temporary))).replace(temporary, "/images"))
