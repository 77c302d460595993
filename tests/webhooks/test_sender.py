"""The way to a receiver: where it may lead, and what an attempt takes at most. Every receiver is a real one."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

import pytest

from app.core.outgoing import Answer
from app.webhooks import sender as module
from app.webhooks.sender import HttpSender
from tests.support.receiver import LONG, Receiver

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
HEADERS = {"webhook-id": "wd-1"}
OTHERS = ("0177.1", "0x7f.1", "2130706433", "017700000001", "127.1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]")


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    """A receiver that takes everything."""
    with Receiver(tmp_path / "receiver") as running:
        yield running


def send(url: str, *, sender: HttpSender | None = None) -> Answer:
    return asyncio.run((sender or HttpSender(LOOPBACK, "blockjobd/test")).send(url, HEADERS, b"{}"))


def check(url: str, *, sender: HttpSender | None = None) -> str | None:
    return asyncio.run((sender or HttpSender((), "blockjobd/test")).check(url))


class Names:
    """A name server whose answers change: each is given once, the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, _port: int) -> Sequence[str]:
        """The next answer."""
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_a_delivery_comes_as_it_was_sent(receiver: Receiver) -> None:
    """With its headers, its body and the host that it was meant for; of the answer 1 KiB is kept."""
    assert send(receiver.url + "?x=%20y") == Answer(status=200, body=LONG[:1024])
    (request,) = receiver.received()
    assert (request["path"], request["body"]) == ("/in?x=%20y", "{}")
    headers = request["headers"]
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert (headers["content-type"], headers["user-agent"]) == ("application/json", "blockjobd/test")
    assert headers["webhook-id"] == "wd-1"


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    """It is the answer."""
    receiver.behave("redirect")
    assert send(receiver.url).status == 307
    assert [request["path"] for request in receiver.received()] == ["/in"]


def test_what_comes_after_the_status_does_not_matter(receiver: Receiver) -> None:
    """A body without end is left where it is."""
    receiver.behave("drip")
    begin = time.monotonic()
    answer = send(receiver.url)
    assert answer.status == 200
    assert 0 < len(answer.body) < 100
    assert time.monotonic() - begin < module.ATTEMPT


