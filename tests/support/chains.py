"""Chains of real images with known data, and what the guest has to see of them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.qemu import Qemu

MIB = 1 << 20
CLUSTER = 65536
SIZE = 4 * MIB
"""The virtual size of a layer in bytes, where a test asks for no other."""
DATA = 24 * CLUSTER
"""The bytes of noise in a layer, where a test asks for no other number."""


@dataclass
class Chain:
    """Images from the base (index 0) up to the active layer, and the bytes that each shows as it was made."""

    images: list[Path]
    views: list[bytes]
    formats: list[str] = field(default_factory=list[str])

    @property
    def files(self) -> list[str]:
        """The images as the service lists them: the active layer first."""
        return [str(image) for image in reversed(self.images)]

    @property
    def active(self) -> Path:
        """The active layer."""
        return self.images[-1]

    @property
    def view(self) -> bytes:
        """What the guest sees."""
        return self.views[-1]

    def at(self, position: int) -> str:
        """The file at the position in the service's list, 0 being the active layer."""
        return self.files[position]


def build_chain(
    folder: Path,
    layers: int = 5,
    *,
    size: int = SIZE,
    sizes: Sequence[int] | None = None,
    base_format: str = "qcow2",
    absolute: bool = False,
    nested: bool = False,
    seed: int = 1,
    data: int = DATA,
    prefix: str = "l",
) -> Chain:
    """A chain of `layers` images with `data` bytes of noise in each, at places that overlap from layer to layer.

    `sizes` gives each layer's virtual size, base first. Headers are relative unless `absolute`; `nested` puts each
    layer into a folder of its own, below the one before.
    """
    noise = random.Random(seed)
    chain = Chain(images=[], views=[])
    for number in range(layers):
        here = folder / Path(*[f"d{depth}" for depth in range(number + 1)]) if nested else folder
        here.mkdir(parents=True, exist_ok=True)
        format_ = base_format if number == 0 else "qcow2"
        image = here / f"{prefix}{number}.{'img' if format_ == 'raw' else 'qcow2'}"
        virtual = sizes[number] if sizes else size
        create = ["qemu-img", "create", "-q", "-f", format_]
        if number:
            below = chain.images[-1]
            name = str(below) if absolute else os.path.relpath(below, here)
            create += ["-b", name, "-F", chain.formats[-1]]
        subprocess.run([*create, str(image), str(virtual)], check=True)
        before = chain.views[-1] if number else b""
        view = bytearray(before[:virtual].ljust(virtual, b"\0"))
        commands: list[str] = []
        for _ in range(data // CLUSTER // 4):
            at, length = noise.randrange(virtual // 4096 - 64) * 4096, noise.randrange(1, 64) * 4096
            pattern = noise.randrange(1, 256)
            view[at : at + length] = bytes([pattern]) * length
            commands += ["-c", f"write -q -P {pattern} {at} {length}"]
        subprocess.run(["qemu-io", "-f", format_, *commands, str(image)], check=True)
        chain.images.append(image)
        chain.views.append(bytes(view))
        chain.formats.append(format_)
    return chain


def copy_chain(chain: Chain, folder: Path) -> Chain:
    """A chain with relative headers and no subfolders, copied into another folder."""
    images = [Path(shutil.copy(image, folder)) for image in chain.images]
    return Chain(images, list(chain.views), list(chain.formats))


def name_backing(image: Path, backing: Path) -> None:
    """Write the absolute path of a qcow2 image into the header of the image above it; no data is moved."""
    header = ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", str(backing), "-F", "qcow2"]
    subprocess.run([*header, str(image)], check=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSpec:
    """The chain that a test works on: the arguments of the marker `chain`.

    `layers` is the number of images, all of them qcow2. `size` is the virtual size of each layer and `data` the noise
    in it, both in bytes, as `build_chain` takes them. Headers are relative, or absolute with `absolute`. `folder` is
    where the images are, relative to the test's own folder.
    """

    layers: int
    size: int = SIZE
    data: int = DATA
    absolute: bool = False
    folder: str = "."


class Templates:
    """Chains for tests to copy. Building a chain is slow, so each is built once, when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[ChainSpec, Chain] = {}

    def copy(self, spec: ChainSpec, folder: Path) -> Chain:
        """A chain in `folder` itself, whatever `spec.folder` is; the folder is made where it is missing."""
        if spec not in self._built:
            place = self._folder / str(len(self._built))
            self._built[spec] = build_chain(place, spec.layers, size=spec.size, data=spec.data)
        folder.mkdir(parents=True, exist_ok=True)
        chain = copy_chain(self._built[spec], folder)
        if spec.absolute:
            for backing, image in itertools.pairwise(chain.images):
                name_backing(image, backing)
        return chain


def write_guest(qemu: Qemu, view: bytes, pattern: int, at: int, length: int, *, device: str = "virtio0") -> bytes:
    """Write as the guest would, through its virtio-blk device; what it sees then, if it saw `view` before."""
    # The HMP command answers with what went wrong, and with nothing but figures if nothing did.
    command = f'qemu-io -d /machine/peripheral/{device}/virtio-backend "write -P {pattern} {at} {length}"'
    said = qemu.qmp("human-monitor-command", command_line=command)
    assert f"wrote {length}/{length} bytes" in said or not said, said
    return view[:at] + bytes([pattern]) * length + view[at + length :]


def read_image(image: Path | str, format_: str = "qcow2") -> bytes:
    """What a guest sees of the image, whole, also while QEMU has it open."""
    raw = Path(f"{image}.raw")
    try:
        subprocess.run(["qemu-img", "convert", "-U", "-f", format_, "-O", "raw", str(image), str(raw)], check=True)
        return raw.read_bytes()
    finally:
        raw.unlink(missing_ok=True)


def assert_same(seen: bytes, expected: bytes) -> int:
    """Compare all bytes, and return how many; a larger disk has to end in zeroes."""
    padded = expected.ljust(len(seen), b"\0")
    if seen != padded:
        at = next((i for i, (a, b) in enumerate(zip(seen, padded, strict=False)) if a != b), len(seen))
        raise AssertionError(f"{len(seen)} bytes seen, {len(expected)} expected, different from offset {at} on")
    return len(seen)


def header_backing(image: Path | str) -> str | None:
    """The string in the image's header."""
    return _info(image).get("backing-filename")


def header_format(image: Path | str) -> str | None:
    """What the image's header says of the format of the backing image."""
    return _info(image).get("backing-filename-format")


def _info(image: Path | str) -> dict[str, Any]:
    command = ["qemu-img", "info", "-U", "--output=json", str(image)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def slow_down(qemu: Qemu, rate: int) -> None:
    """Have a `slow_base` take no more than `rate` bytes/s of writes, from all jobs, at any time."""
    qemu.qmp("qom-set", path="/objects/slow", property="limits", value={"bps-write": rate})


@contextmanager
def small_file_system(folder: Path, size: int) -> Generator[Path]:
    """A file system of `size` bytes; the test is skipped where none can be mounted, which takes root."""
    place = folder / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "blockjobd-test", str(place)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        # A QEMU may still have its images open.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, *, leave: int = 0) -> Path:
    """Take all but `leave` bytes of a file system; the file that does."""
    filler = place / "filler"
    with filler.open("wb") as file:
        while True:
            stat = os.statvfs(place)
            try:
                os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - leave)
            except OSError as error:
                # A job has taken some of it meanwhile.
                if error.errno != errno.ENOSPC:
                    raise
            else:
                return filler


# How QEMU is told of a chain -----------------------------------------------------------------------------------------


def drive(chain: Chain, id_: str = "drive0", extra: str = "") -> list[str]:
    """`-drive`: QEMU opens the chain from the headers and names all nodes itself."""
    return ["-drive", f"file={chain.active},format=qcow2,if=virtio,id={id_}{extra}"]


def drive_with_id(chain: Chain) -> list[str]:
    """As `drive`, with the device id that `blockdev` has."""
    return [
        *("-drive", f"file={chain.active},format=qcow2,if=none,id=drive0"),
        *("-device", "virtio-blk-pci,drive=drive0,id=virtio0"),
    ]


def blockdev(chain: Chain, prefix: str = "n", *, device: str = "virtio0", slow_base: bool = False) -> list[str]:
    """`-blockdev`, a node for each layer (n0 … nN, base first) and one for each file (fn0 … fnN), as libvirt does.

    `slow_base` puts a throttle filter over the base's file, which `slow_down` sets the speed of.
    """
    arguments = explicit_nodes(chain, prefix)
    if slow_base:
        group = {"qom-type": "throttle-group", "id": "slow"}
        filter_ = {"driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": f"f{prefix}0"}
        base = json.loads(arguments[3]) | {"file": "slow"}
        arguments[2:4] = ["-object", json.dumps(group), "-blockdev", json.dumps(filter_)]
        arguments[6:6] = ["-blockdev", json.dumps(base)]
    return [*arguments, "-device", f"virtio-blk-pci,drive={prefix}{len(chain.images) - 1},id={device}"]


def explicit_nodes(chain: Chain, prefix: str = "n", *, throttle_above: int | None = None) -> list[str]:
    """The `-blockdev` arguments of a chain; `throttle_above` puts a throttle filter (named `throttle`) over a layer."""
    arguments: list[str] = []
    last = len(chain.images) - 1
    below: str | None = None
    for number, (image, format_) in enumerate(zip(chain.images, chain.formats, strict=True)):
        file: dict[str, object] = {"driver": "file", "node-name": f"f{prefix}{number}", "filename": str(image)}
        file["auto-read-only"] = True
        node: dict[str, object] = {"driver": format_, "node-name": f"{prefix}{number}", "file": f"f{prefix}{number}"}
        node["read-only"] = number != last
        if format_ != "raw":
            node["backing"] = below
        arguments += ["-blockdev", json.dumps(file), "-blockdev", json.dumps(node)]
        below = f"{prefix}{number}"
        if throttle_above == number:
            group = {"qom-type": "throttle-group", "id": "group0"}
            filter_: dict[str, object] = {"driver": "throttle", "node-name": "throttle", "file": below}
            filter_ |= {"throttle-group": "group0", "read-only": number != last}
            arguments += ["-object", json.dumps(group), "-blockdev", json.dumps(filter_)]
            below = "throttle"
    return arguments
