"""What webhooks are to be sent, in the journal: a row for each event and webhook, in the event's own transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from pydantic import TypeAdapter

from app.core.outgoing import Answer, DeliveryState
from app.engine.ports.clock import Clock
from app.engine.ports.events import WEBHOOK_DISABLED, StoredEvent
from app.engine.ports.outbox import Delivery, Webhook
from app.journal.deliveries import insert
from app.journal.journal import SqliteJournal
from app.journal.writing import Transaction

_ANSWER: Final = TypeAdapter(Answer)

_COLUMNS: Final = (
    "id",
    "url",
    "types",
    "job_id",
    "secret",
    "previous",
    "previous_until",
    "created_at",
    "created_by",
    "disabled_at",
    "disabled_because",
)

_WEBHOOK: Final = ", ".join(f"webhooks.{column}" for column in _COLUMNS)

_PENDING: Final = "(SELECT count(*) FROM deliveries WHERE webhook_id = webhooks.id AND state <> 'delivered')"

_DELIVERY: Final = (
    "deliveries.seq, deliveries.id, webhook_id, event_id, events.type, state, attempts, deliveries.created_at, due_at,"
    " attempted_at, answer"
)


class SqliteOutbox:
    """The `Outbox` in the file of a journal, by its threads."""

    def __init__(self, journal: SqliteJournal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock

    def listen(self, wake: Callable[[Collection[str]], None]) -> None:
        """Have `wake` called with the webhooks for which something was stored."""
        self._journal.wake(wake)

    async def add(self, webhook: Webhook) -> None:
        """Store a new webhook."""
        await self._journal.write(lambda writing: insert(writing.connection, webhook))

    async def webhook(self, webhook_id: str) -> Webhook | None:
        """A webhook."""
        rows = await self._journal.read(
            f"SELECT {_WEBHOOK}, {_PENDING} FROM webhooks WHERE id = :id",  # noqa: S608  # constants only
            {"id": webhook_id},
        )
        return _webhook(*rows[0]) if rows else None

    async def webhooks(
        self, *, job_id: str | None, after: int | None, limit: int
    ) -> tuple[Sequence[Webhook], int | None]:
        """The webhooks for all jobs, or the callbacks of one; oldest first, and the cursor of the next page."""
        rows = await self._journal.read(
            f"SELECT seq, {_WEBHOOK}, {_PENDING} FROM webhooks"  # noqa: S608  # constants only
            " WHERE job_id IS :job AND seq > :after ORDER BY seq LIMIT :limit + 1",
            {"job": job_id, "after": after or 0, "limit": limit},
        )
        page = rows[:limit]
        return [_webhook(*row) for _, *row in page], page[-1][0] if len(rows) > len(page) else None

    async def remove(self, webhook_id: str) -> bool:
        """Delete a webhook with its deliveries; whether it was there."""
        return await self._change("DELETE FROM webhooks WHERE id = ?", webhook_id)

    async def rotate(self, webhook_id: str, secret: str, *, until: int) -> bool:
        """Give a webhook a new secret, beside which the one before signs until then; whether it was there."""
        return await self._change(
            "UPDATE webhooks SET previous = secret, previous_until = ?, secret = ? WHERE id = ?",
            until,
            secret,
            webhook_id,
        )

    async def enable(self, webhook_id: str, *, now: int) -> bool:
        """Have a webhook sent everything that it has missed, from now on; whether it was there."""

        def work(writing: Transaction) -> bool:
            connection = writing.connection
            known = connection.execute(
                "UPDATE webhooks SET disabled_at = NULL, disabled_because = NULL WHERE id = ?", (webhook_id,)
            ).rowcount
            connection.execute(
                "UPDATE deliveries SET state = 'pending', attempts = 0, due_at = ?"
                " WHERE webhook_id = ? AND state <> 'delivered'",
                (now, webhook_id),
            )
            return bool(known)

        return await self._journal.write(work)

    async def _change(self, statement: str, *values: object) -> bool:
        return bool(await self._journal.execute(statement, values))

    async def waiting(self) -> Sequence[str]:
        """The ids of the webhooks that are enabled and have something to be sent."""
        rows = await self._journal.read(
            "SELECT id FROM webhooks WHERE disabled_at IS NULL AND id IN"
            " (SELECT webhook_id FROM deliveries WHERE state <> 'delivered')"
        )
        return [id_ for (id_,) in rows]

    async def head(self, webhook_id: str) -> tuple[Webhook, Delivery, StoredEvent] | None:
        """The oldest delivery that is still to be made; None where there is none, or the webhook is disabled."""
        rows = await self._journal.read(
            f"SELECT {_WEBHOOK}, {_DELIVERY}, events.time, events.domain, events.disk, events.job_id, events.data"  # noqa: S608
            " FROM webhooks JOIN deliveries ON webhook_id = webhooks.id JOIN events ON events.id = event_id"
            " WHERE webhooks.id = :id AND disabled_at IS NULL AND state <> 'delivered' ORDER BY deliveries.seq LIMIT 1",
            {"id": webhook_id},
        )
        if not rows:
            return None
        (row,) = rows
        cut = len(_COLUMNS)
        webhook, delivery = _webhook(*row[:cut]), _delivery(*row[cut:-5])
        time, domain, disk, job_id, data = row[-5:]
        event = StoredEvent(
            id=delivery.event_id,
            type=delivery.event_type,
            time=time,
            domain=domain,
            disk=disk,
            job_id=job_id,
            data=data,
        )
        return webhook, delivery, event

    async def note(self, delivery: Delivery, *, disabled: str | None, data: Callable[[Webhook], str]) -> None:
        """Store what came of an attempt, and with it that it disables its webhook, if it does."""
        answer = None if delivery.answer is None else _ANSWER.dump_json(delivery.answer).decode()

        def work(writing: Transaction) -> None:
            connection = writing.connection
            connection.execute(
                "UPDATE deliveries SET state = ?, attempts = ?, due_at = ?, attempted_at = ?, answer = ? WHERE seq = ?",
                (
                    delivery.state.value,
                    delivery.attempts,
                    delivery.due_at,
                    delivery.attempted_at,
                    answer,
                    delivery.seq,
                ),
            )
            if disabled is None:
                return
            found = connection.execute(
                "UPDATE webhooks SET disabled_at = ?, disabled_because = ?"  # noqa: S608  # constants only
                " WHERE id = ? AND disabled_at IS NULL"
                f" RETURNING {_WEBHOOK}, {_PENDING}",
                (self._clock.now(), disabled, delivery.webhook_id),
            ).fetchall()
            for row in found:
                writing.tell(WEBHOOK_DISABLED, domain="", disk=None, job_id=None, data=data(_webhook(*row)))

        await self._journal.write(work)

    async def deliveries(
        self, webhook_id: str, *, before: int | None, limit: int
    ) -> tuple[Sequence[Delivery], int | None]:
        """A webhook's deliveries, newest first, and the cursor of the next page."""
        rows = await self._journal.read(
            f"SELECT {_DELIVERY} FROM deliveries JOIN events ON events.id = event_id"  # noqa: S608  # constants only
            " WHERE webhook_id = :id AND deliveries.seq < :before ORDER BY deliveries.seq DESC LIMIT :limit + 1",
            {"id": webhook_id, "before": before if before is not None else 2**63 - 1, "limit": limit},
        )
        page = [_delivery(*row) for row in rows[:limit]]
        return page, page[-1].seq if len(rows) > len(page) else None

    async def redeliver(self, webhook_id: str, delivery_id: str, *, now: int) -> Delivery | None:
        """Have a delivery made once more, or now if it waits; None where there is none of that id."""
        await self._change(
            "UPDATE deliveries SET state = 'pending', attempts = 0, due_at = ? WHERE webhook_id = ? AND id = ?",
            now,
            webhook_id,
            delivery_id,
        )
        rows = await self._journal.read(
            f"SELECT {_DELIVERY} FROM deliveries JOIN events ON events.id = event_id"  # noqa: S608  # constants only
            " WHERE webhook_id = :webhook AND deliveries.id = :id",
            {"webhook": webhook_id, "id": delivery_id},
        )
        return _delivery(*rows[0]) if rows else None


def _webhook(*row: Any) -> Webhook:
    id_, url, types, job_id, secret, previous, previous_until, created_at, created_by, disabled_at, because, *more = row
    return Webhook(
        id=id_,
        url=url,
        types=frozenset(json.loads(types)),
        job_id=job_id,
        secret=secret,
        previous=previous,
        previous_until=previous_until,
        created_at=created_at,
        created_by=created_by,
        disabled_at=disabled_at,
        disabled_because=because,
        pending=more[0] if more else 0,
    )


def _delivery(*row: Any) -> Delivery:
    seq, id_, webhook_id, event_id, type_, state, attempts, created_at, due_at, attempted_at, answer = row
    return Delivery(
        seq=seq,
        id=id_,
        webhook_id=webhook_id,
        event_id=event_id,
        event_type=type_,
        state=DeliveryState(state),
        attempts=attempts,
        created_at=created_at,
        due_at=due_at,
        attempted_at=attempted_at,
        answer=None if answer is None else _ANSWER.validate_json(answer),
    )
