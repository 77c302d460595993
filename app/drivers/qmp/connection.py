"""One connection to a QMP monitor: commands that are time-boxed, and the events that say that something happened."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, TypeVar

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.message import DeserializationError, Message, UnexpectedTypeError

from app.core.errors import qemu_problem
from app.drivers.qmp import replies
from app.drivers.qmp.checks import MalformedReply, Query
from app.engine.ports.driver import Address, Busy, Declined, Unanswered, Unreachable
from app.engine.rate import Rate
from app.hostfs.peers import listener
from app.hostfs.process import is_stopped

REPLY_MAX: Final = 16 << 20
"""The longest reply that is read, in bytes. A thousand nodes take 3 MiB."""

VALUES_MAX: Final = 400_000
"""How many values a message may hold: each takes up to a hundred times its two bytes in memory."""

EVENTS_BURST: Final = 150_000
EVENTS_A_SECOND: Final = 4000
"""Events of one monitor that are taken in; beyond them its messages wait. A disk that fails tells of each request."""

EVENTS_AT_ONCE: Final = 64
"""Events after which others have their turn: what is in the buffer would be read without a pause."""

PAUSE: Final = 0.05
"""Seconds for which such a monitor is not read."""

FLOOD_S: Final = 30.0
"""Seconds for which a monitor may send more events than that, before it counts as no QEMU."""

GREETING: Final = 5.0
"""Seconds in which a monitor that is free sends its greeting."""

FULL: Final = 0.02
"""Seconds until the next try at a socket whose queue of clients is full."""

SHOWN: Final = 100
"""How many bytes are shown of a message that is none."""

Sink = Callable[[object, object], None]
"""Gets the name and the data of each event, as they came."""

T = TypeVar("T")

# Every refused command and lost connection is an error to that library's logger, and an attempt that is given up while
# its peer hangs up is a critical one, traceback and all; here they are told where they matter.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class _Client(QMPClient):
    """A client that hands its events on and keeps none: the library's listeners keep all of them for ever.

    It makes no text of a message for a log that nobody reads: that is most of what a message costs.
    """

    def __init__(self, sink: Sink) -> None:
        super().__init__(readbuflen=REPLY_MAX)
        self._sink = sink
        self._rate = Rate(EVENTS_BURST, EVENTS_A_SECOND)
        self._flood: float | None = None
        self._events = 0
        self.heard_all = False

    async def _event_dispatch(self, msg: Message) -> None:
        self._sink(msg["event"], msg.get("data"))
        self._events += 1
        if self._events % EVENTS_AT_ONCE == 0:
            await asyncio.sleep(0)
        now = asyncio.get_running_loop().time()
        if self._rate.take(now):
            if self._flood is not None and now - self._flood > FLOOD_S:
                self._flood = None
            return
        # Others' monitors are read meanwhile.
        await asyncio.sleep(PAUSE)
        if self._flood is None:
            self._flood = now
        elif now - self._flood > FLOOD_S:
            raise ProtocolError(f"more than {EVENTS_A_SECOND} events a second for {FLOOD_S:.0f} s")

    async def _do_recv(self) -> Message:
        """The next message. The library's own errors hold all of what was read, and are made a text of several times.

        What ends without a line's end is no message: the peer has gone while it spoke.
        """
        try:
            line = await self._readline()
        except (EOFError, ConnectionResetError):
            # The kernel hands over all that has come before it tells of a reset (unix(7), tcp(7)).
            self.heard_all = True
            raise
        if not line.endswith(b"\n"):
            self.heard_all = True
            raise EOFError
        if line.count(b",") + line.count(b"{") + line.count(b"[") > VALUES_MAX:
            shown = line[:SHOWN]
            del line
            raise DeserializationError(f"it holds more than {VALUES_MAX} values", shown)
        try:
            return Message(line, eager=True)
        except (DeserializationError, UnexpectedTypeError) as error:
            why = error.error_message
        # Raised out here, with the line let go: an error keeps the frames it came through, and the one it followed.
        shown = line[:SHOWN]
        del line
        raise DeserializationError(why, shown)

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class Connection:
    """An open monitor. `pid` is that of the process that listens there, where the kernel tells.

    What comes over it leaves it as values only. `version` is what the greeting said.
    """

    def __init__(
        self,
        client: _Client,
        version: replies.Version,
        pid: int | None,
        patience: float,
        hint: Callable[[], None],
    ) -> None:
        self.version = version
        self.pid = pid
        self._client = client
        self._patience = patience
        self._watch = asyncio.create_task(self._watch_end(hint))

    @classmethod
    async def open(cls, address: Address, patience: float, sink: Sink, hint: Callable[[], None]) -> Connection:
        """Connect and negotiate; raises `Unreachable` or `Busy`."""
        client = _Client(sink)
        greeting = min(GREETING, patience)
        pid: int | None = None
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(greeting):
                if address.unix is not None:
                    sock = await _connect_unix(address.unix)
                    pid = listener(sock, address.unix)
                else:
                    assert address.tcp is not None
                    sock = await _connect_tcp(*address.tcp)
                await client.connect(sock)
            version = replies.GREETING.read(client.greeting.QMP.version if client.greeting else None)
        except MalformedReply:
            await _disconnect(client)
            raise
        except TimeoutError:
            await _disconnect(client)
            if pid is not None and is_stopped(pid):
                raise Unreachable(f"the process {pid} behind the monitor is stopped") from None
            if sock is None and address.tcp is not None:
                raise Unreachable(f"no monitor at {address.tcp}: no connection within {greeting:.0f} s") from None
            raise Busy(
                f"connected, but no greeting came within {greeting:.0f} s: another client holds the monitor; "
                "give QEMU a second one (-qmp) for this service"
            ) from None
        except OSError as error:
            await _disconnect(client)
            raise Unreachable(f"no monitor at {address.unix or address.tcp}: {error.strerror or error}") from error
        except (ConnectError, AssertionError) as error:
            # The assertion is the library's, of a peer that hangs up right after the negotiation.
            await _disconnect(client)
            if address.tcp is not None:
                # Whatever else listens there, its words are not for everybody who may read.
                raise Unreachable(f"no QMP at {address.tcp}: what answers there speaks no QMP") from None
            why = error.exc if isinstance(error, ConnectError) else "the connection ended at once"
            raise Unreachable(f"no QMP at {address.unix}: {why}") from error
        return cls(client, version, pid, patience, hint)

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._client.runstate is Runstate.RUNNING

    @property
    def heard_all(self) -> bool:
        """Whether the peer has ended the connection, and all that it sent before was taken in."""
        return self._client.heard_all

    async def ask(self, query: Query[T], arguments: Mapping[str, object] | None = None) -> T:
        """What a query's reply says; raises as `execute` does, and `MalformedReply`."""
        return query.read(await self._execute(query.command, arguments))

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        """Have a command carried out; raises `Declined`, `Unanswered` or `Unreachable`.

        After the last two it is unknown whether the command took effect.
        """
        await self._execute(command, arguments)

    async def _execute(self, command: str, arguments: Mapping[str, object] | None) -> object:
        try:
            async with asyncio.timeout(self._patience):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            error_class, desc = replies.refusal(command, error.error_class, str(error))
            raise Declined(qemu_problem(error_class, desc, doing=command)) from error
        except TimeoutError:
            raise Unanswered(f"QEMU has not answered {command} for {self._patience:.0f} s") from None
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise Unreachable(f"the connection to QEMU ended during {command}") from error

    async def close(self) -> None:
        """End the connection; never raises."""
        self._watch.cancel()
        await asyncio.wait([self._watch])
        await _disconnect(self._client)

    async def _watch_end(self, hint: Callable[[], None]) -> None:
        # `runstate_changed` sees only what changes while it waits, so the state is looked at between.
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        hint()


async def _connect_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            # A unix socket connects at once, or its queue is full, which is 1 long at QEMU's. That is no connection in
            # progress (connect(2), EAGAIN), though the event loop's own sock_connect takes it for one.
            try:
                sock.connect(path)
            except BlockingIOError:
                await asyncio.sleep(FULL)
            else:
                break
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tcp(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failed: OSError | None = None
    for family, kind, protocol, _name, place in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, place)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed or OSError(f"{host} has no address")


async def _disconnect(client: QMPClient) -> None:
    # It raises again whatever ended the connection; that has been told already.
    with suppress(Exception):
        async with asyncio.timeout(2):
            await client.disconnect()
