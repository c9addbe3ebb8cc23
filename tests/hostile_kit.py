# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, and front ends that talk to its socket: well-behaved ones, and others."""

from __future__ import annotations

import array
import contextlib
import ctypes.util
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_kit import IOVA_BASE, PAGE, RAM, RING, SIZE, USED, WITH_BIT, FrontEnd
from virtiova.ring.layout import SplitLayout
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    Framer,
    IotlbKind,
    IotlbMessage,
    Message,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)

START_SECONDS = 30.0
"""A program starts in that time on any machine, whatever else it does."""
SECONDS = 10.0
"""How long an answer may take: much longer than it ever does."""
WITH_ANSWERS = frozenset(
    {
        *(Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_VRING_BASE),
        *(Request.GET_CONFIG, Request.GET_INFLIGHT_FD, Request.SET_LOG_BASE, Request.GET_MAX_MEM_SLOTS),
        Request.GET_STATUS,
    }
)
HEADER, DATA, STATUS = 0x8000, 0x9000, 0xA000
"""Where a request of the disk's is in the front end's memory."""


SANDBOX = "on" if ctypes.util.find_library("seccomp") else "auto"
"""What it does must not depend on it; `test_serve_sandbox.py` is skipped, and says so, where there is none."""


class Closed(Exception):
    """The server has closed the connection."""


class LiveFrontEnd(FrontEnd):
    """A front end on a socket. What `FrontEnd` does to its host, this one does to another process."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        self.sock.settimeout(SECONDS)
        self.back, self.theirs = socket.socketpair()
        self.back.settimeout(SECONDS)
        self.file = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.file, RAM)
        self.call, self.err, *self.kicks = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4))
        self.bit = False
        self._fds = [self.file, self.call, self.err, *self.kicks]
        self._avail: dict[int, int] = {}
        self._framer = Framer()
        self._misses = Framer()
        self.asked: list[IotlbMessage] = []
        self.refuses: set[int] = set()
        """Pages of our memory that are not mapped when they are asked for."""

    def __exit__(self, *_: object) -> None:
        for sock in (self.sock, self.back, self.theirs):
            sock.close()
        for fd in self._fds:
            os.close(fd)

    # -- messages

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Any bytes, with any descriptors."""
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], control)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def send(
        self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), *, ack: bool = False
    ) -> list[Message]:
        self.raw(Message(request, payload, need_reply=ack).encode(), fds)
        return [self.reply()] if ack or request in WITH_ANSWERS else []

    def reply(self) -> Message:
        """The next message of the server's."""
        while True:
            try:
                data, control, _, _ = self.sock.recvmsg(self._framer.wanted, 64)
            except ConnectionResetError:
                raise Closed from None
            if not data:
                raise Closed
            fds = array.array("i")
            for _, _, body in control:
                fds.frombytes(body)
            if found := self._framer.feed(data, fds):
                return found[0]

    def gone(self) -> bool:
        """Wait until the server has closed the connection; whether it has."""
        try:
            while True:
                self.reply()
        except Closed:
            return True
        except TimeoutError:
            return False

    # -- setting up

    def negotiate(self, features: int = WITH_BIT, protocol: int | None = None) -> None:
        self.bit = bool(features >> 33 & 1)
        (offered,) = self.send(Request.GET_PROTOCOL_FEATURES)
        agreed = wire.u64_of(offered.payload) if protocol is None else protocol
        self.send(Request.SET_PROTOCOL_FEATURES, wire.u64(agreed))
        self.send(Request.SET_OWNER)
        if agreed >> ProtocolFeature.BACKEND_REQ & 1:
            self.send(Request.SET_BACKEND_REQ_FD, b"", (self.theirs.fileno(),))
        self.ok(Request.SET_FEATURES, wire.u64(features))
        self.table()

    def start(self, index: int = 0, base: int = 0) -> None:
        at = index * 0x4000
        self._avail[index] = base
        self.send(Request.SET_VRING_NUM, VringState(index, SIZE).encode())
        self.send(Request.SET_VRING_BASE, VringState(index, base).encode())
        place = self.dma if self.bit else self.uva
        layout = SplitLayout(SIZE)
        address = VringAddr(index, 0, place(RING + at), place(USED + at), place(RING + at + layout.avail), 0)
        self.send(Request.SET_VRING_ADDR, address.encode())
        for request, fd in (
            (Request.SET_VRING_CALL, self.call),
            (Request.SET_VRING_ERR, self.err),
            (Request.SET_VRING_KICK, self.kicks[index]),
        ):
            self.send(request, wire.encode_vring_fd(index, True), (fd,))
        self.ok(Request.SET_VRING_ENABLE, VringState(index, 1).encode())

    def ready(self, features: int = WITH_BIT, rings: int = 1) -> LiveFrontEnd:
        """Negotiated, and the rings started; returns itself."""
        self.negotiate(features)
        for index in range(rings):
            self.start(index)
        return self

    # -- the driver

    def offer(self, *buffers: tuple[int, int, bool], index: int = 0, head: int = 0, kick: bool = True) -> None:
        super().offer(*buffers, index=index, head=head, kick=False)
        if kick:
            self.kick(index)

    def kick(self, index: int = 0) -> None:
        """Kick a ring."""
        os.eventfd_write(self.kicks[index], 1)

    def wait_used(self, count: int, index: int = 0) -> None:
        """Wait until the used index of a ring is ``count``, and answer the misses that come meanwhile."""
        end = time.monotonic() + SECONDS
        while self.used(index) != count:
            assert time.monotonic() < end, f"ring {index}: not {count} used, but {self.used(index)}"
            self.answer_misses()

    def wait_err(self) -> None:
        """Wait until the server says that a ring is broken."""
        assert select.select([self.err], [], [], SECONDS)[0], "no error was told"
        os.eventfd_read(self.err)

    def answer_misses(self, seconds: float = 0.001) -> None:
        """Pages of our memory are mapped, all others refused."""
        if not select.select([self.back], [], [], seconds)[0]:
            return
        for message in self._misses.feed(self.back.recv(self._misses.wanted)):
            miss = IotlbMessage.decode(message.payload)
            if miss.kind is not IotlbKind.MISS:
                continue
            self.asked.append(miss)
            offset = (miss.iova & -PAGE) - IOVA_BASE
            known = 0 <= offset < RAM and offset not in self.refuses
            if known:
                self.map(offset)
            if message.need_reply:
                self.back.sendall(message.acknowledge(known).encode())

    def read_sector(self, sector: int = 0, index: int = 0) -> int:
        """Read a sector through a ring that is ready; the status."""
        return self.request(0, sector=sector, index=index, room=512)

    def request(self, kind: int, data: bytes = b"", *, sector: int = 0, index: int = 0, room: int = 0) -> int:
        """A request with ``data`` or with ``room``; the status."""
        self.put(HEADER, struct.pack("<IIQ", kind, 0, sector))
        self.put(DATA, data)
        self.put(STATUS, b"\xff")
        want = (self.used(index) + 1) & 0xFFFF
        payload = [(self.dma(DATA), len(data) or room, bool(room))] if data or room else []
        self.offer((self.dma(HEADER), 16, False), *payload, (self.dma(STATUS), 1, True), index=index)
        self.wait_used(want, index)
        return self.get(STATUS, 1)[0]


