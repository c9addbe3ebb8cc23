# SPDX-License-Identifier: Apache-2.0
"""What is seen of a booted guest, from inside and from outside: any console, any trace, any monitor."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.collect import monitor_words
from virtiova.errors import ProtocolError
from virtiova.guest import facts
from virtiova.guest.facts import Console, Translations
from virtiova.guest.outside import look

# -- the console -----------------------------------------------------------------------------------------------------

GOOD = b"""\r
[    0.000000] Linux\r
@virtiova begin 1\r
@virtiova kernel 6.1.0 x86_64\r
(XEN) noise @virtiova disk bit-on features=0010\r
@virtiova disk bit-on group_type=DMA\r
@virtiova disk bit-off group_type=\r
@virtiova end 3.2\r
"""


@given(st.lists(st.integers(1, len(GOOD)), max_size=20))
def test_facts_do_not_depend_on_how_they_arrive(cuts: list[int]) -> None:
    console = Console()
    edges = sorted({0, *cuts, len(GOOD)})
    for start, end in pairwise(edges):
        console.feed(GOOD[start:end])
    inside = console.inside
    assert inside.ended
    assert inside.values["kernel"] == "6.1.0 x86_64"
    assert inside.disks == {"bit-on": {"features": "0010", "group_type": "DMA"}, "bit-off": {"group_type": ""}}
    assert console.last_lines() == ["[    0.000000] Linux"]


words = st.sampled_from([b"@virtiova ", b"disk ", b"end", b"bit-on ", b"a=b", b"\n", b"\r", b"\x1b[2J", b"\xff", b" "])


@given(st.lists(words | st.binary(max_size=30), max_size=60))
def test_any_console_is_taken_in(pieces: list[bytes]) -> None:
    console = Console()
    for piece in pieces:
        console.feed(piece)
    for line in console.last_lines():
        assert line.isprintable()
    for disk in console.inside.disks.values():
        assert all(value.isprintable() for value in disk.values())


def test_a_console_without_end_is_bounded() -> None:
    console = Console()
    for _ in range(200):
        console.feed(b"x" * 65536)
    assert len(console.last_lines()[0]) <= facts.LINE_LIMIT
    for number in range(20_000):
        console.feed(b"\n@virtiova k%d %s\n@virtiova disk d%d k=v\nnoise %d\n" % (number, b"v" * 999, number, number))
    inside = console.inside
    assert len(inside.values) + len(inside.disks) <= 1000
    assert max(map(len, inside.values.values())) <= 200
    assert len(console.last_lines()) <= facts.LAST_LINES


def test_a_line_that_is_too_long_is_no_fact_of_its_tail() -> None:
    console = Console()
    console.feed(b"x" * facts.LINE_LIMIT + b"@virtiova end 1\n")
    assert not console.inside.ended


def test_terminal_commands_do_not_reach_a_terminal() -> None:
    assert monitor_words.printable("a\x1b[2Jb\x1b]0;title\x07c\x00\x9bd") == "ab0;title c  d"


@pytest.mark.parametrize(
    ("features", "answer"),
    [("0" * 33 + "1", True), ("1" * 33 + "0" * 31, False), ("", None), ("1" * 33, None), ("x" * 64, None)],
)
def test_a_feature_of_sysfs(features: str, answer: bool | None) -> None:
    assert facts.feature(features, 33) is answer


def test_a_number_is_a_number() -> None:
    assert [facts.number(text) for text in ("0", "12", "", "-1", "9" * 99, "\u0661", None)] == [0, 12, *[None] * 5]


# -- traces ----------------------------------------------------------------------------------------------------------

VTD = "vtd_dmar_translate dev 00:02.00 iova 0xfffff000 -> gpa 0x2bb6000 mask 0xfff"
SMMU = (
    "smmuv3_translate_success smmuv3-iommu-memory-region-16-0 sid=0x10 iova=0xffffd240 translated=0x43210240 perm=0x3"
)
BYPASS = "smmuv3_translate_bypass smmuv3-iommu-memory-region-16-0 sid=0x10 STE bypass iova:0x5b664000 is_write=0"
SPAPR = "spapr_iommu_xlate liobn=0x80000000 0x30010282 -> 0x2281003 perm=3 mask=0xffff"
DDW = "spapr_iommu_xlate liobn=0x80000001 0x2281282 -> 0x2000003 perm=3 mask=0xffffff"


@pytest.mark.parametrize(
    ("line", "source", "address", "target"),
    [
        (VTD, 0x10, 0xFFFFF240, 0x2BB6240),
        (VTD.replace("0x2bb6000 mask 0xfff", "0x36400000 mask 0x1fffff"), 0x10, 0xFFFFF240, 0x365FF240),
        (SMMU, 0x10, 0xFFFFD002, 0x43210002),
        (SPAPR, None, 0x30010002, 0x2280002),
        (SPAPR, 0x08, 0x30010002, 0x2280002),
        (DDW, None, (1 << 59) + 0x2281002, 0x2281002),
    ],
)
def test_a_translation_is_read(line: str, source: int | None, address: int, target: int) -> None:
    found = Translations()
    text = f"1@2.3:{line}\n".encode()
    found.feed(text[:20])
    found.feed(text[20:] + text)
    assert found.of(source, address) == (2, target)
    assert found.of(source, address + (1 << 40)) == (0, None)


def test_another_devices_translation_does_not_count() -> None:
    found = Translations()
    found.take(VTD)
    assert found.of(0x18, 0xFFFFF000) == (0, None)
    found.take(DDW)
    assert found.of(None, 0x2281002) == (0, None), "an address beside the window is not in it"


def test_what_is_let_through_is_counted_for_its_device() -> None:
    found = Translations()
    found.take(BYPASS)
    assert found.let_through == {0x10: 1}
    assert found.total == 0


@given(st.lists(st.sampled_from([VTD, SMMU, SPAPR]).map(str.encode) | st.binary(max_size=80), max_size=20))
def test_any_trace_is_taken_in(pieces: list[bytes]) -> None:
    found = Translations()
    for piece in pieces:
        found.feed(piece + b"\n")
        found.feed(piece)
    found.of(None, 0xFFFFF000)


def test_a_mask_with_holes_is_no_translation() -> None:
    found = Translations()
    found.take(VTD.replace("mask 0xfff", "mask 0xf0f"))
    assert found.total == 0


# -- the monitor -----------------------------------------------------------------------------------------------------

MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, ram): not-memory
FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-000000001fffffff (prio 0, ram): pc.ram @0000000000100000
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
"""


