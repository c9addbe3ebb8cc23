# SPDX-License-Identifier: Apache-2.0
"""Mistakes in how messages are read and answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mutant_kit import mutant, patch
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import FlatSpace, MediatedSpace
from virtiova.errors import ProtocolError
from virtiova.serve import loop
from virtiova.serve.events import Event, IotlbUpdated
from virtiova.serve.host import Host
from virtiova.serve.misses import Misses
from virtiova.serve.session import Session
from virtiova.wire.vhost_user import IOTLB_MESSAGE_SIZE, Framer, IotlbMessage, Message


@mutant("message-in-pieces")
def one_read_is_one_message() -> None:
    """What a read gives is taken for all of it."""

    class Hasty(Framer):
        def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Message]:
            if len(data) != self.wanted:
                self._fds += fds
                raise ProtocolError("short read")
            return super().feed(data, fds)

    def begun(begin: Any) -> Any:
        def hastily(self: Session, *args: Any, **named: Any) -> None:
            begin(self, *args, **named)
            self._framer = Hasty()

        return hastily

    patch(Session, "__init__", begun)


@mutant("half-message")
def no_message_ends_halfway() -> None:
    """It asserts that a connection ends between two messages."""

    def abandon(original: Any) -> Any:
        def checked(self: Framer) -> Any:
            assert self.idle, "half of a message"
            return original(self)

        return checked

    patch(Framer, "abandon", abandon)


@mutant("unasked-reply")
def always_waits_for_an_answer() -> None:
    """It takes each answer for that to its oldest question."""

    def receive(self: Misses, data: bytes, fds: tuple[int, ...] = ()) -> int:
        for _ in self._framer.feed(data, fds):
            want, _ = self._order.popleft()
            self._asked.pop(want, None)
        return 1

    patch(Misses, "receive", lambda _: receive)


@mutant("iotlb-before-bit33")
def takes_updates_at_any_time() -> None:
    """It keeps what it is told, and goes by it as soon as there is something."""

    def iotlb(self: Session, message: Message) -> Event:
        return IotlbUpdated(self._token(message), IotlbMessage.decode(message.payload))

    def chosen(self: Host, behind: bool) -> Any:
        return MediatedSpace(self.ram, self.iotlb) if behind or len(self.iotlb) else FlatSpace(self.ram), None

    patch(Session, "_iotlb", lambda _: iotlb)
    patch(Host, "_space", lambda _: chosen)
    patch(Iotlb, "flush", lambda _: lambda self: None)


@mutant("burst")
def drops_what_does_not_fit() -> None:
    """It has room for a hundred IOTLB messages, and drops the others."""

    def take(original: Any) -> Any:
        def taken(self: Host, messages: memoryview) -> tuple[int, int]:
            some = 100 * IOTLB_MESSAGE_SIZE
            done, invalidates = original(self, messages[:some])
            whole = len(messages) - len(messages) % IOTLB_MESSAGE_SIZE
            return (whole if done == some else done), invalidates

        return taken

    patch(Host, "take", take)


@mutant("never-reads")
def everybody_reads() -> None:
    """It asserts that all that it has to say fits into the socket."""

    def send(original: Any) -> Any:
        def sent(self: Any, sock: Any) -> None:
            original(self, sock)
            assert not self, "could not write"

        return sent

    patch(loop._Outgoing, "send", send)
