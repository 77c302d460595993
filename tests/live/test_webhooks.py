"""Webhooks that are sent: every event of a subscription comes, signed, in order, whatever ends or fails meanwhile."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.core.outgoing import new_secret
from tests.live.conftest import NewChain
from tests.support.chains import CLUSTER, MIB, Chain, blockdev
from tests.support.qemu import Qemu
from tests.support.receiver import FINE, LONG, Receiver
from tests.support.service import JSON, Service, sse

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=2 * MIB, data=16 * CLUSTER)]

SECRET = new_secret(b"r" * 32)
CALLBACK = new_secret(b"c" * 24)
HASTY = ("tests.support.hasty",)
ALLOW = {"BLOCKJOBD_WEBHOOK_ALLOW": "127.0.0.0/8"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service that tries again after 100 ms, and gives up after six attempts."""
    with Service(tmp_path / "service", ALLOW | {"SCHEDULE": "100,100,100,100,100"}, HASTY) as running:
        yield running


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    """A receiver that takes everything."""
    with Receiver(tmp_path / "receiver") as running:
        yield running


def subscribe(service: Service, receiver: Receiver, *types: str, secret: str | None = SECRET) -> JSON:
    answer = service.client.post("/webhooks", json={"url": receiver.url, "types": types, "secret": secret})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/webhooks/{answer.json()['id']}"
    return answer.json()


def webhook(service: Service, id_: str) -> JSON:
    answer = service.client.get(f"/webhooks/{id_}")
    assert answer.status_code == 200, answer.text
    assert SECRET not in answer.text
    return answer.json()


def deliveries(service: Service, id_: str) -> list[JSON]:
    """Newest first."""
    return service.client.get(f"/webhooks/{id_}/deliveries", params={"limit": 1000}).json()["items"]


def wait_until_sent(service: Service, id_: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while webhook(service, id_)["pending"]:
        assert time.monotonic() < deadline, deliveries(service, id_)
        time.sleep(0.02)


def refused(answer: httpx.Response, status: int, code: str) -> JSON:
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    return answer.json()


def merge(service: Service, domain: str, callback: JSON | None = None) -> JSON:
    return service.wait_for_job(service.started(domain, top="vda[1]", callback=callback)["id"])


def in_order(requests: list[JSON]) -> list[str]:
    """The ids of the events that came, each once; asserts that none came before an older one had been taken."""
    ids: list[str] = []
    keys: dict[str, str] = {}
    for request in requests:
        event = request["event"]
        assert keys.setdefault(event["id"], request["headers"]["webhook-id"]) == request["headers"]["webhook-id"]
        if event["id"] not in ids:
            ids.append(event["id"])
        else:
            # Once more, as its answer was lost: nothing newer has come yet.
            assert ids[-1] == event["id"]
    assert len(set(keys.values())) == len(keys)
    assert ids == sorted(ids, key=int)
    return ids


def test_what_a_stream_shows_is_what_is_sent(service: Service, receiver: Receiver, chain: Chain) -> None:
    """The body is the stream's data, byte for byte; the published package takes its signature."""
    made = subscribe(service, receiver)
    with (
        service.client.stream("GET", "/events") as stream,
        Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)),
    ):
        service.wait_for_domain("vm")
        merge(service, "vm")
        lines: list[str] = []
        for line in stream.iter_lines():
            if line.startswith("data: ") and "job.progress" not in line:
                lines.append(line.removeprefix("data: "))
                if "job.completed" in line:
                    break
        wait_until_sent(service, made["id"])
    taken = receiver.taken(SECRET)[: len(lines)]
    assert [request["body"] for request in taken] == lines
    types = [request["event"]["type"] for request in taken]
    assert types == ["domain.added", "domain.connected", "job.queued", "job.started", "job.completed"]
    newest = deliveries(service, made["id"])[-1]
    assert newest["id"] == taken[0]["headers"]["webhook-id"]
    assert (newest["status"], newest["attempts"], newest["type"]) == ("delivered", 1, "domain.added")
    assert newest["answer"] == {"status": 200, "body": LONG[:1024]}
    assert (newest["error"], newest["next_attempt_at"]) == (None, None)