def test_the_map_of_ram() -> None:
    ram = monitor_words.ram_map(MTREE)
    assert ram == [(0, 0x9FFFF), (0x100000, 0x1FFFFFFF)]
    assert monitor_words.in_ram(ram, 0x1FFFFFFF)
    assert not monitor_words.in_ram(ram, 0xFFFFF000), "the BIOS lies where IOVAs begin, and is no RAM"
    assert monitor_words.ram_map("rubbish") == []


VIEWS = """\
FlatView #7
 AS "virtio-blk-pci", root: bus master container
 AS "vtd-root", root: vtd-01.0
 Root memory region: vtd-01.0-dmar
  0000000000000000-00000000fedfffff (prio 0, i/o): vtd-01.0-dmar
FlatView #8
 AS "vtd-root", root: vtd-02.0
 AS "vtd-root", root: vtd-1f.0
 Root memory region: vtd-nodmar
"""


def test_what_vtd_put_in_front() -> None:
    assert monitor_words.region_of(VIEWS.replace("\n", "\r\n"), 0x08) == "vtd-01.0-dmar"
    assert monitor_words.region_of(VIEWS, 0x10) == "vtd-nodmar"
    assert monitor_words.region_of(VIEWS, 0xF8) == "vtd-nodmar"
    assert monitor_words.region_of(VIEWS, 0x18) == ""
    assert monitor_words.region_of(VIEWS, 0x108) == "", "behind a root port all have the same name"


def test_bytes_of_memory() -> None:
    assert monitor_words.xp_bytes("000000001d0a3000: 0x00 0x00 0x06 0x00\r\n") == b"\0\0\6\0"
    assert monitor_words.xp_bytes("Cannot access memory\r\n") is None


GOOD_STATUS = {
    "host-features": {"transports": ["VIRTIO_F_IOMMU_PLATFORM: Device can be used on IOMMU platform"]},
    "guest-features": {"transports": []},
    "status": {"statuses": ["VIRTIO_CONFIG_S_FEATURES_OK: x", "VIRTIO_CONFIG_S_DRIVER_OK: y"]},
}
GOOD_QUEUE = {"vring-desc": 0x2000, "vring-avail": 0x3000, "vring-used": 0x3240, "last-avail-idx": 6, "used-idx": 6}
GOOD_PCI = [{"devices": [{"qdev_id": "", "pci_bridge": {"devices": [{"qdev_id": "d", "bus": 1, "slot": 0}]}}]}]
PATH_OF_D = "/machine/peripheral/d/virtio-backend"


class FakeMonitor:
    """A monitor whose answers are chosen."""

    def __init__(self, **answers: object) -> None:
        self._answers = {
            "x-query-virtio": [{"path": PATH_OF_D}],
            "x-query-virtio-status": GOOD_STATUS,
            "x-query-virtio-queue-status": GOOD_QUEUE,
            "query-pci": GOOD_PCI,
        } | answers

    def execute(self, command: str, **_: object) -> object:
        return self._answers[command]

    def human(self, line: str) -> str:
        if line.startswith("info"):
            return MTREE
        return "0000000000003000: 0x00 0x00 0x06 0x00\r\n"


def test_a_disk_behind_a_port_is_looked_at() -> None:
    outside = look(FakeMonitor(), "d", Translations(), pci=True)  # type: ignore[arg-type]
    assert (outside.offered, outside.accepted, outside.driver_ok) == (True, False, True)
    assert outside.ram
    assert outside.visible
    assert outside.translated == 0


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD_QUEUE, "devices"]), inner),
)


@given(st.sampled_from(["x-query-virtio", "x-query-virtio-status", "x-query-virtio-queue-status", "query-pci"]), json)
def test_a_monitor_that_answers_anything(command: str, answer: object) -> None:
    with contextlib.suppress(ProtocolError):
        look(FakeMonitor(**{command: answer}), "d", Translations(), pci=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"bus": "x"}, {"bus": None}, {"slot": []}, {"pci_bridge": 1}])
def test_a_pci_tree_that_is_none(bad: dict[str, object]) -> None:
    tree = [{"devices": [{"qdev_id": "d", "bus": 0, "slot": 1} | bad]}]
    with contextlib.suppress(ProtocolError):
        look(FakeMonitor(**{"query-pci": tree}), "d", Translations(), pci=True)  # type: ignore[arg-type]
