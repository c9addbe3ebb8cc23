# SPDX-License-Identifier: Apache-2.0
"""VA301 to VA303, VA305: what comes of the negotiation between driver and device."""

from __future__ import annotations

from typing import Final

from virtiova.collect import keys as k
from virtiova.collect import messages as m
from virtiova.collect.facts import Fact
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM
from virtiova.result import Path
from virtiova.result.scan import Seen, Severity
from virtiova.scan.rule import About, Answer, Hit, Look, Rule
from virtiova.scan.rules.guests import is_windows, vdpa
from virtiova.scan.rules.isolation import OFFER, offer
from virtiova.scan.rules.start import old_machine, wanted
from virtiova.spec import Citation, spec

_FAILED: Final = 0x80
_FEATURES_OK: Final = 8
_BIT_33: Final = 1 << VIRTIO_F_ACCESS_PLATFORM
_REFUSALS: Final = (m.REFUSED, m.DPDK_REFUSED, m.SPDK_REFUSED, m.SEABIOS_REFUSED)


def refused(look: Look) -> list[Seen]:
    """What shows that the device refused the driver's features, or that the driver gave up before: a message, or a
    status of FAILED without FEATURES_OK (which a driver writes only if VERSION_1 is there)."""
    said = look.lines(*_REFUSALS)
    status = look.facts.fact(k.STATUS)
    if status is None:
        return said
    if status.value & (_FAILED | _FEATURES_OK) == _FAILED and look.facts.get(k.VERSION_1) is not False:
        said.append(status.seen(f"the status is 0x{status.value:x}: FAILED without FEATURES_OK"))
    return said


def is_balloon(look: Look) -> bool:
    """A balloon, with a driver that may be Linux's."""
    return look.facts.get(k.TYPE) == "balloon" and look.machine.get(k.OS) in (None, "linux")


def _restricted(look: Look) -> Answer:
    if is_balloon(look) or old_machine(look):
        return None
    said = look.lines(m.NO_BIT_33, m.NO_VERSION_1)
    works = (look.facts.get(k.STATUS) or 0) & _FEATURES_OK
    # Of a sandbox of Kata's it is one option that all its devices lack (VA309).
    kata = look.machine.get(k.KATA)
    by_facts = look.machine.get(k.RESTRICTED) and look.offered is False and not works and not kata
    if not said and not by_facts:
        return None
    seen = look.seen(k.RESTRICTED, k.OFFERED, k.STATUS) if by_facts else []
    return Hit([*said, *seen], offer(look))


def _refused(look: Look) -> Answer:
    seen = refused(look)
    if not seen or is_balloon(look) or _restricted(look) or _masked(look) or vdpa(look) or is_windows(look):
        return None
    # Drivers of a guest whose memory is kept from devices also give up by themselves.
    seen = [*seen, *look.seen(k.RESTRICTED)]
    wrote = _wrote(look)
    if wrote is not None and wrote.value:
        seen.append(wrote.seen("the driver wrote bit 33: another bit, or none, is the cause"))
    return Hit(seen)


def _wrote(look: Look) -> Fact[bool] | None:
    """Whether the driver wrote bit 33 among its features; None: that is not known."""
    word = look.facts.fact(k.FEATURES)
    if word is not None and word.value:
        return Fact(k.WROTE.name, bool(word.value & _BIT_33), word.place, word.certainty)
    return look.facts.fact(k.WROTE)


def _balloon(look: Look) -> Answer:
    if not is_balloon(look):
        return None
    said = [*refused(look), *look.lines(m.NO_BIT_33)]
    told = look.seen(k.CONFIGURED, k.OFFERED)
    if said or wanted(look):
        works = look.facts.get(k.ACCEPTED) or look.machine.get(k.VMM) == "cloud-hypervisor"
        severity = Severity.ERROR if said else Severity.NOTE if works else Severity.WARNING
        return Hit([*said, *told], severity=severity)
    return Hit(look.basis(), severity=Severity.NOTE) if look.verdict is Path.BYPASS else None


