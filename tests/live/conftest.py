"""A real service for each module, and real QEMUs that end with the test."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pytest

from tests.support.chains import Chain, ChainSpec, Templates
from tests.support.qemu import Qemu
from tests.support.service import Service

_NUMBERS = itertools.count(1)

NewChain: TypeAlias = Callable[[Path], Chain]
"""`new_chain(folder)` makes the folder, and in it a chain as the marker `chain` describes it."""


class Boot(Protocol):
    """`boot(arguments)` starts a QEMU that the service knows, as the test's `domain` or under another name."""

    def __call__(self, arguments: Sequence[str], *, name: str | None = None, **options: Any) -> Qemu:
        """The QEMU; `options` are those of `Qemu`."""
        ...


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with its settings' defaults."""
    with Service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The test's own folder, for images and sockets."""
    return tmp_path


@pytest.fixture
def domain() -> str:
    """An id that no other test uses."""
    return f"vm{next(_NUMBERS)}"


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    """The chains that tests copy, built once in each worker process."""
    return Templates(tmp_path_factory.mktemp("templates"))


def chain_spec(node: pytest.Item | pytest.Collector) -> ChainSpec:
    """The arguments of the marker `chain` on a test or on its module; the test's marker replaces the module's.

    Raises LookupError where there is no marker, and TypeError for an argument that `ChainSpec` does not have.
    """
    mark = node.get_closest_marker("chain")
    if mark is None:
        raise LookupError(f"{node.nodeid} needs the marker `chain`")
    return ChainSpec(*mark.args, **mark.kwargs)


@pytest.fixture
def new_chain(templates: Templates, request: pytest.FixtureRequest) -> NewChain:
    """Makes chains as the marker `chain` describes them, for a test that needs several chains."""
    return partial(templates.copy, chain_spec(request.node))


@pytest.fixture
def chain(new_chain: NewChain, folder: Path, request: pytest.FixtureRequest) -> Chain:
    """The test's own chain, as the marker `chain` describes it; layers are numbered from the base (0) upwards."""
    return new_chain(folder / chain_spec(request.node).folder)


@pytest.fixture
def boot(service: Service, folder: Path, domain: str) -> Iterator[Boot]:
    """Starts QEMUs, registers them, and takes both back at the test's end."""
    names: list[str] = []
    with ExitStack() as stack:

        def start(arguments: Sequence[str], *, name: str | None = None, **options: Any) -> Qemu:
            id_ = name or domain
            qemu = stack.enter_context(Qemu(folder / f"{id_}.qmp", arguments, **options))
            names.append(id_)
            answer = service.client.put(f"/domains/{id_}", json={"qmp": {"unix": str(qemu.monitor)}})
            assert answer.status_code in (200, 201), answer.text
            service.wait_for_domain(id_)
            return qemu

        yield start
    for name in names:
        forget(service, name)


def forget(service: Service, name: str) -> None:
    """Have the service forget a domain, once it has seen that the domain's jobs are over."""
    deadline = time.monotonic() + 10
    while (answer := service.client.delete(f"/domains/{name}")).status_code not in (204, 404):
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.02)
