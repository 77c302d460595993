"""Images as the service itself sees them: real qcow2 files, real locks, and headers that mean harm."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.core.chain import Disk, Identity, NotDeleted
from app.core.errors import Code, Refused
from app.core.evidence import HeaderReading, Process
from app.core.images import Image
from app.engine.ports.images import Measure
from app.hostfs import qcow2
from app.hostfs.headers import HEADER
from app.hostfs.identity import image_at
from app.hostfs.images import LocalImages
from app.hostfs.process import start_time
from tests.support.chains import CLUSTER, MIB, blockdev, build_chain
from tests.support.qemu import Qemu

pytestmark = pytest.mark.live

IMAGES = LocalImages((), 10)


def create(image: Path, size: int = 4 * MIB, *options: str, backing: str | None = None, format_: str = "qcow2") -> Path:
    """An image without data; `backing` is what its header is to say, without a look at what that is."""
    below = ["-b", backing, "-F", "qcow2", "-u"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", format_, *below, *options, image, str(size)], check=True)
    return image


def change(image: Path, *commands: str, format_: str = "qcow2") -> None:
    """Have qemu-io write into an image."""
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", format_, *arguments, image], check=True, stdout=subprocess.DEVNULL)


def disk_of(image: Path | str, images: LocalImages = IMAGES) -> Disk:
    """The disk with this active layer, read from the headers."""
    return asyncio.run(images.offline_disk("web1", "vda", str(image), ()))


def measured(disk: Disk, top: int = 0, base: int = 1, images: LocalImages = IMAGES) -> Measure | None:
    """What the merge copies."""
    return asyncio.run(images.measure(disk.layers[top : base + 1], None))


def clusters(copied: int, new: int, size: int = CLUSTER) -> Measure:
    return Measure(bytes_to_copy=copied * size, new_bytes=new * size)


def process_of(pid: int) -> Process:
    return Process(pid=pid, started=start_time(pid), uuid=None)


def identity_of(file: Path | str) -> Identity:
    found = Path(file).stat()
    return (found.st_dev, found.st_ino)


def identified(paths: Sequence[str]) -> dict[str, Identity | None]:
    """Files to be deleted, each with its identity if it has one."""
    return {path: identity_of(path) if Path(path).exists() else None for path in paths}


def images_of(files: Mapping[str, Identity | None]) -> dict[str, Image]:
    """Files with identities, as images."""
    return {path: Image(path, identity) for path, identity in files.items()}


def imaged(paths: Sequence[str]) -> dict[str, Image]:
    """Files to be deleted, as images."""
    return images_of(identified(paths))


def nobody(_image: Image) -> None:
    """Who uses an image."""


# Measuring -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base with data in its clusters 0 to 3, and an empty overlay."""
    base = create(tmp_path / "base.qcow2")
    change(base, f"write -q -P 1 0 {4 * CLUSTER}")
    return base, create(tmp_path / "top.qcow2", backing="base.qcow2")


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        ((), clusters(0, 0)),
        ((f"write -q -P 2 0 {2 * CLUSTER}",), clusters(2, 0)),
        ((f"write -q -P 2 {2 * CLUSTER} {4 * CLUSTER}",), clusters(4, 2)),
        ((f"write -q -P 2 {8 * CLUSTER} {3 * CLUSTER}",), clusters(3, 3)),
        # A few bytes take their whole cluster with them.
        ((f"write -q -P 2 {5 * CLUSTER + 512} 512",), clusters(1, 1)),
        ((f"write -q -P 2 {CLUSTER + 512} 512", f"write -q -P 2 {9 * CLUSTER} 512"), clusters(2, 1)),
        # Zeroes hide what is below, so they are copied too.
        ((f"write -q -z {3 * CLUSTER} {2 * CLUSTER}",), clusters(2, 1)),
    ],
    ids=["nothing", "over data", "half over data", "beside data", "a few bytes", "here and there", "zeroes"],
)
def test_measure(pair: tuple[Path, Path], writes: Sequence[str], expected: Measure) -> None:
    """What a merge copies, and how much of it the base does not hold yet, to the byte."""
    _base, top = pair
    change(top, *writes)
    assert measured(disk_of(top)) == expected


