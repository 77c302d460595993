"""What may go wrong in a run, as switches, and how long the engine may take."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Hazards:
    """Which troubles a run may meet.

    The last group leads to defects that are known, or is slow, so it is off by default.
    """

    lost_replies: bool = True
    """A command arrives and its reply does not, or it never arrives."""
    late_replies: bool = True
    """QEMU is slow for some seconds, also longer than the time-box of a command."""
    cuts: bool = True
    """The connection to a monitor breaks."""
    busy: bool = True
    """Another client holds the monitor."""
    hangs: bool = True
    """QEMU is stopped (SIGSTOP) and goes on later."""
    kills: bool = True
    """QEMU is killed, or ends in order; another process may be started on the same images."""
    blips: bool = True
    """QEMU pauses jobs for a moment for reasons of its own."""
    foreign: bool = True
    """Other clients cancel, complete, dismiss, pause and resume jobs."""
    full: bool = True
    """The file system of the images fills up."""
    slow_files: bool = True
    """A call of the `Images` port takes some seconds."""
    journal_full: bool = True
    """The journal can't be written for a moment."""
    service_kills: bool = True
    """The service is killed, anywhere or right before or after a commit of the journal."""
    restarts: bool = True
    """The service is restarted in order."""
    blind: bool = True
    """Looking at processes fails, as with EMFILE: `alive` gives None."""
    remote: bool = True
    """A domain is on another host: its process and its files can't be seen."""
    scarce: bool = True
    """There are fewer places than jobs."""

    double_put: bool = True
    """The same domain is registered twice at once."""
    put_and_delete: bool = True
    """The same domain is forgotten and registered at once."""
    delete_while_planning: bool = True
    """A domain is deleted while a commit on it is being planned."""
    read_streams: bool = False
    """Clients read a domain's disks without a pause, which takes most of the time of a run."""
    foreign_revert: bool = True
    """While the service is away, another client takes a job away and moves the device onto its base."""
    foreign_pivot_crash: bool = True
    """Another client completes a job of the service, and QEMU may end before anybody has looked."""
    gone_sharers: bool = False
    """Domains share a base, and are shut off; nobody has the service forget one then."""
    long_hangs: bool = True
    """A QEMU is stopped for minutes; a call of the `Images` port takes minutes."""

    def only(self, *names: str) -> Hazards:
        """Those that are named, and no others."""
        return replace(NONE, **dict.fromkeys(names, True))

    def also(self, *names: str) -> Hazards:
        """These, and those that are named."""
        return replace(self, **dict.fromkeys(names, True))

    def without(self, *names: str) -> Hazards:
        """These but for those that are named."""
        return replace(self, **dict.fromkeys(names, False))


NONE = Hazards(**dict.fromkeys((field.name for field in fields(Hazards)), False))
"""A world in which nothing goes wrong."""

DEFAULT = Hazards()
"""All that the service has to cope with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many virtual seconds the engine may take, once the last trouble near it is over."""

    ready_s: float = 5.0
    """From QEMU's `ready` to the pivot or the end of a job whose `on_ready` says so."""
    queue_s: float = 60.0
    """From a free place to the start of a job that waits for one, while its QEMU answers."""
    calm_s: float = 120.0
    """From the end of all faults to the end of each job, or to its waiting for a person."""
    calls_a_second: int = 5000
    """Calls of the ports in one virtual second; more of them are made in a circle."""
    failed_writes_a_second: int = 5000
    """Attempts in one virtual second to write to a journal that is full."""
    after_trouble_s: float = 25.0
    """After a fault: what a time-box, a heartbeat and a new attempt to connect take together."""


BOUNDS = Bounds()
