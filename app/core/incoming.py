"""What a delivery to `POST /hooks/{name}` means: whether it is the sender's, and what it starts.

The signatures are those of GitHub (docs, "Validating webhook deliveries"), GitLab (docs, "Webhooks": the secret token)
and of the Standard Webhooks specification, which GitLab's signing tokens follow as well.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

WINDOW: Final = 300
"""How far a signed time may be from ours, in seconds."""

PREFIX: Final = "whsec_"
"""What the secrets of the Standard Webhooks specification begin with; base 64 follows."""


class Provider(StrEnum):
    """Who signs."""

    GITHUB = "github"
    GITLAB = "gitlab"
    STANDARD = "standard"


@dataclass(frozen=True, slots=True)
class IncomingDelivery:
    """A request as it came; the names of the headers in lower case."""

    headers: Mapping[str, str]
    body: bytes


def signature_error(provider: Provider, secret: str, delivery: IncomingDelivery, now: float) -> str | None:
    """None if whoever knows `secret` has sent the delivery, else what is wrong. `now` in seconds since 1970.

    All comparisons take the same time whatever they find. A secret of GitLab's is its signing token where it looks like
    one, else the plain token that it sends along.
    """
    if provider is Provider.GITHUB:
        return _github_error(secret, delivery)
    if provider is Provider.GITLAB and not secret.startswith(PREFIX):
        return _gitlab_error(secret, delivery)
    return _standard_error(secret, delivery, now)


def _github_error(secret: str, delivery: IncomingDelivery) -> str | None:
    given = delivery.headers.get("x-hub-signature-256")
    if given is None:
        return "the header X-Hub-Signature-256 is missing"
    expected = "sha256=" + hmac.new(secret.encode(), delivery.body, hashlib.sha256).hexdigest()
    return None if _same(given, expected) else "X-Hub-Signature-256 does not fit the body and the secret"


def _gitlab_error(secret: str, delivery: IncomingDelivery) -> str | None:
    given = delivery.headers.get("x-gitlab-token")
    if given is None:
        return "the header X-Gitlab-Token is missing"
    return None if _same(given, secret) else "X-Gitlab-Token is not the secret"


def _standard_error(secret: str, delivery: IncomingDelivery, now: float) -> str | None:
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    missing = [name for name in names if not delivery.headers.get(name)]
    if missing:
        return f"the header {missing[0]} is missing"
    id_, time, signatures = (delivery.headers[name] for name in names)
    if not (time.isascii() and time.isdigit() and len(time) <= 12):
        return "webhook-timestamp is no time in seconds since 1970"
    expected = standard_signature(secret, id_, int(time), delivery.body)
    if not any(_same(given, expected) for given in signatures.split(" ")):
        return "webhook-signature does not fit the id, the time, the body and the secret"
    if abs(now - int(time)) > WINDOW:
        return f"webhook-timestamp is more than {WINDOW} s away from this host's clock"
    return None


def standard_signature(secret: str, id_: str, time: int, body: bytes) -> str:
    """The signature of a message (Standard Webhooks 1.0, symmetric); `time` in seconds since 1970."""
    signed = f"{id_}.{time}.".encode() + body
    digest = hmac.new(standard_key(secret), signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def standard_key(secret: str) -> bytes:
    """The key that a secret stands for: its base 64, or the text itself where it is none."""
    try:
        return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        return secret.encode()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), expected.encode())


def delivery_id(provider: Provider, headers: Mapping[str, str]) -> str | None:
    """The id that a delivery keeps when it is sent again; None where it has none."""
    names = {
        Provider.GITHUB: ("x-github-delivery",),
        # The first of them stays the same over retries, and the second one is shared by the events of one cause.
        Provider.GITLAB: ("idempotency-key", "webhook-id", "x-gitlab-event-uuid"),
        Provider.STANDARD: ("webhook-id",),
    }[provider]
    return next((headers[name] for name in names if headers.get(name)), None)


def mismatch(
    provider: Provider, event: str, match: Mapping[str, object], headers: Mapping[str, str], payload: object
) -> str | None:
    """None if the delivery is of that event and says what is to match, else what it says instead."""
    said = {
        Provider.GITHUB: headers.get("x-github-event"),
        Provider.GITLAB: headers.get("x-gitlab-event"),
        Provider.STANDARD: at_pointer(payload, "/type"),
    }[provider]
    if said != event:
        return f"the event is {said}, not {event}"
    for pointer, expected in match.items():
        found = at_pointer(payload, pointer)
        # True is not 1 here.
        if type(found) is not type(expected) or found != expected:
            return f"{pointer} is {found!r}, not {expected!r}"
    return None


def at_pointer(document: object, pointer: str) -> object:
    """What a JSON Pointer (RFC 6901) leads to; None where it leads nowhere."""
    node = document
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = cast("Mapping[str, object]", node).get(name)
        elif isinstance(node, list) and name.isascii() and name.isdigit():
            items = cast("Sequence[object]", node)
            node = items[int(name)] if int(name) < len(items) else None
        else:
            return None
    return node
