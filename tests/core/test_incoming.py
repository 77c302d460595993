"""Whose a delivery is, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from standardwebhooks.webhooks import Webhook

from app.core.incoming import (
    WINDOW,
    IncomingDelivery,
    Provider,
    at_pointer,
    delivery_id,
    mismatch,
    signature_error,
    standard_signature,
)

NOW = 1_614_265_330.0

# GitHub's documentation, "Validating webhook deliveries", "Testing the webhook payload validation".
GITHUB_SECRET = "It's a Secret to Everybody"
GITHUB = IncomingDelivery(
    {"x-hub-signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"},
    b"Hello, World!",
)

# The secret of the Standard Webhooks specification's examples; the signature is that of the published package.
STANDARD_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
SIGNED = Webhook(STANDARD_SECRET).sign(ID, datetime.fromtimestamp(NOW, UTC), BODY.decode())
STANDARD = IncomingDelivery(
    {"webhook-id": ID, "webhook-timestamp": f"{NOW:.0f}", "webhook-signature": f"v1,bm9uc2Vuc2U= v1a,x {SIGNED}"}, BODY
)

GITLAB = IncomingDelivery({"x-gitlab-token": "s3cret"}, b"{}")

GENUINE = {
    "github": (Provider.GITHUB, GITHUB_SECRET, GITHUB),
    "gitlab's token": (Provider.GITLAB, "s3cret", GITLAB),
    # As GitLab signs where a hook has a signing token ("Webhooks", "Signing tokens").
    "gitlab's signature": (Provider.GITLAB, STANDARD_SECRET, STANDARD),
    "standard": (Provider.STANDARD, STANDARD_SECRET, STANDARD),
}


def flipped(text: str, bit: int) -> str:
    """The text with one bit of one character changed; it stays ASCII."""
    at, bit = divmod(bit, 7)
    return text[:at] + chr(ord(text[at]) ^ 1 << bit) + text[at + 1 :]


@pytest.mark.parametrize(("provider", "secret", "delivery"), GENUINE.values(), ids=GENUINE)
def test_the_published_examples_are_genuine(provider: Provider, secret: str, delivery: IncomingDelivery) -> None:
    """As they were published."""
    assert signature_error(provider, secret, delivery, NOW) is None


def test_our_signature_is_that_of_the_published_package() -> None:
    """Of a secret with and without its prefix."""
    for secret in (STANDARD_SECRET, STANDARD_SECRET.removeprefix("whsec_")):
        assert standard_signature(secret, ID, int(NOW), BODY) == SIGNED


@pytest.mark.parametrize(("provider", "secret", "delivery"), GENUINE.values(), ids=GENUINE)
def test_one_bit_makes_it_false(provider: Provider, secret: str, delivery: IncomingDelivery) -> None:
    """Each bit of what is signed with, and of each header that is signed or signs."""
    for name, text in delivery.headers.items():
        genuine = text.rpartition(" ")[2]
        for bit in range(7 * len(genuine)):
            headers = {**delivery.headers, name: flipped(genuine, bit)}
            assert signature_error(provider, secret, IncomingDelivery(headers, delivery.body), NOW) is not None, (
                name,
                bit,
            )
    if "x-gitlab-token" not in delivery.headers:
        for bit in range(8 * len(delivery.body)):
            body = bytearray(delivery.body)
            body[bit // 8] ^= 1 << bit % 8
            assert signature_error(provider, secret, IncomingDelivery(delivery.headers, bytes(body)), NOW) is not None
    assert signature_error(provider, flipped(secret, 70 if secret != "s3cret" else 7), delivery, NOW) is not None


@pytest.mark.parametrize(("provider", "secret", "delivery"), GENUINE.values(), ids=GENUINE)
def test_nothing_may_be_missing(provider: Provider, secret: str, delivery: IncomingDelivery) -> None:
    """The refusal names the header."""
    for name in delivery.headers:
        left = {other: text for other, text in delivery.headers.items() if other != name}
        error = signature_error(provider, secret, IncomingDelivery(left, delivery.body), NOW)
        assert error is not None
        assert "is missing" in error


def test_a_time_outside_the_window() -> None:
    """On both sides, and to the second."""
    for off in (-WINDOW, 0, WINDOW):
        assert signature_error(Provider.STANDARD, STANDARD_SECRET, STANDARD, NOW + off) is None
    for off in (-WINDOW - 1, WINDOW + 1):
        error = signature_error(Provider.STANDARD, STANDARD_SECRET, STANDARD, NOW + off)
        assert error is not None
        assert "300 s away" in error


@pytest.mark.parametrize("time", ["soon", "-1", "1e9", "9" * 13, "\u0661"])
def test_a_time_that_is_none(time: str) -> None:
    """It is refused before anything is computed of it."""
    error = signature_error(
        Provider.STANDARD, "not base 64!", IncomingDelivery({**STANDARD.headers, "webhook-timestamp": time}, BODY), NOW
    )
    assert error == "webhook-timestamp is no time in seconds since 1970"


def test_a_secret_that_is_no_base_64_is_its_own_key() -> None:
    """So that a secret somebody has thought of works too."""
    signed = standard_signature("not base 64!", ID, int(NOW), BODY)
    headers = {**STANDARD.headers, "webhook-signature": signed}
    assert signature_error(Provider.STANDARD, "not base 64!", IncomingDelivery(headers, BODY), NOW) is None


@pytest.mark.parametrize(
    ("provider", "headers", "id_"),
    [
        (Provider.GITHUB, {"x-github-delivery": "a", "webhook-id": "b"}, "a"),
        (Provider.GITLAB, {"idempotency-key": "a", "x-gitlab-event-uuid": "b"}, "a"),
        (Provider.GITLAB, {"x-gitlab-event-uuid": "b"}, "b"),
        (Provider.STANDARD, {"webhook-id": "c"}, "c"),
        (Provider.STANDARD, {"webhook-id": ""}, None),
    ],
)
def test_ids(provider: Provider, headers: Mapping[str, str], id_: str | None) -> None:
    """Each provider's own header."""
    assert delivery_id(provider, headers) == id_