def test_measure_several_layers(tmp_path: Path) -> None:
    """What several layers hold counts once, layers above `top` and below `base` don't count."""
    create(tmp_path / "l0.qcow2")
    for number in range(1, 5):
        create(tmp_path / f"l{number}.qcow2", backing=f"l{number - 1}.qcow2")
    for number, at, length in ((0, 0, 9), (1, 0, 2), (2, 1, 3), (3, 2, 4), (4, 10, 7)):
        change(tmp_path / f"l{number}.qcow2", f"write -q -P {number + 1} {at * CLUSTER} {length * CLUSTER}")
    disk = disk_of(tmp_path / "l4.qcow2")
    assert measured(disk, 1, 3) == clusters(5, 4)
    assert measured(disk, 2, 3) == clusters(3, 2)
    assert measured(disk, 0, 3) == clusters(12, 11)
    assert measured(disk, 0, 4) == clusters(13, 7)


def test_measure_other_cluster_sizes(tmp_path: Path) -> None:
    """What is new to the base counts in the base's own clusters."""
    create(tmp_path / "base.qcow2", 4 * MIB, "-o", "cluster_size=256k")
    top = create(tmp_path / "top.qcow2", 4 * MIB, "-o", "cluster_size=4k", backing="base.qcow2")
    change(tmp_path / "base.qcow2", "write -q -P 1 0 256k")
    change(top, "write -q -P 2 0 4k", "write -q -P 2 1M 4k", "write -q -P 2 1044k 4k")
    assert measured(disk_of(top)) == Measure(bytes_to_copy=3 * 4096, new_bytes=256 << 10)


def test_measure_a_raw_base(tmp_path: Path) -> None:
    """A raw image with holes holds what is not a hole."""
    base = tmp_path / "base.img"
    with base.open("wb") as file:
        file.write(b"\1" * CLUSTER)
        file.truncate(4 * MIB)
    top = tmp_path / "top.qcow2"
    create_over = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", top]
    subprocess.run(create_over, check=True)
    change(top, f"write -q -P 2 0 {CLUSTER}", f"write -q -P 2 {MIB} {2 * CLUSTER}")
    assert measured(disk_of(top)) == clusters(3, 2)


def test_measure_what_qemu_writes_to(tmp_path: Path) -> None:
    """Images that a QEMU has open are measured all the same, and it is not disturbed."""
    chain = build_chain(tmp_path, 3)
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        found = measured(disk_of(chain.active), 0, 2)
        assert found is not None
        assert 0 < found.new_bytes <= found.bytes_to_copy <= 4 * MIB
        assert qemu.qmp("query-status")["status"] == "prelaunch"


def test_measure_in_vain(pair: tuple[Path, Path]) -> None:
    """Without the tool, without its answer in time, outside the roots, or without the files, nothing is claimed."""
    base, top = pair
    disk = disk_of(top)
    folder = top.parent
    slow, broken = folder / "slow", folder / "broken"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    broken.write_text("#!/bin/sh\necho '[{'\n")
    for script in (slow, broken):
        script.chmod(0o755)
    assert measured(disk, images=LocalImages((), 10, str(folder / "none"))) is None
    assert measured(disk, images=LocalImages((), 0.2, str(slow))) is None
    assert measured(disk, images=LocalImages((), 10, str(broken))) is None
    assert measured(disk, images=LocalImages((folder / "elsewhere",), 10)) is None
    assert measured(disk, images=LocalImages((folder,), 10)) == clusters(0, 0)
    base.unlink()
    assert measured(disk) is None


# Locks ---------------------------------------------------------------------------------------------------------------


def test_locks(tmp_path: Path) -> None:
    """The domain's own QEMU does not count; another process that writes to the image, or forbids it, does."""
    chain = build_chain(tmp_path, 3)
    base, active = str(chain.images[0]), str(chain.active)

    def locked(path: str, pid: int | None) -> bool:
        return asyncio.run(IMAGES.locked(path, process_of(pid) if pid else None))

    assert not locked(base, None)
    with Qemu(tmp_path / "one.qmp", blockdev(chain)) as one:
        assert [locked(path, one.pid) for path in chain.files] == [False, False, False]
        assert locked(active, None)
        assert locked(active, os.getpid())
        # Which locks are those of a QEMU whose pid is not known can't be told; its own attempt decides then.
        assert not asyncio.run(IMAGES.locked(active, Process(pid=None, started=None, uuid=None)))
        over = create(tmp_path / "other.qcow2", backing=chain.images[0].name)
        node = f'{{"driver":"qcow2","node-name":"o","file":{{"driver":"file","filename":"{over}"}}}}'
        with Qemu(tmp_path / "two.qmp", ["-blockdev", node, "-device", "virtio-blk-pci,drive=o"]) as two:
            # The other overlay's QEMU wants that nobody writes into the base that both read.
            assert locked(base, one.pid)
            assert locked(base, two.pid)
            assert not locked(str(chain.images[1]), one.pid)
            assert locked(str(chain.images[1]), two.pid)
        assert not locked(base, one.pid)
    assert not locked(active, None)
    assert not locked(str(tmp_path / "none"), None)
    assert not locked("nbd://host/export", None)


