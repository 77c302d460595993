"""What another process may do to files: asked of the kernel, in a thread that has that process's rights to files.

The user, the group and the further groups by which files are judged belong to a thread on Linux (setfsuid(2); the
system call setgroups, unlike the function of that name). So a thread of its own takes them, acts, and ends.
"""

from __future__ import annotations

import ctypes
import os
import platform
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from app.core.evidence import Process
from app.hostfs.process import alive, pid_here

CAP_DAC_OVERRIDE: Final = 1
SETGROUPS: Final = {"x86_64": 116, "aarch64": 159}
"""The number of setgroups(2): glibc's function would change all threads."""

UNSEEN: Final = "the process behind the monitor can't be seen, so nobody knows what it may delete; set image_roots"

T = TypeVar("T")

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Rights:
    """By which user and groups a process's rights to files are judged; `overrides`: it is not judged by them."""

    user: int
    group: int
    groups: tuple[int, ...]
    overrides: bool


def rights_of(process: Process | None) -> Rights | None:
    """A process's rights to files; None where they can't be seen, or it has ended."""
    if process is None or pid_here(process) is None:
        return None
    try:
        lines = Path(f"/proc/{pid_here(process)}/status").read_text().splitlines()
        fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        own = Path("/proc/self/ns/user").readlink() == Path(f"/proc/{pid_here(process)}/ns/user").readlink()
    except OSError:
        return None
    if alive(process) is not True:
        # The pid may be another's by now.
        return None
    capable = own and int(fields["CapEff"][0], 16) >> CAP_DAC_OVERRIDE & 1 == 1
    user, group = int(fields["Uid"][3]), int(fields["Gid"][3])
    return Rights(user, group, tuple(int(each) for each in fields["Groups"]), overrides=capable and user == 0)


def may_unlink_as(process: Process | None, folder: int, file: os.stat_result) -> str | None:
    """Why the process could not unlink a file of the open folder; None if it could. May block."""
    rights = rights_of(process)
    if rights is None:
        return UNSEEN
    if rights.overrides:
        return None
    above = os.fstat(folder)
    if above.st_mode & stat.S_ISVTX and rights.user not in (file.st_uid, above.st_uid):
        return "the process behind the monitor could not delete it (sticky folder)"
    place = f"/proc/self/fd/{folder}"
    allowed = _as(rights, lambda: os.access(place, os.W_OK | os.X_OK, effective_ids=True))
    return None if allowed is True else "the process behind the monitor could not delete it"


def unlink_as(process: Process | None, folder: int, name: str) -> str | None:
    """Unlink a file of the open folder with the rights of the process; why that was not done, or None. May block."""
    rights = rights_of(process)
    if rights is None:
        return UNSEEN
    if rights.overrides:
        os.unlink(name, dir_fd=folder)
        return None
    done = _as(rights, lambda: os.unlink(name, dir_fd=folder))
    return None if done is None else "the process behind the monitor could not delete it"


class _Failed:
    """The thread could not take the rights, or what it tried was refused."""


def _as(rights: Rights, work: Callable[[], T]) -> T | _Failed:
    """What `work` returns in a thread with these rights."""
    found: list[T | _Failed] = [_Failed()]

    def run() -> None:
        try:
            if _take(rights):
                found[0] = work()
        except OSError:
            found[0] = _Failed()

    thread = threading.Thread(target=run, name="rights", daemon=True)
    thread.start()
    thread.join()
    return found[0]


def _take(rights: Rights) -> bool:
    """Have this thread judged by these rights from now on; whether that could be done."""
    if os.geteuid() != 0:
        # Without root's rights nobody else's can be taken, and one's own are no more than one's own.
        return rights.user == os.geteuid()
    number = SETGROUPS.get(platform.machine())
    groups = (ctypes.c_uint32 * len(rights.groups))(*rights.groups)
    if number is None or _libc.syscall(number, len(rights.groups), groups) != 0:
        return False
    _libc.setfsgid(rights.group)
    _libc.setfsuid(rights.user)
    # Both functions return what was there before, also where they have failed.
    return _libc.setfsgid(-1) == rights.group and _libc.setfsuid(-1) == rights.user
