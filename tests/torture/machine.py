"""One domain of a round: its QEMU, its images, what its guest has written, and the thread that does its plan."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tests.support.chains import (
    Chain,
    assert_same,
    blockdev,
    copy_chain,
    read_image,
    slow_down,
    write_guest,
)
from tests.support.qemu import Qemu, QmpError
from tests.torture.hands import Done, Neighbour, free_port, meddle
from tests.torture.judge import chains_after
from tests.torture.plan import Ask, Await, DomainPlan, Fault, How, Kind, Meddle, Revive, Steer, Step, Write
from tests.torture.records import DomainEnd, Reply, Request
from tests.torture.sockets import cut
from tests.torture.stage import Stage

JSON = dict[str, Any]

PATIENCE: Final = 60.0
"""Seconds that a job may take to its end once nothing holds it up; far more than any needs."""

BLIND: Final = 1.5
"""Seconds for which a job of a service that can't see processes is waited for."""

LATER: Final = ("monitor-unreachable", "monitor-busy", "domain-not-found")
"""Refusals that a short wait may end."""

AIM: Final = 0.5
"""Seconds that a fault waits for the state that it is aimed at; some never come."""

STEERS: Final = {
    "pause": ("POST", "/pause"),
    "resume": ("POST", "/resume"),
    "pivot": ("POST", "/pivot"),
    "speed": ("PATCH", ""),
    "abort": ("DELETE", ""),
    "force": ("DELETE", "?force=true"),
}


