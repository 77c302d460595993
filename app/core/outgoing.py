"""Webhooks that are sent: when a delivery is tried again, where none may go, and what it is signed with.

The signature is that of the Standard Webhooks specification (1.0, symmetric), in `app.core.incoming`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

from app.core.incoming import PREFIX, standard_signature

Network = IPv4Network | IPv6Network

SECOND: Final = 1000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE

SCHEDULE: Final = (
    5 * SECOND,
    5 * MINUTE,
    30 * MINUTE,
    2 * HOUR,
    5 * HOUR,
    10 * HOUR,
    14 * HOUR,
    20 * HOUR,
    24 * HOUR,
)
"""How long after each failed attempt the next one comes, in ms; after the last of them there is none."""

JITTER: Final = 0.1
"""Fraction by which a wait is lengthened at random: webhooks that failed together must come back apart."""

GONE: Final = 410
"""The status of a receiver that wants no more."""

ROTATION: Final = 24 * HOUR
"""How long an old secret signs beside the new one, in ms."""

SECRET_SIZES: Final = range(24, 65)
"""How many bytes a secret may have (Standard Webhooks, "Signature scheme")."""


class DeliveryState(StrEnum):
    """How far a delivery is."""

    PENDING = "pending"
    """It is to be sent, or to be sent again."""
    DELIVERED = "delivered"
    FAILED = "failed"
    """The webhook was disabled by it; it goes first once that is enabled again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one attempt: the receiver's status and the beginning of its body, or why there is none."""

    status: int | None = None
    body: str = ""
    error: str | None = None

    @property
    def fine(self) -> bool:
        """Whether the receiver has taken the delivery."""
        return self.status is not None and 200 <= self.status < 300


def next_wait(attempts: int, schedule: Sequence[int], spread: float) -> int | None:
    """How many ms after the last of so many failed attempts to try again; None: no more. `spread` is in [0, 1)."""
    if attempts > len(schedule):
        return None
    return int(schedule[attempts - 1] * (1 + JITTER * spread))


def waits(*, due_at: int, attempts: int, attempted_at: int | None, now: int) -> int:
    """Milliseconds until a delivery is to be attempted; 0 or less: now.

    One that was never attempted is due at once, and so is one whose last attempt lies ahead: the clock was ahead then.
    """
    if attempts == 0 or (attempted_at is not None and attempted_at > now):
        return 0
    return due_at - now


def disabling(answer: Answer, attempts: int, schedule: Sequence[int]) -> str | None:
    """Why the webhook is sent nothing more after this answer to that attempt; None: it goes on."""
    if answer.fine:
        return None
    if answer.status == GONE:
        return "the receiver answered 410 Gone"
    if attempts <= len(schedule):
        return None
    return f"{attempts} attempts failed, the last one with: {answer.error or f'status {answer.status}'}"


def signatures(secrets: Sequence[str], id_: str, time: int, body: bytes) -> Mapping[str, str]:
    """The headers of a delivery, signed with each of the secrets; `time` in seconds since 1970."""
    return {
        "webhook-id": id_,
        "webhook-timestamp": str(time),
        "webhook-signature": " ".join(standard_signature(secret, id_, time, body) for secret in secrets),
    }


URL_MAX: Final = 2048
"""Characters that a URL may have."""


def url_error(url: str) -> str | None:
    """None if it is the URL of a receiver, wherever it leads, else what is expected."""
    if len(url) > URL_MAX:
        return f"expected a URL of at most {URL_MAX} characters"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        return f"no URL: {error}"
    if parts.scheme not in ("http", "https") or not host or port == 0 or any(ord(each) <= 0x20 for each in url):
        return "expected http:// or https://, a host, and what the receiver wants after it"
    if parts.username is not None:
        return "a name and a password in a URL are shown to all who may read it; verify the signature instead"
    if parts.fragment:
        return "a fragment (#) is never sent; leave it out"
    return None


def secret_error(secret: str) -> str | None:
    """None if it can be a secret, else what is expected."""
    try:
        size = len(base64.b64decode(secret.removeprefix(PREFIX), validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if size in SECRET_SIZES:
        return None
    return f"expected {PREFIX} and the base 64 of {SECRET_SIZES[0]} to {SECRET_SIZES[-1]} bytes"


def new_secret(random: bytes) -> str:
    """The secret that those bytes make."""
    return PREFIX + base64.b64encode(random).decode()


def address_error(address: str, allowed: Sequence[Network]) -> str | None:
    """None if deliveries may go to that IP address, else why not.

    Link-local addresses, multicast and the unspecified ones never may, other addresses that are not public only in the
    networks that are `allowed`. An IPv6 address that stands for an IPv4 one is judged as that.
    """
    found = _embedded(ip_address(address.partition("%")[0]))
    text = address if str(found) == address else f"{address} ({found})"
    if found.is_link_local or (isinstance(found, IPv6Address) and found.is_site_local):
        return f"{text} is link-local"
    if found.is_multicast or found.is_unspecified or str(found) == "255.255.255.255":
        return f"{text} is the address of no single host"
    if _is_public(found) or any(found.version == network.version and found in network for network in allowed):
        return None
    kind = "a loopback address" if found.is_loopback else "not a public address"
    return f"{text} is {kind}, and in no network of `webhook_allow`"


NAT64: Final = IPv6Network("64:ff9b::/96")
"""Where the last 32 bits are an IPv4 address (RFC 6052). With a prefix of another length they are somewhere else."""

UNICAST: Final = IPv6Network("2000::/3")
"""The IPv6 addresses that have been given to anybody (RFC 4291, 2.4; IANA's registry)."""

SPECIAL: Final = tuple(ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "2001:db8::/32", "3fff::/20"))
"""Networks of IANA's registries of special addresses that `ipaddress` of Python 3.11 takes for public ones."""


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in UNICAST:
        return False
    special = any(address.version == network.version and address in network for network in SPECIAL)
    return address.is_global and not special


def _embedded(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one leads to (RFC 4291, 6052, 3056, 4380), or the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    compatible = int(address) >> 32 == 0 and int(address) > 1
    if address in NAT64 or compatible:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
