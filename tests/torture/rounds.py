"""A round from its plan to its record, and what is told of one that went wrong."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from tests.torture.judge import judge
from tests.torture.machine import Machine
from tests.torture.plan import RoundPlan
from tests.torture.records import DomainEnd, Record
from tests.torture.stage import Stage

JSON = dict[str, Any]
T = TypeVar("T")


class Rounds:
    """Plays rounds on one stage, and counts what came of them."""

    def __init__(self, stage: Stage) -> None:
        self.outcomes: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self._stage = stage
        self._last_event = 0

    def play(self, plan: RoundPlan) -> tuple[list[str], Callable[[], str]]:
        """The violations of a round, and the report on it."""
        stage = self._stage
        stage.begin_round()
        with ExitStack() as stack:
            machines: list[Machine] = []
            for domain in plan.domains:
                machines.append(machine := Machine(stage, domain))
                stack.callback(machine.close)
            for machine in machines:
                stage.service.wait_for_domain(machine.plan.name, seconds=30)
            _all(machines, Machine.run)
            _all(machines, Machine.settle)
            stage.note("all", "settled")
            ends = [*_all(machines, Machine.inspect), *_all(machines, Machine.rerun)]
            record = self._record(machines, ends)
            stage.counts["over TCP"] += sum(machine.plan.tcp for machine in machines)
            stage.counts["with a neighbour"] += sum(machine.plan.shared for machine in machines)
        stage.counts["without a view"] += stage.blind
        stage.check_rest()
        log = stage.new_log()
        record.troubles += stage.troubles
        violations = judge(record)
        self._count(record)
        actions = list(stage.actions)
        return violations, lambda: _report(plan, actions, record, log).replace(f"{stage.folder}/", "")

    def _record(self, machines: Sequence[Machine], ends: list[DomainEnd]) -> Record:
        stage = self._stage
        stage.wait_until_empty()
        names = [machine.plan.name for machine in machines]
        jobs = [job for machine in machines for job in machine.jobs()]
        journal = stage.journal_events(self._last_event)
        if journal:
            stage.subscriber.wait_for(journal[-1][0], 20)
        after, self._last_event = self._last_event, journal[-1][0] if journal else self._last_event
        return Record(
            after=after,
            requests=[request for machine in machines for request in machine.requests],
            replies=[reply for machine in machines for reply in machine.replies],
            jobs=[job for job in jobs if job["domain"] in names],
            histories={job["id"]: stage.client.items(f"/jobs/{job['id']}/history") for job in jobs},
            streamed=stage.subscriber.take(self._last_event),
            journal=journal,
            ends=ends,
            troubles=[f"{machine.plan.name}: {trouble}" for machine in machines for trouble in machine.troubles],
        )

    def _count(self, record: Record) -> None:
        for job in record.jobs:
            kind = job["type"] if job["type"] in ("commit", "pull") else f"{job['type']} {job['on_ready']}"
            self.outcomes[f"{kind} | {job['state']}"] += 1
        for request in record.requests:
            self.answers["lost" if request.status is None else request.answer.get("code") or str(request.status)] += 1


def _all(machines: Sequence[Machine], do: Callable[[Machine], T]) -> list[T]:
    """Have all machines do it at once; what fails is one of the machine's troubles."""
    done: list[T] = []

    def one(machine: Machine) -> None:
        try:
            done.append(do(machine))
        except Exception as error:  # noqa: BLE001 - told with the round's other troubles
            machine.troubles.append(f"{do.__name__} failed: {error!r}")

    threads = [threading.Thread(target=one, args=(machine,), daemon=True) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def _report(plan: RoundPlan, actions: Sequence[str], record: Record, log: str) -> str:
    jobs = "\n".join(json.dumps(job) for job in record.jobs)
    histories = "\n".join(
        f"{id_}: " + ", ".join(f"{event['id']} {event['type']} v{event['data']['version']}" for event in history)
        for id_, history in record.histories.items()
    )
    ends = "\n".join(str(end) for end in record.ends)
    return "\n\n".join(
        (
            f"plan: {plan}",
            "actions:\n" + "\n".join(actions),
            f"jobs:\n{jobs}",
            f"histories:\n{histories}",
            f"domains:\n{ends}",
            "log:\n" + "\n".join(line for line in log.splitlines() if '"GET"' not in line)[-12000:],
        )
    )
