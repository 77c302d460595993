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


STANDARD_ID: Final = "webhook-id"
"""The header of the Standard Webhooks specification for the id of a delivery."""

STANDARD_TIME: Final = "webhook-timestamp"
"""The header of the same specification for the time that is signed, in seconds since 1970."""

STANDARD_SIGNATURE: Final = "webhook-signature"
"""The header of the same specification for the signatures, with spaces in between."""

SIGNATURE_HEADERS: Final[Mapping[Provider, str]] = {
    Provider.GITHUB: "X-Hub-Signature-256",
    # Holds the secret itself. A webhook of GitLab with a signing token is signed as the standard says.
    Provider.GITLAB: "X-Gitlab-Token",
    Provider.STANDARD: STANDARD_SIGNATURE,
}
"""The header that proves who has sent a delivery."""

EVENT_HEADERS: Final[Mapping[Provider, str]] = {
    Provider.GITHUB: "X-GitHub-Event",
    Provider.GITLAB: "X-Gitlab-Event",
}
"""The header that names the event. The standard names the event in the body."""

ID_HEADERS: Final[Mapping[Provider, Sequence[str]]] = {
    Provider.GITHUB: ("X-GitHub-Delivery",),
    # The first one stays the same when GitLab sends the delivery again. Events of one cause share the last one.
    Provider.GITLAB: ("Idempotency-Key", STANDARD_ID, "X-Gitlab-Event-UUID"),
    Provider.STANDARD: (STANDARD_ID,),
}
"""The headers that may hold the id of a delivery. The first of them that has a value counts."""


@dataclass(frozen=True, slots=True)
class IncomingDelivery:
    """A request as it came; the names of the headers in lower case."""

    headers: Mapping[str, str]
    body: bytes


def signature_error(provider: Provider, secret: str, delivery: IncomingDelivery, now: float) -> str | None:
    """None if whoever knows `secret` has sent the delivery, else what is wrong. `now` in seconds since 1970.

    A comparison takes the same time for every result. A secret of GitLab is a signing token if it begins with `PREFIX`;
    else it is the plain token that GitLab sends along.
    """
    if provider is Provider.GITHUB:
        return _github_error(secret, delivery)
    if provider is Provider.GITLAB and not secret.startswith(PREFIX):
        return _gitlab_error(secret, delivery)
    return _standard_error(secret, delivery, now)


def _github_error(secret: str, delivery: IncomingDelivery) -> str | None:
    name = SIGNATURE_HEADERS[Provider.GITHUB]
    given = delivery.headers.get(name.lower())
    if given is None:
        return f"the header {name} is missing"
    expected = "sha256=" + hmac.new(secret.encode(), delivery.body, hashlib.sha256).hexdigest()
    return None if _same(given, expected) else f"{name} does not fit the body and the secret"


def _gitlab_error(secret: str, delivery: IncomingDelivery) -> str | None:
    name = SIGNATURE_HEADERS[Provider.GITLAB]
    given = delivery.headers.get(name.lower())
    if given is None:
        return f"the header {name} is missing"
    return None if _same(given, secret) else f"{name} is not the secret"


def _standard_error(secret: str, delivery: IncomingDelivery, now: float) -> str | None:
    names = (STANDARD_ID, STANDARD_TIME, STANDARD_SIGNATURE)
    missing = [name for name in names if not delivery.headers.get(name)]
    if missing:
        return f"the header {missing[0]} is missing"
    id_, time, signatures = (delivery.headers[name] for name in names)
    if not (time.isascii() and time.isdigit() and len(time) <= 12):
        return f"{STANDARD_TIME} is no time in seconds since 1970"
    expected = standard_signature(secret, id_, int(time), delivery.body)
    if not any(_same(given, expected) for given in signatures.split(" ")):
        return f"{STANDARD_SIGNATURE} does not fit the id, the time, the body and the secret"
    if abs(now - int(time)) > WINDOW:
        return f"{STANDARD_TIME} is more than {WINDOW} s away from this host's clock"
    return None


def standard_signature(secret: str, id_: str, time: int, body: bytes) -> str:
    """The signature of a message (Standard Webhooks 1.0, symmetric); `time` in seconds since 1970."""
    signed = f"{id_}.{time}.".encode() + body
    digest = hmac.new(standard_key(secret), signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def standard_key(secret: str) -> bytes:
    """The key of a secret: the bytes of its base 64, or the text itself if the secret is not base 64."""
    try:
        return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        return secret.encode()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), expected.encode())


def delivery_id(provider: Provider, headers: Mapping[str, str]) -> str | None:
    """The id that a delivery keeps when it is sent again; None if no header holds an id."""
    found = (headers.get(name.lower()) for name in ID_HEADERS[provider])
    return next((id_ for id_ in found if id_), None)


def mismatch(
    provider: Provider, event: str, match: Mapping[str, object], headers: Mapping[str, str], payload: object
) -> str | None:
    """None if the delivery is of `event` and `payload` has each value of `match`, else the first difference."""
    header = EVENT_HEADERS.get(provider)
    said = headers.get(header.lower()) if header is not None else at_pointer(payload, "/type")
    if said != event:
        return f"the event is {said}, not {event}"
    for pointer, expected in match.items():
        found = at_pointer(payload, pointer)
        # True is not 1 here.
        if type(found) is not type(expected) or found != expected:
            return f"{pointer} is {found!r}, not {expected!r}"
    return None


def at_pointer(document: object, pointer: str) -> object:
    """The value that a JSON Pointer (RFC 6901) leads to; None if it leads nowhere."""
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
