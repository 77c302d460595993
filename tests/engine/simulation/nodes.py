"""What a block graph is made of, a guest's disk, and the end of a monitor's connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from app.core.machine.inputs import Observed
from tests.engine.simulation.files import Content, Image

DEVICE = 8
"""The number of the device that all files are on."""


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """A format node. `carrier` is the node of its file; nodes that QEMU has made itself go with the node above."""

    name: str
    image: Image
    below: Node | None
    read_only: bool = True
    implicit: bool = False
    carrier: str = ""


@dataclass(slots=True, kw_only=True, eq=False)
class GuestDisk:
    """A disk of a virtual machine, over all of its processes.

    `active` is the file that the machine is started from next time, `expected` what its guest has to read.
    """

    target: str
    qdev: str
    backend: str | None
    active: str
    expected: Content


@dataclass(slots=True, kw_only=True, eq=False)
class Client:
    """The end of a monitor's connection in QEMU: whom to tell, how jobs ended, and which were about to take effect."""

    hint: Callable[[], None]
    final_reports: dict[str, Observed] = field(default_factory=dict[str, Observed])
    leaving: set[str] = field(default_factory=set[str])
