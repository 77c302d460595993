"""Who else uses an image: other domains, other processes and other requests, whatever names they have for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.live.conftest import Boot
from tests.support.chains import CLUSTER, MIB, Chain, assert_same, blockdev, read_image
from tests.support.service import JSON, Service

pytestmark = [
    pytest.mark.live,
    pytest.mark.chain(layers=4, size=8 * MIB, data=32 * CLUSTER, absolute=True, folder="images"),
]

CRAWL: JSON = {"bandwidth": 4096, "flags": ["bandwidth_bytes", "delete"], "top": "vda[1]"}
WAYS = ["symlink", "hard link", "dots", "bind mount"]


@pytest.fixture
def elsewhere(folder: Path) -> Path:
    place = folder / "elsewhere"
    place.mkdir()
    return place


@contextmanager
def another_name(image: Path, elsewhere: Path, way: str) -> Generator[Path]:
    """Another path that leads to the same file."""
    if way == "bind mount" and os.geteuid() != 0:
        pytest.skip("mounting takes root")
    with ExitStack() as stack:
        if way == "symlink":
            (elsewhere / "link").symlink_to(image.parent)
            yield elsewhere / "link" / image.name
        elif way == "hard link":
            os.link(image, elsewhere / image.name)
            yield elsewhere / image.name
        elif way == "dots":
            yield Path(f"{elsewhere}/../{image.parent.name}/./{image.name}")
        else:
            subprocess.run(["mount", "--bind", str(image.parent), str(elsewhere)], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(elsewhere)], check=True)
            yield elsewhere / image.name


def overlay_on(base: Path, image: Path) -> Path:
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(image)]
    subprocess.run(create, check=True)
    return image


@contextmanager
def off(service: Service, name: str, image: Path) -> Generator[None]:
    """A domain that is off, with the image as its disk."""
    body = {"disks": {"vda": {"image": str(image)}}}
    assert service.client.put(f"/domains/{name}", json=body).status_code == 201
    try:
        yield
    finally:
        assert service.client.delete(f"/domains/{name}").status_code == 204


def refusal(answer: httpx.Response, code: str) -> JSON:
    assert (answer.status_code, answer.json()["code"]) == (409, code), answer.text
    return answer.json()


# The base ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["running", "off"])
@pytest.mark.parametrize("way", WAYS)
def test_a_base_under_another_name(
    service: Service, boot: Boot, domain: str, chain: Chain, elsewhere: Path, *, way: str, other: str
) -> None:
    """A base that another domain knows under another name is shared all the same, for a merge by any of its names."""
    qemu = boot(blockdev(chain))
    name = f"{domain}-other"
    with another_name(chain.images[1], elsewhere, way) as path, ExitStack() as stack:
        sibling = overlay_on(path, chain.images[0].parent.parent / "sibling.qcow2")
        if other == "running":
            boot(["-drive", f"file={sibling},format=qcow2,if=virtio"], name=name)
        else:
            stack.enter_context(off(service, name, sibling))
        for base in (chain.at(2), str(path)):
            answer = service.commit(domain, top="vda[1]", base=base)
            assert refusal(answer, "image-shared")["used_by"] == f"{name}/vda"
        assert qemu.qmp("query-jobs") == []
        # The layer above it is nobody else's.
        job = service.started(domain, flags=["active"], base=chain.at(1), on_ready="pivot")
        assert service.wait_for_job(job["id"])["state"] == "completed"


def holder(kind: str, image: Path, folder: Path) -> list[str]:
    if kind == "qemu-nbd":
        return ["qemu-nbd", "-r", "-f", "qcow2", "-t", "-k", str(folder / "nbd.sock"), str(image)]
    if kind == "qemu-img":
        return ["qemu-img", "convert", "-r", "4096", "-O", "raw", str(image), str(folder / "copy.raw")]
    return ["qemu-io", "-r", "-U", "-f", "qcow2", str(image)]


@pytest.mark.parametrize("kind", ["qemu-nbd", "qemu-img", "force-share"])
def test_another_process_has_the_base_open(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, kind: str
) -> None:
    """What holds QEMU's locks on the base is seen, whatever it is; who asks for none (force-share) can't be known."""
    boot(blockdev(chain))
    base = chain.images[1]
    arguments = holder(kind, base, folder)
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        while not has_open(process.pid, base):
            assert process.poll() is None
        answer = service.commit(domain, top="vda[1]", base="vda[2]")
        if kind == "force-share":
            assert answer.status_code == 202
        else:
            assert refusal(answer, "image-locked")["file"] == str(base)
    finally:
        process.kill()
        process.communicate()
    job = answer.json() if kind == "force-share" else service.started(domain, top="vda[1]", base="vda[2]")
    assert service.wait_for_job(job["id"])["state"] == "completed"


def has_open(pid: int, image: Path) -> bool:
    """Whether the process has the image open and has taken what locks it takes."""
    with suppress(OSError):
        held = [file for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists() and file.samefile(image)]
        # qemu-io shows a prompt, nbd a socket and convert its copy only later, so that its locks tell.
        infos = [Path(f"/proc/{pid}/fdinfo/{file.name}").read_text() for file in held]
        return bool(infos) and (any("201 201" in info for info in infos) or "-U" in command_of(pid))
    return False


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


# Deleting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["hard link", "bind mount", "symlink"])
def test_a_file_that_another_domain_uses_is_not_deleted(
    service: Service, boot: Boot, domain: str, chain: Chain, elsewhere: Path, *, way: str
) -> None:
    """A merged image that another domain has come to use, under whatever name, is left; the job has completed."""
    qemu = boot(blockdev(chain))
    job = service.started(domain, **CRAWL)
    with another_name(chain.images[1], elsewhere, way) as path, off(service, f"{domain}-other", path):
        assert service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
        done = service.wait_for_job(job["id"])
        reason = f"in use by {domain}-other/vda"
        assert (done["state"], done["result"]["deleted"]) == ("completed", [chain.at(1)])
        assert done["result"]["not_deleted"] == [{"file": chain.at(2), "reason": reason}]
        assert chain.images[1].samefile(path)
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)


# Requests ------------------------------------------------------------------------------------------------------------


def test_requests_race_for_a_disk(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """Of requests that come at the same moment, for whatever layers and by whatever name, one gets the disk."""
    qemu = boot(blockdev(chain))
    bodies: list[JSON] = [{"flags": ["active"]}, {"top": "vda[1]"}, {"flags": ["active"], "base": "vda[1]"}]
    names = ["vda", "virtio0", "n3"]

    def ask(number: int) -> httpx.Response:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(service.socket)), headers=service.client.headers, timeout=60
        ) as client:
            url = f"http://blockjobd/domains/{domain}/disks/{names[number % 3]}/commit"
            slow = bodies[number % len(bodies)]
            slow = slow | {"bandwidth": 4096, "flags": [*slow.get("flags", []), "bandwidth_bytes"]}
            return client.post(url, json=slow)

    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(ask, range(9)))
    (won,) = [answer.json() for answer in answers if answer.status_code == 202]
    lost = [answer for answer in answers if answer.status_code != 202]
    assert [refusal(answer, "job-conflict")["job"] for answer in lost] == [won["id"]] * 8
    assert [job["id"] for job in qemu.qmp("query-jobs")] == [won["id"]]
    assert [job["id"] for job in service.client.get("/jobs", params={"domain": domain}).json()["items"]] == [won["id"]]
    assert service.client.delete(f"/jobs/{won['id']}", params={"force": "true"}).status_code == 202
    service.wait_for_job(won["id"], "canceled")
    qemu.quit()
    assert_same(read_image(chain.active), chain.view)
