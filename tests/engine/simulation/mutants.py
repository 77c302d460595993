"""The engine, broken on purpose: each of these takes away something that it relies on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from app.engine.ports.driver import Driver
from app.engine.shared import Shared
from tests.engine.simulation.engine import Mutant


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


def _with_runner(**altered: Any) -> Mutant:
    def wrap(shared: Shared) -> None:
        shared.drivers = {
            name: cast("Driver", _AlteredDriver(driver, altered)) for name, driver in shared.drivers.items()
        }

    return Mutant(wrap_ports=wrap)


async def _nothing(_runner: Any, *_arguments: Any) -> None:
    """The call is left out."""


async def _dismiss_only(runner: Any, job_id: str, _nodes: Sequence[str] = ()) -> None:
    await runner.conclude(job_id)


UNFLUSHED: Final = _with_runner(flush=_nothing)
"""A merge below the active layer is finalized before its data is on the disk."""

NODES_KEPT: Final = _with_runner(conclude=_dismiss_only)
"""The nodes of merged layers stay in QEMU."""