@dataclass
class Costs:
    """What a process has taken."""

    fds: int
    maps: int
    rss_kib: int


class Served:
    """``virtiova serve`` in a process, with its log."""

    def __init__(self, folder: Path, *arguments: str, sandbox: str = SANDBOX, prefix: Sequence[str] = ()) -> None:
        self.path = folder / "live.sock"
        self._log = folder / "live.log"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    *prefix,
                    *(sys.executable, "-m", "virtiova", "serve", *arguments),
                    *("--socket-path", str(self.path), "--sandbox", sandbox),
                ],
                stderr=log,
            )
        try:
            self._started()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _started(self) -> None:
        end = time.monotonic() + START_SECONDS
        while "virtiova: serving" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text()

    def said(self, text: str) -> None:
        """Wait until the log has ``text``."""
        end = time.monotonic() + SECONDS
        while text not in self.log:
            assert time.monotonic() < end, f"{text!r} is not in the log:\n{self.log}"
            time.sleep(0.01)

    def front_end(self) -> LiveFrontEnd:
        """One more front end."""
        return LiveFrontEnd(self.path)

    def serves(self) -> None:
        """The next front end that behaves is served, and the process lives."""
        with self.front_end() as good:
            assert good.ready().read_sector() == 0
        assert self.process.poll() is None, self.log

    def costs(self) -> Costs:
        """What it takes now."""
        proc = Path("/proc") / str(self.process.pid)
        rss = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
        return Costs(len(os.listdir(proc / "fd")), len((proc / "maps").read_text().splitlines()), int(rss.split()[1]))

    def settled(self) -> Costs:
        """What it takes once it has nothing left to do: three looks in a row have the same descriptors."""
        looks = [self.costs()]
        end = time.monotonic() + SECONDS
        while len(looks) < 4 or len({look.fds for look in looks[-3:]}) > 1:
            assert time.monotonic() < end
            time.sleep(0.02)
            looks.append(self.costs())
        return looks[-1]

    def end(self) -> str:
        """End it as a user does; the log. It must have lived until now, and end in order."""
        assert self.process.poll() is None, self.log
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SECONDS) == 0, self.log
        assert not self.path.exists()
        assert "Traceback" not in self.log, self.log
        return self.log


@contextlib.contextmanager
def served(folder: Path, *arguments: str, sandbox: str = SANDBOX) -> Iterator[Served]:
    """A server, which has to be alive at the end."""
    server = Served(folder, *arguments, sandbox=sandbox)
    try:
        yield server
        server.end()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def wait_for_fds(live: Served, count: int) -> None:
    end = time.monotonic() + 5
    while live.costs().fds > count:
        assert time.monotonic() < end, f"{live.costs().fds} descriptors, there were {count}"
        time.sleep(0.01)
