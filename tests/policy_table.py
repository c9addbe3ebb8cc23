# SPDX-License-Identifier: Apache-2.0
"""The truth table of the rule: facts, and what must be predicted of them, with the chain of questions."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from virtiova.addr import Access, AddressKind
from virtiova.features import Generation
from virtiova.policy import Facts, Front, Mapping, Payload
from virtiova.result import Path

GPA, IOVA, MACHINE, UNKNOWN = (AddressKind.GPA, AddressKind.IOVA, AddressKind.MACHINE, AddressKind.UNKNOWN)
BLOCKED, BYPASS, DIRECT, REFUSED = (Path.BLOCKED, Path.BYPASS, Path.DIRECT, Path.REFUSED)
MIXED = Path.MIXED
STALE, TRANSLATED = (Path.STALE, Path.TRANSLATED)

# A chain is written as the ids of the rules asked, in order, with the answer as a sign.
_QUIRK = "-no-quirk -xen-domain"
_DEVICE_QUIRK = "+bus-master -device-uses-platform"
_DEVICE_PLATFORM = "+bus-master +device-uses-platform"


@dataclass(frozen=True)
class Row:
    """One line of the table: facts, and all that follows from them."""

    name: str
    facts: Facts
    address: AddressKind
    paths: set[Path]
    dma_ops: str
    chain: str


# Offered or not, accepted or not, and what is in front of the device: the driver's rule, line by line.
TABLE = [
    Row(
        "not offered, nothing in front",
        Facts(False, False, Front.NONE),
        GPA,
        {DIRECT},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "not offered, IOMMU translates: gone around, not isolated",
        Facts(False, False, Front.TRANSLATING),
        GPA,
        {BYPASS},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "not offered, IOMMU translates, hardware: its address is looked up, and misses",
        Facts(False, False, Front.TRANSLATING, hardware=True, mapping=Mapping.UNMAPPED),
        GPA,
        {BLOCKED},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_PLATFORM} +front-translates -permitted +invalidated",
    ),
    Row(
        "not offered, Xen domain: the DMA API all the same",
        Facts(False, False, Front.NONE, xen=True),
        MACHINE,
        {DIRECT},
        "platform",
        f"+bit-taken -no-quirk +xen-domain {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "not offered, Xen domain, emulated IOMMU: the corner that never worked",
        Facts(False, False, Front.TRANSLATING, xen=True),
        MACHINE,
        {BYPASS},
        "platform",
        f"+bit-taken -no-quirk +xen-domain {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "not offered, restricted memory: the driver gives up",
        Facts(False, False, Front.NONE, restricted=True),
        UNKNOWN,
        {REFUSED},
        "direct",
        "-restricted-memory",
    ),
    *(
        Row(
            f"accepted, {front}: the DMA API gives out the physical address",
            Facts(True, True, front),
            GPA,
            {DIRECT},
            "platform",
            f"+bit-taken +no-quirk {_DEVICE_PLATFORM} -front-translates",
        )
        for front in (Front.NONE, Front.OFF, Front.PASSTHROUGH)
    ),
    Row(
        "accepted, IOMMU translates",
        Facts(True, True, Front.TRANSLATING),
        IOVA,
        {TRANSLATED},
        "platform",
        f"+bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "accepted, Xen domain",
        Facts(True, True, Front.NONE, xen=True),
        MACHINE,
        {DIRECT},
        "platform",
        f"+bit-taken +no-quirk {_DEVICE_PLATFORM} -front-translates",
    ),
    Row(
        "accepted, restricted memory: the address of a bounce page, nobody has to translate",
        Facts(True, True, Front.NONE, restricted=True),
        GPA,
        {DIRECT},
        "bounce",
        f"+restricted-memory +bit-taken +no-quirk {_DEVICE_PLATFORM} -front-translates",
    ),
    Row(
        "accepted, restricted memory behind an IOMMU",
        Facts(True, True, Front.TRANSLATING, restricted=True),
        IOVA,
        {TRANSLATED},
        "bounce",
        f"+restricted-memory +bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    *(
        Row(
            f"offered and not taken, {front}: physical addresses, and the device may refuse",
            Facts(True, False, front),
            GPA,
            {path, REFUSED},
            "direct",
            f"-bit-taken {_QUIRK} -insists {_DEVICE_QUIRK} {sign}front-translates",
        )
        for front, path, sign in (
            (Front.NONE, DIRECT, "-"),
            (Front.OFF, DIRECT, "-"),
            (Front.PASSTHROUGH, DIRECT, "-"),
            (Front.TRANSLATING, BYPASS, "+"),
        )
    ),
    Row(
        "offered and not taken, by a device that insists",
        Facts(True, False, insists=True),
        GPA,
        {REFUSED},
        "direct",
        f"-bit-taken {_QUIRK} +insists",
    ),
    Row(
        "offered and not taken, by a device known not to mind",
        Facts(True, False, insists=False),
        GPA,
        {BYPASS},
        "direct",
        f"-bit-taken {_QUIRK} -insists {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "offered and not taken, Xen domain",
        Facts(True, False, Front.NONE, xen=True),
        MACHINE,
        {DIRECT, REFUSED},
        "platform",
        f"-bit-taken -no-quirk +xen-domain -insists {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "offered and not taken, restricted memory: the driver gives up first",
        Facts(True, False, restricted=True, insists=True),
        UNKNOWN,
        {REFUSED},
        "direct",
        "-restricted-memory",
    ),
]

# What the table does not say and the specification does.
BESIDE = [
    Row(
        "neither bit 33 nor VERSION_1: insisting is about modern drivers",
        Facts(True, False, insists=True, version_1=False),
        GPA,
        {BYPASS, REFUSED},
        "direct",
        f"-bit-taken {_QUIRK} {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "the driver carries on after the refusal: the device must not touch the queues",
        Facts(True, False, insists=True, carries_on=True),
        GPA,
        {BLOCKED},
        "direct",
        f"-bit-taken {_QUIRK} -driver-ok-first",
    ),
    Row(
        "the driver writes the bit although it was not offered",
        Facts(False, False, wrote_unoffered=True),
        GPA,
        {BYPASS, REFUSED},
        "direct",
        f"-only-offered-bits +bit-taken {_QUIRK} {_DEVICE_QUIRK} +front-translates",
    ),
    Row(
        "the bit asked of a device that can be legacy",
        Facts(False, False, declared=True, can_be_legacy=True),
        UNKNOWN,
        {REFUSED},
        "direct",
        "-room-for-the-bit",
    ),
    Row(
        "the bit asked of a device that cannot be legacy",
        Facts(True, True, declared=True),
        IOVA,
        {TRANSLATED},
        "platform",
        f"+room-for-the-bit +bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "bus master off, accepted",
        Facts(True, True, bus_master=False),
        IOVA,
        {BLOCKED},
        "platform",
        "+bit-taken +no-quirk -bus-master",
    ),
    Row(
        "bus master off, not offered: no way around that either",
        Facts(False, False, bus_master=False),
        GPA,
        {BLOCKED},
        "direct",
        f"+bit-taken {_QUIRK} -bus-master",
    ),
    Row(
        "hardware behind an IOMMU, its address mapped",
        Facts(False, False, hardware=True),
        GPA,
        {TRANSLATED},
        "direct",
        f"+bit-taken {_QUIRK} {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "before the patch: the offer changes nothing for the driver",
        Facts(True, False, Front.NONE, insists=False, generation=Generation.BEFORE),
        GPA,
        {DIRECT},
        "direct",
        f"-bit-taken {_QUIRK} -insists {_DEVICE_QUIRK} -front-translates",
    ),
    Row(
        "before the patch, Xen domain",
        Facts(False, False, Front.NONE, xen=True, generation=Generation.BEFORE),
        MACHINE,
        {DIRECT},
        "platform",
        f"+bit-taken -no-quirk +xen-domain {_DEVICE_QUIRK} -front-translates",
    ),
]

_MAPPINGS = [
    (Mapping.MAPPED, Access.READ, {TRANSLATED}, "+permitted"),
    (Mapping.UNMAPPED, Access.WRITE, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.UNMAPPED, Access.READ, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.READ_ONLY, Access.WRITE, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.READ_ONLY, Access.RW, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.READ_ONLY, Access.READ, {TRANSLATED}, "+permitted +invalidated"),
    (Mapping.WRITE_ONLY, Access.READ, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.WRITE_ONLY, Access.RW, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.WRITE_ONLY, Access.WRITE, {TRANSLATED}, "+permitted +invalidated"),
    (Mapping.REMOVED, Access.WRITE, {BLOCKED}, "-permitted +invalidated"),
    (Mapping.REMOVED_UNTOLD, Access.WRITE, {BLOCKED, STALE}, "-permitted -invalidated"),
    (Mapping.REMAPPED, Access.WRITE, {TRANSLATED}, "+permitted +invalidated"),
    (Mapping.REMAPPED_UNTOLD, Access.WRITE, {TRANSLATED, STALE}, "+permitted -invalidated"),
]
MAPPINGS = [
    Row(
        f"{mapping}, device {access}",
        Facts(True, True, mapping=mapping, access=access),
        IOVA,
        paths,
        "platform",
        f"+bit-taken +no-quirk {_DEVICE_PLATFORM} +front-translates {chain}",
    )
    for mapping, access, paths, chain in _MAPPINGS
]
RULE_OF = {
    Payload.PAGE_NUMBER: "page-number-is-physical",
    Payload.BLOCK: "block-is-physical",
    Payload.REGION: "region-is-physical",
}

# Addresses inside requests: the ring is governed by bit 33 as ever.
PAYLOADS = [
    Row(
        "a GPU's backing entry, accepted, IOMMU translates: as in a descriptor",
        Facts(True, True, payload=Payload.BACKING),
        IOVA,
        {TRANSLATED},
        "platform",
        f"+bit-taken +no-quirk +backing-is-accessed {_DEVICE_PLATFORM} +front-translates +permitted",
    ),
    Row(
        "a GPU's backing entry that is not mapped",
        Facts(True, True, payload=Payload.BACKING, mapping=Mapping.UNMAPPED),
        IOVA,
        {BLOCKED},
        "platform",
        f"+bit-taken +no-quirk +backing-is-accessed {_DEVICE_PLATFORM} +front-translates -permitted +invalidated",
    ),
    Row(
        "a GPU's backing entry, not offered",
        Facts(False, False, payload=Payload.BACKING),
        GPA,
        {BYPASS},
        "direct",
        f"+bit-taken {_QUIRK} +backing-is-accessed {_DEVICE_QUIRK} +front-translates",
    ),
    *(
        Row(
            f"{payload}, accepted, IOMMU translates: the ring does, this does not",
            Facts(True, True, payload=payload),
            GPA,
            {MIXED},
            "direct",
            f"+bit-taken +no-quirk +{rule} {_DEVICE_PLATFORM} +front-translates",
        )
        for payload, rule in RULE_OF.items()
    ),
    *(
        Row(
            f"{payload}, not offered: everything goes around",
            Facts(False, False, payload=payload),
            GPA,
            {BYPASS},
            "direct",
            f"+bit-taken {_QUIRK} +{rule} {_DEVICE_QUIRK} +front-translates",
        )
        for payload, rule in RULE_OF.items()
    ),
    *(
        Row(
            f"{payload}, accepted, nothing in front",
            Facts(True, True, Front.NONE, payload=payload),
            GPA,
            {DIRECT},
            "direct",
            f"+bit-taken +no-quirk +{rule} {_DEVICE_PLATFORM} -front-translates",
        )
        for payload, rule in RULE_OF.items()
    ),
    *(
        Row(
            f"what virtio-iommu is told to map to, its own bit {'on' if on else 'off'}, IOMMU {front}",
            Facts(on, on, front, payload=Payload.MAP_TARGET),
            GPA,
            paths,
            "direct",
            chain,
        )
        for on in (False, True)
        for front, paths, chain in (
            (Front.TRANSLATING, {MIXED}, "+bus-master +front-translates +map-target-is-physical"),
            (Front.OFF, {DIRECT}, "+bus-master -front-translates"),
        )
    ),
]

ROWS = TABLE + BESIDE + MAPPINGS + PAYLOADS

any_facts = st.builds(
    Facts,
    offered=st.booleans(),
    accepted=st.booleans(),
    front=st.sampled_from(Front),
    xen=st.booleans(),
    restricted=st.booleans(),
    version_1=st.booleans(),
    insists=st.sampled_from([None, True, False]),
    hardware=st.booleans(),
    declared=st.sampled_from([None, True, False]),
    can_be_legacy=st.booleans(),
    wrote_unoffered=st.booleans(),
    carries_on=st.booleans(),
    bus_master=st.booleans(),
    mapping=st.sampled_from(Mapping),
    access=st.sampled_from([Access.READ, Access.WRITE, Access.RW]),
    generation=st.sampled_from(Generation),
    iommu=st.sampled_from(["", "amd"]),
    bridged=st.booleans(),
    vhost=st.booleans(),
    pass_through=st.booleans(),
    payload=st.sampled_from(Payload),
)
