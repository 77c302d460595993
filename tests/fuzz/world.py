"""What is behind the service while it is fuzzed: real QEMUs whose chains never run out of layers."""

from __future__ import annotations

import random
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.chains import MIB, Chain, blockdev, build_chain, drive_with_id, read_image, write_guest
from tests.support.qemu import Qemu
from tests.support.service import ENDED, JSON, Service

MACHINES = ("web1", "web2")
OFF, GONE = "off1", "gone1"
DOMAINS = (*MACHINES, OFF, GONE)
LAYERS = 5
SIZE = 4 * MIB


class World:
    """A service in `folder` with two QEMUs, a domain that is off, and one whose monitor is not there."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.jobs: list[str] = []
        self.names: list[str] = ["vda"]
        """Names of disks, layers and nodes that mean something just now."""
        self._random = random.Random(seed)
        self._overlays = 0
        self._stack = ExitStack()
        self._machines: dict[str, tuple[Qemu, bytes]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            settings = {
                "BLOCKJOBD_IMAGE_ROOTS": str(self.folder),
                "BLOCKJOBD_MAX_RUNNING_JOBS": "2",
                "BLOCKJOBD_WEBHOOK_ALLOW": "127.0.0.0/8",
            }
            self.service = stack.enter_context(Service(self.folder / "service", settings))
            for number, (name, arguments) in enumerate(zip(MACHINES, (blockdev, drive_with_id), strict=True)):
                chain = self._chain(name, number)
                qemu = stack.enter_context(Qemu(self.folder / f"{name}.qmp", arguments(chain)))
                self._machines[name] = (qemu, chain.view)
            self._off = self._chain(OFF, 7)
            self.tend()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _chain(self, name: str, seed: int) -> Chain:
        return build_chain(self.folder / name, LAYERS, size=SIZE, seed=seed)

    def registration(self, name: str) -> JSON:
        """What `name` has to be registered with, to be what it is here."""
        if name == OFF:
            return {"disks": {"vda": {"image": str(self._off.active)}}}
        return {"qmp": {"unix": str(self.folder / f"{name}.qmp")}}

    def tend(self) -> None:
        """Undo what keeps requests from going deep: strange registrations, jobs that stand, chains that are short."""
        client = self.service.client
        known = {domain["id"]: domain for domain in client.get("/domains?limit=1000").json()["items"]}
        for name in known.keys() - set(DOMAINS):
            client.delete(f"/domains/{name}")
        self.names = ["vda"]
        for name in DOMAINS:
            if name not in known or not self._is_itself(name, known[name]):
                answer = client.put(f"/domains/{name}", json=self.registration(name))
                assert answer.status_code in (200, 201), answer.text
        for name in MACHINES:
            self.service.wait_for_domain(name, "paused", seconds=60)
            disk = self.service.disk(name)
            if disk["job"] is not None:
                self._move_on(disk["job"], at_once=name != MACHINES[0])
            elif len(disk["chain"]) < LAYERS:
                self._snapshot(name, disk)
            elif name == MACHINES[0]:
                # One to be steered; the other machine is for those that are asked for.
                job = self.service.started(name, flags=["active"], bandwidth=1)
                self.jobs.append(job["id"])
            self.names += [*disk["aliases"], *(layer[key] for layer in disk["chain"] for key in ("file", "node"))]
        self.names += [f"vda[{index}]" for index in range(LAYERS + 1)]

    def _is_itself(self, name: str, domain: JSON) -> bool:
        if name in MACHINES:
            # It may have been given the other one's monitor, which is lost to that one then.
            return domain["state"] == "paused" and domain["qemu"]["pid"] == self._machines[name][0].pid
        return domain["state"] == {OFF: "shutoff", GONE: "unreachable"}[name]

    def _move_on(self, job_id: str, *, at_once: bool) -> None:
        """Have a job end or go on: at once, or now and then, so that the requests find it as it is."""
        verb = self._random.choice(["pivot", "abort"] if at_once else ["", "", "", "pivot", "resume", "abort"])
        if verb == "abort":
            self.service.client.delete(f"/jobs/{job_id}")
        elif verb:
            self.service.client.post(f"/jobs/{job_id}/{verb}")

    def _snapshot(self, name: str, disk: JSON) -> None:
        qemu, view = self._machines[name]
        active = disk["chain"][0]
        while len(disk["chain"]) + self._overlays % LAYERS <= 2 * LAYERS:
            self._overlays += 1
            overlay = self.folder / name / f"o{self._overlays}.qcow2"
            # Not by QEMU, which would open the chain from headers that say whatever `backing_file` has said.
            create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", active["file"], "-F", "qcow2"]
            subprocess.run([*create, str(overlay), str(SIZE)], check=True)
            qemu.qmp(
                "blockdev-snapshot-sync",
                node_name=active["node"],
                snapshot_file=str(overlay),
                snapshot_node_name=f"o{self._overlays}",
                format="qcow2",
                mode="existing",
            )
            active = {"file": str(overlay), "node": f"o{self._overlays}"}
            at = self._random.randrange(SIZE // MIB) * MIB + self._random.randrange(16) * 65536
            view = write_guest(qemu, view, self._random.randrange(1, 256), at, 65536)
            if self._overlays % LAYERS == 0:
                break
        self._machines[name] = (qemu, view)

    def settle(self) -> None:
        """Have every job end; the outcomes are whatever they are."""
        self.tend()
        for state in ("queued", "ready", "paused", "running"):
            for job in self.service.client.get("/jobs", params={"active": True, "state": state}).json()["items"]:
                self.service.client.delete(f"/jobs/{job['id']}")
        for job in self.service.client.get("/jobs", params={"active": True, "limit": 1000}).json()["items"]:
            self.service.wait_for_job(job["id"], *ENDED)

    def damage(self) -> list[str]:
        """Each disk whose guest would read another byte than it has written: nothing that is asked for may do that."""
        found: list[str] = []
        for name, (qemu, view) in self._machines.items():
            node = self.service.disk(name)["node"]
            socket = self.folder / f"{name}.nbd"
            qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
            qemu.qmp("block-export-add", type="nbd", id="look", node_name=node, name="disk")
            copy = self.folder / f"{name}.raw"
            url = f"nbd+unix:///disk?socket={socket}"
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(copy)], check=True)
            qemu.qmp("nbd-server-stop")
            if copy.read_bytes() != view:
                found.append(f"the guest of {name} reads other data than it has written")
        if read_image(self._off.active) != self._off.view:
            found.append(f"the images of {OFF} hold other data")
        return found