# Deleting ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with one of each kind of file, and a folder beside it."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("data")
    (folder / "plain").write_text("data")
    (folder / "link").symlink_to("plain")
    (folder / "dangling").symlink_to("nothing")
    (folder / "door").symlink_to(tmp_path / "elsewhere")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    return folder


def test_undeletable(zoo: Path) -> None:
    """Only regular files inside of the roots may go, and the reason for all others is told."""
    images = LocalImages((zoo,), 10)
    names = ("plain", "link", "dangling", "folder", "pipe", "none", "door/secret", "../elsewhere/secret", "../none")
    paths = [f"{zoo}/{name}" for name in names]
    reasons = asyncio.run(images.undeletable(identified([*paths, "nbd://host/export"]), None))
    assert {path.removeprefix(f"{zoo}/"): reason for path, reason in reasons.items()} == {
        "link": "a symbolic link; the image behind it may have other names",
        "dangling": "a symbolic link; the image behind it may have other names",
        "folder": "not a regular file",
        "pipe": "not a regular file",
        "none": "can't be seen by the service: No such file or directory",
        "door/secret": "outside image_roots",
        "../elsewhere/secret": "outside image_roots",
        "../none": "can't be seen by the service: No such file or directory",
        "nbd://host/export": "not a file",
    }
    secret = identified([f"{zoo}/door/secret"])
    assert not asyncio.run(IMAGES.undeletable(secret, process_of(os.getpid())))
    # Without roots it is the process that has to have the right to delete, so it has to be seen.
    assert "set image_roots" in asyncio.run(IMAGES.undeletable(secret, None))[f"{zoo}/door/secret"]
    # A root whose name merely begins the same way is another folder.
    (zoo.parent / "images-old").mkdir()
    (zoo.parent / "images-old" / "plain").write_text("data")
    assert asyncio.run(images.undeletable(identified([f"{zoo.parent}/images-old/plain"]), None))
    # The file that was chosen may be another one by now, or have never been seen.
    for identity in ((0, 0), None):
        why = asyncio.run(images.undeletable({f"{zoo}/plain": identity}, None))
        assert why == {f"{zoo}/plain": "not the file that QEMU has opened under this name"}


def test_unlink(zoo: Path) -> None:
    """What may go is gone, what is gone already counts as deleted, and all else stays, with its reason."""
    images = LocalImages((zoo,), 10)
    (zoo / "busy").write_text("data")
    identity = identity_of(zoo / "busy")
    asked: list[Image] = []

    def in_use(image: Image) -> str | None:
        asked.append(image)
        return "web1/vda" if image.identity == identity else None

    names = ("plain", "none", "busy", "link", "pipe", "folder", "door/secret", "no-folder/image")
    paths = [str(zoo / name) for name in names]
    before = imaged(paths) | {str(zoo / "none"): Image(str(zoo / "none"), (identity[0], 1))}
    deleted, kept = asyncio.run(images.unlink(before, None, in_use))
    assert deleted == (str(zoo / "plain"), str(zoo / "none"))
    assert kept == (
        NotDeleted(file=str(zoo / "busy"), reason="in use by web1/vda"),
        NotDeleted(file=str(zoo / "link"), reason="a symbolic link; the image behind it may have other names"),
        NotDeleted(file=str(zoo / "pipe"), reason="not a regular file"),
        NotDeleted(file=str(zoo / "folder"), reason="not a regular file"),
        NotDeleted(file=str(zoo / "door/secret"), reason="outside image_roots"),
        NotDeleted(file=str(zoo / "no-folder/image"), reason="its folder can't be opened: No such file or directory"),
    )
    assert asked == list(before.values())
    left = {entry.name for entry in zoo.iterdir()}
    assert left == {"busy", "link", "dangling", "door", "folder", "pipe"}
    assert (zoo.parent / "elsewhere" / "secret").read_text() == "data"


