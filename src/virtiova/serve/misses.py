# SPDX-License-Identifier: Apache-2.0
"""The pages that a back end has asked its front end for, and what came of it. No I/O.

What is missing is never waited for: what was asked is remembered, and the ring that wants it is looked at again when
something has come. `Wanted` is that memory; who is asked, and how, is a matter of the front end. `Misses` asks by
MISS messages on a back-end channel: with ``need_reply`` each is answered in order, so that a refusal is heard of;
without (or from a front end that keeps silent) it counts as refused after `ANSWER_SECONDS`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from virtiova.addr import IOVA, PAGE_MASK, PAGE_SIZE, UVA, Access
from virtiova.errors import ProtocolError
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import BackendRequest, Framer, IotlbKind, IotlbMessage, Message

ANSWER_SECONDS: Final = 5.0
MAX_ASKED: Final = 1024
"""Pages that may be asked for at a time."""
MAX_REFUSED: Final = 4 * MAX_ASKED
"""Refusals that are remembered. Of one that was forgotten the front end is asked again."""

MAX_NOTICES: Final = 256
"""Failed accesses that the front end is told of, on one channel: a driver can cause as many as it likes."""

_END: Final = 1 << 64

Want = tuple[int, Access]
"""A page by its address, and what is to be done to it."""

_SINGLE: Final = (Access.READ, Access.WRITE)
_FEW: Final = 16
"""Pages that are looked for one by one: nearly all updates are of one."""


class Wanted:
    """What was asked for and what was refused."""

    def __init__(self) -> None:
        self._asked: dict[Want, tuple[float, int]] = {}
        """Until when an answer is waited for, and the number of the question that it is the answer to."""
        self._refused: set[Want] = set()
        self.questions = 0
        """So many were asked for so far."""

    def _fresh(self, wants: Iterable[Want], now: float) -> Iterator[Want]:
        """Those of ``wants`` that are to be asked for now; they are noted. No more than `MAX_ASKED` at a time."""
        for want in wants:
            if want in self._asked or want in self._refused or len(self._asked) >= MAX_ASKED:
                continue
            self.questions += 1
            self._asked[want] = now + ANSWER_SECONDS, self.questions
            yield want

    def ask(self, wants: Iterable[Want], now: float) -> list[bytes]:
        """Ask for those of ``wants`` that were not asked for yet; the messages to send, if that takes any."""
        raise NotImplementedError

    def fail(self, want: Want) -> list[bytes]:
        """A request has failed by this access, which a mapping did not allow: the messages that tell so, if any do."""
        return []

    def refused(self, want: Want) -> bool:
        """Whether the front end has refused that page, or kept silent for too long."""
        return want in self._refused

    def awaited(self, wants: Sequence[Want]) -> bool:
        """Whether an answer to one of ``wants`` is still due."""
        # They come in the order in which they were asked for, so that the last one is found first.
        return any(want in self._asked for want in reversed(wants))

    def forgive(self, wants: Iterable[Want]) -> None:
        """Their refusal has been acted upon: they may be asked for again."""
        self._refused.difference_update(wants)

    @property
    def waiting(self) -> bool:
        """Whether anything is known that `changed` could change."""
        return bool(self._asked or self._refused)

    def changed(self, start: int, size: int) -> None:
        """The front end has said something of its own about these addresses: nothing is known of them any more.

        As `Iotlb.invalidate` has it: they may go past 2**64, and then start again at 0; no size means all.
        """
        if 0 < size <= _FEW * PAGE_SIZE and start + size <= _END:
            for page in range(start & ~PAGE_MASK, start + size, PAGE_SIZE):
                for access in _SINGLE:
                    self._asked.pop((page, access), None)
                    self._refused.discard((page, access))
            return
        for want in [want for want in self._asked if _touched(want[0], start, size)]:
            del self._asked[want]
        self._refused = {want for want in self._refused if not _touched(want[0], start, size)}

    def refuse(self, wants: Collection[Want]) -> None:
        """There is no answer to these but no."""
        for want in wants:
            self._asked.pop(want, None)
        if len(self._refused) + len(wants) > MAX_REFUSED:
            self._refused.clear()
        self._refused.update(wants)

    def expire(self, now: float) -> int:
        """Take silence for a refusal; how many were silent."""
        late = [want for want, (deadline, _) in self._asked.items() if deadline <= now]
        self.refuse(late)
        return len(late)

    @property
    def deadline(self) -> float | None:
        """When to call `expire`; None if nothing is asked for."""
        return min((deadline for deadline, _ in self._asked.values()), default=None)

    def forget(self) -> None:
        """All addresses mean something else from here on. Answers that are still due are taken and not heard."""
        self._asked.clear()
        self._refused.clear()

    def abandon(self) -> tuple[int, ...]:
        """Forget what is unfinished; the descriptors to close."""
        return ()


class Misses(Wanted):
    """What is asked for on one back-end channel. ``replies``: REPLY_ACK was agreed upon, so answers come."""

    def __init__(self, *, replies: bool) -> None:
        super().__init__()
        self._replies = replies
        self._framer = Framer()
        self._order: deque[tuple[Want, int]] = deque()
        """The MISS messages that an answer is due to, oldest first."""
        self._notices = 0
        self._orphans: list[int] = []

    @property
    def wanted(self) -> int:
        """Bytes to read next from the channel, at most."""
        return self._framer.wanted

    def ask(self, wants: Iterable[Want], now: float) -> list[bytes]:
        """The messages that ask for those of ``wants`` that were not asked for yet; no more than `MAX_ASKED`."""
        out = []
        for want in self._fresh(wants, now):
            page, access = want
            # Of a front end that maps but never answers, no more answers are wanted than have room here.
            replies = self._replies and len(self._order) < MAX_ASKED
            if replies:
                self._order.append((want, self.questions))
            out.append(wire.encode_miss(page, access, need_reply=replies))
        return out

    def fail(self, want: Want) -> list[bytes]:
        """The message that tells of an access that failed, ACCESS_FAIL: a notice, to which no answer is wanted, since a
        front end that does not know what to do with it says no. None after `MAX_NOTICES`: it may log each of them."""
        if self._notices >= MAX_NOTICES:
            return []
        self._notices += 1
        page, access = want
        notice = IotlbMessage(IOVA(page), PAGE_SIZE, UVA(0), access, IotlbKind.ACCESS_FAIL)
        return [Message(BackendRequest.IOTLB_MSG, notice.encode()).encode()]

    def receive(self, data: bytes, fds: tuple[int, ...] = ()) -> int:
        """Take answers from the channel; how many there were. Raises `ProtocolError` for anything else."""
        if fds:
            # Of an answer that never ends, they would stay with us.
            self._orphans += fds
            raise ProtocolError("back-end channel: file descriptors, wanted an answer to a MISS")
        count = 0
        for message in self._framer.feed(data, fds):
            if not message.reply or message.request != BackendRequest.IOTLB_MSG or not self._order:
                raise ProtocolError(f"back-end channel: message {message.request}, wanted an answer to a MISS")
            self._answered(wire.u64_of(message.payload))
            count += 1
        return count

    def _answered(self, refused: int) -> None:
        want, number = self._order.popleft()
        asked = self._asked.get(want)
        # Of what was asked for again since, the later answer counts: what was refused may have been mapped.
        if asked is not None and asked[1] == number:
            del self._asked[want]
            if refused:
                self.refuse([want])

    def abandon(self) -> tuple[int, ...]:
        """Forget what is unfinished; the descriptors to close."""
        orphans, self._orphans = tuple(self._orphans), []
        return orphans + self._framer.abandon()


def _touched(page: int, start: int, size: int) -> bool:
    """Whether ``size`` bytes at ``start`` have a byte of the page."""
    length = size if 0 < size < _END else _END
    return (page - start) % _END < length or (start - page) % _END < PAGE_SIZE
