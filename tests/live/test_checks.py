"""Every check that a commit passes before QEMU hears of it, in the order in which the contract has them.

Each refusal is asked for twice, as a dry run and in earnest: the answer is the same one, and nothing has changed. Most
requests fail a later check too, which shows that the earlier one comes first.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.conftest import Boot
from tests.support.chains import (
    CLUSTER,
    MIB,
    Chain,
    blockdev,
    build_chain,
    drive,
    explicit_nodes,
    fill,
    small_file_system,
)
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=4)]

NOWHERE = "/no/such/image.qcow2"
BAD_BODY: JSON = {"base": 7}
SHALLOW_BASE: JSON = {"flags": ["shallow"], "base": NOWHERE}
BAD_TOP: JSON = {"top": NOWHERE}


def ask(
    service: Service,
    domain: str,
    body: JSON,
    *,
    disk: str = "vda",
    dry: bool = False,
    client: httpx.Client | None = None,
) -> httpx.Response:
    """Ask for a commit."""
    params = {"dry_run": "true"} if dry else {}
    return (client or service.client).post(f"/domains/{domain}/disks/{disk}/commit", json=body, params=params)


def jobs_of(service: Service, domain: str) -> list[JSON]:
    """The journal's jobs of a domain, newest first."""
    return service.client.get("/jobs", params={"domain": domain}).json()["items"]


def problem(answer: httpx.Response, status: int, code: str) -> JSON:
    """The problem document of an answer, checked for what each must have."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document = answer.json()
    assert (document["code"], document["status"]) == (code, status), answer.text
    assert document["type"] == f"urn:blockjobd:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert document["instance"] == answer.request.url.raw_path.decode().partition("?")[0]
    return document


def refused(
    service: Service,
    domain: str,
    body: JSON,
    status: int,
    code: str,
    *,
    disk: str = "vda",
    client: httpx.Client | None = None,
) -> JSON:
    """A commit that has to be refused, as a dry run and in earnest, and leaves no job; the problem."""
    before = [job["id"] for job in jobs_of(service, domain)]
    dry = problem(ask(service, domain, body, disk=disk, dry=True, client=client), status, code)
    real = problem(ask(service, domain, body, disk=disk, client=client), status, code)
    # What is free changes by itself.
    assert dry | {"free": 0, "detail": ""} == real | {"free": 0, "detail": ""}
    assert [job["id"] for job in jobs_of(service, domain)] == before
    return real


def pointers(document: JSON) -> list[str]:
    """What a problem says is wrong in a body."""
    return [error["pointer"] for error in document["errors"]]


# Tokens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic YTpi", "Bearer"])
def test_no_token(service: Service, authorization: str | None) -> None:
    """Without a token that is known nothing else is looked at: not the body, not the domain."""
    headers = {"Authorization": authorization} if authorization else {}
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(service.socket)), base_url="http://x", headers=headers
    ) as client:
        for dry in (True, False):
            answer = ask(service, "nobody", BAD_BODY, disk="vdx", dry=dry, client=client)
            problem(answer, 401, "unauthenticated")
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_reader_may_not_commit(service: Service) -> None:
    """A token with the role `read` is refused before the body and the domain are looked at, also for a dry run."""
    with service.as_role("read") as reader:
        refused(service, "nobody", BAD_BODY, 403, "operation-denied", client=reader)


def test_an_operator_may_commit(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """The role `operate` is enough, and the job says whose token it was."""
    boot(blockdev(chain))
    with service.as_role("operate") as operator:
        answer = ask(service, domain, {"top": "vda[1]"}, client=operator)
        assert answer.status_code == 202
        assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
        assert answer.json()["requested_by"].startswith("operate-")
        service.wait_for_job(answer.json()["id"], "completed")


# The body ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"base": 7}, ["/base"], id="base-number"),
        pytest.param({"top": ["vda[1]"]}, ["/top"], id="top-list"),
        pytest.param({"bandwidth": "fast"}, ["/bandwidth"], id="bandwidth-text"),
        pytest.param({"bandwidth": 1.5}, ["/bandwidth"], id="bandwidth-fraction"),
        pytest.param({"bandwidth": True}, ["/bandwidth"], id="bandwidth-boolean"),
        pytest.param({"bandwidth": -1}, ["/bandwidth"], id="bandwidth-negative"),
        pytest.param({"bandwidth": 8796093022208}, ["/bandwidth"], id="bandwidth-over-as-mib"),
        pytest.param({"bandwidth": 2**63, "flags": 16}, ["/bandwidth"], id="bandwidth-over-as-bytes"),
        pytest.param({"flags": ["active", "fast"]}, ["/flags/1"], id="flag-unknown"),
        pytest.param({"flags": 32}, ["/flags"], id="flag-bit-unknown"),
        pytest.param({"flags": -1}, ["/flags"], id="flags-negative"),
        pytest.param({"flags": "active"}, ["/flags"], id="flags-text"),
        pytest.param({"flags": None}, ["/flags"], id="flags-null"),
        pytest.param({"on_ready": "later"}, ["/on_ready"], id="on-ready"),
        pytest.param({"on_error": "ignore"}, ["/on_error"], id="on-error"),
        pytest.param({"backing_file": ""}, ["/backing_file"], id="backing-file-empty"),
        pytest.param({"backing_file": "x" * 1024}, ["/backing_file"], id="backing-file-long"),
        pytest.param({"fast": True}, ["/fast"], id="unknown-field"),
        pytest.param({"a/b~c": 1}, ["/a~1b~0c"], id="unknown-field-escaped"),
        pytest.param({"base": 7, "bandwidth": -1, "x": 0}, ["/bandwidth", "/base", "/x"], id="several"),
    ],
)
def test_invalid_bodies(service: Service, *, body: JSON, expected: list[str]) -> None:
    """Each wrong field is named by a JSON Pointer, before shallow-with-base and before the domain is looked up."""
    document = refused(service, "nobody", SHALLOW_BASE | body, 422, "invalid-request")
    assert sorted(pointers(document)) == expected
    assert document["libvirt"] == "VIR_ERR_INVALID_ARG"


@pytest.mark.parametrize("text", ["[]", "7", '"x"', "{", ""])
def test_bodies_that_are_no_object(service: Service, *, text: str) -> None:
    """A body that is no JSON object is refused; none at all stands for the defaults."""
    answer = service.client.post(
        "/domains/nobody/disks/vda/commit", content=text, headers={"Content-Type": "application/json"}
    )
    if text:
        problem(answer, 422, "invalid-request")
    else:
        problem(answer, 404, "domain-not-found")


def test_a_misspelt_dry_run_is_none(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A query parameter that is not known is refused, so that a misspelt dry run changes nothing."""
    boot(blockdev(chain))
    for params in ({"dryrun": "true"}, {"dry_run": "perhaps"}):
        answer = service.client.post(f"/domains/{domain}/disks/vda/commit", json={"top": "vda[1]"}, params=params)
        problem(answer, 422, "invalid-request")
    assert jobs_of(service, domain) == []


