# SPDX-License-Identifier: Apache-2.0
"""Machines for the rules about drivers and views, and those of `scan_rule_cases` with them."""

from __future__ import annotations

from typing import Any

from scan_rule_cases import INTEL, ISOLATION, LINUX, OFF, ON, REFUSED, START, TOPOLOGY, seen_and, two_views
from scan_rule_kit import Case, device, machine
from virtiova.collect.facts import Certainty

PROVIDE = (
    "virtiofs virtio2: device must provide VIRTIO_F_ACCESS_PLATFORM\nvirtiofs: probe of virtio2 failed with error -19\n"
)
REFUSES = "virtio_net virtio1: virtio: device refuses features: 3\n"
DRIVERS = [
    Case("restricted", machine(device(offered=False), restricted="tdx", iommu="none"), {"VA301 virtio0"}),
    Case("restricted, Kata's", machine(device(offered=False), restricted="tdx", iommu="none", kata=True)),
    Case("restricted, offered", machine(device(offered=True, accepted=True), restricted="tdx", iommu="none")),
    Case(
        "restricted, ccw",
        machine(device(transport="ccw", offered=False), restricted="s390-pv", iommu="none"),
        {"VA301 virtio0"},
    ),
    Case(
        "restricted, mmio",
        machine(device(transport="mmio", offered=False), restricted="sev", iommu="none"),
        {"VA301 virtio0"},
    ),
    Case("restricted, not known", machine(device(), restricted="tdx", iommu="none")),
    Case("restricted, said", machine(log=PROVIDE), {"VA301 virtio2"}),
    Case(
        "restricted, said of one of ours",
        machine(device("virtio2", type="fs", status=0x83, version_1=True), log=PROVIDE),
        {"VA301 virtio2"},
    ),
    Case(
        "restricted, said and known by another name",
        machine(device("fs0", type="fs", offered=False), log=PROVIDE, restricted="sev", iommu="none"),
        {"VA301 fs0"},
    ),
    Case(
        "restricted, known and failed",
        machine(device(status=0x83, version_1=True, offered=False), restricted="sev"),
        {"VA301 virtio0"},
    ),
    Case("refused, said", machine(log=REFUSES), {"VA302 virtio1"}),
    Case("refused, said by firmware", machine(log="device didn't accept features\n"), {"VA302"}),
    Case("refused, said of another", machine(device("virtio0", type="blk"), log=REFUSES), {"VA302 virtio1"}),
    Case("refused, by status", machine(device(status=0x83, version_1=True)), {"VA302 virtio0"}),
    Case("refused, by status, on Linux", machine(device(status=0x83, version_1=True), **LINUX), {"VA302 virtio0"}),
    Case(
        "refused, by status, restricted",
        machine(device(status=0x83, version_1=True), restricted="sev", **LINUX),
        {"VA302 virtio0"},
    ),
    Case(
        "refused, of no known type",
        machine(device(type="type 77", status=0x83, version_1=True), **LINUX),
        {"VA302 virtio0"},
    ),
    Case(
        "refused, not accepted, offer not known",
        machine(device(status=0x83, accepted=False, version_1=True)),
        {"VA302 virtio0"},
    ),
    Case("no driver yet", machine(device(status=0x00, version_1=True))),
    Case("legacy driver gave up", machine(device(status=0x83, version_1=False)), {"VA902 virtio0"}),
    Case("gave up later", machine(device(status=0x8B, version_1=True, driver="virtio_blk")), {"VA902 virtio0"}),
    Case("refused, Windows", machine(device(status=0x83, version_1=True), os="windows"), {"VA902 virtio0"}),
    Case("masked", machine(device(**REFUSED), vmm="qemu", iommu="none"), {"VA305 virtio0"}),
    Case(
        "masked, said",
        machine(device("virtio1", type="net", offered=True, wrote_bit_33=False), log=REFUSES, iommu="none"),
        {"VA305 virtio1"},
    ),
    Case("masked, Windows", machine(device(**REFUSED), vmm="qemu", iommu="none", os="windows"), {"VA902 virtio0"}),
    Case(
        "left out, not refused",
        machine(device(**{**OFF, "offered": True, "wrote_bit_33": False}), iommu="none", vmm="other"),
    ),
    Case(
        "taken, the word is not there",
        machine(device(features=0, **{**REFUSED, "wrote_bit_33": True}), iommu="none"),
        {"VA302 virtio0"},
    ),
    Case("masked, not refused", machine(device(**{**OFF, "offered": True}), iommu="none", vmm="qemu")),
    Case("taken, refused", machine(device(**{**REFUSED, "wrote_bit_33": True}), iommu="none"), {"VA302 virtio0"}),
    Case(
        "masked, by the word",
        machine(device(features=1 << 32, offered=True, status=0x83), iommu="none"),
        {"VA305 virtio0"},
    ),
    Case("taken, by the word", machine(device(features=3 << 32, **REFUSED), iommu="none"), {"VA302 virtio0"}),
    Case("masked, the word is not there", machine(device(features=0, **REFUSED), iommu="none"), {"VA305 virtio0"}),
    Case(
        "masked, not known to be offered",
        machine(device(features=1 << 32, status=0x83), iommu="none"),
        {"VA302 virtio0"},
    ),
    Case("refused, and nobody knows what was written", machine(device(offered=True, status=0x83)), {"VA302 virtio0"}),
    Case(
        "balloon, told", machine(device(type="balloon", iommu_platform=True, offered=True), **INTEL), {"VA303 virtio0"}
    ),
    Case("balloon, told and refused", machine(device(type="balloon", **REFUSED), iommu="none"), {"VA303 virtio0"}),
    Case(
        "balloon, said", machine(log="virtio_balloon virtio3: virtio: device refuses features: 3\n"), {"VA303 virtio3"}
    ),
    Case(
        "balloon, restricted, said",
        machine(log="virtio_balloon virtio3: device must provide VIRTIO_F_ACCESS_PLATFORM\n"),
        {"VA303 virtio3"},
    ),
    Case("balloon, accepted", machine(device(type="balloon", **ON), iommu="none"), {"VA303 virtio0"}),
    Case(
        "balloon, Cloud Hypervisor",
        machine(device(type="balloon", offered=True), vmm="cloud-hypervisor", iommu="none"),
        {"VA303 virtio0"},
    ),
    Case("balloon, around", machine(device(type="balloon", **OFF), **INTEL), {"VA303 virtio0"}),
    Case("balloon, nothing in front", machine(device(type="balloon", **OFF), iommu="none")),
    Case("balloon, Windows", machine(device(type="balloon", **ON), os="windows", **INTEL)),
]

