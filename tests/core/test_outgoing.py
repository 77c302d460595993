"""When deliveries are tried again, where they may go, and what they are signed with."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from ipaddress import ip_network

import pytest
from standardwebhooks.webhooks import Webhook

from app.core.outgoing import (
    SCHEDULE,
    URL_MAX,
    Answer,
    address_error,
    disabling,
    new_secret,
    next_wait,
    secret_error,
    signatures,
    url_error,
    waits,
)

SECRETS = tuple(new_secret(bytes([number]) * 32) for number in (1, 2))


def test_the_waits_are_those_of_the_contract() -> None:
    """5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h, each up to a tenth longer; after that there is none."""
    hours = [5 / 3600, 5 / 60, 0.5, 2, 5, 10, 14, 20, 24]
    for attempts, wait in enumerate(hours, 1):
        assert next_wait(attempts, SCHEDULE, 0.0) == round(wait * 3_600_000)
        assert next_wait(attempts, SCHEDULE, 0.5) == round(wait * 3_600_000 * 1.05)
    assert next_wait(len(hours) + 1, SCHEDULE, 0.0) is None


def test_what_disables() -> None:
    """410 at once, any other failure after the last attempt; success never."""
    last = len(SCHEDULE) + 1
    assert disabling(Answer(status=410), 1, SCHEDULE) == "the receiver answered 410 Gone"
    for failed, said in ((Answer(status=500), "status 500"), (Answer(error="timed out"), "timed out")):
        assert disabling(failed, last - 1, SCHEDULE) is None
        why = disabling(failed, last, SCHEDULE)
        assert why == f"{last} attempts failed, the last one with: {said}"
    for status in (200, 204, 299):
        assert disabling(Answer(status=status), last, SCHEDULE) is None
    for status in (199, 300, 307, 404):
        assert not Answer(status=status).fine


def test_the_published_package_takes_each_secrets_signature() -> None:
    """While a secret is rotated both sign; a changed body is signed by neither."""
    body = json.dumps({"type": "job.completed", "id": "7"})
    now = int(datetime.now(UTC).timestamp())
    headers = dict(signatures(SECRETS, "wd-1", now, body.encode()))
    assert headers["webhook-id"] == "wd-1"
    assert headers["webhook-signature"].count("v1,") == 2
    for secret in SECRETS:
        assert Webhook(secret).verify(body, headers) == json.loads(body)
        with pytest.raises(Exception, match="No matching signature"):
            Webhook(secret).verify(body + " ", headers)


@pytest.mark.parametrize("size", [0, 23, 24, 64, 65])
def test_secrets_have_the_sizes_of_the_specification(size: int) -> None:
    """24 to 64 bytes in base 64, with or without the prefix."""
    for prefix in ("whsec_", ""):
        found = secret_error(prefix + base64.b64encode(b"\xfe" * size).decode())
        assert (found is None) == (24 <= size <= 64)


@pytest.mark.parametrize("secret", ["secret", "whsec_", "whsec_é", "whsec_" + "!" * 40, "whsec_ " + "A" * 32])
def test_what_is_no_secret(secret: str) -> None:
    """The answer says what is expected."""
    assert secret_error(secret) == "expected whsec_ and the base 64 of 24 to 64 bytes"


@pytest.mark.parametrize(
    "url",
    ["http://a", "https://example.org:8443/x?y=z", "http://127.1/", "http://[::1]:80/", "HTTPS://EXAMPLE.org/%20"],
)
def test_urls(url: str) -> None:
    """Wherever they lead: that is judged by what their hosts resolve to."""
    assert url_error(url) is None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "expected http"),
        ("x", "expected http"),
        ("ftp://example.org/", "expected http"),
        ("file:///etc/passwd", "expected http"),
        ("http:///x", "expected http"),
        ("http://example.org:0/", "expected http"),
        ("http://exa mple.org/", "expected http"),
        ("http://example.org/\r\nX: y", "expected http"),
        ("http://example.org:99999/", "no URL"),
        ("http://[::1/", "no URL"),
        ("http://me:it@example.org/", "a password"),
        ("http://me@example.org/", "a password"),
        ("http://example.org/#x", "fragment"),
        ("http://example.org/" + "x" * URL_MAX, "at most"),
    ],
)
def test_what_is_no_url_of_a_receiver(url: str, said: str) -> None:
    """The answer says what is wrong with it."""
    assert said in (url_error(url) or "")


ALLOWED = [ip_network(text) for text in ("127.0.0.0/8", "::1/128", "10.1.0.0/16", "169.254.0.0/16", "fd00:1::/32")]


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_public_addresses_are_fine(address: str) -> None:
    """However they are written."""
    assert address_error(address, ()) is None


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "10.1.2.3",
        "::ffff:10.1.2.3",
        "fd00:1::9",
    ],
)
def test_others_only_where_they_are_allowed(address: str) -> None:
    """An IPv6 address that leads to an IPv4 one counts as that."""
    assert address_error(address, ALLOWED) is None
    assert "webhook_allow" in (address_error(address, ()) or "")


@pytest.mark.parametrize(
    "address",
    [
        "10.2.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "100.64.0.1",
        "198.18.0.1",
        "192.0.0.8",
        "192.88.99.1",
        "240.0.0.1",
        "fc00::1",
        "64:ff9b:1:a9fe:a9:fe00:808:808",
        "::ffff:0:808:808",
        "2001:db8::1",
        "3fff::1",
        "5f00::1",
        "100::1",
    ],
)
def test_what_no_list_holds(address: str) -> None:
    """Private networks, carriers', and those that IANA has set aside, whatever their last bits say."""
    assert address_error(address, ALLOWED) is not None


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
    ],
)
def test_what_is_never_allowed(address: str) -> None:
    """Link-local addresses, and those of no single host, whatever the list says."""
    every = [ip_network("0.0.0.0/0"), ip_network("::/0")]
    assert address_error(address, every) is not None


def test_a_teredo_address_is_that_of_its_client() -> None:
    """RFC 4380: the client's IPv4 address, inverted, in the last 32 bits."""
    assert "(127.0.0.1)" in (address_error("2001:0:4136:e378:8000:63bf:80ff:fffe", ()) or "")


def test_a_clock_that_was_ahead_holds_nothing_up() -> None:
    """What was attempted in a time that has not come yet is due now; so is what was never attempted."""
    assert waits(due_at=9_000, attempts=1, attempted_at=1_000, now=4_000) == 5_000
    assert waits(due_at=9_000, attempts=1, attempted_at=8_000, now=4_000) == 0
    assert waits(due_at=9_000, attempts=0, attempted_at=None, now=4_000) == 0
    assert waits(due_at=9_000, attempts=0, attempted_at=1_000, now=4_000) == 0
