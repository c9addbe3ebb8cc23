# SPDX-License-Identifier: Apache-2.0
"""The rules: one yes-or-no question each, with the sentence that it rests on. Knowledge only, no engine.

Every rule can be inverted, which is how the tests show that every rule matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from virtiova.addr import Access
from virtiova.features import VIRTIO_F_IOMMU_PLATFORM, Generation, mask, vring_use_dma_api
from virtiova.policy.facts import Facts, Front, Mapping, Payload
from virtiova.spec import Citation, commit, spec


@dataclass(frozen=True, slots=True)
class Rule:
    """A question to the facts. ``yes`` and ``no`` say in words what the answer means."""

    id: str
    ask: Callable[[Facts], bool]
    yes: str
    no: str
    citation: Citation


class Rules:
    """A set of rules by id."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = {rule.id: rule for rule in rules}

    def __getitem__(self, rule_id: str) -> Rule:
        return self._rules[rule_id]

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules.values())

    def inverted(self, rule_id: str) -> Rules:
        """The same rules, one of which gives the opposite answer."""
        rule = self._rules[rule_id]
        opposite = replace(rule, ask=lambda facts: not rule.ask(facts))
        return Rules(tuple(opposite if r.id == rule_id else r for r in self))


def _negotiated(facts: Facts) -> int:
    return mask([VIRTIO_F_IOMMU_PLATFORM]) if facts.accepted else 0


def _no_quirk(facts: Facts) -> bool:
    if facts.generation is Generation.BEFORE:
        return False
    return vring_use_dma_api(_negotiated(facts), xen_domain=False, generation=facts.generation)


def _permitted(facts: Facts) -> bool:
    if facts.mapping is Mapping.READ_ONLY:
        return Access.WRITE not in facts.access
    if facts.mapping is Mapping.WRITE_ONLY:
        return Access.READ not in facts.access
    return facts.mapping not in (Mapping.UNMAPPED, Mapping.REMOVED, Mapping.REMOVED_UNTOLD)


_PATCH = commit("1a937693993f", "virtio: new feature to detect IOMMU device quirk", "v4.8")
_VTD = "Intel VT-d specification"