def test_only_what_was_asked_for(service: Service, receiver: Receiver, new_chain: NewChain, tmp_path: Path) -> None:
    """By type; and a callback gets its own job's events, all of them, and no others."""
    made = subscribe(service, receiver, "job.completed", "domain.added")
    callback = {"url": receiver.url.replace("/in", "/callback"), "secret": CALLBACK}
    for name in ("vm1", "vm2"):
        with Qemu(service.qmp_dir / f"{name}.qmp", blockdev(new_chain(tmp_path / name))):
            service.wait_for_domain(name)
            job = merge(service, name, callback=callback if name == "vm1" else None)
            if name == "vm1":
                (of_job,) = service.client.get("/webhooks", params={"job": job["id"]}).json()["items"]
                wait_until_sent(service, of_job["id"])
                assert (of_job["job"], of_job["created_by"]) == (job["id"], "admin")
    wait_until_sent(service, made["id"])
    taken = [(request["event"]["type"], request["event"]["source"]) for request in receiver.taken(SECRET)]
    assert taken == [
        ("domain.added", "/domains/vm1"),
        ("job.completed", "/domains/vm1/disks/vda"),
        ("domain.added", "/domains/vm2"),
        ("job.completed", "/domains/vm2/disks/vda"),
    ]
    called = [request["event"]["type"] for request in receiver.taken(CALLBACK, "/callback")]
    assert called == ["job.queued", "job.started", "job.completed"]
    assert [each["id"] for each in service.client.get("/webhooks").json()["items"]] == [made["id"]]


@pytest.mark.parametrize("mode", ["500", "404", "redirect", "cut", "hang"])
def test_a_failure_is_tried_again(service: Service, receiver: Receiver, mode: str) -> None:
    """Under the same id, until the receiver takes it; what is newer waits."""
    if mode == "hang":
        # Its attempt lasts longer than this test: killed, the receiver hangs up.
        receiver.behave("hang")
    else:
        receiver.behave(mode)
    made = subscribe(service, receiver)
    service.client.put("/domains/a", json={"disks": {}})
    service.client.put("/domains/b", json={"disks": {}})
    if mode == "hang":
        receiver.wait_for(1)
        receiver.kill()
        receiver.start()
    else:
        receiver.wait_for(2)
        waits = deliveries(service, made["id"])[-1]
        assert waits["status"] == "pending"
        assert waits["attempts"] >= 1
        if mode.isdigit():
            assert waits["answer"] == {"status": int(mode), "body": LONG[:1024]}
        if mode == "redirect":
            assert waits["answer"]["status"] == 307
        if mode == "cut":
            assert waits["error"]
    receiver.behave("ok")
    wait_until_sent(service, made["id"])
    requests = receiver.received()
    assert len({request["headers"]["webhook-id"] for request in requests if request["mode"] == mode}) == 1
    assert {request["path"] for request in requests} == {"/in"}
    assert [request["event"]["source"] for request in receiver.taken(SECRET)] == ["/domains/a", "/domains/b"]


def test_a_receiver_that_is_gone_is_not_asked_again(service: Service, receiver: Receiver) -> None:
    """410 disables, with an event; enabled again it gets all that it has missed, in order, under the same ids."""
    receiver.behave("410")
    with sse(service.client, "/events?types=webhook.disabled") as events:
        made = subscribe(service, receiver, "domain.added")
        for name in ("a", "b"):
            service.client.put(f"/domains/{name}", json={"disks": {}})
        event = next(events)["data"]
    assert (event["source"], event["subject"]) == (f"/webhooks/{made['id']}", f"webhooks/{made['id']}")
    assert event["data"]["disabled_because"] == "the receiver answered 410 Gone"
    assert SECRET not in json.dumps(event)
    found = webhook(service, made["id"])
    assert (found["enabled"], found["pending"]) == (False, 2)
    newer, older = deliveries(service, made["id"])
    assert (older["status"], older["attempts"], newer["status"]) == ("failed", 1, "pending")
    redelivery = f"/webhooks/{made['id']}/deliveries/{older['id']}/redeliver"
    assert "enable" in refused(service.client.post(redelivery), 409, "webhook-disabled")["detail"]
    service.stop()
    service.start()
    service.client.put("/domains/c", json={"disks": {}})
    assert len(receiver.received()) == 1
    receiver.behave("ok")
    assert service.client.post(f"/webhooks/{made['id']}/enable").json()["enabled"] is True
    wait_until_sent(service, made["id"])
    taken = receiver.taken(SECRET)
    assert [request["event"]["source"] for request in taken] == ["/domains/a", "/domains/b", "/domains/c"]
    assert [request["headers"]["webhook-id"] for request in taken[:2]] == [older["id"], newer["id"]]


