"""A build of the service that ends by SIGKILL at a named point: `CRASH_FILE=FILE python -m tests.support.crashing`.

Every port of the engine has something around it that passes points: `before-` and `after-` each call that stores or
acts, `sent-` once a command is on its way to QEMU and its reply has not been read, `inside-` a transaction between the
change of a job and the event that tells of it. Points count while there is an unfinished job. The file holds the point
at which to die, and may change at any time; where it is empty, the points that are passed are written to `FILE.passed`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import uvloop

from app.api.render import JsonRender
from app.core.chain import NotDeleted
from app.core.evidence import Process
from app.core.images import Image, MarkChange
from app.core.job import Job
from app.core.kinds import kind_of
from app.core.machine.step import StoredVersion
from app.core.states import State
from app.engine.ports.driver import Address, Driver, Runner
from app.engine.ports.events import StoredEvent
from app.engine.ports.images import Images
from app.engine.ports.journal import Journal, NewJob, Registration
from app.engine.ports.uses import DiskUses
from app.engine.shared import Shared
from app.engine.views import DomainView
from app.logs import configure
from app.settings import load
from app.wiring import serve

SENT: Final = 0.005
"""Seconds in which a command has left for QEMU."""

QMP: Final = {
    "pivot": "job-complete",
    "abort": "job-cancel",
    "disks": "read-chain",
    "flush": "flush",
    "finalize": "job-finalize",
}
"""The calls of a monitor that are points, and what they are called here."""


class Fuse:
    """Ends the process at the point that the file names, or writes down the points that are passed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._passed = file.with_suffix(".passed")
        self._lit = False

    def light(self, *, lit: bool) -> None:
        """Whether points count from now on."""
        self._lit = lit

    def wanted(self) -> str:
        """The point at which to die; empty if nowhere."""
        return self._file.read_text() if self._lit else ""

    def reach(self, point: str) -> None:
        """The process is at `point`."""
        wanted = self.wanted()
        if point == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._lit and not wanted:
            with self._passed.open("a") as passed:
                passed.write(f"{point}\n")

    async def around(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """What `call` returns, with a point before it, one while it waits for its answer, and one after it."""
        self.reach(f"before-{name}")
        if self.wanted() == f"sent-{name}":
            task = asyncio.ensure_future(call())
            await asyncio.sleep(SENT)
            self.reach(f"sent-{name}")
            return await task
        done = await call()
        self.reach(f"after-{name}")
        return done


class Around:
    """A port with points before and after those of its calls that have a name; other calls pass through."""

    def __init__(self, inner: object, fuse: Fuse, name: Callable[[str, tuple[Any, ...]], str | None]) -> None:
        self._inner = inner
        self._fuse = fuse
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        inner: Any = getattr(self._inner, attribute)
        if not inspect.iscoroutinefunction(inner):
            return inner

        async def call(*arguments: Any, **named: Any) -> Any:
            name = self._name(attribute, arguments)
            if name is None:
                return await inner(*arguments, **named)
            return await self._fuse.around(name, lambda: inner(*arguments, **named))

        return call


def version_of(job: Job) -> str:
    """What a stored version of a job is called in a point's name."""
    judged = job.state is State.CONCLUDING and job.control.judgement is not None
    return "store-judged" if judged else f"store-{job.state}"


class DyingRender(JsonRender):
    """Called in the middle of a transaction: after the job's row, before the event's."""

    def __init__(self, fuse: Fuse) -> None:
        self._fuse = fuse

    def job(self, job: Job) -> str:
        """The JSON of a job."""
        self._fuse.reach(f"inside-{version_of(job)}")
        return super().job(job)

    def domain(self, view: DomainView) -> str:
        """The JSON of a domain."""
        return super().domain(view)


class DyingJournal(Around):
    """The journal, with points also before and after subscribers are told."""

    def __init__(self, inner: Journal, fuse: Fuse) -> None:
        super().__init__(inner, fuse, self._called)
        self._journal = inner

    def _called(self, attribute: str, arguments: tuple[Any, ...]) -> str | None:
        if attribute != "add_jobs":
            return None
        self._fuse.light(lit=True)
        new: Sequence[NewJob] = arguments[0]
        return version_of(new[-1].versions[-1].job)

    async def unfinished(self) -> Sequence[Job]:
        """As the journal's own, asked at the start."""
        jobs = await self._journal.unfinished()
        self._fuse.light(lit=bool(jobs))
        return jobs

    async def store(
        self,
        told: Sequence[StoredVersion],
        *,
        uses: DiskUses | None = None,
        marks: MarkChange | None = None,
        registration: Registration | None = None,
    ) -> None:
        """As the journal's own; the points after an ended job's belong to nobody."""
        job = told[-1].job
        await self._fuse.around(
            version_of(job),
            lambda: self._journal.store(told, uses=uses, marks=marks, registration=registration),
        )
        self._fuse.light(lit=not job.ended)

    def listen(self, publish: Callable[[Sequence[StoredEvent]], None]) -> None:
        """As the journal's own."""

        def told(events: Sequence[StoredEvent]) -> None:
            for event in events:
                self._fuse.reach(f"before-publish-{event.type}")
            publish(events)
            for event in events:
                self._fuse.reach(f"after-publish-{event.type}")

        self._journal.listen(told)


class DyingDriver(Around):
    """Monitors with points around their commands, and one when QEMU tells of something."""

    def __init__(self, inner: Driver, fuse: Fuse) -> None:
        super().__init__(inner, fuse, lambda _attribute, _arguments: None)
        self._driver = inner

    async def connect(self, address: Address, hint: Callable[[], None]) -> Runner:
        """As the driver's own."""

        def hinted() -> None:
            self._fuse.reach("qemu-event")
            hint()

        return cast(Runner, DyingRunner(await self._driver.connect(address, hinted), self._fuse))


def _command(attribute: str, arguments: tuple[Any, ...]) -> str | None:
    if attribute != "start":
        return QMP.get(attribute)
    job: Job = arguments[0]
    return kind_of(job.spec).command(job.spec, bandwidth=0, on_error=job.on_error).execute


class DyingRunner(Around):
    """A monitor, with points around its commands."""

    def __init__(self, inner: Runner, fuse: Fuse) -> None:
        super().__init__(inner, fuse, _command)
        self._monitor = inner

    async def conclude(self, job_id: str, nodes: Sequence[str] = (), read_only: Sequence[str] = ()) -> None:
        """As the monitor's own, node by node."""
        await self._fuse.around("job-dismiss", lambda: self._monitor.conclude(job_id))
        for number, node in enumerate(nodes, 1):
            await self._fuse.around(f"blockdev-del-{number}", lambda node=node: self._monitor.conclude(job_id, [node]))
        if read_only:
            await self._fuse.around("reopen", lambda: self._monitor.conclude(job_id, (), read_only))


class DyingImages(Around):
    """The images, with points before each file is unlinked."""

    def __init__(self, inner: Images, fuse: Fuse) -> None:
        super().__init__(inner, fuse, lambda _attribute, _arguments: None)
        self._images = inner

    async def unlink(
        self,
        files: Mapping[str, Image],
        process: Process | None,
        in_use: Callable[[Image], str | None],
        since: int | None = None,
    ) -> tuple[tuple[str, ...], tuple[NotDeleted, ...]]:
        """As the images' own; `in_use` is asked right before each unlink."""
        number = iter(range(1, len(files) + 1))

        def asked(image: Image) -> str | None:
            self._fuse.reach(f"before-unlink-{next(number)}")
            return in_use(image)

        done = await self._images.unlink(files, process, asked, since)
        if files:
            self._fuse.reach("after-unlink")
        return done


def main() -> None:
    """Serve, and die where it was told."""
    fuse = Fuse(Path(os.environ["CRASH_FILE"]))

    def wrap_ports(shared: Shared) -> None:
        shared.journal = cast(Journal, DyingJournal(shared.journal, fuse))
        shared.drivers = {name: cast(Driver, DyingDriver(driver, fuse)) for name, driver in shared.drivers.items()}
        shared.images = cast(Images, DyingImages(shared.images, fuse))

    settings = load(None, os.environ)
    configure(settings.log_format)
    uvloop.run(serve(settings, render=DyingRender(fuse), wrap_ports=wrap_ports))


if __name__ == "__main__":
    main()