def test_no_answer(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hangs, hangs up or is not there: the attempt ends, and says why."""
    monkeypatch.setattr(module, "ATTEMPT", 0.5)
    receiver.behave("hang")
    assert send(receiver.url) == Answer(error="no answer within 0 s")
    receiver.behave("cut")
    assert "disconnected" in (send(receiver.url).error or "")
    receiver.kill()
    answer = send(receiver.url)
    assert answer.status is None
    assert "connect" in (answer.error or "").lower()


def test_an_answer_that_is_no_http(tmp_path: Path) -> None:
    """Nor one whose head has no end."""
    for said in (b"220 mail.example.org ESMTP\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * (1 << 20)):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            async def attempt(listener: socket.socket = listener, said: bytes = said) -> Answer:
                def serve() -> None:
                    connection, _ = listener.accept()
                    # The sender hangs up where it has had enough.
                    with connection, suppress(OSError):
                        connection.recv(1 << 16)
                        connection.sendall(said)

                serving = asyncio.create_task(asyncio.to_thread(serve))
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
                answer = await HttpSender(LOOPBACK, "blockjobd/test").send(url, HEADERS, b"{}")
                await serving
                return answer

            answer = asyncio.run(attempt())
            assert answer.status is None
            assert answer.error


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", *OTHERS])
def test_this_host_in_any_spelling(host: str) -> None:
    """Refused when the webhook is made, and again when it would be sent."""
    url = f"http://{host}:9/"
    assert "webhook_allow" in (check(url) or "")
    error = send(url, sender=HttpSender((), "blockjobd/test")).error
    assert "webhook_allow" in (error or "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", *OTHERS])
def test_this_host_where_it_is_allowed(receiver: Receiver, host: str) -> None:
    """Then each spelling leads there."""
    assert send(f"http://{host}:{receiver.port}/in").status == 200


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://0251.0376.0251.0376/",
        "http://0251.16689662/",
        "http://2852039166/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[fe80::1%25lo]/",
        "http://[fe80::1]/",
        "http://0.0.0.0/",
        "http://0/",
        "http://[::]/",
        "http://224.0.0.1/",
    ],
)
def test_what_no_list_allows(url: str) -> None:
    """Link-local addresses in any spelling, and those of no single host."""
    sender = HttpSender((ip_network("0.0.0.0/0"), ip_network("::/0")), "blockjobd/test")
    assert check(url, sender=sender) is not None
    assert send(url, sender=sender).error is not None


def test_a_name_that_answers_differently_the_second_time(receiver: Receiver) -> None:
    """It is asked once an attempt, and the connection goes to what was judged; what comes next is judged anew."""
    names = Names(["127.0.0.1"], ["169.254.169.254"])
    sender = HttpSender(LOOPBACK, "blockjobd/test", names)
    url = f"http://receiver.example:{receiver.port}/in"
    assert send(url, sender=sender).status == 200
    assert names.asked == ["receiver.example"]
    assert receiver.received()[0]["headers"]["host"] == f"receiver.example:{receiver.port}"
    assert "link-local" in (send(url, sender=sender).error or "")
    assert len(receiver.received()) == 1


def test_only_addresses_that_are_allowed_are_tried(receiver: Receiver) -> None:
    """Of a name with several, as `localhost` is one; where none is left, the name is refused."""
    url = f"http://receiver.example:{receiver.port}/in"
    mixed = HttpSender(LOOPBACK, "blockjobd/test", Names(["169.254.169.254", "10.0.0.1", "127.0.0.1"]))
    assert check(url, sender=mixed) is None
    assert send(url, sender=mixed).status == 200
    receiver.kill()
    assert "connect" in (send(url, sender=mixed).error or "").lower()
    bad = HttpSender(LOOPBACK, "blockjobd/test", Names(["169.254.169.254", "10.0.0.1"]))
    assert "169.254.169.254 is link-local" in (check(url, sender=bad) or "")
    assert "169.254.169.254 is link-local" in (send(url, sender=bad).error or "")


def test_the_next_address_where_nobody_listens_at_the_first(receiver: Receiver) -> None:
    """As a browser does."""
    sender = HttpSender(LOOPBACK, "blockjobd/test", Names(["::1", "127.0.0.1"]))
    assert send(f"http://receiver.example:{receiver.port}/in", sender=sender).status == 200


def test_a_name_that_does_not_resolve() -> None:
    """It may come to be: it is no reason to refuse a webhook, and each attempt says so."""
    assert check("http://nothing.invalid/") is None
    answer = send("http://nothing.invalid/")
    assert answer.status is None
    assert answer.error


def test_names_that_are_none() -> None:
    """Neither raises."""
    for url in ("http://" + "a" * 64 + ".example/", "http://a..b/", "http://\u00a0/", "http://exa\u0130mple.\u3002/"):
        assert send(url).error


def test_proxies_of_the_environment_are_not_asked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be asked for an address that is none of theirs to judge."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert send(receiver.url).status == 200


def test_tls_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate has to be trusted, and to be that of the name in the URL, not of the address."""
    pem = tmp_path / "receiver.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=r -addext subjectAltName=DNS:receiver.example"
    )
    for out in ("-keyout", "-out"):
        command += f" {out} {tmp_path}/{out[1:]}"
    subprocess.run(command.split(), check=True, capture_output=True)
    pem.write_text((tmp_path / "keyout").read_text() + (tmp_path / "out").read_text())
    names = Names(["127.0.0.1"])
    with Receiver(tmp_path / "receiver", tls=pem) as receiver:
        for host, trusted, fine in (
            ("receiver.example", True, True),
            ("other.example", True, False),
            ("receiver.example", False, False),
        ):
            monkeypatch.setenv(
                "SSL_CERT_FILE", str(tmp_path / "out") if trusted else "/etc/ssl/certs/ca-certificates.crt"
            )
            answer = send(f"https://{host}:{receiver.port}/in", sender=HttpSender(LOOPBACK, "blockjobd/test", names))
            assert (answer.status == 200) == fine
            assert fine or "certificate verify failed" in (answer.error or "")
        assert len(receiver.received()) == 1
