"""What is done in a round, as pure data: a seed and a number make the same plan each time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

JSON = dict[str, Any]

DOMAINS: Final = ("a", "b", "c")
LAYERS: Final = 6
SIZE: Final = 8 << 20
"""The disks' virtual size, in bytes."""


class Kind(StrEnum):
    """What a request for a job asks for."""

    INTERMEDIATE = "intermediate"
    PULL = "pull"
    PIVOT = "pivot"
    WAIT = "wait"
    KEEP = "keep"


class How(StrEnum):
    """What is done to a process or a connection."""

    SERVICE_KILL = "service SIGKILL"
    SERVICE_TERM = "service SIGTERM"
    QEMU_KILL = "QEMU SIGKILL"
    QEMU_QUIT = "QEMU quit"
    QEMU_STOP = "QEMU SIGSTOP"
    CUT = "monitor cut"

    @property
    def ends_service(self) -> bool:
        """Whether the service ends of it."""
        return self in (How.SERVICE_KILL, How.SERVICE_TERM)

    @property
    def ends_qemu(self) -> bool:
        """Whether a QEMU ends of it."""
        return self in (How.QEMU_KILL, How.QEMU_QUIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask for a job, without waiting for the answer. `after` is in seconds from the step before, here and below."""

    after: float
    kind: Kind
    body: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Steer:
    """Ask something of the domain's last job; `pivot` and `abort` where it waits at ready are asked once it does."""

    after: float
    verb: str
    at_ready: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Write and flush as the guest, in bytes."""

    after: float
    at: int
    length: int
    pattern: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Do something bad; `hold` is the seconds until the service or a stopped QEMU goes on.

    `aim` is a state to wait for, a short time at most, that a job of the domain is to be in; `after` counts from then.
    `starts` are how long starts of the service last that are killed before the one that counts; that one is in a pid
    namespace of its own if `apart` is set.
    """

    after: float
    how: How
    hold: float
    aim: str | None = None
    starts: tuple[float, ...] = ()
    apart: bool = False


class Hand(StrEnum):
    """What another client of QEMU does to a job of the service."""

    CANCEL = "job-cancel"
    CANCEL_GENTLY = "block-job-cancel"
    COMPLETE = "job-complete"
    PAUSE = "job-pause"
    RESUME = "job-resume"
    FINALIZE = "job-finalize"
    DISMISS = "job-dismiss"
    SPEED = "block-job-set-speed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meddle:
    """Another client does something to the domain's job in QEMU; `aim` as in `Fault`."""

    after: float
    hand: Hand
    aim: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Revive:
    """Start the domain's QEMU anew if it has ended."""

    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Await:
    """Wait until the domain's jobs have ended or wait for somebody; nothing more than `seconds`."""

    seconds: float
    after: float = 0.0


Step = Ask | Steer | Write | Fault | Meddle | Revive | Await


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPlan:
    """The steps of one domain; `slow` is the most bytes/s that its base takes (0: no limit).

    `tcp`: its monitor is reached over TCP, so that nothing is seen of its process. `shared`: another domain, which is
    off, has an overlay on its base.
    """

    name: str
    slow: int
    tcp: bool
    shared: bool
    pivots_at_end: bool
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """What is done in one round, by each domain's thread at its own pace."""

    number: int
    domains: tuple[DomainPlan, ...]

    @property
    def faults(self) -> tuple[Fault, ...]:
        """All that is done to processes and connections."""
        return tuple(step for domain in self.domains for step in domain.steps if isinstance(step, Fault))


WEIGHTS: Final = {
    How.SERVICE_KILL: 32,
    How.SERVICE_TERM: 12,
    How.QEMU_KILL: 18,
    How.QEMU_QUIT: 8,
    How.QEMU_STOP: 14,
    How.CUT: 16,
}


AIMS: Final = {None: 30, "starting": 10, "running": 20, "ready": 10, "pivoting": 15, "concluding": 15}


@dataclass(slots=True)
class _Draft:
    name: str
    jobs: list[list[Step]] = field(default_factory=list[list[Step]])


def plan_round(seed: int, number: int) -> RoundPlan:
    """The plan of the round `number` under `seed`."""
    chance = random.Random(f"{seed}/{number}")
    drafts = [_Draft(f"r{number}{name}") for name in DOMAINS]
    for draft in drafts:
        draft.jobs = [_job(chance) for _ in range(chance.choice((1, 2, 2)))]
    most, services = chance.choice((1, 1, 1, 2)), 0
    for _ in range(chance.choice((2, 3, 4, 4))):
        how = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if how.ends_service and services == most:
            # A start of the service is what takes most of a round's time.
            how = chance.choice((How.QEMU_KILL, How.QEMU_KILL, How.CUT, How.QEMU_STOP))
        services += how.ends_service
        job = chance.choice(chance.choice(drafts).jobs)
        places = [at for at in range(1, len(job)) if not isinstance(job[at - 1], Await)]
        place = chance.choice(places or [1])
        hold = chance.choice((0.0, 0.0, 0.05, 0.2, 0.4, 1.3))
        aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
        job.insert(place, Fault(after=_moment(chance), how=how, hold=hold, aim=aim))
        if how.ends_qemu and chance.random() < 0.6:
            job.insert(place + 1, Revive(after=_moment(chance)))
    more = random.Random(f"{seed}/{number}/others")
    for draft in drafts:
        draft.jobs = [_with_others(more, job) for job in draft.jobs]
    domains = tuple(
        DomainPlan(
            name=draft.name,
            tcp=more.random() < 0.2,
            shared=more.random() < 0.25,
            slow=chance.choice((0, 0, 8 << 20, 24 << 20)),
            pivots_at_end=chance.random() < 0.5,
            steps=tuple(step for job in draft.jobs for step in job),
        )
        for draft in drafts
    )
    return RoundPlan(number=number, domains=domains)


def _restless(chance: random.Random, step: Step) -> Step:
    if not isinstance(step, Fault) or not step.how.ends_service:
        return step
    starts = tuple(chance.uniform(0, 1.5) for _ in range(chance.choice((0, 0, 0, 1, 2))))
    return replace(step, starts=starts, apart=chance.random() < 0.3)


def _with_others(chance: random.Random, job: list[Step]) -> list[Step]:
    """The steps of a job, with other clients of QEMU in between, and with services that die while they start."""
    steps = [_restless(chance, step) for step in job]
    for _ in range(chance.choice((0, 0, 1, 2))):
        aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
        place = chance.randint(1, len(steps))
        steps.insert(place, Meddle(after=_moment(chance), hand=chance.choice(list(Hand)), aim=aim))
    return steps


def _moment(chance: random.Random) -> float:
    """Seconds from a spread that has most of its weight where fast jobs begin and end."""
    return chance.choice((0.0, chance.uniform(0, 0.008), chance.uniform(0, 0.05), chance.uniform(0.02, 0.3)))


def _job(chance: random.Random) -> list[Step]:
    kind = chance.choice(list(Kind))
    body: JSON = {"flags": ["bandwidth_bytes"]}
    if kind is Kind.INTERMEDIATE:
        # Mostly more than one layer, so that there is something to see half done.
        body |= {"top": "vda[1]", "base": chance.choice(("vda[2]", "vda[3]", "vda[4]", None))}
    elif kind is Kind.PULL:
        body |= {
            "top": chance.choice(("vda[0]", "vda[1]")),
            "base": chance.choice(("vda[2]", "vda[3]", "vda[4]", None)),
        }
    else:
        body |= {"base": chance.choice((None, "vda[1]", "vda[2]", "vda[4]")), "on_ready": kind.value}
        body["flags"] += ["active"]
    if kind not in (Kind.KEEP, Kind.PULL) and chance.random() < 0.5:
        body["flags"] += ["delete"]
    # Each request has a speed of its own, by which its job is known also where no answer came; see `Stage.ask`.
    body["bandwidth"] = chance.choice((0, 2 << 20, 4 << 20, 16 << 20))
    steps: list[Step] = [Ask(after=_moment(chance), kind=kind, body=body)]
    for _ in range(chance.choice((0, 1, 2, 3))):
        if chance.random() < 0.5:
            steps.append(_write(chance))
        else:
            verb = chance.choice(("pause", "resume", "speed", "abort", "force"))
            steps.append(Steer(after=_moment(chance), verb=verb))
    if kind is Kind.WAIT:
        steps.append(Steer(after=_moment(chance), verb=chance.choice(("pivot", "pivot", "abort")), at_ready=True))
        if chance.random() < 0.5:
            steps.append(_write(chance))
    if chance.random() < 0.7:
        steps.append(Await(seconds=1.5))
    return steps


def _write(chance: random.Random) -> Write:
    length = chance.randrange(1, 48) * 4096
    at = chance.randrange((SIZE - length) // 4096) * 4096
    return Write(after=_moment(chance), at=at, length=length, pattern=chance.randrange(1, 256))