def test_unlink_what_a_process_has_open(tmp_path: Path) -> None:
    """A file that any process has locked stays, the domain's own QEMU too: it has let go of what was merged."""
    chain = build_chain(tmp_path, 2)
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        (file,) = files = imaged([chain.at(0)])
        why = (NotDeleted(file=file, reason="a process has it open"),)
        inside = LocalImages((tmp_path,), 10)
        ours = process_of(qemu.pid)
        for process in (None, process_of(os.getpid()), Process(pid=qemu.pid, started=0, uuid=None), ours):
            assert asyncio.run(inside.unlink(files, process, nobody)) == ((), why)
    assert asyncio.run(inside.unlink(files, ours, nobody)) == ((file,), ())


def test_unlink_what_is_another_image_by_now(tmp_path: Path) -> None:
    """A file with the number of the merged one was made later, or was written anew."""
    path = tmp_path / "image"
    path.write_text("merged")
    merged, now = image_at(str(path), None), time.time_ns() // 1_000_000
    images = LocalImages((tmp_path,), 10)
    files = {str(path): replace(merged, born=(merged.born or 0) - 1)}
    why = "a file that was made later has its name"
    assert asyncio.run(images.unlink(files, None, nobody)) == ((), (NotDeleted(file=str(path), reason=why),))
    os.utime(path, ns=(0, (now + 1) * 1_000_000))
    why = "it was written to after the merge, and may be another image by now"
    files = {str(path): merged}
    assert asyncio.run(images.unlink(files, None, nobody, now)) == ((), (NotDeleted(file=str(path), reason=why),))
    os.utime(path, ns=(0, now * 1_000_000))
    assert asyncio.run(images.unlink(files, None, nobody, now)) == ((str(path),), ())


def test_unlink_behind_a_symlinked_folder(zoo: Path) -> None:
    """Where a folder is a link, it is the real place that has to be inside of the roots."""
    inside = LocalImages((zoo.parent,), 10)
    path = f"{zoo}/door/secret"
    assert asyncio.run(inside.unlink(imaged([path]), None, nobody)) == ((path,), ())
    assert not (zoo.parent / "elsewhere" / "secret").exists()


@contextmanager
def container(folder: Path) -> Generator[Process]:
    """A process with a root of its own, whose /images is `folder`; it takes root to make one."""
    root = folder.parent / "root"
    for name in ("bin", "lib", "lib64", "usr", "images", "old"):
        (root / name).mkdir(parents=True)
    binds = "".join(f"mount --bind /{name} {root}/{name}; " for name in ("bin", "lib", "lib64", "usr"))
    script = f"""set -e; mount --make-rprivate /; mount --bind {root} {root}; {binds}
        mount --bind {folder} {root}/images; cd {root}; pivot_root . old; echo up; exec sleep 60"""
    started = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "up\n"
        yield Process(pid=started.pid, started=start_time(started.pid), uuid=None)
    finally:
        started.kill()
        started.communicate()


def test_links_of_another_root_lead_nowhere(zoo: Path) -> None:
    """A container's links don't lead the service to the host's files, whatever they are called in there."""
    target = zoo.parent / "elsewhere"
    (zoo / "image").write_text("data")
    (zoo / "up").symlink_to("..")
    with container(zoo) as process:
        names = ("door/secret", "up/elsewhere/secret", "../elsewhere/secret")
        bad = [f"/images/{name}" for name in names]
        files = dict.fromkeys(bad, identity_of(target / "secret")) | {"/images/image": identity_of(zoo / "image")}
        # What it calls by the name of a root is no root of the service's.
        for root in ("/images", str(zoo)):
            rooted = LocalImages((root,), 10)
            assert set(asyncio.run(rooted.undeletable(files, process))) == set(files)
            assert asyncio.run(rooted.unlink(images_of(files), process, nobody))[0] == ()
        assert set(asyncio.run(IMAGES.undeletable(files, process))) == set(bad)
        deleted, kept = asyncio.run(IMAGES.unlink(images_of(files), process, nobody))
    assert (deleted, [item.file for item in kept]) == (("/images/image",), bad)
    assert (target / "secret").read_text() == "data"
    assert not (zoo / "image").exists()


