# SPDX-License-Identifier: Apache-2.0
"""Mistakes in a device's life."""

from __future__ import annotations

import os
from typing import Any

from mutant_kit import in_python, mutant, patch
from virtiova.addr import GPA
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import MediatedSpace
from virtiova.serve import events
from virtiova.serve.dirty import LoggedRam
from virtiova.serve.host import Host
from virtiova.serve.inflight import Inflight
from virtiova.serve.rings import Ring
from virtiova.serve.rounds import Rounds
from virtiova.serve.session import Session
from virtiova.wire.vhost_user import Message

NET = "serve net --datagram-fd {net} --io python --sandbox off --socket-path {socket}"


@mutant("reconnect")
def keeps_its_table() -> None:
    """Memory and translations are the process's, not the connection's, and nobody empties them."""
    kept: list[Any] = []

    def init(original: Any) -> Any:
        def made(self: Host, *args: Any, **named: Any) -> None:
            original(self, *args, **named)
            if not kept:
                kept.append((self.ram, self.iotlb))
            self.ram, self.iotlb = kept[0]

        return made

    in_python()
    patch(Host, "__init__", init)
    patch(Iotlb, "flush", lambda _: lambda self: None)


@mutant("stopped-ring")
def says_where_it_stands_and_goes_on() -> None:
    """It answers GET_VRING_BASE, and serves the ring as before."""
    patch(Ring, "stop", _says_and_goes_on)


def _says_and_goes_on(original: Any) -> Any:
    def stop(self: Ring) -> int:
        started, address, broken = self.started, self.address, self.broken
        base = int(original(self))
        self.started, self.address, self.broken, self.kicked = started, address, broken, True
        return base

    return stop


@mutant("stop-and-go-on")
def counts_what_it_has_seen() -> None:
    """It answers with the index of the last request that it has looked at, also if that waits."""

    def stop(original: Any) -> Any:
        def stopped(self: Ring) -> int:
            waiting = self.parked
            base = int(original(self))
            self.base = base + waiting
            return self.base

        return stopped

    patch(Ring, "stop", stop)


@mutant("ring-disabled", NET, "net")
def cannot_be_disabled() -> None:
    """It takes SET_VRING_ENABLE for a way to enable."""

    def enable(original: Any) -> Any:
        def enabled(self: Session, message: Message) -> Any:
            event = original(self, message)
            return events.RingEnabled(event.token, event.index, True)

        return enabled

    patch(Session, "_ring_enable", enable)


@mutant("ring-never-enabled")
def forgets_the_kick() -> None:
    """A kick of a disabled ring is thrown away, and enabling it is no reason to look."""

    def ring_event(original: Any) -> Any:
        def done(self: Rounds, event: Any) -> bool:
            ring = self.rings[event.index]
            answered = bool(original(self, event))
            if isinstance(event, events.RingEnabled):
                ring.kicked = False
            return answered

        return done

    patch(Rounds, "event", ring_event)


@mutant("call-replaced")
def calls_the_first() -> None:
    """It keeps the descriptor that it was given first."""

    def ring_event(original: Any) -> Any:
        def done(self: Rounds, event: Any) -> bool:
            if isinstance(event, events.RingCall) and self.rings[event.index].call is not None:
                if event.fd is not None:
                    os.close(event.fd)
                return False
            return bool(original(self, event))

        return done

    patch(Rounds, "event", ring_event)


@mutant("kick-without-descriptor")
def takes_the_first_of_none() -> None:
    """It does not look at bit 8."""
    patch(Session, "_ring_fd", lambda _: lambda self, message: (message.payload[0], message.fds[0]))


@mutant("inflight")
def notes_and_never_looks() -> None:
    """It notes what is in flight, and does not look there when it starts."""
    patch(Inflight, "unfinished", lambda _: lambda self, used: [])


class LogsAddresses(MediatedSpace):
    """Notes in the log the address that the driver gave."""

    def __init__(self, ram: LoggedRam, iotlb: Iotlb) -> None:
        super().__init__(ram, iotlb)
        self._logged = ram

    def write(self, address: int, data: bytes) -> None:
        super().write(address, data)
        if self._logged.log is not None:
            self._logged.log.mark(address, len(data))


@mutant("dirty-log")
def logs_iovas() -> None:
    """The log is by the addresses in the rings."""

    def write(self: LoggedRam, gpa: GPA, data: bytes) -> None:
        RegionRam.write(self, gpa, data)

    in_python(lambda host: LogsAddresses(host.ram, host.iotlb))
    patch(LoggedRam, "write", lambda _: write)
