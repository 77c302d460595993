"""A monitor may lie: a process of another user that answers as QEMU hurts nobody but itself."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.core.evidence import Process
from app.hostfs.credentials import may_unlink_as, rights_of
from app.hostfs.process import start_time
from tests.support.chains import CLUSTER, MIB, Chain, blockdev
from tests.support.qemu import Qemu, as_user
from tests.support.service import JSON, Service

pytestmark = [
    pytest.mark.live,
    pytest.mark.chain(layers=3, size=8 * MIB, data=16 * CLUSTER),
    pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to be another user"),
]

NOBODY = 65534
BELOW: JSON = {"top": "vda[1]", "flags": ["delete"]}


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path / "service") as running:
        yield running


def reachable(path: Path) -> None:
    """Let everybody pass the folders of pytest."""
    for folder in (path, *path.parents):
        if folder.is_relative_to("/tmp/") and folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o755)


@contextmanager
def process_of_nobody() -> Generator[Process]:
    """A process of another user."""
    command = ["sh", "-c", "echo up; exec sleep 60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/"
    ) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "up\n"
            yield Process(pid=started.pid, started=start_time(started.pid), uuid=None)
        finally:
            started.kill()


def may(process: Process, file: Path) -> str | None:
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return may_unlink_as(process, folder, file.stat())
    finally:
        os.close(folder)


def test_what_another_user_may_delete(tmp_path: Path) -> None:
    """Asked of the kernel with that user's rights: the folder's mode, its sticky bit, and its access list."""
    reachable(tmp_path)
    own, other, sticky = (tmp_path / name for name in ("own", "other", "sticky"))
    for folder in (own, other, sticky):
        folder.mkdir(mode=0o755)
        (folder / "image").write_text("data")
    os.chown(own, NOBODY, NOBODY)
    sticky.chmod(0o1777)
    with process_of_nobody() as process:
        rights = rights_of(process)
        assert rights is not None
        assert (rights.user, rights.group, rights.groups, rights.overrides) == (NOBODY, NOBODY, (), False)
        assert may(process, own / "image") is None
        assert "could not delete it" in (may(process, other / "image") or "")
        assert "sticky" in (may(process, sticky / "image") or "")
        os.chown(sticky / "image", NOBODY, NOBODY)
        assert may(process, sticky / "image") is None
    assert "can't be seen" in (may(process, own / "image") or "")
    assert os.geteuid() == 0
    (own / "by-root").write_text("still root")


def test_a_qemu_that_may_not_delete(service: Service, chain: Chain, tmp_path: Path) -> None:
    """The service that runs as root deletes nothing for a QEMU that could not."""
    reachable(tmp_path)
    for image in chain.images:
        os.chown(image, NOBODY, NOBODY)
    with Qemu(service.qmp_dir / "vm.qmp", [*blockdev(chain), *as_user("nobody")]):
        service.wait_for_domain("vm")
        plan = service.client.post("/domains/vm/disks/vda/commit", params={"dry_run": "true"}, json=BELOW).json()
        assert plan["deletes"] == []
        job = service.wait_for_job(service.started("vm", **BELOW)["id"])
        assert (job["state"], job["result"]["deleted"]) == ("completed", [])
        assert "could not delete it" in job["result"]["not_deleted"][0]["reason"]
    assert chain.images[1].exists()


def test_a_folder_whose_mount_has_come_off(tmp_path: Path, chain: Chain) -> None:
    """An image that is not there as its file system is not is not deleted already."""
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
    try:
        moved = mount / chain.images[1].name
        moved.write_bytes(chain.images[1].read_bytes())
        for names in (("-b", chain.images[0], moved), ("-b", moved, chain.images[2])):
            subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", *names], check=True)
        chain.images[1] = moved
        with (
            Service(tmp_path / "service") as service,
            Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)),
        ):
            service.wait_for_domain("vm")
            job = service.started("vm", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes", "delete"])
            subprocess.run(["umount", "-l", mount], check=True)
            service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0})
            ended = service.wait_for_job(job["id"])
            assert (ended["state"], ended["result"]["deleted"]) == ("completed", [])
            assert ended["result"]["not_deleted"][0]["reason"] == "its folder is another one by now"
    finally:
        subprocess.run(["umount", "-l", mount], check=False, capture_output=True)


def test_a_bind_mount_under_the_name_of_a_root(tmp_path: Path, chain: Chain) -> None:
    """What QEMU has mounted for itself under the name of a root is not inside of it."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    (root / "place").mkdir()
    secret.mkdir()
    images = [image.rename(secret / image.name) for image in chain.images]
    shown = Chain([root / "place" / image.name for image in images], chain.views, chain.formats)
    for above, below in zip(images[1:], images, strict=False):
        names = ("-b", below.name, "-F", "qcow2", above)
        subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", *map(str, names)], check=True)
    script = f'mount --bind {secret} {root}/place && exec "$@"'
    within = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    settings = {"BLOCKJOBD_IMAGE_ROOTS": json.dumps([str(root)])}
    with (
        Service(tmp_path / "service", settings) as service,
        Qemu(service.qmp_dir / "vm.qmp", blockdev(shown), within=within),
    ):
        service.wait_for_domain("vm")
        job = service.wait_for_job(service.started("vm", **BELOW)["id"])
        assert (job["state"], job["result"]["deleted"]) == ("completed", [])
        assert job["result"]["not_deleted"]
    assert all(image.exists() for image in images)


def test_a_link_of_another_user_in_the_watched_folder(service: Service, tmp_path: Path, chain: Chain) -> None:
    """It leads root nowhere that its maker could not go."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with Qemu(private / "vm.sock", blockdev(chain)) as qemu:
        link = service.qmp_dir / "evil.qmp"
        link.symlink_to(qemu.monitor)
        os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
        own = service.qmp_dir / "good.qmp"
        own.symlink_to(qemu.monitor)
        service.wait_for_domain("good")
        assert service.client.get("/domains/evil").status_code == 404


def test_an_image_that_is_named_and_not_held(service: Service, tmp_path: Path, chain: Chain) -> None:
    """Who names another machine's base, without having it open, keeps nobody from it."""
    overlay, own = tmp_path / "overlay.qcow2", tmp_path / "own.qcow2"
    for image in (own, overlay):
        under = ["-b", own, "-F", "qcow2"] if image is overlay else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *map(str, under), image, "8M"], check=True)
    with (
        Qemu(service.qmp_dir / "a.qmp", blockdev(chain)),
        Qemu(service.qmp_dir / "b.qmp", ["-drive", f"file={overlay},if=virtio"]),
    ):
        service.wait_for_domain("a")
        service.wait_for_domain("b")
        # The name leads to the base of the other one by now, and the process has another file open.
        own.rename(tmp_path / "moved.qcow2")
        os.link(chain.images[0], own)
        until(lambda: len(service.disk("b")["chain"]) == 2)
        job = service.wait_for_job(service.started("a", flags=["active"], on_ready="pivot")["id"])
        assert job["state"] == "completed", job


def test_a_pipe_in_a_header(service: Service, tmp_path: Path) -> None:
    """A header may name anything: it is looked at before it is opened."""
    pipe, overlay = tmp_path / "pipe", tmp_path / "overlay.qcow2"
    os.mkfifo(pipe)
    names = ("-b", pipe, "-F", "qcow2", overlay, "8M")
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *map(str, names)], check=True)
    answer = service.client.put("/domains/off", json={"disks": {"vda": {"image": str(overlay)}}})
    assert "neither a regular file nor a block device" in answer.json()["error"]["detail"]