AMD_IOMMU: dict[str, Any] = {"iommu": "amd", "vmm": "qemu", "vmm_version": "7.2.22"}
VIEWS = [
    Case("two views, two offers", machine(two_views("offered", True, False), iommu="none"), {"VA901 virtio0"}),
    Case("two views, one offer", machine(two_views("offered", False, False), iommu="none")),
    Case("not written, and it runs with it", machine(seen_and(True, False)), {"VA901 virtio0"}),
    Case("on by default, and it runs with it", machine(seen_and(True, True))),
    Case("not written, and it runs without it", machine(seen_and(False, False), iommu="none")),
    Case(
        "not written, and somebody infers it", machine(seen_and(True, False, running=Certainty.INFERRED), iommu="none")
    ),
    Case("written in one place, and not in another", machine(seen_and(True, False, running=Certainty.SAID))),
    Case("written here, inferred there", machine(seen_and(True, False, written=Certainty.INFERRED))),
    Case("the other way round", machine(device(offered=False, accepted=True), iommu="none"), {"VA901 virtio0"}),
    Case("one view", machine(device(accepted=True), iommu="none")),
    Case("needs reset", machine(device(status=0x4F, version_1=True)), {"VA902 virtio0"}),
    Case("healthy", machine(device(status=0x0F, version_1=True))),
    Case("amd, bridged", machine(device(bridged=True, **ON), **AMD_IOMMU), {"VA903 virtio0"}),
    Case("amd, not bridged", machine(device(bridged=False, **ON), **AMD_IOMMU)),
    Case(
        "amd, bridged, nobody knows the version",
        machine(device(bridged=True, **ON), iommu="amd", vmm="qemu"),
        {"VA903? virtio0"},
    ),
    Case("amd, bridged, later", machine(device(bridged=True, **ON), **{**AMD_IOMMU, "vmm_version": "99.0"})),
    Case("amd, bridged, not QEMU", machine(device(bridged=True, **ON), iommu="amd", vmm="other")),
    Case(
        "amd, pt=on, 10.0",
        machine(device(**ON), **{**AMD_IOMMU, "vmm_version": "10.0.2", "iommu_options": ("pt=on",)}),
        {"VA903 virtio0"},
    ),
    Case("amd, off", machine(device(bridged=True, behind_iommu=False, **ON), **AMD_IOMMU)),
    Case(
        "leaky",
        machine(
            device(backend_product="virtiova-leaky 0.1", backend="vhost-user", backend_offered=True, **ON), **INTEL
        ),
        {"VA903 virtio0"},
    ),
]
CASES = [*ISOLATION, *TOPOLOGY, *START, *DRIVERS, *VIEWS]