def test_who_fails_all_the_time_is_disabled(service: Service, receiver: Receiver) -> None:
    """After the last attempt of the schedule, which goes on over restarts of the service."""
    receiver.behave("503")
    made = subscribe(service, receiver, "domain.added")
    service.client.put("/domains/a", json={"disks": {}})
    receiver.wait_for(2)
    service.stop()
    service.start()
    deadline = time.monotonic() + 30
    while webhook(service, made["id"])["enabled"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (failed,) = deliveries(service, made["id"])
    assert (failed["status"], failed["attempts"], failed["next_attempt_at"]) == ("failed", 6, None)
    assert webhook(service, made["id"])["disabled_because"] == "6 attempts failed, the last one with: status 503"
    # One more where the service was stopped between an answer and its record.
    assert 6 <= len(receiver.received()) <= 7


def test_once_more(service: Service, receiver: Receiver) -> None:
    """A delivery is made again under its id; one that waits is made at once."""
    made = subscribe(service, receiver, "domain.added")
    service.client.put("/domains/a", json={"disks": {}})
    wait_until_sent(service, made["id"])
    (done,) = deliveries(service, made["id"])
    path = f"/webhooks/{made['id']}/deliveries/{done['id']}/redeliver"
    answer = service.client.post(path)
    assert (answer.status_code, answer.json()["status"]) == (202, "pending")
    wait_until_sent(service, made["id"])
    taken = receiver.taken(SECRET)
    assert [request["headers"]["webhook-id"] for request in taken] == [done["id"]] * 2
    assert taken[0]["body"] == taken[1]["body"]
    refused(service.client.post(path.replace(done["id"], "wd-x")), 404, "delivery-not-found")
    refused(service.client.post(path.replace(made["id"], "wh-x")), 404, "webhook-not-found")


def test_a_secret_is_rotated(service: Service, receiver: Receiver) -> None:
    """For a while either one verifies; only the answers that make a secret show it."""
    made = subscribe(service, receiver, "domain.added", secret=None)
    first = made["secret"]
    rotated = service.client.post(f"/webhooks/{made['id']}/rotate").json()
    assert rotated["secret"] not in (first, None)
    service.client.put("/domains/a", json={"disks": {}})
    wait_until_sent(service, made["id"])
    for secret in (first, rotated["secret"]):
        assert len(receiver.taken(secret)) == 1
    assert receiver.received()[0]["headers"]["webhook-signature"].count("v1,") == 2
    chosen = service.client.post(f"/webhooks/{made['id']}/rotate", json={"secret": SECRET}).json()
    assert chosen["secret"] == SECRET
    shown = service.client.get("/webhooks").text + service.client.get(f"/webhooks/{made['id']}").text + service.log()
    assert not [secret for secret in (first, rotated["secret"], SECRET) if secret in shown]
    refused(service.client.post(f"/webhooks/{made['id']}/rotate", json={"secret": "x"}), 422, "invalid-request")


def test_what_is_deleted_is_sent_nothing(service: Service, receiver: Receiver) -> None:
    """Nor what was still to be sent."""
    receiver.behave("500")
    made = subscribe(service, receiver)
    service.client.put("/domains/a", json={"disks": {}})
    receiver.wait_for(1)
    path = f"/webhooks/{made['id']}"
    assert service.client.delete(path).status_code == 204
    count = len(receiver.received())
    service.client.put("/domains/b", json={"disks": {}})
    for method, url in (("DELETE", path), ("GET", path), ("GET", f"{path}/deliveries"), ("POST", f"{path}/enable")):
        refused(service.client.request(method, url), 404, "webhook-not-found")
    assert service.client.get("/webhooks").json() == {"items": [], "next": None}
    time.sleep(0.3)
    assert len(receiver.received()) <= count + 1


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": "receiver"}, "/url"),
        ({"url": 7}, "/url"),
        ({"url": "http://127.0.0.1", "types": ["job.done"]}, "/types/0"),
        ({"url": "http://127.0.0.1", "types": ["job.progress"]}, "/types/0"),
        ({"url": "http://127.0.0.1", "types": "job.completed"}, "/types"),
        ({"url": "http://127.0.0.1", "secret": "short"}, "/secret"),
        ({"url": "http://127.0.0.1", "sercet": None}, "/sercet"),
    ],
)
def test_wrong_fields_are_pointed_at(service: Service, body: JSON, pointer: str) -> None:
    """Nothing is stored."""
    problem = refused(service.client.post("/webhooks", json=body), 422, "invalid-request")
    assert problem["errors"][0]["pointer"] == pointer
    assert service.client.get("/webhooks").json()["items"] == []