# Disks of domains that are off ---------------------------------------------------------------------------------------


def refusal(image: Path, images: LocalImages = IMAGES) -> str:
    """Why the disk with this active layer can't be read."""
    with pytest.raises(Refused) as refused:
        disk_of(image, images)
    assert refused.value.problem.code is Code.DISK_NOT_FOUND
    return refused.value.problem.detail


def test_offline_disk(tmp_path: Path) -> None:
    """A chain of any shape is read from the headers, with sizes, strings and identities as they are."""
    chain = build_chain(tmp_path, 4, nested=True, sizes=[2 * MIB, 3 * MIB, 3 * MIB, 4 * MIB], base_format="raw")
    disk = disk_of(chain.active)
    assert [layer.file for layer in disk.layers] == chain.files
    assert [layer.format for layer in disk.layers] == ["qcow2", "qcow2", "qcow2", "raw"]
    assert [layer.virtual_size for layer in disk.layers] == [4 * MIB, 3 * MIB, 3 * MIB, 2 * MIB]
    assert [layer.backing for layer in disk.layers] == ["../l2.qcow2", "../l1.qcow2", "../l0.img", None]
    for layer in disk.layers:
        found = Path(layer.file).stat()
        assert layer.identity == (found.st_dev, found.st_ino)
        assert layer.actual_size == found.st_blocks * 512
        assert layer.folder == os.path.realpath(Path(layer.file).parent)
    assert disk.virtual_size == 4 * MIB


def test_offline_disk_with_absolute_headers(tmp_path: Path) -> None:
    """Headers may be absolute, also with the prefix that QEMU understands."""
    base = create(tmp_path / "base.qcow2")
    middle = create(tmp_path / "middle.qcow2", backing=f"file:{base}")
    top = create(tmp_path / "top.qcow2", backing=str(middle))
    disk = disk_of(top)
    assert disk.files == (str(top), str(middle), str(base))
    assert [layer.backing for layer in disk.layers] == [str(middle), f"file:{base}", None]


def test_offline_disk_of_a_raw_image(tmp_path: Path) -> None:
    """An image that is no qcow2 is raw and the end of its chain; so is one whose overlay says so."""
    raw = create(tmp_path / "disk.img", 3 * MIB, format_="raw")
    assert [(layer.format, layer.virtual_size) for layer in disk_of(raw).layers] == [("raw", 3 * MIB)]
    # A guest may write what looks like a header into its raw disk; nobody must follow it.
    secret = create(tmp_path / "secret.qcow2")
    trap = create(tmp_path / "trap.img", backing=secret.name)
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", trap.name, "-F", "raw", top], check=True)
    disk = disk_of(top)
    assert disk.files == (str(top), str(trap))
    assert [layer.format for layer in disk.layers] == ["qcow2", "raw"]


def test_offline_disk_in_circles(tmp_path: Path) -> None:
    """A chain that runs in a circle is refused, whatever names the circle has."""
    one = create(tmp_path / "one.qcow2", backing="two.qcow2")
    create(tmp_path / "two.qcow2", backing="./one.qcow2")
    alone = create(tmp_path / "alone.qcow2", backing="alone.qcow2")
    (tmp_path / "again").symlink_to(".")
    linked = create(tmp_path / "linked.qcow2", backing="again/linked.qcow2")
    assert "circle" in refusal(one)
    assert "circle" in refusal(alone)
    assert "circle" in refusal(linked)


def test_offline_disk_with_a_missing_layer(tmp_path: Path) -> None:
    """A layer that is missing, is no file, or is not what its overlay says is named."""
    missing = create(tmp_path / "top.qcow2", backing="none.qcow2")
    assert f"{tmp_path}/none.qcow2" in refusal(missing)
    assert "No such file" in refusal(missing)
    (tmp_path / "folder").mkdir()
    assert f"{tmp_path}/folder" in refusal(create(tmp_path / "over.qcow2", backing="folder"))
    text = tmp_path / "text.qcow2"
    text.write_text("no image " * 100)
    assert "magic" in refusal(create(tmp_path / "wrong.qcow2", backing="text.qcow2"))
    assert "No such file" in refusal(tmp_path / "gone.qcow2")


