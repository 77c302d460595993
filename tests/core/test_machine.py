"""The job's table against a QEMU that does what it likes, a service that crashes, and replies that get lost."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.core.errors import Code, Problem, Refused
from app.core.job import Command, EventType, Intent, Job, OnError, OnReady, Result, State
from app.core.machine.inputs import (
    Abort,
    Accepted,
    Checked,
    CleanedUp,
    CompleteDeclined,
    CompleteTaken,
    Gone,
    Input,
    Launch,
    Observed,
    Pause,
    Pivot,
    Rejected,
    Resume,
    SetSpeed,
)
from app.core.machine.reports import Step, StoredVersion
from app.core.machine.table import start_job, step
from app.core.reconcile import prove, prove_by_header, reconcile
from tests.core.model import Qemu, QemuRefuses
from tests.core.samples import FILES, NODES, PROCESS, active_job, intermediate_job

ENDING_EVENTS: Final = {EventType.COMPLETED, EventType.FAILED, EventType.CANCELED, EventType.LOST}
ROUNDS: Final = 60
"""Looks that are more than enough for every job to end, once QEMU and its clients cooperate."""


FAULTS: Final = ("die", "lost", "unheard", "full")


class ServiceDies(Exception):
    """The service is killed at this point."""


class Unanswered(Exception):
    """No reply came."""


class Service:
    """What the engine does with a job, without its concurrency: step, store, act, and look.

    `faults` are what goes wrong next, one for each command or transaction: `die` (before it), `lost` (the command
    never arrives), `unheard` (it arrives, its reply does not), `full` (the journal can't be written).
    """

    def __init__(self, job: Job, qemu: Qemu) -> None:
        self.qemu = qemu
        self.told: list[StoredVersion] = []
        self.faults: deque[str] = deque()
        self.now = job.created_at
        self.paused_looks = 0
        self.planned_now = True
        self.job = job
        self._store(start_job(job))

    def _store(self, following: Step) -> None:
        for told in following.told:
            before = self.told[-1].job if self.told else None
            assert before is None or told.job.version == before.version + 1, "versions rise by one"
            assert before is None or not before.ended, "an ended job never changes"
            self.told.append(told)
        self.job = following.job

    def restart(self) -> None:
        """Come back with what was stored."""
        self.job = self.told[-1].job
        self.paused_looks = 0
        self.planned_now = False

    def advance(self, event: Input) -> None:
        """Step, store, act, and go on with what comes of it."""
        events = deque([event])
        while events:
            self.now += 1
            following = step(self.job, events.popleft(), self.now)
            if following.told and self._fault("full"):
                return
            self._store(following)
            for command in following.commands:
                try:
                    result = self._act(command)
                except Unanswered:
                    continue
                except ServiceDies:
                    self.restart()
                    return
                if result is not None:
                    events.append(result)

    def _fault(self, kind: str) -> bool:
        if self.faults and self.faults[0] == kind:
            self.faults.popleft()
            return True
        return False

    def _act(self, command: Command) -> Input | None:
        if self._fault("die"):
            raise ServiceDies
        if command is Command.CHECK_IMAGES:
            return Checked(prove_by_header(self.job, self._overlay_backing()), flushed=False)
        if command is Command.CLEAN_UP:
            return self._clean_up()
        if not self.qemu.up or self._fault("lost"):
            raise Unanswered
        result = self._send(command)
        if self._fault("unheard"):
            raise Unanswered
        return result

    def _send(self, command: Command) -> Input | None:
        id_, qemu = self.job.id, self.qemu
        match command:
            case Command.START:
                return self._start()
            case Command.COMPLETE:
                try:
                    qemu.complete(id_)
                except QemuRefuses as refusal:
                    return CompleteDeclined(refusal.problem)
                return CompleteTaken()
            case Command.CHECK_CHAIN:
                return Checked(prove(self.job, qemu.chain, nodes=True))
            case _:
                # The next look tells what has become of it.
                with suppress(QemuRefuses):
                    self._steer(command)
                return None

    def _steer(self, command: Command) -> None:
        id_, qemu = self.job.id, self.qemu
        match command:
            case Command.CANCEL:
                qemu.cancel(id_, force=False)
            case Command.CANCEL_FORCE:
                qemu.cancel(id_, force=True)
            case Command.FINALIZE:
                qemu.finalize(id_)
            case Command.PAUSE:
                qemu.pause(id_)
            case Command.RESUME:
                qemu.resume(id_)
            case _:
                assert command is Command.SET_SPEED

    def _start(self) -> Input:
        job = self.job
        if not self.planned_now and self.qemu.chain != job.work.nodes:
            return Rejected(Problem(code=Code.CHAIN_CHANGED, detail="another chain"))
        try:
            self.qemu.start(
                job.id, active=job.work.top == 0, top=job.work.top, base=job.work.base, on_error=job.on_error
            )
        except QemuRefuses as refusal:
            return Rejected(refusal.problem)
        return Accepted(self.qemu.process)

    def _overlay_backing(self) -> str | None:
        if self.job.overlay is None:
            return None
        below = self.qemu.chain[self.qemu.chain.index(NODES[self.job.work.top - 1]) + 1]
        return FILES[NODES.index(below)]

    def _clean_up(self) -> Input:
        job = self.job
        if job.ending is State.COMPLETED:
            # Here images are deleted and nodes released: never before the merge, or the copy, is a fact.
            assert self.really_done(), "nothing is tidied away before the proof"
        if self.qemu.up and job.id in self.qemu.jobs and self.qemu.jobs[job.id].status == "concluded":
            self.qemu.dismiss(job.id)
        return CleanedUp(Result(chain=FILES))

    def really_done(self) -> bool:
        """Whether what the job was for has happened to the data."""
        work = self.job.work
        merged = self.qemu.chain == NODES[: work.top] + NODES[work.base :]
        return merged or (self.job.intent is Intent.KEEP and self.qemu.kept)

    def look(self) -> Input | None:
        """Read the truth and bring the job in line; the event that came of it."""
        job, qemu = self.job, self.qemu
        if job.ended:
            return None
        if not qemu.up:
            self.advance(Gone())
            return Gone()
        if job.state is State.QUEUED:
            self.advance(Launch(qemu.process))
            return None
        seen = qemu.query()
        stands = job.id in seen and seen[job.id].status in {"paused", "standby"}
        self.paused_looks = self.paused_looks + 1 if stands else 0
        timed = {id_: replace(state, paused_for=float(self.paused_looks)) for id_, state in seen.items()}
        for _, event in reconcile([job], timed, qemu.process):
            self.advance(event)
            return event
        return None

    def ask(self, wish: Input) -> None:
        """Pass on what a caller wants; a refusal changes nothing."""
        before = self.job
        try:
            self.advance(wish)
        except Refused:
            assert self.job == before


JOBS = st.one_of(
    st.builds(active_job, on_ready=st.sampled_from(OnReady), on_error=st.sampled_from(OnError)),
    st.builds(active_job, on_ready=st.just(OnReady.WAIT), on_error=st.sampled_from(OnError)),
    st.builds(intermediate_job, on_error=st.sampled_from(OnError)),
)


class JobMachine(RuleBasedStateMachine):
    """One job, from its acceptance to its end, whatever happens around it."""

    service: Service
    qemu: Qemu
    last: Input | None
    old: Observed | None
    processes: int
    trouble: int

    @initialize(job=JOBS, trouble=st.integers(0, 3), looks=st.integers(0, 4), done=st.booleans())
    def accept(self, job: Job, trouble: int, looks: int, *, done: bool) -> None:
        """A job is accepted, and has come some way already; so much `trouble` is still ahead of it."""
        self.qemu = Qemu(chain=NODES, process=PROCESS)
        self.service = Service(job, self.qemu)
        self.last = self.old = None
        self.processes = 1
        self.trouble = trouble
        for _ in range(looks):
            self.qemu.move(done=done)
            self.look()

    @precondition(lambda self: self.service.job.ended)
    @rule(job=JOBS, trouble=st.integers(0, 3), looks=st.integers(0, 4), done=st.booleans())
    def another_job(self, job: Job, trouble: int, looks: int, *, done: bool) -> None:
        """The next one on a disk like it."""
        self.accept(job, trouble, looks, done=done)

    def go_wrong(self, fault: str | None) -> None:
        """Have the next command or transaction meet this trouble, and no older one."""
        self.service.faults = deque() if fault is None else deque([fault])

    # The service

    @rule()
    def look(self) -> None:
        """The service reads QEMU's jobs and brings its own in line."""
        self.last = self.service.look()
        if isinstance(self.last, Observed):
            self.old = self.old or self.last

    @rule(moves=st.integers(1, 4), done=st.booleans(), fault=st.sampled_from([None, None, None, *FAULTS]))
    def time_passes(self, moves: int, fault: str | None, *, done: bool) -> None:
        """QEMU's job goes on, and the service looks at it; what follows from the look may meet trouble."""
        for _ in range(moves):
            self.qemu.move(done=done)
        self.go_wrong(fault)
        self.look()

    @precondition(lambda self: isinstance(self.last, Observed))
    @rule(late=st.booleans())
    def something_is_told_again(self, *, late: bool) -> None:
        """What was seen is told once more; or something that was true once comes when it may be long past."""
        again = self.old if late else self.last
        self.old = None if late else self.old
        if isinstance(again, Observed):
            self.service.advance(again)

    @precondition(lambda self: self.trouble > 0)
    @rule(fault=st.sampled_from(["die now", *FAULTS]))
    def something_goes_wrong(self, fault: str) -> None:
        """The service is killed while it is idle; or the next command, or the next transaction, meets trouble."""
        self.trouble -= 1
        if fault == "die now":
            self.service.restart()
        else:
            self.service.faults.append(fault)

    @precondition(lambda self: not self.service.job.ended)
    @rule(
        wish=st.sampled_from([Pivot(), Pivot(), Abort(), Abort(force=True), Pause(), Resume(), SetSpeed(1)]),
        fault=st.sampled_from([None, None, *FAULTS]),
    )
    def somebody_asks(self, wish: Input, fault: str | None) -> None:
        """A caller steers the job, whatever state it is in; what follows from it may meet trouble."""
        self.go_wrong(fault)
        self.service.ask(wish)

    # QEMU

    @rule(moves=st.integers(1, 4), done=st.booleans())
    def time_passes_unseen(self, moves: int, *, done: bool) -> None:
        """QEMU's job goes on, and nobody looks."""
        for _ in range(moves):
            self.qemu.move(done=done)

    @precondition(lambda self: self.qemu.jobs)
    @rule(drain=st.booleans())
    def qemu_stops_the_job(self, *, drain: bool) -> None:
        """QEMU pauses the job for a moment of its own; or the job meets ENOSPC."""
        if drain:
            self.qemu.blip()
        else:
            self.qemu.run_out_of_space()

    @precondition(lambda self: self.trouble > 0 or not self.qemu.up)
    @rule(moves=st.integers(0, 4))
    def qemu_dies_or_returns(self, moves: int) -> None:
        """QEMU ends, and what is on disk stays; or another process runs the same chain."""
        if self.qemu.up:
            self.trouble -= 1
            for _ in range(moves):
                self.qemu.move(done=True)
            self.qemu.crash()
        else:
            self.processes += 1
            self.qemu.restart(replace(PROCESS, started=self.processes))

    @precondition(lambda self: self.service.job.id in self.qemu.jobs)
    @rule(what=st.sampled_from(["cancel", "cancel-force", "complete", "pause", "resume", "dismiss"]))
    def another_client_meddles(self, what: str) -> None:
        """Somebody else at QEMU's monitor steers the job, or takes it away."""
        id_ = self.service.job.id
        with suppress(QemuRefuses):
            match what:
                case "cancel" | "cancel-force":
                    self.qemu.cancel(id_, force=what == "cancel-force")
                case "complete":
                    self.qemu.complete(id_)
                    self.qemu.foreign_pivot = True
                case "pause":
                    self.qemu.pause(id_)
                case "resume":
                    self.qemu.resume(id_)
                case _:
                    self.qemu.dismiss(id_)

    # What holds at any time

    @invariant()
    def completed_means_merged(self) -> None:
        """A completed job has really been done; a failed or canceled one has not."""
        job, qemu = self.service.job, self.qemu
        done = self.service.really_done()
        if job.state is State.COMPLETED:
            assert done
        if job.state in {State.FAILED, State.CANCELED} and not qemu.foreign_pivot:
            assert not done

    @invariant()
    def nothing_runs_on_after_the_end(self) -> None:
        """QEMU does not go on with a job whose end was told."""
        job = self.service.job
        if job.ended and job.id in self.qemu.jobs:
            assert self.qemu.jobs[job.id].status == "concluded"

    @invariant()
    def an_ended_job_stays_as_it_is(self) -> None:
        """An outcome is final, in the journal and in memory, whatever is seen later."""
        job = self.service.job
        if job.ended:
            assert job == self.service.told[-1].job
            for event in (self.last, self.old, Gone()):
                if event is not None:
                    assert step(job, event, 0) == Step(job)

    @invariant()
    def percent_is_full_only_from_ready_on(self) -> None:
        """100 % is shown from ready on, or at the successful end."""
        job = self.service.job
        assert 0.0 <= job.percent <= 100.0
        if job.percent == 100.0:
            assert job.ready_at is not None or job.state is State.COMPLETED

    @invariant()
    def events_tell_a_life_in_order(self) -> None:
        """Queued, started, ready before pivoting, and one ending, which comes last."""
        types = [told.type for told in self.service.told if told.type is not None]
        assert types[0] is EventType.QUEUED
        assert types.count(EventType.STARTED) <= 1
        assert types.count(EventType.ABORTING) <= 1
        assert not ENDING_EVENTS & set(types[:-1])
        assert (types[-1] in ENDING_EVENTS) is self.service.told[-1].job.ended
        started = types.index(EventType.STARTED) if EventType.STARTED in types else len(types)
        assert set(types[:started]) <= {EventType.QUEUED} | ENDING_EVENTS
        assert EventType.PIVOTING not in types or self.service.job.pivotable
        if EventType.PIVOTING in types:
            assert EventType.READY in types[: types.index(EventType.PIVOTING)]

    @invariant()
    def times_are_in_order(self) -> None:
        """Created, started, ready, finished; and a reason for a pause if and only if there is one."""
        job = self.service.job
        times = [job.created_at, job.started_at, job.ready_at, job.finished_at]
        known = [time for time in times if time is not None]
        assert known == sorted(known)
        assert (job.finished_at is not None) is job.ended
        assert (job.pause_reason is not None) is (job.state is State.PAUSED)

    def teardown(self) -> None:
        """Everybody cooperates now: the job has to end."""
        if not hasattr(self, "service"):
            return
        service, qemu = self.service, self.qemu
        service.faults.clear()
        for _ in range(ROUNDS):
            if service.job.ended:
                break
            qemu.move(done=True)
            service.look()
            if service.job.state is State.READY:
                service.ask(Pivot())
            elif service.job.state is State.PAUSED:
                service.ask(Resume())
        assert service.job.ended, f"the job stays {service.job.state} for ever"
        self.completed_means_merged()
        self.nothing_runs_on_after_the_end()
        self.events_tell_a_life_in_order()
        self.times_are_in_order()


# It takes seconds; the time is for hypothesis to find a short story where one fails.
TestJobMachine = pytest.mark.timeout(600)(JobMachine.TestCase)
TestJobMachine.settings = settings(
    max_examples=500, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