def test_shallow_with_base(service: Service) -> None:
    """`shallow` and `base` together are refused before the domain is looked up; `""` is no base."""
    refused(service, "nobody", SHALLOW_BASE, 422, "shallow-with-base")
    refused(service, "nobody", SHALLOW_BASE | {"base": ""}, 404, "domain-not-found")


# The domain ----------------------------------------------------------------------------------------------------------


def test_unknown_domain(service: Service) -> None:
    """A domain that nobody knows has no disks to look for."""
    assert refused(service, "nobody", BAD_TOP, 404, "domain-not-found", disk="vdx")["libvirt"] == "VIR_ERR_NO_DOMAIN"


LIBVIRTS = {
    "master-key": ["-object", "secret,id=masterKey0,data=none"],
    "monitor": ["-chardev", "null,id=charmonitor"],
    "nodes": ["-blockdev", "driver=null-co,node-name=libvirt-1-storage,read-zeroes=on"],
}


@pytest.mark.parametrize("sign", LIBVIRTS)
def test_libvirts_domain(service: Service, boot: Boot, domain: str, chain: Chain, *, sign: str) -> None:
    """A domain of libvirt's is shown and not changed, whatever is asked of it, unless its registration allows that."""
    qemu = boot([*blockdev(chain), *LIBVIRTS[sign]])
    assert service.wait_for_domain(domain)["managed_by"] == "libvirt"
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == chain.files
    refused(service, domain, BAD_TOP, 409, "domain-managed-elsewhere", disk="vdx")
    refused(service, domain, {"top": "vda[1]"}, 409, "domain-managed-elsewhere")

    registration = {"qmp": {"unix": str(qemu.monitor)}, "allow_managed": True}
    assert service.client.put(f"/domains/{domain}", json=registration).status_code == 200
    service.wait_for_domain(domain)

    refused(service, domain, BAD_TOP, 404, "disk-not-found", disk="vdx")
    job = service.started(domain, top="vda[1]")
    service.wait_for_job(job["id"], "completed")