def test_addresses_that_are_refused(service: Service, chain: Chain) -> None:
    """When a webhook is made, and when a job is to have one; there is no job then."""
    for url in (
        "http://169.254.169.254/",
        "http://[::ffff:169.254.169.254]/",
        "http://2852039166/",
        "http://[fe80::1]/",
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://0.0.0.0/",
    ):
        problem = refused(service.client.post("/webhooks", json={"url": url}), 422, "webhook-url-refused")
        assert problem["errors"][0]["pointer"] == "/url"
    with Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)):
        service.wait_for_domain("vm")
        body = {"top": "vda[1]", "callback": {"url": "http://169.254.169.254/"}}
        for dry in ("true", "false"):
            answer = service.client.post(f"/domains/vm/disks/vda/commit?dry_run={dry}", json=body)
            assert refused(answer, 422, "webhook-url-refused")["errors"][0]["pointer"] == "/callback/url"
        assert service.client.get("/jobs").json()["items"] == []


def test_roles(service: Service, receiver: Receiver) -> None:
    """Webhooks are an admin's; who may read sees them, without their secrets."""
    made = subscribe(service, receiver)
    with service.as_role("operate") as operator, service.as_role("read") as reader:
        for method, path in (
            ("POST", "/webhooks"),
            ("DELETE", f"/webhooks/{made['id']}"),
            ("POST", f"/webhooks/{made['id']}/rotate"),
            ("POST", f"/webhooks/{made['id']}/enable"),
            ("POST", f"/webhooks/{made['id']}/deliveries/x/redeliver"),
        ):
            refused(operator.request(method, path), 403, "operation-denied")
        for path in ("/webhooks", f"/webhooks/{made['id']}", f"/webhooks/{made['id']}/deliveries"):
            answer = reader.get(path)
            assert answer.status_code == 200
            assert SECRET not in answer.text


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_missed(tmp_path: Path, new_chain: NewChain, seed: int) -> None:
    """Receiver and service fail, hang, and are killed at random; every event comes at least once, and in order."""
    chance = random.Random(seed)
    hasty = Service(tmp_path / "service", ALLOW | {"SCHEDULE": ",".join(["50"] * 500)}, HASTY)
    with Receiver(tmp_path / "receiver") as receiver, hasty as service:
        made = subscribe(service, receiver)
        for number in range(8):
            name = f"vm{number}"
            receiver.behave(chance.choice(["ok", "slow", "500", "redirect", "cut", "hang"]))
            with Qemu(service.qmp_dir / f"{name}.qmp", blockdev(new_chain(tmp_path / name))):
                service.wait_for_domain(name)
                job = service.started(name, top="vda[1]")
                time.sleep(chance.random() / 5)
                if chance.random() < 0.7:
                    service.kill()
                    service.start()
                if chance.random() < 0.4:
                    receiver.kill()
                    time.sleep(chance.random() / 5)
                    receiver.start()
                service.wait_for_domain(name)
                service.wait_for_job(job["id"])
        # Whoever hangs is let go: the attempt would outlast the test.
        receiver.kill()
        receiver.behave("ok")
        receiver.start()
        wait_until_sent(service, made["id"], seconds=60)
        with sse(service.client, "/events?after=0") as events:
            stored = {event["id"]: event["data"] for event in _until_last(service, made["id"], events)}
        taken = receiver.taken(SECRET)
        assert in_order(taken) == [id_ for id_ in stored if int(id_) <= int(list(stored)[-1])]
        assert all(request["event"] == stored[request["event"]["id"]] for request in taken)
        assert len(stored) > 8 * 3


def _until_last(service: Service, webhook_id: str, events: Iterator[JSON]) -> Iterator[JSON]:
    """The stored events up to the one that was sent last."""
    last = deliveries(service, webhook_id)[0]["event"]
    for event in events:
        if "id" in event:
            yield event
            if event["id"] == last:
                return


def test_the_service_ends_in_time_while_it_sends(service: Service, receiver: Receiver) -> None:
    """What hangs is given up, and sent again at the next start."""
    receiver.behave("hang")
    made = subscribe(service, receiver)
    service.client.put("/domains/a", json={"disks": {}})
    receiver.wait_for(1)
    begin = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - begin < 5
    receiver.behave("ok")
    service.start()
    wait_until_sent(service, made["id"])
    requests = receiver.received()
    assert [request["mode"] for request in requests[:2]] == ["hang", "ok"]
    assert requests[0]["headers"]["webhook-id"] == requests[1]["headers"]["webhook-id"]


def test_one_receiver_does_not_hold_up_another(service: Service, tmp_path: Path) -> None:
    """Each has a way of its own."""
    with Receiver(tmp_path / "bad") as bad, Receiver(tmp_path / "good") as good:
        bad.behave("hang")
        subscribe(service, bad)
        made = subscribe(service, good)
        service.client.put("/domains/a", json={"disks": {}})
        bad.wait_for(1)
        wait_until_sent(service, made["id"])
        assert [request["mode"] in FINE for request in good.received()] == [True]
        # So that the hanging attempt does not outlast the test.
        bad.kill()
