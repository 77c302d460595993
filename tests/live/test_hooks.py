"""Deliveries of CI pipelines: a signed one starts a commit, once; anything else starts nothing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from app.core.outgoing import new_secret
from tests.live.conftest import Boot
from tests.support.chains import CLUSTER, MIB, Chain, blockdev
from tests.support.qemu import Qemu
from tests.support.receiver import Receiver
from tests.support.service import JSON, Service

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=3, size=2 * MIB, data=16 * CLUSTER)]

NUMBERS = itertools.count(1)
SECRET = "It's a Secret to Everybody"
SIGNING = "whsec_" + base64.b64encode(b"k" * 32).decode()

PUBLISHED = Path(__file__).parents[1] / "support" / "payloads"
WORKFLOW_RUN: JSON = json.loads((PUBLISHED / "github_workflow_run.json").read_text())
PIPELINE: JSON = json.loads((PUBLISHED / "gitlab_pipeline.json").read_text())
STANDARD: JSON = {"type": "build.finished", "data": {"ok": True}}


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, JSON]:
    """The hooks of the service, as in its configuration."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "token").write_text(f"{SECRET}\n")
    (folder / "signing").write_text(SIGNING)
    started = {"domain": "ci", "disk": "vda", "body": {"top": "vda[1]"}}
    github = {"/action": "completed", "/workflow_run/conclusion": "success"}
    gitlab = {"/object_attributes/status": "success"}
    return {
        "github": {
            "provider": "github",
            "event": "workflow_run",
            "match": github,
            "secret_file": f"{folder}/token",
            **started,
        },
        "gitlab": {
            "provider": "gitlab",
            "event": "Pipeline Hook",
            "match": gitlab,
            "secret_file": f"{folder}/token",
            **started,
        },
        "signing": {
            "provider": "gitlab",
            "event": "Pipeline Hook",
            "match": gitlab,
            "secret_file": f"{folder}/signing",
            **started,
        },
        "standard": {
            "provider": "standard",
            "event": "build.finished",
            "match": {"/data/ok": True},
            "secret_file": f"{folder}/signing",
            **started,
        },
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, hooks: Mapping[str, JSON]) -> Iterator[Service]:
    """A service that takes deliveries."""
    settings = {"BLOCKJOBD_HOOKS": json.dumps(hooks)}
    with Service(tmp_path_factory.mktemp("service"), settings) as running:
        yield running


@pytest.fixture
def ci(boot: Boot, chain: Chain) -> Qemu:
    """The QEMU of the domain of all hooks."""
    return boot(blockdev(chain), name="ci")


def new_id() -> str:
    return f"72d3162e-cc78-11e3-81ab-{next(NUMBERS):012d}"


def signed(kind: str, payload: JSON | bytes, *, id_: str, at: float | None = None) -> tuple[bytes, dict[str, str]]:
    """A delivery as the provider sends it: its body, and its headers."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    headers = {"Content-Type": "application/json"}
    if kind == "github":
        digest = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        headers |= {
            "X-GitHub-Event": "workflow_run",
            "X-GitHub-Delivery": id_,
            "X-Hub-Signature-256": f"sha256={digest}",
        }
    elif kind == "gitlab":
        headers |= {"X-Gitlab-Event": "Pipeline Hook", "X-Gitlab-Token": SECRET, "Idempotency-Key": id_}
    else:
        moment = datetime.fromtimestamp(int(at or time.time()), UTC)
        headers |= {
            "X-Gitlab-Event": "Pipeline Hook",
            "webhook-id": id_,
            "webhook-timestamp": str(int(moment.timestamp())),
            "webhook-signature": Webhook(SIGNING).sign(id_, moment, body.decode()),
        }
    return body, headers


PAYLOADS = {"github": WORKFLOW_RUN, "gitlab": PIPELINE, "signing": PIPELINE, "standard": STANDARD}


def deliver(service: Service, hook: str, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
    """Send it, without a token."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(service.socket)), base_url="http://blockjobd") as client:
        return client.post(f"/hooks/{hook}", content=body, headers=headers)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    return answer.json()["detail"]


def jobs_of(service: Service) -> list[JSON]:
    return service.client.get("/jobs", params={"domain": "ci"}).json()["items"]