class Machine:
    """A domain; `run` does its plan, `settle` lets it come to rest, `end` says how it was found."""

    def __init__(self, stage: Stage, plan: DomainPlan) -> None:
        self.plan = plan
        self.requests: list[Request] = []
        self.replies: list[Reply] = []
        self.runs: Counter[str] = Counter()
        self.troubles: list[str] = []
        self.qemu_ended = False
        self.meddled = False
        self._stage = stage
        folder = stage.folder / plan.name
        folder.mkdir()
        self.folder = folder
        self.chain: Chain = copy_chain(stage.template, folder)
        self.view = self.chain.view
        self.images = tuple(self.chain.files)
        self._left = self.chain
        """The chain that QEMU was started with last."""
        self._may_have_pivoted = False
        self._stopped = False
        self._asking: list[threading.Thread] = []
        self._neighbour = Neighbour(stage, self.chain.images[0], plan.name) if plan.shared else None
        self._port = free_port() if plan.tcp else 0
        self.qemu: Qemu = self._boot(slow=plan.slow)
        if plan.tcp:
            stage.register(plan.name, {"qmp": {"tcp": f"127.0.0.1:{self._port}"}})

    def _boot(self, *, slow: int = 0) -> Qemu:
        arguments = blockdev(self._left, slow_base=bool(slow))
        monitor = self._stage.service.qmp_dir / f"{self.plan.name}.qmp"
        if self._port:
            monitor = self.folder / "own.qmp"
            arguments += ["-qmp", f"tcp:127.0.0.1:{self._port},server=on,wait=off"]
        qemu = Qemu(monitor, arguments)
        if slow:
            slow_down(qemu, slow)
        return qemu

    @property
    def _blind(self) -> bool:
        """Whether the service can't know that a QEMU has ended before another one answers in its place."""
        return self._stage.blind or self.plan.tcp

    def note(self, what: str) -> None:
        """Keep what was done."""
        self._stage.note(self.plan.name, what)

    # The plan ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do the plan, each step in its time."""
        try:
            for step in self.plan.steps:
                if isinstance(step, Fault | Meddle) and step.aim is not None:
                    self._stage.wait_for_state(self.plan.name, step.aim, AIM)
                time.sleep(step.after)
                self._do_step(step)
        except Exception as error:  # noqa: BLE001 - it is told with the round's other troubles
            self.troubles.append(f"the test itself failed: {error!r}")
        finally:
            self.join()

    def _do_step(self, step: Step) -> None:
        match step:
            case Ask():
                self._ask(step)
            case Steer():
                self._later(lambda step=step: self._steer(step))
            case Write():
                self._write(step)
            case Fault():
                self._fault(step)
            case Meddle():
                self._meddle(step)
            case Revive():
                self._revive()
            case Await():
                self._await(step.seconds)

    def join(self) -> None:
        """Wait for the answers to what was asked."""
        for thread in self._asking:
            thread.join(90)
        self._asking.clear()

    def _later(self, what: Any) -> None:
        thread = threading.Thread(target=what, daemon=True)
        self._asking.append(thread)
        thread.start()

    def _ask(self, step: Ask) -> None:
        speed = self._stage.new_speed(step.body["bandwidth"])
        request = Request(domain=self.plan.name, speed=speed, body=step.body | {"bandwidth": speed})
        self.requests.append(request)
        self._may_have_pivoted |= step.kind is Kind.PIVOT
        self.note(f"ask {step.kind} {request.body}")

        def send() -> None:
            verb = "pull" if step.kind is Kind.PULL else "commit"
            path = f"/domains/{self.plan.name}/disks/virtio0/{verb}"
            deadline = time.monotonic() + 2
            while True:
                request.status, request.answer = self._stage.client.ask("POST", path, request.body)
                # As after a restart of the service, or of QEMU: somebody who means it asks again.
                if request.answer.get("code") not in LATER or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            told = request.answer.get("id") or request.answer.get("code")
            self.note(f"answer {request.status} {told}")

        self._later(send)

    def _last_job(self) -> JSON | None:
        jobs = self._stage.client.get(f"/jobs?domain={self.plan.name}&limit=1")["items"]
        return jobs[0] if jobs else None

    def _steer(self, step: Steer) -> None:
        deadline = time.monotonic() + 3
        job = self._last_job()
        while step.at_ready and (job is None or job["state"] != "ready") and time.monotonic() < deadline:
            if job is not None and job["finished_at"] is not None:
                return
            time.sleep(0.02)
            job = self._last_job()
        if job is not None:
            self._do(step.verb, job)

    def _do(self, verb: str, job: JSON) -> bool:
        """Ask for something; whether the domain could be reached."""
        method, suffix = STEERS[verb]
        self._may_have_pivoted |= verb == "pivot"
        body: JSON | None = {"bandwidth": 0} if verb == "speed" else None
        status, answer = self._stage.client.ask(method, f"/jobs/{job['id']}{suffix}", body)
        self.replies.append(Reply(domain=self.plan.name, what=f"{verb} {job['id']}", status=status, answer=answer))
        self.note(f"{verb} {job['id']} ({job['state']}): {status} {answer.get('code') or answer.get('state')}")
        return status != 503

    def _write(self, step: Write) -> None:
        if self._stopped or not self.running:
            return
        self.view = write_guest(self.qemu, self.view, step.pattern, step.at, step.length)
        flush = 'qemu-io -d /machine/peripheral/virtio0/virtio-backend "flush"'
        said = self.qemu.qmp("human-monitor-command", command_line=flush)
        assert not said, said
        self.note(f"write {step.pattern} {step.at} {step.length}")

    @property
    def running(self) -> bool:
        """Whether there is a QEMU."""
        return self.qemu.process.poll() is None

    def _fault(self, fault: Fault) -> None:
        if fault.how.ends_service:
            self._stage.end_service(fault, self.plan.name)
            return
        if not self.running:
            return
        self._stage.count(fault.how.value, self._stage.states(self.plan.name))
        self.note(fault.how.value)
        match fault.how:
            case How.CUT if self._port:
                self.note("over TCP: not cut")
            case How.CUT:
                cut(self.qemu.pid, self.qemu.monitor)
            case How.QEMU_STOP:
                self._stopped = True
                self.qemu.pause()
                time.sleep(fault.hold)
                self.qemu.wake()
                self._stopped = False
                self.note("woken")
            case How.QEMU_QUIT:
                self.qemu_ended = True
                self._count_runs()
                self.qemu.quit()
            case _:
                self.qemu_ended = True
                self._count_runs()
                self.qemu.kill()

    def _meddle(self, step: Meddle) -> None:
        if self._stopped or not self.running:
            return
        done = meddle(self.qemu, step.hand)
        self.note(f"another client's {step.hand}: {done}")
        if done is Done.TAKEN:
            self._stage.count(step.hand.value, self._stage.states(self.plan.name))
            self.meddled = self._may_have_pivoted = True

    def _count_runs(self) -> None:
        """How often each job has begun in this QEMU, by the events that it has sent to the test's own monitor."""
        # The events from before this reply are read with it.
        self.qemu.qmp("query-status")
        created: str | None = None
        for event in self.qemu.events:
            if event["event"] != "JOB_STATUS_CHANGE":
                continue
            id_, status = event["data"]["id"], event["data"]["status"]
            # A refused command makes a job that goes from created to null.
            if status == "running" and created == id_:
                self.runs[id_] += 1
            created = id_ if status == "created" else None if created == id_ else created
        self.qemu.events.clear()

    def _await(self, seconds: float) -> None:
        self.join()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self._last_job()
            if job is None or job["state"] in ("ready", "paused") or job["finished_at"] is not None:
                return
            time.sleep(0.02)

    # Coming back ------------------------------------------------------------------------------------------------------

    def _unfinished(self) -> list[JSON]:
        return self._stage.client.get(f"/jobs?domain={self.plan.name}&active=true")["items"]

    def jobs(self) -> list[JSON]:
        """The domain's jobs, oldest first."""
        return self._stage.client.items(f"/jobs?domain={self.plan.name}")[::-1]

    def _revive(self) -> None:
        """Start QEMU again, from the chain that the disk has by now."""
        if self.running:
            return
        self.join()
        if self._may_have_pivoted:
            # Which image is the active layer is for the job to say. A service that can't see that QEMU has ended says
            # so at once or waits for another one, whatever that is started from.
            began = time.monotonic()
            while left := [job for job in self._unfinished() if job["state"] != "queued"]:
                if time.monotonic() > began + PATIENCE:
                    self.troubles.append(f"QEMU has ended, and its jobs have not: {left}")
                    break
                if self._blind and time.monotonic() > began + BLIND:
                    break
                time.sleep(0.02)
        self._left = self._chain_on_disk()
        self._may_have_pivoted = False
        self.qemu = self._boot()
        self.note(f"QEMU started from {self._left.active.name}")

    def _chain_on_disk(self) -> Chain:
        jobs = self.jobs()
        tops = [Path(file) for file in dict.fromkeys(self._tops(jobs))]
        for top in tops:
            if top.exists() and read_image(top) == self.view:
                return self._chain_of(top)
        self.troubles.append(f"none of {[top.name for top in tops]} has what the guest has written; jobs: {jobs}")
        return self._chain_of(next(top for top in tops if top.exists()))

    def _tops(self, jobs: list[JSON]) -> list[str]:
        if not self._may_have_pivoted:
            return [str(self._left.active)]
        # What was judged, and not yet tidied up after, is told by the state of the data.
        likely = {job["id"]: "completed" if job["data_state"] == "merged" else "lost" for job in jobs}
        ended = [job if job["finished_at"] is not None else job | {"state": likely[job["id"]]} for job in jobs]
        return [chain[0] for chain in chains_after(self.images, ended, meddled=self.meddled)]

    def _chain_of(self, top: Path) -> Chain:
        images = [Path(file) for file in header_chain(top)][::-1]
        return replace(self.chain, images=images, formats=["qcow2"] * len(images))

    # The end ----------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let all jobs end, QEMU started again where it has ended."""
        if self.running:
            with suppress(QmpError):
                slow_down(self.qemu, 0)
        deadline = time.monotonic() + PATIENCE
        asked: set[str] = set()
        while left := self._unfinished():
            if not self.running and (self._blind or all(job["state"] == "queued" for job in left)):
                break
            for job in left:
                if job["state"] == "ready" and job["id"] not in asked and job["on_ready"] == "wait":
                    if self._do("pivot" if self.plan.pivots_at_end else "abort", job):
                        asked.add(job["id"])
                elif job["state"] == "paused":
                    self._do("resume", job)
            if time.monotonic() > deadline:
                self.troubles.append(f"jobs that do not end: {left}; QEMU has {self._query_jobs()}")
                return
            time.sleep(0.02)
            asked &= {job["id"] for job in left if job["state"] == "ready"}
        if not self.running:
            self._revive()
            self.settle()

    def _query_jobs(self) -> list[JSON]:
        return self.qemu.qmp("query-jobs") if self.running else []

    def inspect(self) -> DomainEnd:
        """How the domain is found, now that it has settled. The data is compared here."""
        self._count_runs()
        graph = self._graph()
        end = DomainEnd(
            name=self.plan.name,
            jobs=tuple(job["id"] for job in self.jobs()),
            images=self.images,
            graph=graph,
            headers=header_chain(Path(graph[0])),
            there=frozenset(file for file in self.images if Path(file).exists()),
            in_qemu=tuple(job["id"] for job in self._settled_jobs()),
            runs=dict(self.runs),
            qemu_ended=self.qemu_ended,
            meddled=self.meddled,
            blind=self._blind,
        )
        self._compare(graph[0])
        return end

    def _settled_jobs(self) -> list[JSON]:
        # A job is dismissed after its end is stored only where the service had died between the two.
        deadline = time.monotonic() + 5
        while (left := self._query_jobs()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def _graph(self) -> tuple[str, ...]:
        block = next(block for block in self.qemu.qmp("query-block") if "virtio0" in block.get("qdev", ""))
        image: JSON | None = block["inserted"]["image"]
        files: list[str] = []
        while image is not None:
            files.append(_file_of(image["filename"]))
            image = image.get("backing-image")
        return tuple(files)

    def _compare(self, image: str) -> None:
        try:
            assert_same(read_image(image), self.view)
        except AssertionError as error:
            self.troubles.append(f"{image} does not hold what the guest has written: {error}")

    def rerun(self) -> DomainEnd:
        """Another merge of all that is left just works; all images are sound, and the base holds every byte."""
        if self._neighbour is not None and (wrong := self._neighbour.leave()):
            self.troubles.append(wrong)
        if len(self._graph()) > 1:
            self._merge_all()
        end = self.inspect()
        self.qemu.quit()
        if self.plan.tcp:
            self._stage.forget(self.plan.name)
        self._compare(end.graph[0])
        for file in self.images:
            if Path(file).exists() and (problem := check(file)):
                self.troubles.append(problem)
        return end

    def _merge_all(self) -> None:
        client, deadline = self._stage.client, time.monotonic() + PATIENCE
        speed = self._stage.new_speed(0)
        body: JSON = {"flags": ["active", "bandwidth_bytes"], "on_ready": "pivot", "bandwidth": speed}
        request = Request(domain=self.plan.name, speed=speed, body=body)
        while True:
            status, answer = client.ask("POST", f"/domains/{self.plan.name}/disks/virtio0/commit", body)
            if answer.get("code") == "node-in-use" and self.meddled:
                # Who has a job pivot and forgets it leaves its nodes behind, which nobody else may take for his.
                self.qemu.qmp("blockdev-del", node_name=answer["used_by"])
            elif answer.get("code") not in LATER or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        request.status, request.answer = status, answer
        self.requests.append(request)
        while self._unfinished() and time.monotonic() < deadline:
            time.sleep(0.02)
        job = self._last_job()
        if status != 202 or job is None or job["state"] != "completed":
            self.troubles.append(f"after all, a merge did not work: {status} {answer} {job}")

    def close(self) -> None:
        """Leave nothing of it."""
        self.qemu.__exit__(None, None, None)
        if self._neighbour is not None:
            self._neighbour.close()
        for image in self.chain.images:
            image.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _file_of(filename: str) -> str:
    """The path behind the name that QEMU gives to a node."""
    if not filename.startswith("json:"):
        return filename
    node: Any = json.loads(filename.removeprefix("json:"))
    while "filename" not in node:
        node = node["file"]
    return node["filename"]


def header_chain(top: Path) -> tuple[str, ...]:
    """The chain as the images' headers tell it."""
    command = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(top)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return tuple(image["filename"] for image in found)


def check(file: str) -> str | None:
    """What `qemu-img check` has against the image alone. Leaked clusters are what a killed QEMU may leave, and no harm.

    What a merged layer leads to may have been deleted by a later job.
    """
    alone = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": file}}
    command = ["qemu-img", "check", "-q", "json:" + json.dumps(alone)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return None if done.returncode in (0, 3) else f"qemu-img check {file}: {done.stdout}{done.stderr}"
