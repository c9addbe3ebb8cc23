# SPDX-License-Identifier: Apache-2.0
"""The other side is never to be believed: nothing is read twice, nothing outside is touched, everything ends. Changing
rings and junk for device ends, used elements that were made up for driver ends."""

from __future__ import annotations

import contextlib
import random
import struct
from dataclasses import dataclass, replace
from typing import Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from virtiova.addr import IOVA, PAGE_SIZE, Access, DmaAddr
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.ends import Segment
from virtiova.ring.layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Desc,
    PackedDesc,
    PackedLayout,
    SplitLayout,
)
from virtiova.testing.checks import Effort, NotApplicable, search
from virtiova.testing.hostile_scene import SIZE, Scene
from virtiova.testing.ring_ends import Begin, DeviceEnd, MakeDevice, MakeDriver
from virtiova.testing.ring_world import Op, Watched

_ALL: Final = DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT


def given_back_first(make: MakeDevice, *, packed: bool) -> None:
    """A descriptor that is made available again before it was given back. Raises `Wrong`."""
    if not packed:
        raise NotApplicable("of packed rings only")
    scene = Scene(Begin(packed=True, size=SIZE))
    raw, at = scene.ring(), int(scene.data.addr)
    device = make(scene.place)
    for number in range(SIZE):
        raw.offer((at, 8, False), number=number)
    scene.steps += [f"# {SIZE} chains of one descriptor in the ring", f"device.pop()  # {SIZE} times"]
    for _ in range(SIZE):
        scene.guarded(device.pop)
    raw.offer((at, 8, False), number=0)
    scene.steps += [
        "# the first descriptor is made available again; nothing was given back",
        "device.pop()",
    ]
    try:
        given = scene.guarded(device.pop)
    except ProtocolError:
        return
    raise scene.wrong(f"not refused, but {'None' if given is None else 'a chain'} given, wanted a ProtocolError")


