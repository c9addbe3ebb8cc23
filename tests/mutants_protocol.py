# SPDX-License-Identifier: Apache-2.0
"""Mistakes with single messages that make no sense."""

from __future__ import annotations

import os
import signal
import struct
from dataclasses import replace
from typing import Any

from mutant_kit import mutant, patch
from virtiova.errors import ProtocolError
from virtiova.serve.events import Event, Refused
from virtiova.serve.host import Host
from virtiova.serve.rounds import Rounds
from virtiova.serve.session import Session
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Framer, MemoryRegion, Message


def _fatal(original: Any) -> Any:
    """What was an error of the front end's is one of our own."""

    def checked(*args: Any) -> Any:
        try:
            return original(*args)
        except ProtocolError as problem:
            raise SystemExit(f"assertion failed: {problem}") from problem

    return checked


@mutant("payload-size")
def trusts_the_size() -> None:
    """It unpacks what should be there."""
    patch(wire, "_sized", lambda _: lambda what, payload, size: None)
    patch(wire, "u64_of", lambda _: lambda payload: struct.unpack("<Q", payload)[0])


@mutant("message-size")
def asserts_the_size() -> None:
    """A size that is too large ends the process."""
    patch(Framer, "_size", _fatal)


@mutant("header-flags")
def asserts_the_version() -> None:
    """A version that is not 1 ends the process."""

    def size(original: Any) -> Any:
        def checked(self: Framer) -> int:
            _, flags, _ = struct.unpack_from("<III", self._data)
            assert flags & 3 == 1, "version"
            return int(original(self))

        return checked

    patch(Framer, "_size", size)


@mutant("unknown-request")
def does_not_know_and_says_yes() -> None:
    """An unknown request is passed over, and acknowledged like any other."""

    def take(original: Any) -> Any:
        def taken(self: Session, message: Message) -> Event | Refused | None:
            if message.request not in self._handlers:
                self._nothing(message)
                return None
            found: Event | Refused | None = original(self, message)
            return found

        return taken

    patch(Session, "_take", take)


@mutant("too-many-descriptors")
def keeps_descriptors() -> None:
    """It refuses a message, and forgets what came with it."""

    def handle(original: Any) -> Any:
        def handled(self: Host, event: Event | Refused) -> None:
            original(self, replace(event, fds=()) if isinstance(event, Refused) else event)

        return handled

    patch(Host, "handle", handle)


@mutant("missing-descriptors")
def takes_the_first_descriptor() -> None:
    """The first of none."""
    patch(Session, "_ring_fd", lambda _: lambda self, message: (0, message.fds[0]))


@mutant("wrong-descriptors")
def dies_of_a_closed_pipe() -> None:
    """SIGPIPE is left as it is."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@mutant("ring-number")
def any_ring_will_do() -> None:
    """Rings that there are not are taken modulo those that there are."""
    patch(Session, "_index", lambda _: lambda self, index: index % self._offer.queues)
    patch(Session, "_state", _modulo)
    patch(wire.VringAddr, "decode", lambda original: lambda payload: replace(original(payload), index=0))


def _modulo(original: Any) -> Any:
    def state(self: Session, message: Message) -> wire.VringState:
        found: wire.VringState = original(self, message)
        return replace(found, index=found.index % self._offer.queues)

    return state


@mutant("ring-size")
def divides_by_the_size() -> None:
    """Any size will do; it is found out when the ring is looked at."""
    patch(Session, "_ring_of", lambda _: lambda self, size: None)

    def looked(original: Any) -> Any:
        def look(self: Rounds, ring: Any, *args: Any, **named: Any) -> None:
            _ = 1 % ring.size
            original(self, ring, *args, **named)

        return look

    patch(Rounds, "_look", looked)


@mutant("region-nowhere")
def adds_without_looking() -> None:
    """A region that wraps ends the process: no integer of the machine's has that sum."""

    def memory(original: Any) -> Any:
        def set_memory(self: Host, event: Any) -> None:
            for region in getattr(event, "regions", ()):
                _ends(region)
            original(self, event)

        return set_memory

    patch(Host, "_memory", memory)


def _ends(region: MemoryRegion) -> bytes:
    return struct.pack("<QQ", region.gpa + region.size, region.uva + region.size)


@mutant("region-past-file")
def dies_of_a_short_file() -> None:
    """Memory that is not there is a SIGBUS."""

    def memory(original: Any) -> Any:
        def set_memory(self: Host, event: Any) -> None:
            if any(not os.fstat(fd).st_size for fd in getattr(event, "fds", ())):
                os.kill(os.getpid(), signal.SIGBUS)
            original(self, event)

        return set_memory

    patch(Host, "_memory", memory)


@mutant("iotlb-nonsense")
def asserts_the_kind() -> None:
    """It has a branch for UPDATE, one for INVALIDATE, and an assertion that there is nothing else."""
    patch(Session, "_iotlb", _fatal)