def test_offline_disk_over_a_pipe(tmp_path: Path) -> None:
    """A header that names a pipe keeps nobody waiting."""
    os.mkfifo(tmp_path / "pipe")
    create(tmp_path / "top", backing="pipe")

    async def read() -> None:
        async with asyncio.timeout(5):
            with suppress(Refused):
                await IMAGES.offline_disk("web1", "vda", str(tmp_path / "top"), ())

    asyncio.run(read())


def test_offline_disk_with_a_zero_byte_in_a_name(tmp_path: Path) -> None:
    """A name that no path can be is refused as any other that leads nowhere."""
    image = create(tmp_path / "top", backing="aXb")
    image.write_bytes(image.read_bytes().replace(b"aXb", b"a\0b", 1))
    assert "zero byte" in refusal(image)
    assert asyncio.run(IMAGES.read_header(str(image), identity_of(image), None)) is None


def test_offline_disk_outside_the_roots(tmp_path: Path) -> None:
    """No image outside of the roots is opened, also not at the end of a chain or behind a link."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    images = LocalImages((inside,), 10)
    base = create(outside / "base.qcow2")
    assert "image_roots" in refusal(base, images)
    assert "image_roots" in refusal(create(inside / "top.qcow2", backing="../outside/base.qcow2"), images)
    (inside / "link.qcow2").symlink_to(base)
    assert "image_roots" in refusal(inside / "link.qcow2", images)
    raw = inside / "over-raw.qcow2"
    create(outside / "disk.img", format_="raw")
    below = ["-b", "../outside/disk.img", "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, raw], check=True)
    assert "image_roots" in refusal(raw, images)
    create(inside / "base.qcow2")
    assert len(disk_of(create(inside / "good.qcow2", backing="base.qcow2"), images).layers) == 2


def test_read_header(tmp_path: Path) -> None:
    """Where a header leads is told as a path, or that it leads nowhere; nothing is told where it can't be read."""
    base = create(tmp_path / "base.qcow2")
    relative = create(tmp_path / "top.qcow2", backing="./x/../base.qcow2")
    images = LocalImages((tmp_path,), 10)

    def read(image: Path, identity: Identity | None, reader: LocalImages = images) -> object:
        return asyncio.run(reader.read_header(str(image), identity, None))

    itself = identity_of(relative)
    leads = HeaderReading(file=f"{tmp_path}/./x/../base.qcow2")
    assert read(relative, itself) == leads
    (tmp_path / "x").mkdir()
    leads = replace(leads, identity=identity_of(base))
    assert read(relative, itself) == leads
    assert read(base, identity_of(base)) == HeaderReading(file=None)
    assert read(tmp_path / "none", itself) is None
    assert read(relative, itself, LocalImages((tmp_path / "else",), 10)) is None
    # It is the file that was seen before, also if its file system has another number now, or it is not read.
    assert read(relative, (itself[0] + 1, itself[1])) == leads
    for other in (identity_of(base), None):
        assert read(relative, other) is None


def test_identities(tmp_path: Path) -> None:
    """A file is the same one under all its names, and what is no file has no identity."""
    image = create(tmp_path / "image.qcow2")
    (tmp_path / "link").symlink_to(image)
    (tmp_path / "hard").hardlink_to(image)
    names = [str(image), str(tmp_path / "link"), str(tmp_path / "hard"), f"{tmp_path}/./image.qcow2"]
    found = asyncio.run(IMAGES.identities([*names, str(tmp_path / "none"), "vda", "a\0b", "/a\0b"], None))
    assert found == dict.fromkeys(names, (image.stat().st_dev, image.stat().st_ino))


def test_free_bytes(tmp_path: Path) -> None:
    """The free bytes are those of the image's file system, for those who are not root; not known is None."""
    image = create(tmp_path / "image.qcow2")
    free = asyncio.run(IMAGES.free_bytes(str(image), None))
    assert free is not None
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert asyncio.run(IMAGES.free_bytes(str(image), process_of(os.getpid()))) is not None
    assert asyncio.run(IMAGES.free_bytes("/proc/self/status", None)) == 0
    assert asyncio.run(IMAGES.free_bytes(str(tmp_path / "none"), None)) is None
    assert asyncio.run(IMAGES.free_bytes("nbd://host/export", None)) is None