def reads_once(make: MakeDevice, *, packed: bool, tables: bool = True) -> None:
    """Whatever was loaded is something else right after: what `pop` gives is what was there first. Raises `Wrong`."""
    for indirect in (False, True) if tables else (False,):
        scene = Scene(Begin(packed=packed, size=SIZE, indirect=tables))
        at = int(scene.data.addr)
        wanted = [(at, 16, Access.READ), (at + 32, 16, Access.WRITE)]
        _lay_chain(scene, at, indirect=indirect)
        device = make(scene.place)
        space = scene.place.space
        assert isinstance(space, Watched)
        space.ops.clear()

        def spoil(op: Op, scene: Scene = scene) -> None:
            if op.what == "load":
                fresh = struct.pack("<QIHH", 0x6666_0000, 0x7FFF_FFFF, _ALL, 0xFFFF)
                for region in (scene.place.region, scene.table):
                    if region.addr <= op.address < region.addr + region.size:
                        bad = fresh if op.length == 16 else b"\xff" * op.length
                        region.write(op.address - region.addr, (bad * (op.length // 16 + 1))[: op.length])

        space.after = spoil
        scene.steps += [
            f"# in the ring: a chain of two{', in a table' if indirect else ''}; what is loaded changes right after",
            "device.pop()",
        ]
        try:
            given = scene.guarded(device.pop)
        except ProtocolError as error:
            raise scene.wrong(f"refused ({error}), so something was read twice") from error
        if not any(op.what == "load" for op in space.ops):
            raise NotApplicable("reads memory without its address space")
        found = [] if given is None else list(given.buffers())  # type: ignore[attr-defined]
        if found != wanted:
            raise scene.wrong(f"gave {found}, wanted {wanted}: something was read twice")


def _lay_chain(scene: Scene, at: int, *, indirect: bool) -> None:
    chain = ((at, 16, False), (at + 32, 16, True))
    table = int(scene.table.addr)
    if scene.packed:
        if indirect:
            scene.table.write(0, PackedDesc(at, 16, 0, 0).pack() + PackedDesc(at + 32, 16, 0, DESC_F_WRITE).pack())
            scene.ring().offer_rows((table, 32, 0, DESC_F_INDIRECT))
        else:
            scene.ring().offer(*chain)
        return
    raw = scene.split()
    if indirect:
        raw.put_chain(0, *chain, table=table)
        raw.put_desc(0, Desc(table, 32, DESC_F_INDIRECT, 0))
    else:
        raw.put_chain(0, *chain)
    raw.offer(0)


# -- any bytes


@dataclass(frozen=True, slots=True)
class Junk:
    """A ring of anything: descriptors as (region, offset, length, flags, next), and what lies around them."""

    rows: tuple[tuple[int, int, int, int, int], ...]
    inner: tuple[tuple[int, int, int, int, int], ...]
    heads: tuple[int, ...]
    index: int
    words: tuple[int, int]
    event_idx: bool

    def __str__(self) -> str:
        return f"# in the ring: {self!r}"


def _junk(number: int) -> Junk:
    """The ring of that number. What is refused at once shows little: nearly all heads and indices are right."""
    rng = random.Random(number)
    offsets, lengths = (0xFF0, 0xFFF, 0x1000, 1 << 20), (0, 1, 16, 16, 32, 64, 0x1000, 0x2001, 0xFFFFFFFF)

    def row() -> tuple[int, int, int, int, int]:
        offset = rng.choice((rng.randrange(64), rng.choice(offsets)))
        length = rng.choice((rng.choice(lengths), rng.getrandbits(32)))
        return rng.randrange(5), offset, length, rng.randrange(8), rng.choice((*range(SIZE), *range(SIZE + 2)))

    return Junk(
        rows=tuple(row() for _ in range(SIZE)),
        inner=tuple(row() for _ in range(SIZE)),
        heads=tuple(rng.choice((*range(SIZE), *range(SIZE), *range(SIZE + 1))) for _ in range(SIZE)),
        index=rng.choice((*range(1, SIZE + 1), *range(1, SIZE + 1), 0, SIZE + 1, rng.getrandbits(16))),
        words=(rng.getrandbits(16), rng.getrandbits(16)),
        event_idx=bool(rng.getrandbits(1)),
    )


def junk_rings() -> SearchStrategy[Junk]:
    """Rings of `SIZE` entries in which anything may lie, much of it nearly right."""
    return st.integers(0, (1 << 32) - 1).map(_junk)


def survives(make: MakeDevice, effort: Effort, *, packed: bool, tables: bool = True) -> None:
    """Any bytes in the ring: no exception but those that are promised, nothing outside is touched. Raises `Wrong`."""

    def play(junk: Junk) -> None:
        indirect = tables and junk.words[0] % 4 != 3
        scene = Scene(Begin(packed=packed, size=SIZE, event_idx=junk.event_idx, indirect=indirect, way="platform"))
        scene.steps.append(str(junk))
        _lay_junk(scene, junk)
        # Of the table, nobody may write a byte.
        scene.world.iommu.map(IOVA(scene.table.addr), scene.table.gpas[0], PAGE_SIZE, Access.READ)
        scene.world.iommu.invalidate()
        table = scene.table.read(0, PAGE_SIZE)
        scene.steps.append("# and the device takes chains, reads, writes, gives back")
        with contextlib.suppress(ProtocolError):
            device = make(scene.place)
            for turn in range(2 * SIZE):
                if not _serve_one(scene, device, turn):
                    break
            _if_it_can(scene, device, "enable_notify")
        scene.in_bounds()
        if scene.table.read(0, PAGE_SIZE) != table:
            raise scene.wrong("wrote where it may only read")

    search(junk_rings(), play, replace(effort, examples=3 * effort.examples))


def _lay_junk(scene: Scene, junk: Junk) -> None:
    bases = [int(scene.place.region.addr), int(scene.table.addr), int(scene.data.addr), 0x10_0000, (1 << 64) - 0x2000]
    layout = scene.place.layout
    for rows, region in ((junk.rows, scene.place.region), (junk.inner, scene.table)):
        for number, (base, offset, length, flags, following) in enumerate(rows):
            address = (bases[base] + offset) % (1 << 64)
            if isinstance(layout, PackedLayout):
                mine = layout.available(number) if number < junk.index else 0
                data = PackedDesc(address, length, following, flags | mine).pack()
            else:
                data = Desc(address, length, flags, following).pack()
            region.write(16 * number, data)
    if isinstance(layout, SplitLayout):
        words = struct.pack(f"<HH{SIZE}HH", junk.words[0], junk.index, *junk.heads, junk.words[1])
        scene.place.region.write(layout.avail, words)
    else:
        scene.place.region.write(layout.driver, struct.pack("<HH", *junk.words))


def _if_it_can(scene: Scene, device: DeviceEnd, name: str, *arguments: object) -> bool:
    """Call a method, if it is there; whether it is."""
    method = getattr(device, name, None)
    if method is None:
        return False
    scene.guarded(lambda: method(*arguments))
    return True


def _serve_one(scene: Scene, device: DeviceEnd, turn: int) -> bool:
    chain = scene.guarded(device.pop)
    if chain is None:
        return False
    written = 0
    with contextlib.suppress(AccessError):
        for address, length, access in chain.buffers():  # type: ignore[attr-defined]
            if access is Access.WRITE:
                scene.place.space.write(address, b"w" * min(length, 0x2000))
                written += length
            else:
                scene.place.space.read(address, min(length, 0x2000))
    if turn % 3 == 2 and _if_it_can(scene, device, "put_back", 1):
        return False
    scene.guarded(lambda: device.push(chain, written))
    _if_it_can(scene, device, "needs_interrupt")
    return True


# -- for driver ends


def made_up(what: str, make: MakeDriver, *, packed: bool) -> None:
    """A device that says of a request what cannot be: `DriverEnd.poll` has to raise ``ProtocolError``. Raises `Wrong`.

    ``what``: ``unknown`` (nobody sent it), ``hidden`` (it was not published), ``twice``, ``jump`` (too many).
    """
    begin = Begin(packed=packed, size=SIZE)
    scene = Scene(begin)
    driver = make(scene.place)
    segment = Segment(DmaAddr(scene.data.addr), 8, True)
    heads = [driver.add([segment]), driver.add([segment])]
    driver.publish()
    hidden = driver.add([segment])
    scene.steps += [f"driver.add(...)  # heads {heads}", "driver.publish()", f"driver.add(...)  # head {hidden}"]
    if what == "jump" and packed:
        raise NotApplicable("of split rings only")
    used = {
        "unknown": [next(each for each in range(99, 200) if each not in {*heads, hidden})],
        "hidden": [hidden],
        "twice": [heads[0], heads[0]],
        "jump": [heads[0]],
    }[what]
    for number, head in enumerate(used):
        _use(scene, number, head, more=7 if what == "jump" else 0)
        scene.steps += [f"# the device says that it has used {head}", "driver.poll()"]
        try:
            given = scene.guarded(driver.poll)
        except ProtocolError:
            if head == heads[0] and what == "twice" and not number:
                raise scene.wrong("refused, but that one was pending") from None
            return
    raise scene.wrong(f"not refused, but {given} given, wanted a ProtocolError")


def _use(scene: Scene, number: int, head: int, *, more: int = 0) -> None:
    """The device end by hand: the ``number``-th used one."""
    region, layout = scene.place.region, scene.place.layout
    if isinstance(layout, PackedLayout):
        region.write(layout.entry(number), PackedDesc(0, 4, head, layout.used(number)).pack())
    else:
        region.write(layout.used + layout.used_entry(number), struct.pack("<II", head, 4))
        region.store16(layout.used + 2, number + 1 + more)
