"""HTTP requests to receivers: into allowed networks only, and bounded in all that they take.

A URL's host is resolved once for each attempt, each address that comes of it is judged, and the connection goes to one
that is allowed, so a name that answers differently the second time leads nowhere.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import httpx

from app.core.outgoing import Answer, Network, address_error

RESOLVE: Final = 5.0
"""Seconds that a host's name may take to be resolved."""

ATTEMPT: Final = 15.0
"""Seconds that an attempt may take in all."""

KEPT: Final = 1024
"""Bytes of an answer's body that are kept."""

BODY: Final = 2.0
"""Seconds that an answer's body may take, of which nothing depends."""

PORTS: Final = {"http": 80, "https": 443}


Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host and a port; raises `OSError` and `UnicodeError`."""


class _Refused(Exception):
    """The URL may not be sent to; the message says why."""


class HttpSender:
    """The `Sender` port; `allow` are networks that are not public and may be reached all the same."""

    def __init__(self, allow: Sequence[Network], agent: str, resolve: Resolve | None = None) -> None:
        self._allow = allow
        self._agent = agent
        self._resolve = resolve or resolved
        self._tls = ssl.create_default_context()

    async def check(self, url: str) -> str | None:
        """None if deliveries may go to `url` as far as can be told now, else why not.

        A name that can't be resolved may be one that is to come; it is judged again at each attempt.
        """
        try:
            await self._addresses(_parsed(url))
        except _Refused as refused:
            return str(refused)
        except OSError:
            return None
        return None

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """POST `body`; the first bytes of the answer."""
        try:
            async with asyncio.timeout(ATTEMPT):
                return await self._send(_parsed(url), headers, body)
        except _Refused as refused:
            return Answer(error=str(refused))
        except TimeoutError:
            return Answer(error=f"no answer within {ATTEMPT:.0f} s")
        except (OSError, httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            return Answer(error=str(error) or type(error).__name__)

    async def _send(self, url: httpx.URL, headers: Mapping[str, str], body: bytes) -> Answer:
        failed: httpx.ConnectError | None = None
        for address in await self._addresses(url):
            # Neither proxies nor credentials of the environment: they would lead elsewhere than to the address.
            async with httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=ATTEMPT) as client:
                try:
                    return await self._post(client, url, address, headers, body)
                except httpx.ConnectError as error:
                    failed = error
        raise failed or OSError("the host has no address")

    async def _post(
        self, client: httpx.AsyncClient, url: httpx.URL, address: str, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        own = {
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": self._agent,
            # What is not read whole can't be unpacked.
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        request = client.build_request(
            "POST",
            url.copy_with(host=address),
            headers={**own, **headers},
            content=body,
            extensions={"sni_hostname": url.host.strip("[]")},
        )
        answer = await client.send(request, stream=True, follow_redirects=False)
        try:
            return Answer(status=answer.status_code, body=await _beginning(answer))
        finally:
            await answer.aclose()

    async def _addresses(self, url: httpx.URL) -> Sequence[str]:
        """Those of the addresses of a URL's host that are allowed; raises `_Refused` where none is, and `OSError`."""
        try:
            async with asyncio.timeout(RESOLVE):
                addresses = await self._resolve(url.host.strip("[]"), url.port or PORTS[url.scheme])
        except TimeoutError:
            raise OSError(f"the name {url.host} was not resolved within {RESOLVE:.0f} s") from None
        except UnicodeError as error:
            raise _Refused(f"{url.host} is no host's name") from error
        wrong = {address: address_error(address, self._allow) for address in addresses}
        allowed = [address for address in addresses if wrong[address] is None]
        if addresses and not allowed:
            raise _Refused(f"{url.host} leads where webhooks may not go: {wrong[addresses[0]]}")
        return allowed


async def resolved(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, each once; raises `OSError` and `UnicodeError`.

    In a thread of its own that may be left behind: a name server that does not answer must hold up neither the reading
    of images, which the loop's own threads do, nor the end of the service.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[str]] = loop.create_future()

    def tell(found: Sequence[str] | Exception) -> None:
        if answer.done():
            return
        if isinstance(found, Exception):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def ask() -> None:
        found: Sequence[str] | Exception
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(address[0]) for *_, address in infos))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            found = error
        # Nobody waits any more where the loop has ended.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, found)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    return await answer


async def _beginning(answer: httpx.Response) -> str:
    read = b""
    # A receiver that has taken the delivery has taken it, whatever becomes of the rest of its answer.
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(BODY):
            async for part in answer.aiter_raw():
                read += part
                if len(read) >= KEPT:
                    break
    return read[:KEPT].decode("utf-8", "replace").replace("\0", "\ufffd")


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise _Refused(f"no URL: {error}") from error
    if parsed.scheme not in PORTS or not parsed.host:
        raise _Refused("neither http:// nor https:// and a host")
    if "%" in parsed.host:
        raise _Refused("an address with a zone (%) is link-local")
    return parsed