def stale_socket(path: Path) -> None:
    """A socket's file behind which nobody listens any more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@contextmanager
def registered(service: Service, name: str, body: JSON) -> Generator[None]:
    """A domain that is registered for a while."""
    assert service.client.put(f"/domains/{name}", json=body).status_code == 201
    try:
        yield
    finally:
        assert service.client.delete(f"/domains/{name}").status_code == 204


def test_monitor_unreachable(service: Service, domain: str, folder: Path) -> None:
    """Where nobody listens, or where no socket is, the domain is shown as unreachable, and no disk is looked for."""
    stale_socket(folder / "stale.qmp")
    for path in (folder / "stale.qmp", folder / "none.qmp"):
        with registered(service, domain, {"qmp": {"unix": str(path)}}):
            shown = service.wait_for_domain(domain, "unreachable")
            assert shown["error"]["code"] == "monitor-unreachable"
            document = refused(service, domain, BAD_TOP, 503, "monitor-unreachable", disk="vdx")
            assert str(path) in document["detail"]


def test_stale_socket_is_discovered_as_unreachable(service: Service, domain: str) -> None:
    """A stale socket in the watched folder is a domain that can't be reached."""
    path = service.qmp_dir / f"{domain}.qmp"
    stale_socket(path)
    try:
        service.wait_for_domain(domain, "unreachable")
        refused(service, domain, BAD_TOP, 503, "monitor-unreachable", disk="vdx")
    finally:
        path.unlink()


def test_tcp_monitor_unreachable(service: Service, domain: str) -> None:
    """A port that refuses is unreachable too."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with registered(service, domain, {"qmp": {"tcp": address}}):
            refused(service, domain, BAD_TOP, 503, "monitor-unreachable", disk="vdx")


def test_monitor_ends(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A domain whose QEMU has ended is off."""
    qemu = boot(blockdev(chain))
    qemu.kill()
    service.wait_for_domain(domain, "shutoff")
    refused(service, domain, BAD_TOP, 503, "monitor-unreachable", disk="vdx")


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that gives QEMU half a second."""
    with Service(tmp_path_factory.mktemp("impatient"), {"BLOCKJOBD_QMP_TIMEOUT": "0.5"}) as running:
        yield running


def test_monitor_busy(impatient: Service, domain: str, chain: Chain, folder: Path) -> None:
    """A monitor that another client holds takes no second one; once that one goes, the domain can be worked on."""
    with Qemu(folder / "held.qmp", blockdev(chain)) as qemu:
        with socket.socket(socket.AF_UNIX) as holder:
            holder.connect(str(qemu.monitor))
            assert b"QMP" in holder.recv(4096)
            assert impatient.client.put(f"/domains/{domain}", json={"qmp": {"unix": str(qemu.monitor)}}).is_success
            shown = impatient.wait_for_domain(domain, "busy")
            assert shown["error"]["code"] == "monitor-busy"
            refused(impatient, domain, BAD_TOP, 503, "monitor-busy", disk="vdx")
        impatient.wait_for_domain(domain)
        refused(impatient, domain, BAD_TOP, 404, "disk-not-found", disk="vdx")


def test_a_stopped_qemu_is_not_busy(impatient: Service, domain: str, chain: Chain, folder: Path) -> None:
    """A QEMU that is stopped by a signal sends no greeting either, and is unreachable."""
    with Qemu(folder / "stopped.qmp", blockdev(chain)) as qemu:
        qemu.pause()
        assert impatient.client.put(f"/domains/{domain}", json={"qmp": {"unix": str(qemu.monitor)}}).is_success
        impatient.wait_for_domain(domain, "unreachable")
        refused(impatient, domain, BAD_TOP, 503, "monitor-unreachable", disk="vdx")
        qemu.wake()
        impatient.wait_for_domain(domain)


# What is behind the monitor ------------------------------------------------------------------------------------------


def test_a_storage_daemon(service: Service, domain: str, chain: Chain, folder: Path) -> None:
    """qemu-storage-daemon speaks QMP, and lacks commands that a merge needs."""
    path = folder / "daemon.qmp"
    arguments = ["--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"]
    nodes = [argument.replace("-blockdev", "--blockdev") for argument in explicit_nodes(chain)]
    daemon = subprocess.Popen(["qemu-storage-daemon", *nodes, *arguments])
    try:
        wait_for(path.exists)
        with registered(service, domain, {"qmp": {"unix": str(path)}}):
            service.wait_for_domain(domain)
            document = refused(service, domain, BAD_TOP, 501, "not-supported", disk="vdx")
            assert "query-status" in document["detail"]
    finally:
        daemon.terminate()
        daemon.wait(10)


def test_a_domain_that_is_off(service: Service, domain: str, chain: Chain) -> None:
    """Layers of a domain that is off are shown, and not merged by this version."""
    with registered(service, domain, {"disks": {"vda": {"image": str(chain.active)}}}):
        assert service.wait_for_domain(domain, "shutoff")["disks"] == ["vda"]
        assert [layer["file"] for layer in service.disk(domain)["chain"]] == chain.files
        refused(service, domain, {"top": "vda[1]"}, 501, "not-supported")
        refused(service, domain, BAD_TOP, 501, "not-supported", disk="vdx")


def wait_for(condition: Any, seconds: float = 10) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The disk ------------------------------------------------------------------------------------------------------------


def test_unknown_disk(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A disk that there is not has no layers to look for."""
    boot(blockdev(chain))
    for disk in ("vdb", "n1", "l3.qcow2", "%2Fno%2Fsuch.qcow2"):
        refused(service, domain, BAD_TOP, 404, "disk-not-found", disk=disk)


