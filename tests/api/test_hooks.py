"""Deliveries over HTTP, as far as that goes without a domain."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.cli.hooks import judge
from app.core.incoming import standard_signature
from app.settings import Settings, load
from tests.api.conftest import problem, served

SECRET = "a secret of ours"
BODY = b'{"type": "done"}'
IDS = {"github": "X-GitHub-Delivery", "gitlab": "Idempotency-Key", "standard": "webhook-id"}
EVENTS = {"github": "X-GitHub-Event", "gitlab": "X-Gitlab-Event"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The settings of a service with a hook of each provider."""
    folder: Path = tmp_path_factory.mktemp("hooks")
    (folder / "secret").write_text(SECRET)
    hooks = {
        provider: {
            "provider": provider,
            "secret_file": str(folder / "secret"),
            "event": "done",
            "domain": "nobody",
            "disk": "vda",
        }
        for provider in IDS
    }
    environ = {
        "BLOCKJOBD_STATE_DIR": str(folder / "state"),
        "BLOCKJOBD_LISTEN": "127.0.0.1:0",
        "BLOCKJOBD_HOOKS": json.dumps(hooks),
    }
    return load(None, environ)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[httpx.Client]:
    """A sender without a token."""
    with served(settings) as background, httpx.Client(base_url=background.url, timeout=20) as client:
        yield client


@pytest.mark.parametrize("provider", EVENTS)
def test_a_delivery_without_an_id(client: httpx.Client, provider: str) -> None:
    """The refusal names the header that the provider's own documentation names."""
    digest = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()
    headers = {
        "Content-Type": "application/json",
        "X-Hub-Signature-256": f"sha256={digest}",
        "X-Gitlab-Token": SECRET,
        EVENTS[provider]: "done",
    }
    document = problem(client.post(f"/hooks/{provider}", content=BODY, headers=headers), 422, "invalid-request")
    assert [error["parameter"] for error in document["errors"]] == [IDS[provider]]
    assert IDS[provider] in document["errors"][0]["detail"]
    problem(
        client.post(f"/hooks/{provider}", content=BODY, headers={**headers, IDS[provider]: "d1"}),
        404,
        "domain-not-found",
    )


@pytest.mark.parametrize("provider", IDS)
def test_a_stored_delivery_without_its_headers(settings: Settings, provider: str) -> None:
    """Where the header of the event is not given, the hook's own event is assumed."""
    lines, starts = judge(settings, provider, BODY, [])
    assert starts, lines
    assert lines[:2] == ["signature: not given, so not looked at", "delivery id: not given"]


@pytest.mark.parametrize("provider", EVENTS)
def test_a_stored_delivery_of_another_event(settings: Settings, provider: str) -> None:
    """The header of the event counts where it is given."""
    lines, starts = judge(settings, provider, BODY, [f"{EVENTS[provider]}: other"])
    assert not starts
    assert lines[-1] == "answer: 200, ignored: the event is other, not done"


@pytest.mark.parametrize(
    ("provider", "header"),
    [
        ("github", "X-Hub-Signature-256: sha256=00"),
        ("gitlab", "X-Gitlab-Token: other"),
        ("standard", f"webhook-signature: {standard_signature('other', 'd1', 1, BODY)}"),
    ],
)
def test_a_stored_delivery_with_a_wrong_signature(settings: Settings, provider: str, header: str) -> None:
    """A signature that is given is judged."""
    lines, starts = judge(settings, provider, BODY, [header])
    assert not starts
    assert lines[-1] == "answer: 401 signature-invalid"
