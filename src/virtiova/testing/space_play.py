# SPDX-License-Identifier: Apache-2.0
"""A history, played on an address space and on a plain model: a table of pieces, and a copy of all bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.addr import Access
from virtiova.dma.space import AddressSpace, Miss, Span
from virtiova.testing.checks import NotApplicable, Wrong
from virtiova.testing.memory import Memory
from virtiova.testing.spaces import (
    History,
    Invalidate,
    Read,
    Refusal,
    Sized,
    Space,
    Step,
    Table,
    Translate,
    Update,
    Write,
    attempt,
    payload,
)

Places = list[tuple[int, int]]
"""Pieces of the buffer: place and length."""
SHOWN: Final = 24
"""Bytes of a difference that are shown."""


class Play:
    """One history against the model. ``where``: a refusal has to name the right byte. ``forgets``: a mapping may be
    missing without a reason, and is given again then."""

    def __init__(
        self, make: Callable[[Memory], Space], granule: int, width: int, *, where: bool, forgets: bool
    ) -> None:
        self.memory = Memory()
        self.space = make(self.memory)
        self.model = Table(granule)
        self.bytes = bytearray(self.memory.buffer)
        self.steps: list[str] = []
        self._end = 1 << width
        self._where = where
        self._forgets = forgets

    def __call__(self, history: History) -> None:
        """Play all of it. Raises `Wrong`."""
        for step in history:
            self.steps.append(str(step))
            self._step(step)
            if self.memory.buffer != self.bytes:
                raise self._wrong(self._difference())

    def _wrong(self, what: str) -> Wrong:
        return Wrong(self.steps, what)

    def _step(self, step: Step) -> None:
        match step:
            case Update():
                self._tell(lambda: self.space.update(step.iova, step.gpa, step.size, step.access))
                self.model.update(step.iova, step.gpa, step.size, step.access)
            case Invalidate():
                self._tell(lambda: self.space.invalidate(step.iova, step.size))
                self.model.invalidate(step.iova, step.size)
            case Read():
                self._read(step)
            case Write():
                self._write(step)
            case Sized():
                self._sized(step)
            case Translate():
                self._translate(step)

    # -- the model

    def _places(self, iova: int, length: int, access: Access) -> Places | int:
        """Where the bytes are, or the first address that is missing."""
        if iova + length > self._end and iova < self._end:
            found = self.model.lookup(iova, self._end - iova, access)
            return found.address if isinstance(found, Miss) else self._end
        found = self.model.lookup(iova, length, access)
        if isinstance(found, Miss):
            return found.address
        places: Places = []
        for span in found:
            places += self._cut(span)
        return places

    def _cut(self, span: Span) -> Places:
        """A span in pieces of the buffer."""
        places: Places = []
        gpa, end = int(span.gpa), span.gpa + span.length
        for block in sorted(self.memory.blocks, key=lambda block: block.gpa):
            stop = block.gpa + block.size
            if block.gpa <= gpa < stop and gpa < end:
                step = min(end, stop) - gpa
                places.append((block.offset + gpa - block.gpa, step))
                gpa += step
        return places

    # -- the steps

    def _tell(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            raise self._wrong(f"raised {_words(error)}") from error

    def _ask(self, call: Callable[[], object], iova: int, length: int, access: Access) -> tuple[object, Places]:
        """What an access gives, and where its bytes are. A refusal is checked here, and gives no places."""
        given, places = self._attempt(call), self._places(iova, length, access)
        again = 2 * min(length, self._end) // self.model.granule + 3 if self._forgets else 0
        while isinstance(given, Refusal) and again and self._give(given.address, access):
            again -= 1
            given = self._attempt(call)
        if not isinstance(places, int):
            if isinstance(given, Refusal):
                raise self._wrong(f"refused at 0x{given.address:x}, but all of it is mapped, with permission")
            return given, places
        verb = "write" if Access.WRITE in access else "read"
        if not isinstance(given, Refusal):
            raise self._wrong(f"not refused, but 0x{places:x} may not be {'written' if verb == 'write' else 'read'}")
        if self._where and iova + length <= self._end:
            if given.address != places:
                raise self._wrong(
                    f"refused at 0x{given.address:x}, wanted 0x{places:x}: the first byte that is missing"
                )
            if given.access is not None and given.access != access:
                raise self._wrong(f"refused for {given.access}, wanted {access}")
        return given, []

    def _attempt(self, call: Callable[[], object]) -> object:
        try:
            return attempt(call)
        except Exception as error:
            raise self._wrong(f"raised {_words(error)}; wanted a Miss or an AccessError, or none of them") from error

    def _give(self, address: int, wanted: Access) -> bool:
        """Answer a miss once more, as a front end does; False if that is not mapped, or not for this."""
        piece = address - address % self.model.granule
        gpa, access = self.model.pieces.get(piece, (0, Access.NONE))
        if wanted not in access:
            return False
        again = Update(piece, gpa, self.model.granule, access)
        self.steps.append(f"{again}  # asked for again")
        self._tell(lambda: self.space.update(again.iova, again.gpa, again.size, again.access))
        return True

    def _read(self, step: Read) -> None:
        given, places = self._ask(lambda: self.space.read(step.iova, step.length), step.iova, step.length, Access.READ)
        if not isinstance(given, Refusal):
            self._same(given, self._held(places))

    def _write(self, step: Write) -> None:
        data = payload(step.length, step.number)
        given, places = self._ask(lambda: self.space.write(step.iova, data), step.iova, step.length, Access.WRITE)
        if not isinstance(given, Refusal) and given is not None:
            raise self._wrong(f"returned {given!r:.60}, wanted None or a Miss")
        self._put(places, data)

    @property
    def _full(self) -> AddressSpace:
        space: AddressSpace | None = getattr(self.space, "space", None)
        if space is None:
            raise NotApplicable("needs an attribute `space` with the AddressSpace itself")
        return space

    def _sized(self, step: Sized) -> None:
        space, at, length = self._full, step.iova, step.length
        order = "big" if step.big else "little"
        store = step.verb.startswith("store")
        method = getattr(space, step.verb)
        arguments = [at, *([step.value] if store else []), *([order] if length != 16 else [])]
        if at % length:
            given = self._attempt(lambda: method(*arguments))
            if not isinstance(given, Refusal):
                raise self._wrong(f"not refused, but 0x{at:x} is no multiple of {length}")
            return
        given, places = self._ask(lambda: method(*arguments), at, length, Access.WRITE if store else Access.READ)
        if isinstance(given, Refusal):
            return
        if store:
            self._put(places, step.value.to_bytes(length, "big" if step.big else "little"))
        elif length == 16:
            self._same(given, self._held(places))
        else:
            self._same(given, int.from_bytes(self._held(places), "big" if step.big else "little"))

    def _translate(self, step: Translate) -> None:
        space = self._full
        call = lambda: space.translate(step.iova, step.length, step.access)  # noqa: E731 - asked for twice below
        given, places = self._ask(call, step.iova, step.length, step.access)
        if isinstance(given, Refusal):
            return
        spans = given if isinstance(given, list | tuple) else []
        found = [piece for span in spans for piece in self._cut(span)]
        if _joined(found) != _joined(places):
            raise self._wrong(f"gave {given!r:.200}, wanted what lies at {_joined(places)} of the buffer")

    def _held(self, places: Places) -> bytes:
        return b"".join(bytes(self.bytes[at : at + length]) for at, length in places)

    def _put(self, places: Places, data: bytes) -> None:
        done = 0
        for at, length in places:
            self.bytes[at : at + length] = data[done : done + length]
            done += length

    def _same(self, given: object, wanted: object) -> None:
        if isinstance(given, bytearray | memoryview):
            given = bytes(given)
        if given == wanted:
            return
        if isinstance(given, bytes) and isinstance(wanted, bytes) and len(given) == len(wanted):
            at = next(at for at, (one, other) in enumerate(zip(given, wanted, strict=True)) if one != other)
            one, other = given[at : at + SHOWN].hex(" "), wanted[at : at + SHOWN].hex(" ")
            raise self._wrong(f"gave other bytes from byte {at} on: {one}\n{'wanted:':>28} {other}")
        raise self._wrong(f"gave {given!r:.100}, wanted {wanted!r:.100}")

    def _difference(self) -> str:
        """Where the memory is not as it should be."""
        pairs = enumerate(zip(self.memory.buffer, self.bytes, strict=True))
        at = next(at for at, (one, other) in pairs if one != other)
        for block in self.memory.blocks:
            if block.offset <= at < block.offset + block.size:
                where = f"RAM at 0x{block.gpa + at - block.offset:x}"
                break
        else:
            where = "memory that is not the guest's"
        one, other = self.memory.buffer[at : at + SHOWN].hex(" "), self.bytes[at : at + SHOWN].hex(" ")
        return f"{where} is: {one}\nwanted: {other}"


def _joined(places: Places) -> Places:
    joined: Places = []
    for at, length in places:
        if joined and sum(joined[-1]) == at:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        elif length:
            joined.append((at, length))
    return joined


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
