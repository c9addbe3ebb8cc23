# SPDX-License-Identifier: Apache-2.0
"""VA101 to VA103, VA108: devices that go around the IOMMU, and what comes of it."""

from __future__ import annotations

from typing import Final

from virtiova.collect import keys as k
from virtiova.result import Path
from virtiova.result.scan import Severity
from virtiova.scan.naming import faulting
from virtiova.scan.rule import About, Answer, Hit, Input, Look, Open, Rule, quote, taken_for
from virtiova.scan.rules.guests import is_windows, unprotected, vdpa
from virtiova.spec import Citation, commit, spec

PATCH: Final = commit("1a937693993f", "virtio: new feature to detect IOMMU device quirk", "v4.8")
OFFER: Final = {
    "QEMU": "add {bit} to -device {model} ({device})",
    "libvirt": "<driver iommu='on'/> in the device; on a conventional PCI slot also model='virtio-non-transitional'",
    "Cloud Hypervisor": "iommu=on in the device's option (--disk, --net, --rng, --console, --pmem; not for vhost-user)",
}
"""How a device is told to offer bit 33, by product; `offer()` fills the braces."""


def offer(look: Look) -> dict[str, str]:
    """What to write for this device: most of QEMU's models also have to be kept from being legacy."""
    model = look.facts.get(k.MODEL) or ""
    fixed = model.endswith("-non-transitional") or look.facts.get(k.CAN_BE_LEGACY) is False
    pci = look.facts.get(k.TRANSPORT) in ("pci", None)
    bit = "iommu_platform=on,disable-legacy=on" if pci and not fixed else "iommu_platform=on"
    if look.facts.get(k.TRANSPORT) == "mmio":
        bit += " and -global virtio-mmio.force-legacy=false"
    return {"bit": bit, "model": model or f"virtio-{look.facts.get(k.TYPE) or '...'}-pci"}


def _around(look: Look) -> bool:
    """It goes around an IOMMU, and it is no balloon: that cannot do otherwise (VA303)."""
    return look.verdict is Path.BYPASS and look.facts.get(k.TYPE) != "balloon"


def _severity(look: Look) -> Severity | None:
    # Where memory is to be kept from devices, one that reaches it all is more than a surprise.
    return Severity.ERROR if look.get(k.RESTRICTED) else None


def _not_offered(look: Look) -> Answer:
    if not _around(look) or look.offered is not False or look.facts.get(k.VFIO):
        return None
    assumed = look.row.assumes if look.row is not None else []
    seen = [*look.basis(), *map(taken_for, assumed), *look.seen(k.RESTRICTED)]
    return Hit(seen, offer(look), _severity(look))


def _not_taken(look: Look) -> Answer:
    # A vDPA device reaches what was mapped and nothing else: without the bit it does not work (VA307).
    if not _around(look) or look.offered is False or is_windows(look) or vdpa(look) is not None:
        return None
    return Hit([*look.basis(), *look.seen(k.DRIVER, k.RESTRICTED)], severity=_severity(look))


_FEW: Final = 4


def _faults(look: Look) -> Answer:
    address = look.facts.get(k.ADDRESS) or ""
    if look.facts.get(k.ACCEPTED) or not address:
        return None
    seen = [quote(line) for line in look.view.log if address[-7:] == faulting(line.text)][:_FEW]
    if not seen:
        return None
    if look.facts.get(k.ACCEPTED) is None and look.offered is not False:
        return Open(Input.GUEST)
    return Hit([*seen, *look.seen(k.ACCEPTED, k.OFFERED)], offer(look))


def _bit_and_bypass(look: Look) -> Answer:
    behind = look.facts.fact(k.BEHIND_IOMMU)
    if behind is None or behind.value or not look.facts.get(k.CONFIGURED):
        return None
    if look.facts.get(k.TRANSPORT) != "pci" or look.get(k.IOMMU) in (None, "none"):
        return None
    return Hit([behind.seen("its bus goes around the IOMMU"), *look.seen(k.CONFIGURED, k.IOMMU)])


def _user_space(look: Look) -> Answer:
    if not look.facts.get(k.VFIO) or unprotected(look):
        return None
    if look.offered is None:
        return Open(Input.QMP)
    return Hit([*look.seen(k.DRIVER, k.GROUP, k.OFFERED)], offer(look)) if look.offered is False else None


RULES: Final = (
    Rule(
        "VA101",
        "goes around the IOMMU: bit 33 is not offered",
        Severity.WARNING,
        About.DEVICE,
        _not_offered,
        "The device takes guest-physical addresses and reaches all of memory, whatever the IOMMU's tables say. No "
        "fault is ever reported. That it is in an IOMMU group proves nothing.",
        OFFER,
        PATCH,
        "seen with empty VT-d tables: no fault, and the device works; rivosinc/salus#55",
    ),
    Rule(
        "VA102",
        "goes around the IOMMU: bit 33 is not taken by the driver",
        Severity.WARNING,
        About.DEVICE,
        _not_taken,
        "The driver passes guest-physical addresses, and the device reaches all of memory, whatever the IOMMU's "
        "tables say.",
        {
            "guest": "a driver that accepts VIRTIO_F_ACCESS_PLATFORM: Linux's do since v4.8, but for the balloon's",
            "QEMU": "a device without a legacy interface (disable-legacy=on): a legacy driver has no bit 33",
        },
        spec("6.1", "a driver SHOULD accept VIRTIO_F_ACCESS_PLATFORM if it is offered"),
        "the bit counts as negotiated, not as offered",
    ),
    Rule(
        "VA103",
        "the IOMMU reports faults of a device that was given guest-physical addresses",
        Severity.ERROR,
        About.DEVICE,
        _faults,
        "Without bit 33 the driver passes guest-physical addresses and sets up no mapping; here what serves the "
        "device sends them through the IOMMU all the same. The device does not work.",
        {
            **OFFER,
            "kernel": "until then iommu=pt (x86), or iommu.passthrough=1, if nothing has to be kept out",
        },
        spec("6.1", "if the bit is not offered, a driver MUST pass only physical addresses"),
        "microsoft/openvmm#3448",
    ),
    Rule(
        "VA109",
        "has bit 33, and its bus is led around the IOMMU: the bit keeps nothing out",
        Severity.WARNING,
        About.DEVICE,
        _bit_and_bypass,
        "Somebody asked for bit 33 here, and the machine has an IOMMU, but the device's bus goes around it: "
        "the platform's addresses are then those of memory itself, and the device reaches all of it.",
        {
            "QEMU": "{device} on a bus that is not bypassed: no default_bus_bypass_iommu=on for pcie.0, no "
            "bypass_iommu=on for a pxb-pcie",
            "libvirt": "{device} on another controller: <target> of its root bus without a bypass",
        },
        Citation("QEMU", "docs/bypass-iommu.txt", "a bus that is bypassed is not translated for"),
        "the bit says whose addresses are used; whether an IOMMU is in front is the machine's matter",
    ),
    Rule(
        "VA108",
        "given to user space by vfio, and reaches all of memory: bit 33 is not offered",
        Severity.ERROR,
        About.DEVICE,
        _user_space,
        "vfio counts on the IOMMU to keep a user-space driver within the memory that it mapped. This device goes "
        "around the IOMMU: whoever has the file descriptor reads and writes the whole machine, with no mapping at all.",
        {
            **OFFER,
            "guest": "take it from vfio-pci until the bit is there",
        },
        Citation("Linux", "drivers/virtio: the quirk of commit 1a937693993f", "no bit 33: the IOMMU is not in effect"),
        "a check for this in vfio was proposed in April 2016 and not merged",
    ),
)
