"""A request that is repeated under a key: what becomes of it (Idempotency-Key).

The key goes into the journal in the transaction of the job that its first request made, and the answer once there is
one. A request that made no job leaves nothing behind, and its key can be used again.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from app.core.errors import Code, Problem, Refused
from app.core.job import refusal_of
from app.engine.ports.clock import Clock
from app.engine.ports.journal import IdempotencyKey, Journal, StoredAnswer

KEPT_FOR: Final = 24 * 3600 * 1000
"""How long a key is kept, in ms."""

DELIVERY_KEPT_FOR: Final = 30 * KEPT_FOR
"""How long the id of a delivery is kept, in ms: not every provider signs a time, so nothing else makes one too old."""

HOOK: Final = "hook:"
"""What stands before a hook's name where else the name of a token is; no token is called so."""


def kept_for(who: str) -> int:
    """How long the keys of a client are kept, in ms."""
    return DELIVERY_KEPT_FOR if who.startswith(HOOK) else KEPT_FOR


class IdempotencyKeys:
    """The keys under which requests are being served, and those that the journal keeps."""

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self._under_way: set[tuple[str, str]] = set()

    @contextmanager
    def alone(self, key: IdempotencyKey) -> Generator[None]:
        """Serve a request under its key; raises `Refused` while another one is being served."""
        name = (key.who, key.key)
        if name in self._under_way:
            raise Refused(
                Problem(
                    code=Code.IDEMPOTENCY_IN_PROGRESS,
                    detail=f"a request with the Idempotency-Key {key.key!r} is still being answered; send it again",
                )
            )
        self._under_way.add(name)
        try:
            yield
        finally:
            self._under_way.remove(name)

    async def kept(self, key: IdempotencyKey) -> StoredAnswer | None:
        """What the first request under the key led to; raises `Refused` where that was another request.

        A refusal leaves the key free, also one by QEMU, for which there is a job that was never started.
        """
        kept = await self._journal.kept(key, since=self._clock.now() - kept_for(key.who))
        if kept is not None and (job := await self._journal.job(kept.job_id)) is not None and refusal_of(job):
            return None
        if kept is not None and kept.fingerprint != key.fingerprint:
            raise Refused(
                Problem(
                    code=Code.IDEMPOTENCY_KEY_REUSED,
                    detail=f"the Idempotency-Key {key.key!r} belongs to another request, which made the job "
                    f"{kept.job_id}; choose a new key for a new request",
                    extra={"job": kept.job_id},
                )
            )
        return kept

    async def keep_answer(self, key: IdempotencyKey, status: int, body: str) -> None:
        """Keep the answer to the request that made the key's job; raises `JournalError`."""
        await self._journal.keep_answer(key, status, body)
