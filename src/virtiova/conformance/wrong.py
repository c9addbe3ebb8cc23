# SPDX-License-Identifier: Apache-2.0
"""Saying wrong things to a back end, one after the other, and what becomes of each."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.conformance.stand import Stand
from virtiova.errors import MachineError, ProtocolError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1
from virtiova.machine.vhost_user.frontend import FrontEnd
from virtiova.wire.vhost_user import F_PROTOCOL_FEATURES, ProtocolFeature, Request, request_name, u64

_SECONDS: Final = 2.0
"""How long a back end may take over a wrong message: to answer it, or to hang up."""
_ZERO: Final = u64(0)


@dataclass(frozen=True, slots=True)
class Wrong:
    """A message that makes no sense, and what is wrong with it."""

    what: str
    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{request_name(self.request)} {self.what}".rstrip()


class Fate(enum.StrEnum):
    """What became of a message."""

    REFUSED = "answered with a failure"
    CLOSED = "answered by hanging up"
    ANSWERED = "answered as if there were such a ring"
    TAKEN = "acknowledged as if it were done"
    IGNORED = "passed over without a word"
    SILENT = "not answered at all"


Found = tuple[Wrong, Fate]


def answered_unasked(stand: Stand, send: Callable[[], object]) -> None:
    """Send IOTLB messages that do not ask for an answer: who answers them all the same has read it so."""
    try:
        send()
    except ProtocolError as error:
        stand.unclear(
            f"an IOTLB message without need_reply was answered: {error}",
            "an IOTLB message has a reply of its own, whether it is asked for or not",
            "an IOTLB message is answered where need_reply is set, as QEMU and DPDK have it",
        )


def greet(stand: Stand, front: FrontEnd) -> None:
    """The features that a plain driver takes, bit 33 among them if it is offered."""
    known = 1 << VIRTIO_F_VERSION_1 | 1 << F_PROTOCOL_FEATURES | 1 << VIRTIO_F_ACCESS_PLATFORM
    word = stand.vhost.offered & known
    front.set_features(word, translating=bool(word >> VIRTIO_F_ACCESS_PLATFORM & 1))
    front.barrier()


def fate(front: FrontEnd, wrong: Wrong) -> Fate:
    """Say it, and see. An acknowledgement that is followed by hanging up is none."""
    try:
        if not front.speaks(ProtocolFeature.REPLY_ACK):
            front.tell(wrong.request, wrong.payload, wrong.fds)
            front.barrier()
            return Fate.IGNORED
        pending = front.post(wrong.request, wrong.payload, wrong.fds)
        deadline = time.monotonic() + _SECONDS
        while not pending.done:
            if (left := deadline - time.monotonic()) <= 0:
                return Fate.SILENT
            front.pump(left)
        front.barrier()
    except (MachineError, ProtocolError):
        return Fate.CLOSED
    if wrong.request == Request.GET_VRING_BASE:
        # It has an answer of its own, and none that says no.
        return Fate.ANSWERED
    return Fate.TAKEN if pending.payload == _ZERO else Fate.REFUSED


def say_all(stand: Stand, wrongs: Sequence[Wrong]) -> list[Found]:
    """What becomes of each, on as many connections as it takes. Fails if one is not answered, and if no other front
    end is served after one."""
    stand.asking = True
    front: FrontEnd | None = stand.front
    greet(stand, stand.front)
    found: list[Found] = []
    before = "the last one"
    with contextlib.ExitStack() as stack:
        for wrong in wrongs:
            if front is None:
                stack.close()
                if not stand.again_possible:
                    break
                try:
                    front = stack.enter_context(stand.dial())
                    front.open()
                    greet(stand, front)
                except (MachineError, ProtocolError) as error:
                    stand.fail(f"after {before} no other front end is served: {error}")
            came = fate(front, wrong)
            if came is Fate.SILENT:
                stand.fail(f"{wrong} is {came}, within {_SECONDS:g} s")
            found.append((wrong, came))
            before = str(wrong)
            if came is Fate.CLOSED:
                front = None
    return found


def summary(stand: Stand, found: Sequence[Found]) -> str:
    """How many of each fate, and that the back end is there for others."""
    there = stand.still_there()
    fates = [each for _, each in found]
    counts = [f"{fates.count(each)} {each}" for each in Fate if each in fates]
    return f"{', '.join(counts)}; {there}"


def taken(found: Sequence[Found]) -> str:
    """The first that was acknowledged; empty if none was."""
    return next((str(wrong) for wrong, each in found if each is Fate.TAKEN), "")