def two_overlays(folder: Path) -> tuple[Chain, Chain]:
    """Two chains over the same base image."""
    one = build_chain(folder, 2)
    two = build_chain(folder / "two", 2, prefix="m")
    overlay = folder / "other.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "l0.qcow2", "-F", "qcow2", str(overlay)]
    subprocess.run(create, check=True)
    two.images, two.views = [one.images[0], overlay], [one.views[0], one.views[0]]
    return one, two


def test_ambiguous_disk(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """The path of an image that two disks share names neither; that of one of their own does."""
    one, two = two_overlays(folder)
    boot([*drive(one, "a"), *drive(two, "b")])
    shared = str(one.images[0]).replace("/", "%2F")
    document = refused(service, domain, BAD_TOP, 409, "disk-ambiguous", disk=shared)
    assert "vda" in document["detail"]
    assert "vdb" in document["detail"]
    refused(service, domain, BAD_TOP, 422, "top-not-found", disk=str(two.active).replace("/", "%2F"))


def test_empty_disk(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A CD-ROM drive without a medium has no layers."""
    boot([*drive(chain), "-device", "ide-cd,id=cd0"])
    for disk in ("sda", "cd0"):
        refused(service, domain, BAD_TOP, 409, "disk-empty", disk=disk)


def test_conflict_with_our_job(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """While a job of ours is on the disk, others are refused with its name; other disks are free."""
    one, two = build_chain(folder, 3, prefix="a"), build_chain(folder, 3, prefix="b")
    boot([*blockdev(one, "a", device="virtio0"), *blockdev(two, "b", device="virtio1")])
    job = service.started(domain, flags=["active"])
    for _ in range(2):
        assert refused(service, domain, BAD_TOP, 409, "job-conflict")["job"] == job["id"]
        service.wait_for_job(job["id"], "ready")
    other = service.started(domain, "vdb", top="vdb[1]")
    service.wait_for_job(other["id"], "completed")
    assert service.client.delete(f"/jobs/{job['id']}").status_code == 202
    service.wait_for_job(job["id"], "canceled")
    refused(service, domain, BAD_TOP, 422, "top-not-found")


@pytest.mark.parametrize("opened", ["drive", "blockdev"])
@pytest.mark.parametrize("command", ["block-commit", "block-stream", "drive-mirror"])
def test_conflict_with_anothers_job(
    service: Service, boot: Boot, domain: str, folder: Path, *, command: str, opened: str
) -> None:
    """A block job that another client of QEMU started on the disk is one to wait for too."""
    one, two = build_chain(folder, 3, prefix="a"), build_chain(folder, 3, prefix="b")
    if opened == "drive":
        qemu, device = boot([*drive(one, "a"), *drive(two, "b")]), "a"
    else:
        arguments = [*blockdev(one, "a", device="virtio0"), *blockdev(two, "b", device="virtio1")]
        qemu, device = boot(arguments), "a2"
    foreign: dict[str, Any] = {"job_id": "foreign", "device": device, "speed": 1}
    if command == "drive-mirror":
        foreign |= {"target": str(folder / "copy.qcow2"), "sync": "full", "format": "qcow2"}
    qemu.qmp(command, **foreign)
    assert refused(service, domain, BAD_TOP, 409, "job-conflict")["job"] == "foreign"
    assert service.disk(domain)["job"] == "foreign"
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == one.files
    other = service.started(domain, "vdb", top="vdb[1]")
    service.wait_for_job(other["id"], "completed")
    qemu.qmp("block-job-cancel", device="foreign", force=True)
    wait_for(lambda: qemu.qmp("query-jobs") == [])
    refused(service, domain, BAD_TOP, 422, "top-not-found")


# The layers ----------------------------------------------------------------------------------------------------------

LAYERS: Sequence[tuple[str, JSON, int, str]] = [
    ("top-before-base", {"top": NOWHERE, "base": NOWHERE}, 422, "top-not-found"),
    ("top-index", {"top": "vda[4]"}, 422, "top-not-found"),
    ("top-of-another-disk", {"top": "vdb[1]"}, 422, "top-not-found"),
    ("base-unknown", {"top": "vda[1]", "base": NOWHERE}, 422, "base-not-found"),
    ("base-before-active", {"base": NOWHERE}, 422, "base-not-found"),
    ("base-before-no-backing", {"top": "vda[3]", "base": NOWHERE}, 422, "base-not-found"),
    ("base-is-top", {"base": "vda[0]"}, 422, "base-not-below-top"),
    ("base-above-top", {"top": "vda[2]", "base": "vda[1]", "flags": ["active"]}, 422, "base-not-below-top"),
    ("base-above-lowest", {"top": "vda[3]", "base": "vda[1]"}, 422, "base-not-below-top"),
    ("lowest", {"top": "vda[3]"}, 422, "no-backing"),
    ("lowest-shallow", {"top": "vda[3]", "flags": ["shallow", "active"]}, 422, "no-backing"),
    ("active-unsaid", {}, 422, "active-flag-required"),
    ("active-unsaid-by-name", {"top": "vda[0]", "base": "vda[1]"}, 422, "active-flag-required"),
    ("active-unsaid-pivot", {"on_ready": "pivot"}, 422, "active-flag-required"),
    ("active-unsaid-keep", {"on_ready": "keep", "flags": ["delete"]}, 422, "active-flag-required"),
    ("active-said", {"top": "vda[1]", "flags": ["active"]}, 422, "top-not-active"),
    ("active-said-keep", {"top": "vda[1]", "flags": 6, "on_ready": "keep"}, 422, "top-not-active"),
    ("pivot-below", {"top": "vda[1]", "on_ready": "pivot"}, 422, "top-not-active"),
    ("keep-below", {"top": "vda[1]", "on_ready": "keep", "flags": ["delete"]}, 422, "top-not-active"),
    ("delete-and-keep", {"flags": ["active", "delete", "relative"], "on_ready": "keep"}, 422, "delete-with-keep"),
    ("backing-file-for-none", {"flags": ["active"], "backing_file": "x"}, 422, "invalid-request"),
]


@pytest.fixture(scope="module")
def absolute_domain(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A domain with absolute headers, for questions that change nothing."""
    folder = tmp_path_factory.mktemp("absolute")
    with Qemu(folder / "a.qmp", blockdev(build_chain(folder, 4, absolute=True))) as qemu:
        with registered(service, "absolute", {"qmp": {"unix": str(qemu.monitor)}}):
            service.wait_for_domain("absolute")
            yield "absolute"
        assert qemu.qmp("query-jobs") == []


@pytest.mark.parametrize(("body", "status", "code"), [pytest.param(*row[1:], id=row[0]) for row in LAYERS])
def test_layers(service: Service, absolute_domain: str, *, body: JSON, status: int, code: str) -> None:
    """Each request that means no layers, or not these, is refused with the first reason in the contract's order."""
    refused(service, absolute_domain, body, status, code)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"top": "", "base": ""}, "active-flag-required"),
        ({"top": "", "base": "", "flags": ["shallow"]}, "active-flag-required"),
        ({"top": "vda[3]", "base": ""}, "no-backing"),
    ],
)
def test_empty_names_are_null(service: Service, absolute_domain: str, *, body: JSON, code: str) -> None:
    """`""` as `base` or `top` counts as null."""
    refused(service, absolute_domain, body, 422, code)