def test_is_device(tmp_path: Path) -> None:
    """Files, folders and what can't be seen are no block devices."""
    for path in (str(create(tmp_path / "image.qcow2")), str(tmp_path), "/dev/null", "/none", "nbd://host"):
        assert not asyncio.run(IMAGES.is_device(path, None))


# Headers -------------------------------------------------------------------------------------------------------------


def parse(head: bytes) -> qcow2.Header | None:
    """The header, or None where the bytes are none."""
    try:
        return qcow2.parse(head)
    except qcow2.NotQcow2:
        return None


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_real_headers(tmp_path: Path, compat: str) -> None:
    """What qemu-img writes is read, in both versions of the format, with names beyond ASCII."""
    image = tmp_path / "top.qcow2"
    create(image, 5 * MIB, "-o", f"compat={compat},cluster_size=4k", backing="bäse ☃.qcow2")
    assert qcow2.parse(image.read_bytes()[:HEADER]) == qcow2.Header(
        virtual_size=5 * MIB, cluster_size=4096, backing="bäse ☃.qcow2", backing_format="qcow2", room=1023
    )
    plain = create(tmp_path / "plain.qcow2", MIB, "-o", f"compat={compat}")
    assert qcow2.parse(plain.read_bytes()[:HEADER]) == qcow2.Header(
        virtual_size=MIB, cluster_size=65536, backing=None, backing_format=None, room=1023
    )


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes(junk: bytes) -> None:
    """Whatever the bytes, they are a header or told to be none, with nothing else raised."""
    for head in (junk, qcow2.MAGIC + junk, qcow2.MAGIC + struct.pack(">I", 3) + junk):
        parse(head)


@settings(max_examples=400, deadline=None)
@given(
    version=st.sampled_from([2, 3]) | st.integers(0, 2**32 - 1),
    name_at=st.integers(0, 700) | st.integers(0, 2**64 - 1),
    name_length=st.integers(0, 1100) | st.integers(0, 2**32 - 1),
    cluster_bits=st.integers(0, 40) | st.integers(0, 2**32 - 1),
    size=st.integers(0, 2**64 - 1),
    header_length=st.integers(0, 600) | st.integers(0, 2**32 - 1),
    kind=st.sampled_from([0, qcow2.BACKING_FORMAT]) | st.integers(0, 2**32 - 1),
    length=st.integers(0, 64) | st.integers(0, 2**32 - 1),
    rest=st.binary(max_size=512),
)
def test_hostile_fields(
    *,
    version: int,
    name_at: int,
    name_length: int,
    cluster_bits: int,
    size: int,
    header_length: int,
    kind: int,
    length: int,
    rest: bytes,
) -> None:
    """A header with any values in its fields is refused or read, and what is read lies within bounds."""
    head = struct.pack(">4sIQIIQ", qcow2.MAGIC, version, name_at, name_length, cluster_bits, size)
    head = head.ljust(100, b"\0") + struct.pack(">III", header_length, kind, length) + rest
    found = parse(head)
    if found is not None:
        assert found.virtual_size == size
        assert found.cluster_size in {1 << bits for bits in range(9, 22)}
        assert found.backing is None or len(found.backing.encode()) == name_length <= qcow2.NAME_MAX
        assert "\0" not in (found.backing or "")
        assert found.backing_format is None or len(found.backing_format) <= len(head)
    for end in range(0, len(head), 37):
        parse(head[:end])


async def read_or_refused(image: Path) -> Code | None:
    """Read a disk; the code of the refusal if there is one."""
    try:
        await IMAGES.offline_disk("web1", "vda", str(image), ())
    except Refused as refused:
        return refused.problem.code
    return None


@settings(max_examples=60, deadline=None)
@example([(14, b"\0")])
@given(st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=8)), max_size=6))
def test_damaged_headers(tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, bytes]]) -> None:
    """An image whose header is damaged anywhere is refused as a disk, or read: never more."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        folder.mkdir()
        create(folder / "base.qcow2")
        create(folder / "template.qcow2", backing="base.qcow2")
    head = bytearray((folder / "template.qcow2").read_bytes())
    for at, junk in damage:
        head[at : at + len(junk)] = junk
    image = folder / "image.qcow2"
    image.write_bytes(head)
    refused = asyncio.run(read_or_refused(image))
    assert refused in (None, Code.DISK_NOT_FOUND)
