"""`verify`: the merged layers and the base are compared, byte by byte, before anything is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, read_image
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4, size=8 * MIB, data=16 * CLUSTER)]


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """A folder with a `qemu-img` that does what `before` says first, where that is asked to compare."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "qemu-img"
    real = shutil.which("qemu-img")
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = compare ] && [ -x {folder}/before ]; then {folder}/before; fi\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    return folder


@pytest.fixture
def service(tmp_path: Path, tool: Path) -> Iterator[Service]:
    settings = {"PATH": f"{tool}:{os.environ['PATH']}"}
    with Service(tmp_path / "service", settings) as running:
        yield running


BODY: JSON = {"top": "vda[1]", "flags": ["delete"], "verify": True}


def test_every_byte_is_the_same(service: Service, chain: Chain) -> None:
    """The result says how many bytes were compared, and the files go then."""
    with Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
        service.wait_for_domain("vm")
        job = service.wait_for_job(service.started("vm", **BODY)["id"])
        assert (job["state"], job["error"]) == ("completed", None)
        assert job["result"]["verified"] == 8 * MIB
        assert job["result"]["deleted"] == [chain.at(1), chain.at(2)]
        plain = service.wait_for_job(service.started("vm", flags=["active"], on_ready="pivot")["id"])
        assert "verified" not in plain["result"]
        qemu.quit()
    assert_same(read_image(chain.images[0]), chain.view)


def test_one_byte_is_another(service: Service, chain: Chain, tool: Path) -> None:
    """The job has failed, says where, and has deleted nothing."""
    before = tool / "before"
    # The last byte of the file is data of the merge.
    last = f"$(($(stat -c %s {chain.images[0]}) - 1))"
    before.write_text(f"#!/bin/sh\nprintf Z | dd of={chain.images[0]} bs=1 seek={last} conv=notrunc status=none\n")
    before.chmod(0o755)
    with Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
        service.wait_for_domain("vm")
        job = service.wait_for_job(service.started("vm", **BODY)["id"])
        assert (job["state"], job["error"]["code"]) == ("failed", "verification-failed"), job
        assert job["error"]["file"] == str(chain.images[0])
        assert job["result"]["deleted"] == []
        assert [left["file"] for left in job["result"]["not_deleted"]] == [chain.at(1), chain.at(2)]
        assert all(image.exists() for image in chain.images)
        assert qemu.qmp("query-jobs") == []


def test_only_below_the_active_layer(service: Service, chain: Chain) -> None:
    """Into the base of the active layer the guest goes on to write."""
    with Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)):
        service.wait_for_domain("vm")
        answer = service.commit("vm", flags=["active"], verify=True)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/verify")