@pytest.mark.parametrize(
    ("absolute", "top", "base", "possible"),
    [
        # Layers from the overlay (3) to the base: which of their headers is absolute, and whether it is in the way.
        pytest.param(3, 2, 0, False, id="overlay"),
        pytest.param(2, 2, 0, False, id="top"),
        pytest.param(1, 2, 0, False, id="between"),
        pytest.param(1, 2, 1, True, id="base"),
        pytest.param(3, 1, 0, True, id="above-the-overlay"),
    ],
)
def test_relative_impossible(
    service: Service, boot: Boot, domain: str, chain: Chain, *, absolute: int, top: int, base: int, possible: bool
) -> None:
    """`relative` needs relative headers from the layer above `top` down to the one above `base`, and no others."""
    below = chain.images[absolute - 1]
    rebase = ["qemu-img", "rebase", "-q", "-u", "-F", "qcow2", "-b", str(below), str(chain.images[absolute])]
    subprocess.run(rebase, check=True)
    boot(drive(chain))
    body: JSON = {"top": str(chain.images[top]), "base": str(chain.images[base]), "flags": ["relative"]}
    if possible:
        assert ask(service, domain, body, dry=True).json()["backing_file"] == chain.images[base].name
        service.wait_for_job(service.started(domain, **body)["id"], "completed")
    else:
        document = refused(service, domain, body, 422, "relative-impossible")
        assert document["libvirt"] == "VIR_ERR_OPERATION_INVALID"
        assert str(chain.images[absolute]) in document["detail"]


