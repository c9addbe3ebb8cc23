# SPDX-License-Identifier: Apache-2.0
"""Mistakes about indirect tables and chains, about who tells whom, and about the order of what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mutant_kit import in_python, mutant, patch
from virtiova.addr import Access
from virtiova.dma.space import FlatSpace, Miss
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring import split_device
from virtiova.ring.chain import Chain
from virtiova.ring.ends import Gathering
from virtiova.ring.layout import AVAIL_F_NO_INTERRUPT, DESC_F_NEXT, DESC_SIZE, Desc
from virtiova.ring.split_device import SplitDevice
from virtiova.serve.platform import missing
from virtiova.serve.rings import Ring


def tables_read_by(read: Callable[[SplitDevice, int], bytes]) -> None:
    """The descriptors of indirect tables are read in another way."""
    in_python()

    def loading(load: Callable[..., Desc]) -> Callable[..., Desc]:
        def loaded(self: Any, where: int, direct: bool) -> Desc:
            return load(self, where, direct) if direct else Desc.unpack(read(self, where), self._order)

        return loaded

    patch(SplitDevice, "_load", loading)


@mutant("indirect-iova")
def table_at_the_bare_address() -> None:
    """It reads tables around the IOMMU."""
    tables_read_by(lambda self, where: FlatSpace(self._space._ram).read(where, DESC_SIZE))  # type: ignore[attr-defined]


@mutant("indirect-two-pages")
def table_in_one_piece() -> None:
    """It translates where a table begins, and reads on from there."""
    begun: dict[str, tuple[int, int]] = {}

    def entries(made: Callable[..., int]) -> Callable[..., int]:
        def counted(self: Any, desc: Desc, where: int, direct: bool) -> int:
            found = self._space.translate(desc.addr, DESC_SIZE, Access.READ)
            if isinstance(found, Miss):
                raise found.error()
            begun["at"] = desc.addr, found[0].gpa
            return made(self, desc, where, direct)

        return counted

    def read(self: Any, where: int) -> bytes:
        address, gpa = begun["at"]
        return FlatSpace(self._space._ram).read(gpa + where - address, DESC_SIZE)

    tables_read_by(read)
    patch(SplitDevice, "_indirect_entries", entries)


@mutant("indirect-page-late")
def as_far_as_it_is_there() -> None:
    """A table that goes on in a page that is not there yet ends before that."""
    in_python()

    def walking(walk: Callable[..., Chain]) -> Callable[..., Chain]:
        def walked(self: Any, head: int) -> Chain:
            load, last = self._load, [Desc(0, 0, 0, 0)]

            def loaded(where: int, direct: bool) -> Desc:
                try:
                    last[0] = load(where, direct)
                except AccessError:
                    if direct or not where % 4096 == 0:
                        raise
                    return Desc(0, 0, 2, 0)
                return last[0]

            self._load = loaded
            try:
                return walk(self, head)
            finally:
                del self._load

        return walked

    patch(SplitDevice, "_walk", walking)


@mutant("indirect-page-refused")
def around_what_is_refused() -> None:
    """What is not mapped it reads at the bare address."""

    def read(self: Any, where: int) -> bytes:
        try:
            return bytes(self._space.read(where, DESC_SIZE))
        except AccessError:
            return FlatSpace(self._space._ram).read(where, DESC_SIZE)

    tables_read_by(read)


@mutant("indirect-read-only")
def table_for_writing() -> None:
    """It wants to write to tables, too."""

    def read(self: Any, where: int) -> bytes:
        found = self._space.translate(where, DESC_SIZE, Access.RW)
        if isinstance(found, Miss):
            raise found.error()
        return bytes(self._space.read(where, DESC_SIZE))

    tables_read_by(read)


@mutant("long-chain")
def sixteen_at_most() -> None:
    """It has room for 16 buffers, and leaves the others alone, but for the last."""
    in_python()

    def add(made: Callable[..., None]) -> Callable[..., None]:
        def added(self: Any, where: int, address: int, length: int, flags: int) -> None:
            if len(self.writable) < 16 or not flags & DESC_F_NEXT:
                made(self, where, address, length, flags)

        return added

    patch(Gathering, "add", add)


@mutant("event-idx-interrupt")
def only_if_equal() -> None:
    """It tells if the last element is the one that the driver named."""
    in_python()
    patch(split_device, "need_event", lambda _: lambda event, new, old: event == (new - 1) & 0xFFFF)
    # Several requests are given back at once, as by who serves them in batches.
    patch(
        SplitDevice,
        "needs_interrupt",
        lambda made: lambda self: False if self._look() else made(self),
    )


@mutant("interrupt-flag")
def by_used_event_in_any_case() -> None:
    """It goes by used_event whether it was negotiated or not."""

    def made(begin: Callable[..., None]) -> Callable[..., None]:
        def begun(self: Any, *args: Any, **named: Any) -> None:
            begin(self, *args, **{**named, "event_idx": True})

        return begun

    in_python()
    patch(SplitDevice, "__init__", made)


@mutant("interrupt-flag/once")
def flag_seen_once() -> None:
    """Once the flag was set it tells of nothing any more."""
    in_python()
    quiet: set[int] = set()

    def asked(made: Callable[..., bool]) -> Callable[..., bool]:
        def wanted(self: Any) -> bool:
            if self._space.load16(self._avail, self._order) & AVAIL_F_NO_INTERRUPT:
                quiet.add(id(self))
            return made(self) and id(self) not in quiet

        return wanted

    patch(SplitDevice, "needs_interrupt", asked)


@mutant("kick-when-asked")
def wish_never_renewed() -> None:
    """It looks once more before it sleeps, and does not say that it is to be woken."""
    in_python()

    def asleep(self: Any, *, waiting: bool = False) -> bool:
        known = self._seen_avail if waiting else self._next_avail
        if known == self._seen_avail:
            self._look()
        return bool(known != self._seen_avail)

    patch(SplitDevice, "enable_notify", lambda _: asleep)


@mutant("in-order")
def what_can_be_done_first() -> None:
    """A request that waits for its buffer is put aside, and the next one is done."""
    in_python()

    def one(made: Callable[..., tuple[int, bool]]) -> Callable[..., tuple[int, bool]]:
        def done(self: Any, end: Any, platform: Any, late: Callable[[], bool]) -> tuple[int, bool]:
            count, go_on = made(self, end, platform, late)
            if count or not self.parked or self._unfinished:
                return count, go_on
            chains = _two(end)
            wants: dict[Any, None] = {}
            if len(chains) == 2:
                missing(chains[1].buffers(), platform, wants)
            if len(chains) < 2 or wants:
                end.put_back(len(chains))
                return count, go_on
            self._give((chains[1],), end, platform)
            self._unfinished = [chains[0].head]
            return 1, False

        return done

    patch(Ring, "_one", one)


def _two(end: SplitDevice) -> Sequence[Chain]:
    chains: list[Chain] = []
    try:
        while len(chains) < 2 and (chain := end.pop()) is not None:
            chains.append(chain)
    except (AccessError, ProtocolError):
        pass
    return chains
