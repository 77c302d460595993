"""Requests that are repeated: one key, one job, one answer; and requests for a chain that has changed meanwhile."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.live.conftest import Boot
from tests.support.chains import CLUSTER, MIB, Chain, blockdev
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=2 * MIB, data=16 * CLUSTER)]

KEYS = itertools.count(1)
BODY: JSON = {"top": "vda[1]"}
AT_ONCE = 50


@pytest.fixture
def qemu(boot: Boot, chain: Chain) -> Qemu:
    """The QEMU of the test's `domain` with `chain`."""
    return boot(blockdev(chain))


@pytest.fixture
def key() -> str:
    """A key that no other test uses."""
    return f"key-{next(KEYS)}"


def ask(
    service: Service, domain: str, key: str | None, body: JSON = BODY, *, match: str | None = None, **query: str
) -> httpx.Response:
    headers = {"Idempotency-Key": key, "If-Match": match}
    return service.client.post(
        f"/domains/{domain}/disks/vda/commit",
        json=body,
        params=query,
        headers={name: value for name, value in headers.items() if value is not None},
    )


def jobs_of(service: Service, domain: str) -> list[JSON]:
    return service.client.get("/jobs", params={"domain": domain}).json()["items"]


def refused(answer: httpx.Response, status: int, code: str) -> JSON:
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()


def same(first: httpx.Response, again: httpx.Response) -> None:
    """The second is the first answer, marked as a repetition."""
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for name in ("content-type", "location", "etag"):
        assert again.headers.get(name) == first.headers.get(name)
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.usefixtures("qemu")
def test_a_repeated_request_gets_the_first_answer(service: Service, domain: str, key: str) -> None:
    """Also after the job's end, when the same request could not be served."""
    first = ask(service, domain, key)
    assert first.status_code == 202
    same(first, ask(service, domain, key))
    service.wait_for_job(first.json()["id"])
    same(first, ask(service, domain, key))
    assert len(jobs_of(service, domain)) == 1


@pytest.mark.usefixtures("qemu")
def test_one_key_many_times_at_once(service: Service, domain: str, key: str) -> None:
    """All who are told to come again come to the same answer."""
    gate = threading.Barrier(AT_ONCE)

    def one() -> tuple[httpx.Response, int]:
        gate.wait()
        for turned_away in itertools.count():
            answer = ask(service, domain, key)
            if answer.status_code != 409:
                return answer, turned_away
            refused(answer, 409, "idempotency-in-progress")
            assert int(answer.headers["retry-after"]) >= 1
            time.sleep(0.02)
        raise AssertionError

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = [future.result() for future in [pool.submit(one) for _ in range(AT_ONCE)]]
    assert {(answer.status_code, answer.content) for answer, _ in answers} == {(202, answers[0][0].content)}
    assert sum("idempotency-replayed" not in answer.headers for answer, _ in answers) == 1
    assert [job["id"] for job in jobs_of(service, domain)] == [answers[0][0].json()["id"]]


@pytest.mark.usefixtures("qemu")
def test_a_key_belongs_to_one_request(service: Service, domain: str, key: str) -> None:
    """Another body or another If-Match is another request; another client has keys of its own."""
    first = ask(service, domain, key)
    assert first.status_code == 202
    for answer in (ask(service, domain, key, {"top": "vda[1]", "bandwidth": 7}), ask(service, domain, key, match="*")):
        assert refused(answer, 422, "idempotency-key-reused")["job"] == first.json()["id"]
    service.wait_for_job(first.json()["id"])
    with service.as_role("operate") as other:
        answer = other.post(f"/domains/{domain}/disks/vda/commit", json=BODY, headers={"Idempotency-Key": key})
        refused(answer, 422, "no-backing")
    with service.as_role("read") as reader:
        answer = reader.post(f"/domains/{domain}/disks/vda/commit", json=BODY, headers={"Idempotency-Key": key})
        refused(answer, 403, "operation-denied")


@pytest.mark.usefixtures("qemu")
def test_a_request_that_made_no_job_is_served_anew(service: Service, domain: str, key: str) -> None:
    """Neither a refusal nor a dry run uses up the key."""
    refused(ask(service, domain, key, {"top": "vda[9]"}), 422, "top-not-found")
    assert ask(service, domain, key, dry_run="true").status_code == 200
    slow = {"flags": ["active", "bandwidth_bytes"], "bandwidth": CLUSTER}
    other = ask(service, domain, None, slow).json()
    refused(ask(service, domain, key), 409, "job-conflict")
    service.client.delete(f"/jobs/{other['id']}", params={"force": "true"})
    service.wait_for_job(other["id"])
    answer = ask(service, domain, key)
    assert answer.status_code == 202
    assert "idempotency-replayed" not in answer.headers