def test_relative_has_no_effect_on_an_active_commit(service: Service, absolute_domain: str) -> None:
    """A merge of the active layer writes no header, so `relative` is no obstacle to it."""
    answer = ask(service, absolute_domain, {"flags": ["active", "relative"]}, dry=True)
    assert (answer.status_code, answer.json()["backing_file"]) == (200, None)


# The images ----------------------------------------------------------------------------------------------------------


def test_temporary_overlay(service: Service, boot: Boot, domain: str, chain: Chain, folder: Path) -> None:
    """Under -snapshot no layer is merged, whatever else is in the way; what the request has wrong comes first."""
    boot([*drive(chain), "-snapshot"])
    shared = {"disks": {"vda": {"image": str(build_sibling(chain, folder))}}}
    with registered(service, f"{domain}-off", shared):
        for body in ({"flags": ["active"]}, {"top": "vda[1]"}, {"top": "vda[2]", "base": "vda[3]"}):
            refused(service, domain, body, 409, "temporary-overlay")
        refused(service, domain, {"flags": 6, "on_ready": "keep"}, 422, "delete-with-keep")
        refused(service, domain, {"top": "vda[1]", "flags": ["relative"]}, 422, "relative-impossible")


def build_sibling(chain: Chain, folder: Path, number: int = 0) -> Path:
    """Another overlay over a layer of the chain."""
    overlay = folder / f"sibling{number}.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(chain.images[number]), "-F", "qcow2"]
    subprocess.run([*create, str(overlay)], check=True)
    return overlay