RUN = {"action": "completed", "workflow_run": {"conclusion": "success", "attempt": 1, "jobs": [{"a/b": True}]}}


@pytest.mark.parametrize(
    ("pointer", "found"),
    [
        ("", RUN),
        ("/action", "completed"),
        ("/workflow_run/attempt", 1),
        ("/workflow_run/jobs/0/a~1b", True),
        ("/workflow_run/jobs/1", None),
        ("/workflow_run/jobs/x", None),
        ("/action/deeper", None),
        ("/no", None),
    ],
)
def test_pointers(pointer: str, found: object) -> None:
    """Into objects and lists, and nowhere."""
    assert at_pointer(RUN, pointer) == found


def test_what_matches() -> None:
    """The event and all of the values; a refusal says what is there instead."""
    headers = {"x-github-event": "workflow_run", "x-gitlab-event": "Pipeline Hook"}
    match = {"/action": "completed", "/workflow_run/attempt": 1}
    assert mismatch(Provider.GITHUB, "workflow_run", match, headers, RUN) is None
    assert mismatch(Provider.GITHUB, "push", match, headers, RUN) == "the event is workflow_run, not push"
    assert mismatch(Provider.GITLAB, "Pipeline Hook", {}, headers, RUN) is None
    assert mismatch(Provider.STANDARD, "job.completed", {}, headers, {"type": "job.completed"}) is None
    assert mismatch(Provider.STANDARD, "job.completed", {}, headers, [1]) == "the event is None, not job.completed"
    for expected in ("1", True, 2):
        why = mismatch(Provider.GITHUB, "workflow_run", {"/workflow_run/attempt": expected}, headers, RUN)
        assert why == f"/workflow_run/attempt is 1, not {expected!r}"