def test_qemus_refusal_leaves_the_key_free(service: Service, boot: Boot, domain: str, chain: Chain, key: str) -> None:
    """There is a failed job, and the same request makes another one; what QEMU has taken is the answer from then on."""
    subprocess.run(["qemu-img", "bitmap", "--add", chain.images[0], "daily"], check=True)
    # A base whose file is read-only for good can't be opened for the merge.
    qemu = boot(
        [text.replace('"auto-read-only": true', '"read-only": true', int('"fn0"' in text)) for text in blockdev(chain)]
    )
    body: JSON = {"top": "vda[1]"}
    first = ask(service, domain, key, body)
    (job,) = jobs_of(service, domain)
    assert refused(first, 409, "image-read-only")["job"] == job["id"]
    again = ask(service, domain, key, body)
    assert refused(again, 409, "image-read-only")["job"] != job["id"]
    assert "idempotency-replayed" not in again.headers
    file = {"driver": "file", "node-name": "fn0", "filename": str(chain.images[0]), "read-only": False}
    qemu.qmp("blockdev-reopen", options=[file])
    taken = ask(service, domain, key, body)
    assert taken.status_code == 202, taken.text
    same(taken, ask(service, domain, key, body))
    assert len(jobs_of(service, domain)) == 3


@pytest.mark.parametrize("key", ["", "k" * 256, "a b", "\u00e9"])
@pytest.mark.usefixtures("qemu")
def test_a_key_that_is_none(service: Service, domain: str, key: str) -> None:
    """Nothing is started under it."""
    answer = service.client.post(
        f"/domains/{domain}/disks/vda/commit", json=BODY, headers=[(b"Idempotency-Key", key.encode())]
    )
    assert refused(answer, 422, "invalid-request")["errors"][0]["parameter"] == "Idempotency-Key"
    assert jobs_of(service, domain) == []


@pytest.mark.usefixtures("qemu")
def test_a_chain_that_was_meant(service: Service, domain: str, chain: Chain) -> None:
    """If-Match takes the digest, or the disk's ETag; with another chain nothing is started."""
    tag = service.client.get(f"/domains/{domain}/disks/vda").headers["etag"]
    digest = tag.strip('"')
    for wrong in ('"sha256:0"', "sha256:0", f"W/{tag}", '"a", "b"'):
        assert refused(ask(service, domain, None, match=wrong), 412, "chain-changed")["digest"] == digest
        refused(ask(service, domain, None, match=wrong, dry_run="true"), 412, "chain-changed")
    assert (
        refused(ask(service, domain, None, match='"'), 422, "invalid-request")["errors"][0]["parameter"] == "If-Match"
    )
    assert jobs_of(service, domain) == []
    for right in (tag, digest, "*", f'"x", {tag}'):
        assert ask(service, domain, None, match=right, dry_run="true").status_code == 200
    job = ask(service, domain, None, match=digest).json()
    service.wait_for_job(job["id"])
    assert [layer["file"] for layer in service.disk(domain)["chain"]] == [chain.at(0), chain.at(2)]
    refused(ask(service, domain, None, {"flags": ["active"]}, match=digest), 412, "chain-changed")


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Service]:
    """A service that dies at a point that is named."""
    service = Service(tmp_path / "mortal")
    service.client.timeout = httpx.Timeout(10)
    yield service
    if service.process is not None:
        service.stop()
    service.client.close()


@pytest.mark.parametrize(
    "point",
    [
        "before-store-starting",
        "inside-store-queued",
        "after-store-starting",
        "sent-block-commit",
        "after-block-commit",
        "after-store-running",
    ],
)
def test_a_key_outlives_the_service(mortal: Service, chain: Chain, key: str, point: str) -> None:
    """Killed before anybody was answered: the same request again finds the job that it made, or makes the only one."""
    build, fuse = ("tests.support.crashing",), mortal.folder / "point"
    with Qemu(mortal.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
        fuse.write_text("")
        mortal.start(build, {"CRASH_FILE": str(fuse)})
        mortal.wait_for_domain("vm")
        fuse.write_text(point)
        with pytest.raises(httpx.TransportError):
            ask(mortal, "vm", key)
        assert mortal.process is not None
        assert mortal.process.wait(30) == -9
        mortal.start()
        mortal.wait_for_domain("vm")
        answers = [ask(mortal, "vm", key) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202] * 3, answers[0].text
        assert len({answer.content for answer in answers}) == 1
        stored = point.startswith(("after", "sent"))
        assert ("idempotency-replayed" in answers[0].headers) == stored
        refused(ask(mortal, "vm", key, {"top": "vda[1]", "bandwidth": 7}), 422, "idempotency-key-reused")
        job = mortal.wait_for_job(answers[0].json()["id"])
        assert job["state"] == "completed"
        assert [each["id"] for each in jobs_of(mortal, "vm")] == [job["id"]]
        assert qemu.qmp("query-jobs") == []
        mortal.stop()
        mortal.start()
        same_again = ask(mortal, "vm", key)
        assert (same_again.status_code, same_again.content) == (202, answers[0].content)
