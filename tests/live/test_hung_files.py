"""A file system that never answers hurts nobody but the domain whose images are on it."""

from __future__ import annotations

import ctypes
import os
import stat
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live.conftest import NewChain
from tests.support.chains import CLUSTER, MIB, assert_same, blockdev, read_image
from tests.support.qemu import Qemu
from tests.support.service import Service

pytestmark = [
    pytest.mark.live,
    pytest.mark.chain(layers=3, size=4 * MIB, data=16 * CLUSTER),
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="it takes root and FUSE"),
]

LIBC = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2


@contextmanager
def hung(folder: Path) -> Generator[Path]:
    """A file system whose server never answers; whoever asked is let go with an error at the end."""
    folder.mkdir()
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0"
    try:
        if LIBC.mount(b"silent", bytes(folder), b"fuse", 0, options.encode()) != 0:
            pytest.skip(f"no FUSE here: {os.strerror(ctypes.get_errno())}")
        try:
            yield folder
        finally:
            LIBC.umount2(bytes(folder), MNT_DETACH)
    finally:
        os.close(server)


def test_an_image_of_a_machine_that_is_off(tmp_path: Path, new_chain: NewChain) -> None:
    """It may need any base, so commits elsewhere are refused, soon and with its name; running jobs are watched."""
    chain = new_chain(tmp_path / "a")
    with hung(tmp_path / "silent") as silent, Service(tmp_path / "service") as service:
        with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)) as qemu:
            service.wait_for_domain("a")
            job = service.started("a", top="vda[1]", bandwidth=4096, flags=["bandwidth_bytes"])
            service.client.put("/domains/off", json={"disks": {"vda": {"image": str(silent / "image.qcow2")}}})
            for _ in range(3):
                begun = time.monotonic()
                answer = service.commit("a", flags=["active"])
                assert (answer.status_code, answer.json()["code"]) == (409, "job-conflict")
                assert time.monotonic() - begun < 10
            assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
            assert service.wait_for_job(job["id"], seconds=20)["state"] == "completed"
            refusal = service.commit("a", flags=["active"]).json()
            assert (refusal["code"], refusal["used_by"]) == ("image-shared", "off")
            assert "DELETE /domains/off" in refusal["detail"]
            assert service.client.delete("/domains/off").status_code == 204
            done = service.started("a", flags=["active"], on_ready="pivot")
            assert service.wait_for_job(done["id"])["state"] == "completed"
            qemu.quit()
        begun = time.monotonic()
        service.stop()
        assert time.monotonic() - begun < 8
    assert_same(read_image(chain.images[0]), chain.view)


def test_a_link_in_the_watched_folder(tmp_path: Path, new_chain: NewChain) -> None:
    """The event loop goes on, and what was found before is served."""
    with hung(tmp_path / "silent") as silent, Service(tmp_path / "service") as service:
        with Qemu(service.qmp_dir / "a.qmp", blockdev(new_chain(tmp_path / "a"))):
            service.wait_for_domain("a")
            (service.qmp_dir / "b.qmp").symlink_to(silent / "b.sock")
            time.sleep(1)
            begun = time.monotonic()
            assert service.client.get("/livez").status_code == 200
            done = service.started("a", flags=["active"], on_ready="pivot")
            assert service.wait_for_job(done["id"])["state"] == "completed"
            assert time.monotonic() - begun < 10
        service.stop()


def test_a_layer_that_a_request_names(tmp_path: Path, new_chain: NewChain) -> None:
    """A job of the same domain that gets ready meanwhile is pivoted before that request is answered."""
    chain = new_chain(tmp_path / "a")
    with hung(tmp_path / "silent") as silent, Service(tmp_path / "service") as service:
        with Qemu(service.qmp_dir / "a.qmp", blockdev(chain)), ThreadPoolExecutor() as beside:
            service.wait_for_domain("a")
            job = service.started("a", on_ready="pivot", bandwidth=MIB, flags=["active", "bandwidth_bytes"])
            # It takes as long as a file system has to answer.
            refused = beside.submit(service.commit, "a", top=str(silent / "top.qcow2"))
            assert service.wait_for_job(job["id"], seconds=20)["state"] == "completed"
            assert not refused.done()
            assert refused.result().json()["code"] in {"top-not-found", "no-backing"}
        service.stop()
    assert_same(read_image(chain.images[0]), chain.view)
