# SPDX-License-Identifier: Apache-2.0
"""VA1..: devices that go around the IOMMU, or that it does not protect from."""

from __future__ import annotations

from typing import Final

from virtiova.collect import keys as k
from virtiova.result import Path
from virtiova.result.scan import Severity
from virtiova.scan.rule import About, Answer, Hit, Look, Rule, by_rule
from virtiova.spec import commit, spec


def _not_offered(look: Look) -> Answer:
    row = look.row
    if row is None or row.verdict is not Path.BYPASS or look.offered is not False:
        return None
    return Hit([*row.basis, *map(by_rule, row.assumes)])


def _not_taken(look: Look) -> Answer:
    row = look.row
    if row is None or row.verdict is not Path.BYPASS or look.offered is False:
        return None
    return Hit([*row.basis, *look.seen(k.DRIVER)])


RULES: Final = (
    Rule(
        "VA101",
        "goes around the IOMMU: bit 33 is not offered",
        Severity.WARNING,
        About.DEVICE,
        _not_offered,
        "The device takes guest-physical addresses and reaches all of memory, whatever the IOMMU's tables say. No "
        "fault is ever reported. That it is in an IOMMU group proves nothing.",
        {
            "QEMU": "-device ...: add iommu_platform=on,disable-legacy=on to {device}",
            "libvirt": "<driver iommu='on'/> in the device, and model='virtio-non-transitional'",
            "Cloud Hypervisor": "iommu=on on the device",
        },
        commit("1a937693993f", "virtio: new feature to detect IOMMU device quirk", "v4.8"),
    ),
    Rule(
        "VA102",
        "goes around the IOMMU: bit 33 is not taken by the driver",
        Severity.WARNING,
        About.DEVICE,
        _not_taken,
        "The driver passes guest-physical addresses, and the device reaches all of memory, whatever the IOMMU's "
        "tables say.",
        {"guest": "a driver that accepts VIRTIO_F_ACCESS_PLATFORM (Linux: all but virtio_balloon)"},
        spec("6.1", "a driver SHOULD accept VIRTIO_F_ACCESS_PLATFORM if it is offered"),
    ),
)