@pytest.mark.usefixtures("ci")
@pytest.mark.parametrize("hook", PAYLOADS)
def test_a_signed_delivery_starts_one_commit(service: Service, chain: Chain, hook: str) -> None:
    """Sent twice, it gets the first answer again; and its job is the hook's."""
    before = len(jobs_of(service))
    id_ = new_id()
    first = deliver(service, hook, *signed(hook, PAYLOADS[hook], id_=id_))
    assert first.status_code == 202, first.text
    job = service.wait_for_job(first.json()["id"])
    assert (job["state"], job["requested_by"]) == ("completed", f"hook:{hook}")
    assert [layer["file"] for layer in service.disk("ci")["chain"]] == [chain.at(0), chain.at(2)]
    # A provider signs what it sends again anew.
    again = deliver(service, hook, *signed(hook, PAYLOADS[hook], id_=id_, at=time.time() + 2))
    assert (again.status_code, again.content) == (202, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    assert len(jobs_of(service)) == before + 1


@pytest.mark.usefixtures("ci")
@pytest.mark.usefixtures("ci")
@pytest.mark.parametrize("hook", ["github", "gitlab"])
def test_a_recorded_body_under_other_ids(service: Service, hook: str) -> None:
    """Where the id is not signed, the body is taken once, whatever id comes with it."""
    body = PAYLOADS[hook] | {"recorded": hook}
    first = deliver(service, hook, *signed(hook, body, id_=new_id()))
    assert first.status_code == 202, first.text
    service.wait_for_job(first.json()["id"])
    before = len(jobs_of(service))
    for _ in range(3):
        again = deliver(service, hook, *signed(hook, body, id_=new_id()))
        assert (again.status_code, again.content) == (202, first.content)
    assert len(jobs_of(service)) == before


def test_what_does_not_match_is_ignored(service: Service) -> None:
    """It is told why, and nothing is started."""
    before = jobs_of(service)
    failed = {**WORKFLOW_RUN, "workflow_run": {**WORKFLOW_RUN["workflow_run"], "conclusion": "failure"}}
    answer = deliver(service, "github", *signed("github", failed, id_=new_id()))
    assert (answer.status_code, answer.json()) == (
        200,
        {"ignored": "/workflow_run/conclusion is 'failure', not 'success'"},
    )
    body, headers = signed("github", {"zen": "Design for failure."}, id_=new_id())
    answer = deliver(service, "github", body, {**headers, "X-GitHub-Event": "ping"})
    assert (answer.status_code, answer.json()) == (200, {"ignored": "the event is ping, not workflow_run"})
    assert jobs_of(service) == before


@pytest.mark.usefixtures("ci")
@pytest.mark.parametrize("hook", PAYLOADS)
def test_what_is_not_genuine_is_refused(service: Service, hook: str) -> None:
    """Another body, another signature, none at all."""
    before = jobs_of(service)
    body, headers = signed(hook, PAYLOADS[hook], id_=new_id())
    name = {"github": "X-Hub-Signature-256", "gitlab": "X-Gitlab-Token"}.get(hook, "webhook-signature")
    if hook != "gitlab":
        refused(deliver(service, hook, body.replace(b"s", b"r", 1), headers), 401, "signature-invalid")
    refused(deliver(service, hook, body, {**headers, name: headers[name][:-2] + "x="}), 401, "signature-invalid")
    refused(
        deliver(service, hook, body, {key: value for key, value in headers.items() if key != name}),
        401,
        "signature-invalid",
    )
    assert jobs_of(service) == before


@pytest.mark.usefixtures("ci")
def test_an_old_delivery_is_refused(service: Service) -> None:
    """More than five minutes on either side of the service's clock."""
    for off in (-302, 302):
        answer = deliver(service, "standard", *signed("standard", STANDARD, id_=new_id(), at=time.time() + off))
        assert "300 s away" in refused(answer, 401, "signature-invalid")


@pytest.mark.usefixtures("ci")
def test_bad_deliveries(service: Service) -> None:
    """Each is answered with a problem document; nothing is read of what nobody has signed."""
    before = jobs_of(service)
    body, headers = signed("github", WORKFLOW_RUN, id_=new_id())
    refused(deliver(service, "nothing", body, headers), 404, "hook-not-found")
    refused(deliver(service, "github", b" " * (2 * MIB), headers), 413, "payload-too-large")
    assert "not JSON" in refused(
        deliver(service, "github", *signed("github", b'{"action": ', id_=new_id())), 422, "invalid-request"
    )
    assert "not JSON" in refused(
        deliver(service, "github", *signed("github", b"[" * 100_000, id_=new_id())), 422, "invalid-request"
    )
    form = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
    assert "application/json" in refused(deliver(service, "github", body, form), 422, "invalid-request")
    nameless = {name: value for name, value in headers.items() if name != "X-GitHub-Delivery"}
    assert "X-GitHub-Delivery" in refused(deliver(service, "github", body, nameless), 422, "invalid-request")
    assert jobs_of(service) == before


def test_a_domain_that_is_not_there(service: Service) -> None:
    """The sender gets the commit's own refusal, and may send the delivery again."""
    delivery = signed("github", WORKFLOW_RUN | {"number": 2}, id_=new_id())
    refused(deliver(service, "github", *delivery), 404, "domain-not-found")
    refused(deliver(service, "github", *delivery), 404, "domain-not-found")


def command(hooks: Mapping[str, JSON], folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"BLOCKJOBD_HOOKS": json.dumps(hooks), "BLOCKJOBD_STATE_DIR": str(folder / "state")}
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", "hooks", "test", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_stored_delivery_is_judged(hooks: Mapping[str, JSON], tmp_path: Path) -> None:
    """The command says what would be started, or why nothing would."""
    body, headers = signed("github", WORKFLOW_RUN, id_="d1")
    file = tmp_path / "delivery.json"
    file.write_bytes(body)
    given = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    said = command(hooks, tmp_path, "github", file, *given)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines() == [
        "signature: valid",
        "delivery id: d1",
        'starts: POST /domains/ci/disks/vda/commit {"top": "vda[1]"}',
    ]
    bare = command(hooks, tmp_path, "github", file)
    assert (bare.returncode, bare.stdout.splitlines()[0]) == (0, "signature: not given, so not looked at")
    file.write_bytes(body + b" ")
    changed = command(hooks, tmp_path, "github", file, *given)
    assert changed.returncode == 1
    assert changed.stdout.splitlines()[-1] == "answer: 401 signature-invalid"
    file.write_text('{"action": "requested"}')
    other = command(hooks, tmp_path, "github", file)
    assert (other.returncode, other.stdout.splitlines()[-1]) == (
        1,
        "answer: 200, ignored: /action is 'requested', not 'completed'",
    )
    file.write_text("{")
    assert "422 invalid-request" in command(hooks, tmp_path, "github", file).stdout
    for wrong in (("nothing", file), ("github", tmp_path / "none"), ("github", file, "-H", "x")):
        ended = command(hooks, tmp_path, *wrong)
        assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"provider": "other"}, "BLOCKJOBD_HOOKS.github.provider"),
        ({"secret_file": "/nothing/here"}, "hooks.github.secret_file"),
        ({"secret_file": "/dev/null"}, "is empty"),
        ({"match": {"action": "completed"}}, "BLOCKJOBD_HOOKS.github.match"),
        ({"match": {"/action": None}}, "BLOCKJOBD_HOOKS.github.match"),
        ({"body": {"tpo": "vda[1]"}}, "hooks.github.body.tpo"),
        ({"body": {"base": "a", "flags": ["shallow"]}}, "hooks.github.body"),
        ({"vreb": "commit"}, "BLOCKJOBD_HOOKS.github.vreb: there is no such setting"),
        ({"verb": "explode"}, "BLOCKJOBD_HOOKS.github.verb"),
    ],
)
def test_a_hook_that_can_not_be_served(hooks: Mapping[str, JSON], tmp_path: Path, change: JSON, expected: str) -> None:
    """The service says so at its start, in one line that names the setting."""
    wrong = {"github": {**hooks["github"], **change}}
    environ = os.environ | {
        "BLOCKJOBD_HOOKS": json.dumps(wrong),
        "BLOCKJOBD_STATE_DIR": str(tmp_path / "state"),
        "BLOCKJOBD_LISTEN": f"unix:{tmp_path}/s",
    }
    command = [sys.executable, "-m", "app.cli.main", "serve"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=30)
    assert ended.returncode == 2
    assert expected in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_from_a_pipeline_to_its_receiver(tmp_path: Path, chain: Chain) -> None:
    """GitHub's delivery starts a merge with pivot; the callback tells a receiver how it went, signed."""
    secret, signing = tmp_path / "ci.secret", new_secret(b"b" * 32)
    secret.write_text(SECRET)
    with Receiver(tmp_path / "receiver") as receiver:
        config = tmp_path / "blockjobd.toml"
        config.write_text(f"""
webhook_allow = ["127.0.0.0/8"]

[hooks.ci]
provider = "github"
secret_file = "{secret}"
event = "workflow_run"
match = {{ "/action" = "completed", "/workflow_run/conclusion" = "success" }}
domain = "web1"
disk = "vda"
verb = "commit"
body = {{ flags = ["active"], on_ready = "pivot", callback = {{ url = "{receiver.url}", secret = "{signing}" }} }}
""")
        with (
            Service(tmp_path / "service", build=("app.cli.main", "serve", "--config", str(config))) as service,
            Qemu(service.qmp_dir / "web1.qmp", blockdev(chain)),
        ):
            service.wait_for_domain("web1")
            delivery = signed("github", WORKFLOW_RUN, id_=new_id())
            answers = [deliver(service, "ci", *delivery) for _ in range(2)]
            assert [answer.status_code for answer in answers] == [202, 202], answers[0].text
            assert answers[0].content == answers[1].content
            job = service.wait_for_job(answers[0].json()["id"])
            assert (job["state"], job["type"], job["requested_by"]) == ("completed", "active-commit", "hook:ci")
            receiver.wait_for(5)
            told = [request["event"] for request in receiver.taken(signing)]
            types = [event["type"] for event in told]
            assert types == ["job.queued", "job.started", "job.ready", "job.pivoting", "job.completed"]
            assert told[-1]["data"] == job
            assert [layer["file"] for layer in service.disk("web1")["chain"]] == [chain.at(2)]
            assert len(service.client.get("/jobs").json()["items"]) == 1
