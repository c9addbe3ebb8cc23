# SPDX-License-Identifier: Apache-2.0
"""Rings that mean nothing, one by one, each of which a device end has to refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.errors import ProtocolError
from virtiova.ring.layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    Desc,
    PackedDesc,
)
from virtiova.testing.checks import NotApplicable
from virtiova.testing.hostile_scene import SIZE, Scene
from virtiova.testing.ring_ends import Begin, MakeDevice

Plant = Callable[[Scene], Iterator[str]]
"""Lays a ring into the scene, once for each variant; yields what it is."""


@dataclass(frozen=True, slots=True)
class Planted:
    """One thing that a driver must never do, and a device end has to refuse."""

    name: str
    title: str
    citation: str
    split: Plant | None
    packed: Plant | None
    indirect: bool = True

    @property
    def about_tables(self) -> bool:
        """Whether it is about what is in an indirect table."""
        return self.indirect and self.name in {"table-length", "table-next", "table-loop", "nested", "not-alone"}


def _good(scene: Scene) -> tuple[int, int, bool]:
    return (scene.data.addr, 16, False)


def _split_loop(scene: Scene) -> Iterator[str]:
    for length in (1, 2, SIZE):
        raw, at = scene.split(), scene.data.addr
        for index in range(length):
            raw.put_desc(index, Desc(at, 8, DESC_F_NEXT, (index + 1) % length))
        raw.offer(0)
        yield f"a chain of {length} descriptors whose last one leads back to the first"


def _packed_loop(scene: Scene) -> Iterator[str]:
    raw, at = scene.ring(), scene.data.addr
    raw.offer_rows(*[(at, 8, 0, DESC_F_NEXT)] * SIZE)
    yield "a list that goes on through the whole ring"


def _split_head(scene: Scene) -> Iterator[str]:
    for head in (SIZE, 0x7FFF, 0xFFFF):
        raw = scene.split()
        raw.put_chain(0, _good(scene))
        raw.offer(head)
        yield f"head {head} in a ring of {SIZE}"


def _split_next(scene: Scene) -> Iterator[str]:
    for following in (SIZE, SIZE + 1, 0xFFFF):
        raw, at = scene.split(), scene.data.addr
        raw.put_desc(0, Desc(at, 8, DESC_F_NEXT, following))
        raw.offer(0)
        yield f"a descriptor whose next is {following}, in a ring of {SIZE}"


def _split_jump(scene: Scene) -> Iterator[str]:
    for index in (SIZE + 1, 0x8000, 0xFFFF):
        raw = scene.split()
        raw.put_chain(0, _good(scene))
        raw.put16(raw.avail + 2, index)
        yield f"an available index of {index}, with none before, in a ring of {SIZE}"


def _table(scene: Scene, length: int, flags: int = 0) -> Desc:
    return Desc(scene.table.addr, length, DESC_F_INDIRECT | flags, 1 if flags & DESC_F_NEXT else 0)


def _split_tables(rows: Callable[[Scene], Sequence[tuple[str, Desc, Sequence[Desc]]]]) -> Plant:
    def plant(scene: Scene) -> Iterator[str]:
        for words, desc, inner in rows(scene):
            raw = scene.split()
            raw.put_desc(0, desc)
            raw.put_chain(1, _good(scene))
            for index, each in enumerate(inner):
                raw.put_desc(index, each, scene.table.addr)
            raw.offer(0)
            yield words

    return plant


def _packed_tables(rows: Callable[[Scene], Sequence[tuple[str, list[tuple[int, int, int, int]]]]]) -> Plant:
    def plant(scene: Scene) -> Iterator[str]:
        inner = PackedDesc(scene.data.addr, 8, 0, 0).pack()
        scene.table.write(0, inner * (PAGE_SIZE // 16))
        for words, made in rows(scene):
            raw = scene.ring()
            raw.offer_rows(*made)
            yield words

    return plant


def _odd_lengths(scene: Scene) -> list[tuple[str, Desc, list[Desc]]]:
    inner = [Desc(scene.data.addr, 8, 0, 0)] * 2
    return [(f"an indirect table of {n} bytes", _table(scene, n), inner) for n in (0, 8, 17, 40)]


def _nested(scene: Scene) -> list[tuple[str, Desc, list[Desc]]]:
    inner = [Desc(scene.table.addr + 16, 16, DESC_F_INDIRECT, 0), Desc(scene.data.addr, 8, 0, 0)]
    return [("an indirect table in an indirect table", _table(scene, 32), inner)]


def _goes_on(scene: Scene) -> list[tuple[str, Desc, list[Desc]]]:
    inner = [Desc(scene.data.addr, 8, 0, 0)]
    return [("an indirect table, and a next descriptor", _table(scene, 16, DESC_F_NEXT), inner)]


def _leads_out(scene: Scene) -> list[tuple[str, Desc, list[Desc]]]:
    return [
        (f"an indirect table of 2 descriptors, with next {n}", _table(scene, 32), [Desc(scene.data.addr, 8, 1, n)])
        for n in (2, 3, 0xFFFF)
    ]


def _one_table(scene: Scene) -> list[tuple[str, Desc, list[Desc]]]:
    return [("an indirect table, but bit 28 was not taken", _table(scene, 16), [Desc(scene.data.addr, 8, 0, 0)])]


def _loop_within(scene: Scene) -> list[tuple[str, Desc, list[Desc]]]:
    inner = [Desc(scene.data.addr, 8, DESC_F_NEXT, 1), Desc(scene.data.addr, 8, DESC_F_NEXT, 0)]
    return [("an indirect table whose second descriptor leads back to the first", _table(scene, 32), inner)]


def _packed_rows(scene: Scene, length: int, more: int = 0) -> list[tuple[int, int, int, int]]:
    rows = [(int(scene.table.addr), length, 0, DESC_F_INDIRECT | more)]
    return rows + ([(int(scene.data.addr), 8, 0, 0)] if more & DESC_F_NEXT else [])


def _mixed_split(scene: Scene) -> Iterator[str]:
    raw, at = scene.split(), scene.data.addr
    raw.put_chain(0, (at, 8, True), (at + 8, 8, False))
    raw.offer(0)
    yield "a buffer to read behind one to write"


def _mixed_packed(scene: Scene) -> Iterator[str]:
    raw, at = scene.ring(), scene.data.addr
    raw.offer((at, 8, True), (at + 8, 8, False))
    yield "a buffer to read behind one to write"


PLANTED: Final = (
    Planted("loop", "a chain that does not end is refused", "virtio 1.4, 2.7.5.2", _split_loop, _packed_loop),
    Planted("head", "a head that is not in the ring is refused", "virtio 1.4, 2.7.6", _split_head, None),
    Planted("next", "a next that is not in the ring is refused", "virtio 1.4, 2.7.5", _split_next, None),
    Planted("jump", "more chains than the ring has are refused", "virtio 1.4, 2.7.6", _split_jump, None),
    Planted(
        "table-length",
        "an indirect table of no descriptors, or of half ones, is refused",
        "virtio 1.4, 2.7.5.3",
        _split_tables(_odd_lengths),
        _packed_tables(lambda scene: [(f"a table of {n} bytes", _packed_rows(scene, n)) for n in (0, 8, 17)]),
    ),
    Planted(
        "table-next",
        "a next that is not in its table is refused",
        "virtio 1.4, 2.7.5.3",
        _split_tables(_leads_out),
        None,
    ),
    Planted("table-loop", "a loop in a table is refused", "virtio 1.4, 2.7.5.3", _split_tables(_loop_within), None),
    Planted("nested", "a table in a table is refused", "virtio 1.4, 2.7.5.3.1", _split_tables(_nested), None),
    Planted(
        "not-alone",
        "a table that something follows is refused",
        "virtio 1.4, 2.7.5.3.1",
        _split_tables(_goes_on),
        _packed_tables(lambda scene: [("a table, and more", _packed_rows(scene, 16, DESC_F_NEXT))]),
    ),
    Planted(
        "not-taken",
        "a table is refused where bit 28 was not taken",
        "virtio 1.4, 2.7.5.3.1",
        _split_tables(_one_table),
        _packed_tables(lambda scene: [("a table, but bit 28 was not taken", _packed_rows(scene, 16))]),
        indirect=False,
    ),
    Planted(
        "order",
        "what is to be read does not come after what is to be written",
        "virtio 1.4, 2.7.4.2",
        _mixed_split,
        _mixed_packed,
    ),
)


def refuses(planted: Planted, make: MakeDevice, *, packed: bool) -> None:
    """Each variant, in a scene of its own: `DeviceEnd.pop` has to raise ``ProtocolError``. Raises `Wrong`."""
    plant = planted.packed if packed else planted.split
    if plant is None:
        raise NotApplicable("of split rings only")
    begin = Begin(packed=packed, size=SIZE, indirect=planted.about_tables)
    for number in range(sum(1 for _ in plant(Scene(begin)))):
        scene = Scene(begin)
        words = _only(plant, scene, number)
        device = make(scene.place)
        scene.steps += [f"# in the ring: {words}", "device.pop()"]
        try:
            given = scene.guarded(device.pop)
        except ProtocolError:
            scene.in_bounds()
            continue
        raise scene.wrong(f"not refused, but {'None' if given is None else 'a chain'} given, wanted a ProtocolError")


def _only(plant: Plant, scene: Scene, number: int) -> str:
    """Lay the variant of that number; what it is. Nothing is left of those before it."""
    for at, words in enumerate(plant(scene)):
        if at == number:
            return words
        scene.place.region.write(0, bytes(scene.place.layout.total))
    raise LookupError(number)