def _masked(look: Look) -> Answer:
    """The driver went through the features, left out bit 33 that was offered, and was refused."""
    if is_balloon(look) or is_windows(look):
        return None
    seen = refused(look)
    wrote = _wrote(look)
    if not seen or wrote is None or wrote.value or not look.facts.get(k.OFFERED):
        return None
    left = wrote.seen("the driver did not write bit 33")
    return Hit([*seen, *look.seen(k.OFFERED), left, *look.seen(k.OS, k.KERNEL, k.DRIVER)])


RULES: Final = (
    Rule(
        "VA301",
        "the guest's memory is kept from devices, and the device does not offer bit 33: its driver gives up",
        Severity.ERROR,
        About.DEVICE,
        _restricted,
        "The memory of this guest is encrypted, or shared page by page, so that a device reaches only what its driver "
        "shares. Without bit 33 the driver could not say so, and does not start: the probe fails with -ENODEV.",
        {
            **OFFER,
            "Cloud Hypervisor": "a release that forces the bit in TDX and SEV-SNP guests; else iommu=on on the device",
            "Kata": "block devices instead of virtio-fs, whose back end has no bit 33 (kata-containers#3811)",
        },
        Citation("Linux", "virtio_features_ok()", "device must provide VIRTIO_F_ACCESS_PLATFORM (-ENODEV)"),
        "kata-containers/kata-containers#3810, #3811, #4977; cloud-hypervisor/cloud-hypervisor#2881, #3916, #6190",
    ),
    Rule(
        "VA302",
        "the device refused what the driver took of its features",
        Severity.ERROR,
        About.DEVICE,
        _refused,
        "FEATURES_OK did not stay, so the driver must give up. A device may refuse a driver that leaves out bit 33, "
        "and QEMU does. The number in the message is the status, not the features.",
        {
            "guest": "a driver that takes VIRTIO_F_ACCESS_PLATFORM",
            "QEMU": "iommu_platform=off for this device, if nothing has to be kept from it",
            "libvirt": "no iommu='on' in the device's <driver>, under the same condition",
        },
        spec("3.1.1", "step 6: if FEATURES_OK is not set when it is read again, the device is unusable"),
        "QEMU's virtio_validate_features(); qemu-devel 20220307112939.2780117-1-pasic@linux.ibm.com",
    ),
    Rule(
        "VA303",
        "a balloon does without bit 33: Linux' driver never takes it",
        Severity.WARNING,
        About.DEVICE,
        _balloon,
        "The pages that a balloon names are guest-physical, so Linux leaves bit 33 out; QEMU refuses such a driver, "
        "and nothing is ballooned. Without the bit the balloon works, and goes around the IOMMU.",
        {
            "QEMU": "iommu_platform=off on virtio-balloon; where memory is kept from devices, and in a confidential "
            "guest, no balloon at all",
            "libvirt": "no iommu='on' in its <driver>; or <memballoon model='none'/>",
        },
        Citation("Linux", "virtballoon_validate()", "clears VIRTIO_F_ACCESS_PLATFORM, whatever the device offers"),
        "drivers/virtio/virtio_balloon.c; autotest/tp-qemu#2086; cloud-hypervisor/cloud-hypervisor#8054",
    ),
    Rule(
        "VA305",
        "the driver leaves out bit 33, and the device insists on it",
        Severity.ERROR,
        About.DEVICE,
        _masked,
        "The device offers bit 33, the driver did not take it, and was refused: it cannot use the device.",
        {
            "guest": "a driver that takes the bit (Linux v4.8, DPDK 16.11, Windows drivers of 2018, or newer)",
            "QEMU": "iommu_platform=off for this device, if nothing has to be kept from it",
            "libvirt": "no iommu='on' in the device's <driver>, under the same condition",
        },
        spec("6.2", "a device MAY fail to operate further if VIRTIO_F_ACCESS_PLATFORM is not accepted"),
        "drivers of small systems that mask the bit",
    ),
)
