# SPDX-License-Identifier: Apache-2.0
"""What is made of a guest's console, QEMU's traces and QEMU's monitor: hostile input, and the judge's table."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import AddressKind
from virtiova.errors import ProtocolError
from virtiova.guest import facts, judge
from virtiova.guest.facts import Console, Inside, Translations
from virtiova.guest.outside import Outside, look
from virtiova.guest.platforms import PLATFORMS, find
from virtiova.policy import RULES, Front, predict
from virtiova.result import Path

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
    assert facts.printable("a\x1b[2Jb\x1b]0;title\x07c\x00\x9bd") == "ab0;title c  d"


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
    ram = facts.ram_map(MTREE)
    assert ram == [(0, 0x9FFFF), (0x100000, 0x1FFFFFFF)]
    assert facts.in_ram(ram, 0x1FFFFFFF)
    assert not facts.in_ram(ram, 0xFFFFF000), "the BIOS lies where IOVAs begin, and is no RAM"
    assert facts.ram_map("rubbish") == []


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
    assert facts.region_of(VIEWS.replace("\n", "\r\n"), 0x08) == "vtd-01.0-dmar"
    assert facts.region_of(VIEWS, 0x10) == "vtd-nodmar"
    assert facts.region_of(VIEWS, 0xF8) == "vtd-nodmar"
    assert facts.region_of(VIEWS, 0x18) == ""
    assert facts.region_of(VIEWS, 0x108) == "", "behind a root port all have the same name"


def test_bytes_of_memory() -> None:
    assert facts.xp_bytes("000000001d0a3000: 0x00 0x00 0x06 0x00\r\n") == b"\0\0\6\0"
    assert facts.xp_bytes("Cannot access memory\r\n") is None


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


# -- the judge -------------------------------------------------------------------------------------------------------

GIVEN = Outside(
    offered=True,
    accepted=True,
    features_ok=True,
    driver_ok=True,
    desc=0x1D0A2000,
    avail=0x1D0A3000,
    used=0x1D0A3240,
    avail_index=6,
    used_index=6,
    ram=True,
    visible=True,
    translated=0,
    through=False,
    let_through=0,
)
IOVA = replace(GIVEN, desc=0xFFFFE000, ram=False, visible=False)
XEN = Inside({"hypervisor": "xen", "pages_end_kib": "524288"})


def seen(outside: Outside, **more: object) -> judge.Seen:
    base = judge.Seen(Inside(), {}, outside, data_right=True, has_iommu=True)
    return replace(base, **more)  # type: ignore[arg-type]


TABLE = {
    "nothing in front": (seen(GIVEN, has_iommu=False), AddressKind.GPA, Path.DIRECT),
    "translated, with the trace": (seen(replace(IOVA, translated=9, through=True)), AddressKind.IOVA, Path.TRANSLATED),
    "translated, without a trace": (seen(IOVA), AddressKind.IOVA, Path.TRANSLATED),
    "around what the other disk goes through": (
        seen(GIVEN, control=Path.TRANSLATED),
        AddressKind.GPA,
        Path.BYPASS,
    ),
    "as the other disk, which nothing translates": (seen(GIVEN, control=Path.DIRECT), AddressKind.GPA, Path.DIRECT),
    "the other disk says nothing": (seen(GIVEN, control=Path.UNKNOWN), AddressKind.GPA, Path.UNKNOWN),
    "VT-d off": (seen(replace(GIVEN, region="vtd-nodmar")), AddressKind.GPA, Path.DIRECT),
    "VT-d says that it translates": (seen(replace(GIVEN, region="vtd-01.0-dmar")), AddressKind.GPA, Path.BYPASS),
    "VT-d's own word before the guest's": (
        seen(replace(GIVEN, region="vtd-nodmar"), disk={"group_type": "DMA"}),
        AddressKind.GPA,
        Path.DIRECT,
    ),
    "an IOMMU of which nobody says anything": (seen(GIVEN), AddressKind.GPA, Path.UNKNOWN),
    "the guest says that it lets it through": (
        seen(GIVEN, disk={"group_type": "identity"}),
        AddressKind.GPA,
        Path.DIRECT,
    ),
    "an IOMMU that lets it through": (seen(replace(GIVEN, let_through=9)), AddressKind.GPA, Path.DIRECT),
    "the bit, and yet around": (seen(GIVEN, disk={"group_type": "DMA"}), AddressKind.GPA, Path.BYPASS),
    "the wrong data": (seen(IOVA, data_right=False), AddressKind.UNKNOWN, Path.UNKNOWN),
    "never driven": (seen(replace(GIVEN, driver_ok=False)), AddressKind.UNKNOWN, Path.UNKNOWN),
    "RAM, but not the ring": (seen(replace(GIVEN, visible=False)), AddressKind.UNKNOWN, Path.UNKNOWN),
    "RAM, not the ring, but translated to it": (
        seen(replace(GIVEN, visible=False, translated=3, through=True)),
        AddressKind.IOVA,
        Path.TRANSLATED,
    ),
    "a trace that leads elsewhere": (seen(replace(GIVEN, translated=3)), AddressKind.GPA, Path.UNKNOWN),
    "a machine address": (
        seen(replace(GIVEN, desc=0x36820000), inside=XEN, has_iommu=False),
        AddressKind.MACHINE,
        Path.DIRECT,
    ),
    "Xen, but the address could be the domain's own": (
        seen(GIVEN, inside=XEN, has_iommu=False),
        AddressKind.UNKNOWN,
        Path.DIRECT,
    ),
    "Xen's one-to-one mapping": (
        seen(replace(GIVEN, desc=0x36820000, translated=5, through=True), inside=XEN),
        AddressKind.MACHINE,
        Path.TRANSLATED,
    ),
}


@pytest.mark.parametrize(("what", "kind", "path"), TABLE.values(), ids=TABLE)
def test_the_judges_table(what: judge.Seen, kind: AddressKind, path: Path) -> None:
    assert judge.address_kind(what) is kind
    assert judge.path(what) is path
    assert ("translations" in judge.sentence(what, kind)) == (what.has_iommu and what.data_right)
    assert "translations" not in judge.sentence(replace(what, traced=False), kind)


bools = st.booleans()
any_outside = st.builds(
    Outside,
    offered=bools,
    accepted=bools,
    features_ok=bools,
    driver_ok=bools,
    desc=st.integers(0, 2**64 - 1),
    avail=st.integers(0, 2**64 - 1),
    used=st.integers(0, 2**64 - 1),
    avail_index=st.integers(0, 65535),
    used_index=st.integers(0, 65535),
    ram=bools,
    visible=bools,
    translated=st.integers(0, 99),
    through=bools,
    let_through=st.integers(0, 9),
)
any_words = st.dictionaries(
    st.sampled_from(["hypervisor", "pages_end_kib", "features", "group_type", "dma_map"]),
    st.sampled_from(["xen", "DMA", "identity", "0", "12", "0" * 33 + "1"]) | st.text(max_size=5),
)


@given(any_outside, any_words, any_words, bools, bools, st.none() | st.sampled_from(Path))
def test_anything_has_one_answer(
    outside: Outside, values: dict[str, str], disk: dict[str, str], data: bool, iommu: bool, control: Path | None
) -> None:
    what = judge.Seen(Inside(values), disk, outside, data, iommu, control)
    kind, path = judge.address_kind(what), judge.path(what)
    judge.disagreements(what, predict(find("x86-vtd").facts(offered=True, accepted=True)), kind, frozenset({"DMA"}))
    if path is not Path.UNKNOWN:
        assert data
        assert outside.driver_ok, "no path without a driver at work and the right data"
    if path is Path.BYPASS:
        assert iommu
        assert outside.visible
    if path is Path.DIRECT:
        assert outside.visible
        assert not outside.translated


def test_what_disagrees_is_said() -> None:
    prediction = predict(find("x86-vtd").facts(offered=True, accepted=True))
    disk = {"features": "0" * 64, "dma_map": "0", "group_type": "identity"}
    said = judge.disagreements(seen(GIVEN, disk=disk), prediction, AddressKind.GPA, frozenset({"DMA"}))
    assert said == [
        "the guest says that bit 33 is off, the device that it is on",
        "iova addresses are predicted, gpa addresses were seen",
        "platform DMA ops are predicted, and 0 calls of the DMA API were counted",
        "an IOMMU group of type DMA is expected, and it is identity",
    ]
    right = {"features": "0" * 33 + "1", "dma_map": "31", "group_type": "DMA"}
    assert judge.disagreements(seen(IOVA, disk=right), prediction, AddressKind.IOVA, frozenset({"DMA"})) == []


# -- the rows --------------------------------------------------------------------------------------------------------

EXPECTED = {
    # name: (kind and path with the bit, kind and path without it)
    "x86": ("gpa direct", "gpa direct"),
    "x86-vtd": ("iova translated", "gpa bypass"),
    "x86-vtd-off": ("gpa direct", "gpa direct"),
    "x86-vtd-pt": ("gpa direct", "gpa direct"),
    "x86-vtd-strict": ("iova translated", "gpa bypass"),
    "x86-vtd-lazy": ("iova translated", "gpa bypass"),
    "aarch64-smmuv3": ("iova translated", "gpa bypass"),
    "aarch64-smmuv3-pt": ("gpa direct", "gpa direct"),
    "aarch64-mmio": ("gpa direct", "gpa direct"),
    "ppc64le-pseries": ("iova translated", "gpa bypass"),
    "ppc64le-pseries-ddw": ("iova translated", "gpa bypass"),
    "ppc64le-powernv9": ("iova translated", "gpa bypass"),
    "xen-pv": ("machine direct", "machine direct"),
    "xen-pv-vtd": ("machine translated", "machine bypass"),
    "s390x-ccw": ("gpa direct", "gpa direct"),
    "s390x-zpci": ("iova translated", "gpa bypass"),
}


def test_every_row_predicts_what_the_facts_say() -> None:
    """From the rows through the policy, against a table written by hand."""
    found = {}
    for name, platform in PLATFORMS.items():
        both = [predict(platform.facts(offered=bit, accepted=bit)) for bit in (True, False)]
        found[name] = tuple(f"{p.address} {'|'.join(p.paths)}" for p in both)
    assert found == EXPECTED


@pytest.mark.parametrize("rule", ["no-quirk", "xen-domain", "device-uses-platform", "front-translates"])
def test_an_inverted_rule_changes_rows(rule: str) -> None:
    changed = 0
    for platform in PLATFORMS.values():
        for bit in (True, False):
            at = platform.facts(offered=bit, accepted=bit)
            right, wrong = predict(at), predict(at, RULES.inverted(rule))
            changed += (right.address, right.paths) != (wrong.address, wrong.paths)
    assert changed > 0


def test_rows_hold_together() -> None:
    for name, platform in PLATFORMS.items():
        assert platform.name == name
        assert (platform.iommu == "none") == (platform.front is Front.NONE)
        assert (platform.machine == "xen-pv") == (platform.xen is not None)
        assert "," not in platform.append or platform.xen is None, "a comma would end a multiboot module's words"
        assert not platform.places or len(platform.places) >= 2
