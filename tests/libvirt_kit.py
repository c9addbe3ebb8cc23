# SPDX-License-Identifier: Apache-2.0
"""The real libvirt: its QEMU driver inside virsh (``qemu:///embed``), with folders of its own and no daemon.

As root it runs in a mount namespace whose users have the one that Debian's packages make (``libvirt-qemu``), else as
the session of whoever runs the tests, which does without virtiofs and vsock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

PRIVILEGED: Final = os.geteuid() == 0
DATA: Final = Path(__file__).parent / "data/libvirt"
_SECONDS: Final = 60
_USER: Final = """\
user = "root"
group = "root"
"""
_CONFIG: Final = """\
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
_PRIVATE: Final = """\
mount --bind "$1/passwd" /etc/passwd && mount --bind "$1/group" /etc/group && shift && exec "$@"
"""
_AROUND: Final = (
    ["unshare", "-m", "-n", "sh", "-c", _PRIVATE, "sh"] if PRIVILEGED else ["unshare", "-c", "-n", "--keep-caps"]
)


def missing() -> str:
    """Why there is no libvirt to ask here; empty if there is one."""
    if shutil.which("virsh") is None or not list(Path("/usr/lib").rglob("libvirt_driver_qemu.so")):
        return "no libvirt (to have it: apt install libvirt-clients libvirt-daemon-driver-qemu)"
    around = _AROUND[:-4] if PRIVILEGED else _AROUND
    done = subprocess.run([*around, "true"], capture_output=True, text=True, check=False)
    return f"no namespaces of one's own here: {done.stderr.strip()}" if done.returncode else ""


class Libvirt:
    """A libvirt of one's own. Nothing of it is left at the end, nor of its machines."""

    def __init__(self) -> None:
        # Sockets are in there, whose paths are short.
        self.folder = Path(tempfile.mkdtemp(prefix="lv-", dir="/tmp"))
        self.root = self.folder / "r"
        self._home = self.folder / "home"
        for path in (self.root / "etc", self._home):
            path.mkdir(parents=True)
        for number in range(1, 6):
            (self.folder / f"disk{number}.img").write_bytes(bytes(4096))
        with (self.folder / "pmem.img").open("wb") as file:
            file.truncate(128 << 20)
        (self.root / "etc/qemu.conf").write_text(_USER + _CONFIG if PRIVILEGED else _CONFIG)
        for name, line in (("passwd", "libvirt-qemu:x:0:0::/:/bin/false"), ("group", "libvirt-qemu:x:0:")):
            (self.folder / name).write_text(f"{Path('/etc', name).read_text().rstrip()}\n{line}\n")

    def __enter__(self) -> Libvirt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for pid in (self.root / "run/qemu").glob("*.pid"):
            if pid.stem != "driver":
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def virsh(self, *commands: str, fails: bool = False) -> str:
        """What virsh prints for some commands. It may only fail where that is said."""
        around = [*_AROUND, str(self.folder)] if PRIVILEGED else _AROUND
        call = [*around, "virsh", "-q", "-c", f"qemu:///embed?root={self.root}", "; ".join(commands)]
        places = {"HOME": str(self._home), "XDG_RUNTIME_DIR": str(self._home), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            call, env={**os.environ, **places}, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        assert fails or done.returncode == 0, f"{commands}: {done.stderr}"
        return done.stdout

    def file(self, text: str) -> Path:
        """A file with a domain."""
        path = self.folder / "domain.xml"
        path.write_text(text)
        return path

    def text(self, name: str, **more: str) -> str:
        """One of the domains in ``tests/data/libvirt``, with files that are there."""
        text = (DATA / f"{name}.xml").read_text().replace("@dir@", str(self.folder))
        for key, value in more.items():
            text = text.replace(f"@{key}@", value)
        return text

    def defined(self, text: str, name: str) -> str:
        """A domain as it is in ``/etc/libvirt/qemu`` once libvirt knows it: complete, with all addresses."""
        path = self.file(text)
        return self.virsh(f"define {path}", f"dumpxml --inactive {name}", f"undefine {name}")

    def native(self, text: str) -> bytes:
        """The command line that libvirt exports of a domain; its network cards are not those of the domain."""
        return self.virsh(f"domxml-to-native qemu-argv {self.file(text)}").encode()

    def log(self, name: str) -> bytes:
        """The log of a machine: the command line with which it was started last, and what it said."""
        found = (self.root / f"log/qemu/{name}.log").read_bytes()
        return found[found.rindex(b": starting up libvirt version") - 28 :]

    @contextlib.contextmanager
    def started(self, text: str, name: str) -> Iterator[None]:
        """A machine that runs, and waits before its first instruction."""
        self.virsh(f"create --paused {self.file(text)}")
        try:
            yield
        finally:
            self.virsh(f"destroy {name}", fails=True)
