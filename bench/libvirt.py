"""A libvirt of its own: libvirtd on folders that nobody else has, and `virsh`.

What stands in /etc, /run and /var/lib of the host is hidden from it by a mount namespace, and not touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HIDDEN = ("/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")

QEMU_CONF = """
stdio_handler = "file"
security_driver = "none"
cgroup_controllers = []
namespaces = []
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
"""
USERS = {"passwd": "libvirt-qemu:x:64055:64055::/nonexistent:/bin/false\n", "group": "libvirt-qemu:x:64055:\n"}
"""The user that this build of libvirt looks for at its start, though the settings name another one."""

LIBVIRTD_CONF = 'auth_unix_rw = "none"\n'

DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{image}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def missing() -> str | None:
    """Why libvirt can't be compared with here; None if it can."""
    absent = [tool for tool in ("libvirtd", "virsh", "unshare") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found"
    return None if os.geteuid() == 0 else "it takes root to run a libvirtd beside the host's"


class Libvirt:
    """A running libvirtd; `virsh` talks to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script: list[str] = []
        for hidden in HIDDEN:
            own = folder / hidden.strip("/").replace("/", "-")
            own.mkdir()
            script += [f"mkdir -p {hidden}", f"mount --bind {own} {hidden}"]
        (folder / "etc-libvirt" / "qemu.conf").write_text(QEMU_CONF)
        (folder / "etc-libvirt" / "libvirtd.conf").write_text(LIBVIRTD_CONF)
        for table, entry in USERS.items():
            own = folder / table
            own.write_text(Path("/etc", table).read_text() + entry)
            script.append(f"mount --bind {own} /etc/{table}")
        script.append("exec libvirtd")
        with (folder / "libvirtd.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.uri = f"qemu+unix:///system?socket={folder}/run-libvirt/libvirt-sock"
        deadline = time.monotonic() + 60
        while self._try("list").returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"libvirtd does not answer: {(folder / 'libvirtd.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def _try(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["virsh", "-q", "-c", self.uri, *command], capture_output=True, text=True, check=False)

    def virsh(self, *command: str) -> str:
        """Run a command of virsh; what it printed."""
        done = self._try(*command)
        assert done.returncode == 0, f"virsh {' '.join(command)}: {done.stderr}"
        return done.stdout

    def create(self, name: str, image: Path) -> None:
        """Start a domain on an image; its guest does not run."""
        description = self._folder / f"{name}.xml"
        emulator = shutil.which("qemu-system-x86_64")
        description.write_text(DOMAIN.format(name=name, image=image, emulator=emulator))
        self.virsh("create", "--paused", str(description))

    def destroy(self, name: str) -> None:
        """End a domain."""
        self.virsh("destroy", name)

    def pids(self) -> Sequence[int]:
        """The QEMU processes that it has started."""
        return [int(file.read_text()) for file in (self._folder / "run-libvirt" / "qemu").glob("*.pid")]

    def close(self) -> None:
        """End it, and its QEMUs."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def libvirt(folder: Path) -> Generator[Libvirt]:
    """A libvirtd for as long as the block lasts."""
    running = Libvirt(folder)
    try:
        yield running
    finally:
        running.close()
