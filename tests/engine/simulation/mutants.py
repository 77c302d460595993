"""The engine, broken on purpose: each of these takes away something that it relies on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence, Sized
from typing import Any, Final, TypeVar, cast

from app.core.chain import Disk
from app.core.errors import Code, Problem, Refused
from app.core.images import Image
from app.core.job import Job
from app.engine.actor import Actor
from app.engine.domains import DomainDirectory
from app.engine.known import ImageUser, KnownDisks
from app.engine.looks import Looks
from app.engine.ports.driver import Driver
from app.engine.ports.journal import Registration
from app.engine.shared import Shared
from tests.engine.simulation.engine import Mutant

T = TypeVar("T")


class _Altered:
    """A runner of which some calls are others."""

    def __init__(self, inner: Any, altered: dict[str, Any]) -> None:
        self._inner = inner
        self._altered = altered

    def __getattr__(self, name: str) -> Any:
        if name not in self._altered:
            return getattr(self._inner, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            return await self._altered[name](self._inner, *arguments, **named)

        return call


class _AlteredDriver:
    def __init__(self, inner: Driver, altered: dict[str, Any]) -> None:
        self._inner = inner
        self._altered = altered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def connect(self, *arguments: Any) -> Any:
        return _Altered(await self._inner.connect(*arguments), self._altered)


def with_runner(**altered: Any) -> Mutant:
    """The engine on runners of which these calls are others; each is handed the real runner first."""

    def wrap(shared: Shared) -> None:
        shared.drivers = {
            name: cast("Driver", _AlteredDriver(driver, altered)) for name, driver in shared.drivers.items()
        }

    return Mutant(wrap_ports=wrap)


async def _nothing(_runner: Any, *_arguments: Any) -> None:
    """The call is left out."""


async def _dismiss_only(runner: Any, job_id: str, _nodes: Sequence[str] = (), _read_only: Sequence[str] = ()) -> None:
    await runner.conclude(job_id)


UNFLUSHED: Final = with_runner(flush=_nothing)
"""A merge below the active layer is finalized before its data is on the disk."""


class _Unlocked(DomainDirectory):
    """Changes of one domain are not serialised."""

    def alone(self, domain: str) -> asyncio.Lock:  # noqa: ARG002 - as the engine's own
        return asyncio.Lock()


class _Hasty(DomainDirectory):
    """Whether a domain may be forgotten is decided outside of its actor."""

    async def forget(self, domain: str) -> None:
        """Forget a domain that has no job just now."""
        actor = self.find(domain)
        if actor.jobs:
            raise Refused(Problem(code=Code.JOB_CONFLICT, detail=actor.jobs[0].id))
        await self._shared.journal.unregister(domain, self._shared.render.domain(actor.view()))
        self._forgotten.add(domain)
        await self._remove(actor)


class _PlainLooks(Looks):
    """Jobs wait while files are asked for a request."""

    async def meanwhile(self, asked: Awaitable[T], /) -> T:
        """What files answer."""
        return await asked


class _GreedyLooks(_PlainLooks):
    """Requests are served as long as there are any."""

    requests: Sized = ()

    @property
    def due(self) -> bool:
        """No look is due while somebody waits."""
        return not self.requests and super().due


class _GreedyActor(Actor):
    async def run(self) -> None:
        """Work, and look at the jobs when nobody waits."""
        self._looks.__class__ = _GreedyLooks
        cast(_GreedyLooks, self._looks).requests = self._inbox
        await super().run()


class _Greedy(DomainDirectory):
    def _launch(self, registration: Registration, jobs: Sequence[Job]) -> Actor:
        actor = super()._launch(registration, jobs)
        # Before its task has begun.
        actor.__class__ = _GreedyActor
        return actor


class _PlainActor(Actor):
    async def run(self) -> None:
        """Work, and do nothing else while files are asked."""
        self._looks.__class__ = _PlainLooks
        await super().run()


class _Plain(DomainDirectory):
    def _launch(self, registration: Registration, jobs: Sequence[Job]) -> Actor:
        actor = super()._launch(registration, jobs)
        actor.__class__ = _PlainActor
        return actor


UNLOCKED: Final = Mutant(directory=_Unlocked)
HASTY: Final = Mutant(directory=_Hasty)
GREEDY: Final = Mutant(directory=_Greedy)
PLAIN: Final = Mutant(directory=_Plain)

NODES_KEPT: Final = with_runner(conclude=_dismiss_only)
"""The nodes of merged layers stay in QEMU."""


class _Forgetful(KnownDisks):
    """What machines that are off use is forgotten."""

    def user_of(self, image: Image, domain: str, disk: Disk) -> ImageUser | None:
        """Another disk, of a machine that runs, that has the image."""
        found = super().user_of(image, domain, disk)
        return None if found is None or found.because else found


def _forget(shared: Shared) -> None:
    shared.known = _Forgetful(shared.images)


USES_FORGOTTEN: Final = Mutant(wrap_ports=_forget)