def test_shared_with_another_disk(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A base under two disks of one QEMU takes no data of either."""
    one, two = two_overlays(folder)
    boot([*drive(one, "a"), *drive(two, "b")])
    document = refused(service, domain, {"flags": ["active"]}, 409, "image-shared")
    assert document["used_by"] == f"{domain}/vdb"
    assert document["file"] == str(one.images[0])
    refused(service, domain, {"flags": ["active"]}, 409, "image-shared", disk="vdb")


@pytest.mark.parametrize("other", ["running", "shutoff"])
def test_shared_with_another_domain(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, other: str
) -> None:
    """A base under another domain, running or off, takes no data; a layer above the shared one does."""
    boot(blockdev(chain))
    sibling = build_sibling(chain, folder, 1)
    name = f"{domain}-other"
    shared: JSON = {"flags": ["active"], "base": str(chain.images[1])}
    free: JSON = {"flags": ["active"], "base": str(chain.images[2])}
    if other == "running":
        boot(["-drive", f"file={sibling},format=qcow2,if=virtio"], name=name)
        # Both QEMUs hold the base, so it is locked by another process as well.
        assert refused(service, domain, shared, 409, "image-shared")["used_by"] == f"{name}/vda"
        refused(service, domain, {"top": "vda[1]"}, 409, "image-shared")
        assert ask(service, domain, free, dry=True).status_code == 200
    else:
        with registered(service, name, {"disks": {"vda": {"image": str(sibling)}}}):
            assert refused(service, domain, shared, 409, "image-shared")["used_by"] == f"{name}/vda"
            assert ask(service, domain, free, dry=True).status_code == 200
        assert ask(service, domain, shared, dry=True).status_code == 200


def test_shared_since_with_a_domain_that_is_off(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path
) -> None:
    """The images of a domain that is off are read anew for each merge: nobody tells when one gets another base."""
    boot(blockdev(chain))
    name = f"{domain}-other"
    shared: JSON = {"flags": ["active"], "base": str(chain.images[1])}
    with registered(service, name, {"disks": {"vda": {"image": str(folder / "sibling1.qcow2")}}}):
        assert ask(service, domain, shared, dry=True).status_code == 200
        build_sibling(chain, folder, 1)
        assert refused(service, domain, shared, 409, "image-shared")["used_by"] == f"{name}/vda"


@pytest.mark.parametrize("holder", ["qemu-io", "qemu"])
def test_locked_by_another_process(
    service: Service, boot: Boot, domain: str, chain: Chain, folder: Path, *, holder: str
) -> None:
    """A base that a process has open which the service knows nothing of takes no data; once that has ended it does."""
    boot(blockdev(chain))
    if holder == "qemu":
        sibling = build_sibling(chain, folder, 1)
        with Qemu(folder / "unknown.sock", ["-drive", f"file={sibling},format=qcow2,if=virtio"]):
            document = refused(service, domain, {"top": "vda[1]", "base": "vda[2]"}, 409, "image-locked")
    else:
        command = ["qemu-io", "-r", "-f", "qcow2", str(chain.images[1])]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Its prompt comes once it has the image open.
            assert process.stdout.read(8) == b"qemu-io>"
            document = refused(service, domain, {"top": "vda[1]", "base": "vda[2]"}, 409, "image-locked")
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(10)
    assert document["file"] == str(chain.images[1])
    job = service.started(domain, top="vda[1]", base="vda[2]")
    service.wait_for_job(job["id"], "completed")


def test_insufficient_storage(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """A base whose file system can't take its growth is left alone; `needed` and `free` say what is missing."""
    with small_file_system(folder, 24 * MIB) as place:
        # 2 MiB of the base are there, and up to 8 more may come.
        chain = build_chain(place, 3, size=8 * MIB, data=96 * CLUSTER)
        filler = fill(place, leave=MIB)
        qemu = boot(blockdev(chain))
        body: JSON = {"top": "vda[1]"}
        document = refused(service, domain, body, 507, "insufficient-storage")
        stat = os.statvfs(place)
        assert document["free"] == stat.f_bavail * stat.f_frsize
        assert document["needed"] > document["free"]
        with subprocess.Popen(["qemu-io", "-r", str(chain.images[0])], stdin=-1, stdout=-1) as process:
            assert process.stdout is not None
            assert process.stdout.read(8) == b"qemu-io>"
            refused(service, domain, body, 409, "image-locked")
            process.communicate(b"quit\n")
        filler.unlink()
        plan = ask(service, domain, body, dry=True).json()
        assert plan["base_growth_max"] == document["needed"]
        before = chain.images[0].stat().st_blocks * 512
        job = service.started(domain, **body)
        service.wait_for_job(job["id"], "completed")
        assert chain.images[0].stat().st_blocks * 512 - before <= document["needed"]
        qemu.quit()


def read_only_base(chain: Chain) -> list[str]:
    """The chain with a base whose file node is read-only for good: QEMU can't open it for the merge.

    A base with a bitmap is not tried beforehand, as that would write to it.
    """
    subprocess.run(["qemu-img", "bitmap", "--add", chain.images[0], "daily"], check=True)
    return [
        text.replace('"auto-read-only": true', '"read-only": true', int('"node-name": "fn0"' in text))
        for text in blockdev(chain)
    ]


def test_qemus_refusal(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """What QEMU refuses is told in its own words; the job is named, and has `failed` in the journal with them."""
    qemu = boot(read_only_base(chain))
    before = state_of(qemu, chain)
    body: JSON = {"top": "vda[1]"}
    assert ask(service, domain, body, dry=True).status_code == 200
    assert jobs_of(service, domain) == []

    answer = ask(service, domain, body)

    document = problem(answer, 409, "image-read-only")
    assert document["qmp"] == {"class": "GenericError", "desc": "Block node is read-only"}
    assert document["libvirt"] == "VIR_ERR_OPERATION_INVALID"
    (job,) = jobs_of(service, domain)
    assert (job["id"], job["state"], job["data_state"]) == (document["job"], "failed", "untouched")
    assert job["error"]["code"] == "image-read-only"
    assert job["error"]["qmp"] == document["qmp"]
    assert job["error"]["instance"] == f"/jobs/{job['id']}"
    assert (job["started_at"], job["actions"]) == (None, [])
    assert [event["type"] for event in service.history(job["id"])] == ["job.queued", "job.failed"]
    disk = service.disk(domain)
    assert all(layer["valid"] for layer in disk["chain"])
    assert disk["job"] is None
    assert state_of(qemu, chain) == before
    # The refused job is in nobody's way.
    other = service.started(domain, top="vda[1]", base="vda[2]")
    service.wait_for_job(other["id"], "completed")


def test_space_comes_before_qemus_refusal(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """Where both are wrong, the file system's lack of space is told, and QEMU is not asked."""
    with small_file_system(folder, 24 * MIB) as place:
        chain = build_chain(place, 3, size=8 * MIB, data=96 * CLUSTER)
        fill(place, leave=MIB)
        qemu = boot(read_only_base(chain))
        refused(service, domain, {"top": "vda[1]"}, 507, "insufficient-storage")
        qemu.quit()


# Dry runs ------------------------------------------------------------------------------------------------------------


def state_of(qemu: Qemu, chain: Chain) -> Any:
    """Everything that a dry run must not touch: QEMU's graph and jobs, and the images."""
    nodes = qemu.qmp("query-named-block-nodes", flat=True)
    graph = qemu.qmp("x-debug-query-block-graph")
    files = [(image.stat().st_mtime_ns, image.read_bytes()) for image in chain.images]
    return nodes, graph, qemu.qmp("query-jobs"), files


@pytest.mark.parametrize(
    "body",
    [
        {"flags": ["active", "delete"], "on_ready": "pivot"},
        {"flags": ["active"], "on_ready": "keep"},
        {"top": "vda[1]", "flags": ["delete", "relative"], "bandwidth": 5},
        {"top": "vda[2]", "flags": ["shallow"], "backing_file": "./l0.qcow2", "on_error": "enospc"},
    ],
)
def test_a_dry_run_changes_nothing(service: Service, boot: Boot, domain: str, chain: Chain, *, body: JSON) -> None:
    """A dry run leaves QEMU's nodes and jobs, the images and the journal as they are, and is the same each time."""
    qemu = boot(blockdev(chain))
    before, disk = state_of(qemu, chain), service.disk(domain)
    answers = [ask(service, domain, body, dry=True) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() | {"free": 0} == answers[1].json() | {"free": 0}
    assert state_of(qemu, chain) == before
    assert service.disk(domain) == disk
    assert jobs_of(service, domain) == []
    names = [event["event"] for event in qemu.events]
    assert not [name for name in names if name.startswith(("BLOCK_JOB", "JOB_"))]
