# SPDX-License-Identifier: Apache-2.0
"""What is measured: the commands of our own served devices, with default options, and of the back ends beside them."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from virtiova import _load
from virtiova.bench.memory import PAGE
from virtiova.machine.backend import START_SECONDS, BackEnd, Spawned
from virtiova.machine.qemu.process import memory_file

Kind = Literal["blk", "net"]
Data = Literal["image", "written", "zeros", "none"]
"""What a disk holds: the image that it was started with, what was written to it first, or nothing but zeros."""

_SERVE: Final = f"{shlex.quote(sys.executable)} -m virtiova serve"
_PRIORITY: Final = 2
"""Of the back end among real-time threads: what it has on the front end's processor comes before that, as it must
where the two would wait for each other."""
_FILE: Final = "driver=file,filename={image},aio="
_TESTPMD: Final = (
    "dpdk-testpmd --lcores 0@{cpu},1@{cpu} --no-huge --no-shconf -m 256 --no-pci --no-telemetry "
    "--file-prefix virtiova-bench-{pid} --vdev net_vhost0,iface={socket},queues=1,iommu-support=1 "
    "-- --nb-cores=1 --no-mlockall --forward-mode=rxonly --total-num-mbufs=4096 --auto-start --stats-period=30"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A back end: its command, with ``{socket} {image} {size} {cpu} {pid}`` to be filled in."""

    name: str
    kind: Kind
    command: str
    data: Data = "none"
    package: str = ""
    """Whose program it is; empty for our own."""
    bit: bool = True
    """Whether it can be asked to honour bit 33."""
    packed: bool = True
    """Whether it has packed rings."""
    spins: bool = False
    """Whether it takes a whole processor also while it has nothing to do."""

    @property
    def missing(self) -> str:
        """What is to be installed for it; empty if nothing."""
        program = shlex.split(self.command)[0]
        if not self.package or shutil.which(program):
            return ""
        return f"n/a: no {program} (apt install {self.package})"


def _daemon(name: str, drive: str, data: Data) -> Subject:
    """QEMU's storage daemon, which offers no bit 33, with one drive."""
    command = (
        f"qemu-storage-daemon --object iothread,id=it0,poll-max-ns=32768 --blockdev {drive},node-name=n0 "
        "--export type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={socket},writable=on,iothread=it0"
    )
    return Subject(f"qemu-storage-daemon {name}", "blk", command, data, "qemu-system-common", bit=False, packed=False)


MEMORY: Final = Subject(
    "virtiova memory", "blk", f"{_SERVE} blk --memory {{size}} -q --socket-path {{socket}}", "written"
)
FILE: Final = Subject("virtiova file", "blk", f"{_SERVE} blk {{image}} -q --socket-path {{socket}}", "image")
HANDLER: Final = Subject(
    "virtiova Python handler",
    "blk",
    f"{shlex.quote(sys.executable)} -m virtiova.bench.handler {{image}} {{socket}}",
    "image",
)
NULL: Final = _daemon("null-co", "driver=null-co,size={size},read-zeroes=on", "zeros")
URING: Final = _daemon("io_uring", _FILE + "io_uring", "image")
THREADS: Final = _daemon("threads", _FILE + "threads", "image")
NET: Final = Subject("virtiova net", "net", f"{_SERVE} net --discard -q --socket-path {{socket}}")
TESTPMD: Final = Subject("dpdk-testpmd rxonly", "net", _TESTPMD, package="dpdk-dev", spins=True)

SUBJECTS: Final[dict[Kind, tuple[Subject, ...]]] = {
    "blk": (MEMORY, NULL, FILE, URING, THREADS, HANDLER),
    "net": (NET, TESTPMD),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where things run: the processors of front end and back end, which may be one, and whether both come
    before all other programs."""

    front: int
    back: int
    realtime: bool = False


class Running:
    """A subject that runs, with a disk image of ``pages`` pages. Whatever it leaves behind goes when it is closed."""

    def __init__(self, subject: Subject, place: Place, pages: int) -> None:
        self.subject = subject
        self.filled = subject.data != "written"
        self._cleanup = contextlib.ExitStack()
        try:
            image = -1
            if subject.data == "image":
                image = image_file(pages)
                self._cleanup.callback(os.close, image)
            command = _filled(subject, place, pages)
            self._spawned = Spawned(BackEnd(spawn=command), image, -1)
            self._cleanup.callback(self._spawned.close)
        except BaseException:
            self.close()
            raise
        self.gone = self._spawned.gone

    @property
    def pid(self) -> int:
        """Its process."""
        process = self._spawned.process
        return 0 if process is None else process.pid

    def connect(self) -> socket.socket:
        """A fresh connection."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(START_SECONDS)
        try:
            sock.connect(self._spawned.path)
        except OSError as error:
            sock.close()
            raise self.gone(f"cannot connect: {error.strerror or error}") from error
        return sock

    def close(self) -> None:
        """End it."""
        self._cleanup.close()


def _filled(subject: Subject, place: Place, pages: int) -> str:
    """The command on its processor, still without the socket and the image, which have their names later."""
    command = subject.command
    for name, value in (("{size}", pages * PAGE), ("{cpu}", place.back), ("{pid}", os.getpid())):
        command = command.replace(name, str(value))
    wrapper = shlex.quote(str(Path(__file__).with_name("pinned.py")))
    # Who spins has a thread that does so on a processor that the command names, and others that need one, too.
    where = -1 if subject.spins else place.back
    priority = _PRIORITY if place.realtime else 0
    return f"{shlex.quote(sys.executable)} -I -S {wrapper} {where} {priority} {{socket}} {command}"


def image_file(pages: int) -> int:
    """The descriptor of a disk image in memory (tmpfs), with what `_load.paint` writes."""
    fd = memory_file("virtiova-bench-image", pages * PAGE)
    try:
        piece = bytearray(min(pages, 1024) * PAGE)
        for page in range(0, pages, 1024):
            count = min(1024, pages - page)
            _load.paint(piece, 0, page, count)
            os.pwrite(fd, memoryview(piece)[: count * PAGE], page * PAGE)
    except BaseException:
        os.close(fd)
        raise
    return fd
