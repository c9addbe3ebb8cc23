# SPDX-License-Identifier: Apache-2.0
"""Back ends for tests: one that says what a test wants it to say, and the commands of real ones."""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from virtiova.addr import IOVA, UVA, Access
from virtiova.features import Feature, mask
from virtiova.wire.vhost_user import (
    F_PROTOCOL_FEATURES,
    Framer,
    IotlbKind,
    IotlbMessage,
    Message,
    ProtocolFeature,
    Request,
    u64,
)

FEATURES = mask([F_PROTOCOL_FEATURES, Feature.VERSION_1, Feature.ACCESS_PLATFORM])
PROTOCOL = mask([ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ])
REPLIES = {Request.GET_FEATURES: FEATURES, Request.GET_PROTOCOL_FEATURES: PROTOCOL}

STORAGE_DAEMON = (
    "qemu-storage-daemon --blockdev driver=file,node-name=f0,filename={image} "
    "--export type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={socket},writable=on"
)
VIRTIOFSD = "/usr/lib/qemu/virtiofsd --socket-path={socket} -o source={share} -o sandbox=chroot -f"
TESTPMD = (
    "dpdk-testpmd --no-huge -m 128 --no-pci --no-telemetry --lcores 0@0,1@0 --file-prefix {prefix} "
    "--vdev net_vhost0,iface={socket},queues=1,iommu-support=1 "
    "-- --no-mlockall --forward-mode=io --auto-start --total-num-mbufs=2048 --stats-period=60"
)

Answer = Callable[["Scripted", Message], bytes | None]
"""What a request is answered with; None: with nothing. It may raise `Gone`."""


class Gone(Exception):
    """The back end goes away here."""


def honest(_: Scripted, message: Message) -> bytes | None:
    """What a back end says that has nothing against anything."""
    if message.request in REPLIES:
        return message.answer(u64(REPLIES[Request(message.request)])).encode()
    if message.request == Request.GET_VRING_BASE:
        return message.answer(message.payload).encode()
    return message.acknowledge().encode() if message.need_reply else None


class Scripted:
    """A back end at ``path`` that serves one connection, in a thread, as ``answers`` say by request."""

    def __init__(self, path: Path, answers: dict[int, Answer]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._answers = answers
        self.main: socket.socket | None = None
        self.back: socket.socket | None = None
        self.seen: list[Message] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, Gone):
            self.main, _ = self._listener.accept()
            framer = Framer()
            while True:
                data, ancillary, _, _ = self.main.recvmsg(framer.wanted, 1024)
                if not data:
                    break
                fds = array.array("i")
                for _, _, payload in ancillary:
                    fds.frombytes(payload)
                for message in framer.feed(data, fds):
                    self._answer(message)
        for each in (self.main, self.back):
            if each is not None:
                each.close()

    def _answer(self, message: Message) -> None:
        self.seen.append(message)
        fds = list(message.fds)
        if message.request == Request.SET_BACKEND_REQ_FD:
            self.back = socket.socket(fileno=fds.pop())
        try:
            said = self._answers.get(message.request, honest)(self, message)
        finally:
            for fd in fds:
                os.close(fd)
        if said is not None and self.main is not None:
            self.main.sendall(said)

    def close(self) -> None:
        """Stop listening; the connection ends with the front end's side of it."""
        self._listener.close()
        if self.main is not None:
            with contextlib.suppress(OSError):
                self.main.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def scripted(folder: Path, answers: dict[int, Answer] | None = None) -> Iterator[tuple[Scripted, str]]:
    """A scripted back end, and the path of its socket."""
    path = folder / "scripted.sock"
    backend = Scripted(path, answers or {})
    try:
        yield backend, str(path)
    finally:
        backend.close()
        path.unlink()


def miss(iova: int, perm: Access, need_reply: bool = True) -> bytes:
    """What a back end asks its front end."""
    asked = IotlbMessage(IOVA(iova), 0, UVA(0), perm, IotlbKind.MISS)
    return Message(1, asked.encode(), need_reply=need_reply).encode()


def installed(program: str) -> bool:
    """Whether a program is here."""
    return shutil.which(program) is not None


def commands(parent: int | None = None) -> list[str]:
    """The command lines of all processes, or of all that have this parent."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything; then come the state and the parent.
            ours = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if parent is None or int(ours) == parent:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def listening(path: Path) -> bool:
    """Whether somebody listens there: a socket that is bound and not yet listened to refuses."""
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(row[-1] == str(path) and int(row[3], 16) & 0x10000 for row in rows)
