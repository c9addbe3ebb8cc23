# SPDX-License-Identifier: Apache-2.0
"""What is made of a guest's console, QEMU's traces and QEMU's monitor: hostile input, and the judge's table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.addr import AddressKind
from virtiova.guest import judge
from virtiova.guest.facts import Inside
from virtiova.guest.outside import Outside
from virtiova.guest.platforms import PLATFORMS, find
from virtiova.policy import RULES, Front, predict
from virtiova.result import Path

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