RULES = Rules(
    (
        Rule(
            "room-for-the-bit",
            lambda f: not (f.declared and f.can_be_legacy),
            "the device has no legacy interface that would have to do without bit 33",
            "the device can still be legacy; that interface has 32 feature bits, so bit 33 cannot be declared",
            spec("2.2.3", "the legacy interface has no feature bits past 31"),
        ),
        Rule(
            "restricted-memory",
            lambda f: not (f.restricted and f.generation is Generation.TODAY and not f.accepted),
            "the driver's platform does not ask for more than was negotiated",
            "memory is restricted and bit 33 is not negotiated: the driver gives up before FEATURES_OK",
            Citation("Linux", "virtio_features_ok()", "device must provide VIRTIO_F_ACCESS_PLATFORM (-ENODEV)"),
        ),
        Rule(
            "bit-taken",
            lambda f: bool(f.accepted) or not f.offered,
            "the driver took bit 33, or it was not offered",
            "the driver did not take the offered bit 33; the device may fail to operate further",
            spec("6.2", "a device MAY fail to operate further if VIRTIO_F_ACCESS_PLATFORM is not accepted"),
        ),
        Rule(
            "insists",
            lambda f: f.insists is True,
            "this device is known to refuse such a driver",
            "this device is not known to refuse such a driver",
            Citation("QEMU", "virtio_validate_features()", "-EFAULT where bit 33 is offered and not accepted"),
        ),
        Rule(
            "only-offered-bits",
            lambda f: not f.wrote_unoffered,
            "the driver wrote only bits that were offered",
            "the driver wrote a bit that was never offered: the device may refuse the set, or ignore the bit",
            spec("2.2.1", "the driver MUST NOT accept a feature which the device did not offer"),
        ),
        Rule(
            "no-quirk",
            _no_quirk,
            "bit 33 is negotiated: no quirk, the driver takes its addresses from the DMA API",
            "no negotiated bit 33: the device has the quirk and must be given physical addresses",
            _PATCH,
        ),
        Rule(
            "xen-domain",
            lambda f: f.xen,
            "the driver runs in a Xen domain: it takes its addresses from the DMA API all the same",
            "the driver does not run in a Xen domain: it passes physical addresses, untouched",
            Citation("Linux", "vring_use_dma_api()", "otherwise left to guess: the DMA API on a Xen domain only"),
        ),
        Rule(
            "driver-ok-first",
            lambda f: not f.carries_on,
            "the device's status allows it to use the queues",
            "FEATURES_OK was refused, so DRIVER_OK does not count: the device must not use the queues",
            spec("2.1.2", "the device MUST NOT consume buffers before DRIVER_OK"),
        ),
        Rule(
            "bus-master",
            lambda f: f.bus_master,
            "the device may do DMA (bus master on)",
            "the device may not do any DMA (bus master off)",
            Citation("PCI Local Bus 3.0", "6.2.2", "a 0 in bit 2 disables the device from generating accesses"),
        ),
        Rule(
            "device-uses-platform",
            lambda f: bool(f.accepted) or f.hardware,
            "the device's accesses are the platform's: they go through whatever is in front of it",
            "the device takes physical addresses, not translated further: it goes around what is in front of it",
            spec("6", "VIRTIO_F_ACCESS_PLATFORM; when clear, this overrides any platform-specific description"),
        ),
        Rule(
            "backing-is-accessed",
            lambda f: f.payload is Payload.BACKING,
            "the device accesses what a backing entry names, so that bit 33 governs it as it does a descriptor",
            "a backing entry is no address that the device accesses",
            spec("5.7.6.8", "entries are the addresses of the guest memory that backs a resource"),
        ),
        Rule(
            "page-number-is-physical",
            lambda f: f.payload is Payload.PAGE_NUMBER,
            "a balloon's page number says which page the guest gives away: guest-physical, whatever bit 33 is",
            "a balloon's page number is an address like any other of the device's",
            Citation(
                "virtio 1.4, 5.5.6, and Linux",
                "virtballoon_validate()",
                "the text divides an address by 4096 and says no more; Linux never takes bit 33 for a balloon",
            ),
        ),
        Rule(
            "block-is-physical",
            lambda f: f.payload is Payload.BLOCK,
            "a memory device's block is part of the guest's physical address space, whatever bit 33 is",
            "a memory device's block is an address like any other of the device's",
            spec("5.15.6.4", "addr is the guest-physical address of the first block"),
        ),
        Rule(
            "region-is-physical",
            lambda f: f.payload is Payload.REGION,
            "the region is where the driver's own loads and stores find the memory, whatever bit 33 is",
            "the region is an address like any other of the device's",
            spec("5.19.4", "start is the physical address of the region's first byte"),
        ),
        Rule(
            "map-target-is-physical",
            lambda f: f.payload is Payload.MAP_TARGET,
            "phys_start is what virtio-iommu translates to: guest-physical by definition, whatever its own bit 33 is",
            "phys_start is an address that is translated once more",
            spec("5.13.6.5", "phys_start to phys_end lie in the guest-physical address space"),
        ),
        Rule(
            "front-translates",
            lambda f: f.front is Front.TRANSLATING,
            "an IOMMU is in front of the device, and it translates",
            "nothing in front of the device translates",
            spec("6.1", "the driver disables the IOMMU or configures it to translate bus addresses"),
        ),
        Rule(
            "permitted",
            _permitted,
            "the tables allow this access",
            "the tables do not allow this access",
            Citation(_VTD, "3.7", "an access without a present entry with that permission is blocked"),
        ),
        Rule(
            "invalidated",
            lambda f: f.mapping not in (Mapping.REMOVED_UNTOLD, Mapping.REMAPPED_UNTOLD),
            "the IOMMU was told of the last change of the tables",
            "the IOMMU was not told of the change: it may still use the mapping that was taken away",
            Citation(_VTD, "6.5", "software invalidates cached entries after it changed the tables"),
        ),
    )
)
