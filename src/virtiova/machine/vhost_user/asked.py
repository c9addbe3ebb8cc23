# SPDX-License-Identifier: Apache-2.0
"""What is under way on a vhost-user connection: answers that the back end owes, a MISS that waits for ours, counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from virtiova.addr import IOVA, PAGE_SIZE, UVA, Access
from virtiova.wire.vhost_user import IotlbMessage, Message, u64_of


class Answering(Protocol):
    """The front end, as far as it takes to answer a MISS."""

    def look_up(self, iova: int, access: Access) -> tuple[IOVA, UVA, Access] | None:
        """What the tables say of a page."""

    def post_update(
        self, iova: int, size: int, uva: int, allowed: Access, then: Callable[[bytes], None] | None = None
    ) -> Pending | None:
        """Send an UPDATE; ``then`` gets the acknowledgement."""

    def reply(self, message: Message, *, ok: bool) -> None:
        """Answer a MISS, where an answer is wanted."""


@dataclass(slots=True)
class Counters:
    """What went over the back-end channel and the IOTLB messages of the main one."""

    misses: int = 0
    updates: int = 0
    invalidates: int = 0
    failed: int = 0
    """Misses that were answered with nothing, or with a failure."""


@dataclass(slots=True)
class Pending:
    """An answer that the back end owes, and once it has come its payload."""

    request: int
    payload: bytes | None = None
    then: Callable[[bytes], None] | None = None

    @property
    def done(self) -> bool:
        """Whether it has come."""
        return self.payload is not None

    @property
    def ok(self) -> bool:
        """Whether it is an acknowledgement that says yes; `ProtocolError` if it is none at all."""
        return self.payload is not None and u64_of(self.payload) == 0


class Asked:
    """A MISS that waits for its answer: ``iova`` and ``access`` are what the back end asked for.

    Answered once, at any time, in any order: `answer` does what the tables say. The parts of that are there to be done
    otherwise.
    """

    def __init__(self, front: Answering, message: Message, asked: IotlbMessage) -> None:
        self.iova, self.access = asked.iova, asked.perm
        self._front = front
        self._message = message

    def __str__(self) -> str:
        return f"MISS 0x{self.iova:x} {self.access.name}"

    @property
    def wants_reply(self) -> bool:
        """Whether the back end waits for an answer beside the UPDATE."""
        return self._message.need_reply

    def answer(self) -> None:
        """An UPDATE of one page, and the word that it is there once it is acknowledged; or a failure."""
        found = self._front.look_up(self.iova, self.access)
        if found is None:
            self.reply(ok=False)
            return
        iova, uva, allowed = found
        self._front.post_update(iova, PAGE_SIZE, uva, allowed, lambda payload: self.reply(ok=u64_of(payload) == 0))

    def reply(self, *, ok: bool) -> None:
        """Only the word that it is there, or that it never will be, to a back end that waits for one."""
        self._front.reply(self._message, ok=ok)
