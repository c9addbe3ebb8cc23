# SPDX-License-Identifier: Apache-2.0
"""The vDPA bus, as far as it concerns who serves a device: whether it is there, and how it gets off.

A device cannot be destroyed while it is on the bus, and whoever takes it off waits in the kernel until the driver has
let go - which takes a device that goes on serving, and sometimes a user who closes a file. So a process of its own does
it, that can be waited for as long as one likes, and that holds nothing of what is served.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import select
import signal
import socket
import time
from typing import Final

from virtiova.errors import ProtocolError
from virtiova.wire import genl

SECONDS: Final = 15.0
"""How long the driver may take to let go."""
_GENERIC: Final = 16
_DEVICES: Final = "/sys/bus/vdpa/devices"


def on_bus(name: str) -> bool:
    """Whether a vDPA device of that name is there."""
    return os.path.exists(f"{_DEVICES}/{name}")


def used_by(name: str) -> str:
    """The device file of vhost-vdpa's by which a process uses it now; "" if none does."""
    try:
        found = [each for each in os.listdir(f"{_DEVICES}/{name}") if each.startswith("vhost-vdpa-")]
    except FileNotFoundError:
        return ""
    for each in found:
        try:
            os.close(os.open(f"/dev/{each}", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return f"/dev/{each}"
    return ""


def mounted(name: str) -> list[str]:
    """Where file systems are mounted that are on the disk which has become of it."""
    numbers = set()
    disks = f"{_DEVICES}/{glob.escape(name)}/virtio*/block/*"
    # Of disks, and of their partitions.
    for each in (*glob.glob(f"{disks}/dev"), *glob.glob(f"{disks}/*/dev")):
        with contextlib.suppress(OSError), open(each, encoding="ascii") as file:
            numbers.add(file.read().strip())
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        lines = [line.split() for line in file]
    return [words[4] for words in lines if len(words) > 4 and words[2] in numbers]


def take_off(name: str) -> str:
    """Take it off, as ``vdpa dev del`` does; why that is not possible, or "". Waits for its driver."""
    if not on_bus(name):
        return ""
    if user := used_by(name):
        # The kernel would wait until it is closed, and nothing could end who waits.
        return f"{user} is in use by a process"
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _GENERIC) as sock:
            sock.bind((0, 0))
            sock.send(genl.family_query("vdpa"))
            family = genl.family_of(sock.recv(1 << 16))
            while genl.error_of(sock.recv(1 << 16)) is None:
                pass
            sock.send(genl.vdpa_delete(family, name))
            while (number := genl.error_of(sock.recv(1 << 16))) is None:
                pass
    except ProtocolError as problem:
        return str(problem)
    except OSError as error:
        number = error.errno or errno.EIO
    return os.strerror(number) if number not in (0, errno.ENODEV) else ""


class Remover:
    """A process that waits to be told to take ``name`` off the bus, and ends with this one. It is started before
    anything is given up, or made that it should not have."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if not (pid := os.fork()):
            # Once more, so that nobody has to wait for it: what serves may not even ask how it ended.
            if not os.fork():
                _wait_and_remove(theirs.fileno(), name)
            os._exit(0)
        os.waitpid(pid, 0)
        theirs.close()
        ours.setblocking(False)
        self._sock = ours
        self.answer: str | None = None
        """What came of it: "" if the device is off the bus. None until then."""
        self.dead: list[str] = []
        """Where file systems are still mounted of which the disk has gone."""

    def fileno(self) -> int:
        """Readable when there is an answer."""
        return self._sock.fileno()

    def begin(self) -> None:
        """Take it off now."""
        try:
            self._sock.send(b"!")
        except OSError as error:
            self.answer = f"nobody is there to do it: {error.strerror}"

    def heard(self) -> None:
        """There may be an answer."""
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            data = b"-" + (error.strerror or "").encode()
        why, *self.dead = data[1:].decode(errors="replace").split("\n")
        self.answer = why if data else "whoever was to do it has died"

    def wait(self) -> str:
        """Have it taken off by a process that serves nothing; why it is not off, or ""."""
        self.begin()
        end = time.monotonic() + SECONDS
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while self.answer is None and (left := end - time.monotonic()) > 0:
            poll.poll(left * 1000)
            self.heard()
        return f"its driver has not let go of it in {SECONDS:g} s" if self.answer is None else self.answer

    def close(self) -> None:
        """Let it end. May be called more than once. One that waits in the kernel is not waited for."""
        self._sock.close()


def _wait_and_remove(fd: int, name: str) -> None:
    """The other process; never returns."""
    try:
        # What belongs to whoever serves is held by nobody else: its device file, for one, is one process's at a time.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(0, fd)
        os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
        select.select([fd], [], [])
        if os.read(fd, 1):
            where = mounted(name)
            why = take_off(name)
            os.write(fd, b"-" + "\n".join([why, *(() if why else where)]).encode(errors="replace")[:4000])
    except OSError:
        pass
    finally:
        os._exit(0)
