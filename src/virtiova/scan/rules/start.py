# SPDX-License-Identifier: Apache-2.0
"""VA201 to VA204, VA206, VA308: machines that do not start, or whose firmware does not."""

from __future__ import annotations

import re
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect import messages as m
from virtiova.policy import Front
from virtiova.result.scan import Seen, Severity
from virtiova.scan.naming import not_set_up
from virtiova.scan.rule import About, Answer, Hit, Input, Look, Open, Rule, by_rule, quote
from virtiova.scan.rules.backend_bugs import goes_untranslated
from virtiova.spec import Citation, spec

_RUST: Final = re.compile(r"virtiofsd 1\.|vhost-device-|vhost_user_(net|block)\b")
_DPDK: Final = re.compile(r"(dpdk|ovs-vswitchd|testpmd|vpp)\b")


def wanted(look: Look) -> bool:
    """Was the device told to offer bit 33, or does it?"""
    return bool(look.facts.get(k.CONFIGURED) or look.offered)


def old_machine(look: Look) -> bool:
    """A machine with conventional PCI slots only, whose memory is encrypted: `_sev_on_i440fx` says it all."""
    kind = look.machine.get(k.MACHINE_TYPE) or ""
    old = bool(re.match(r"(pc|pc-i440fx.*|i440fx)$", kind))
    return old and (look.machine.get(k.RESTRICTED) or "").startswith("sev")


def _still_legacy(look: Look) -> Answer:
    said = look.lines(m.STILL_LEGACY)
    told = look.facts.get(k.CONFIGURED) and look.facts.get(k.CAN_BE_LEGACY)
    if not (said or told) or old_machine(look):
        return None
    model = look.facts.get(k.MODEL) or ""
    what = f"{model.removesuffix('-transitional')} instead of {model}, and " if model.endswith("-transitional") else ""
    seen = look.seen(k.CONFIGURED, k.CAN_BE_LEGACY, k.DISABLE_LEGACY, k.BRIDGED)
    return Hit([*said, *seen], {"what": what})


def _sev_on_i440fx(look: Look) -> Answer:
    if not old_machine(look):
        return None
    bare = []
    for device in look.view.devices:
        offered = device.facts.fact(k.OFFERED)
        legacy = device.facts.fact(k.CAN_BE_LEGACY)
        if offered is not None and not offered.value:
            bare.append(offered.seen(f"{device.name} does not offer bit 33"))
        elif legacy is not None and legacy.value:
            bare.append(legacy.seen(f"{device.name} can be legacy"))
    return Hit([*look.seen(k.MACHINE_TYPE, k.RESTRICTED), *bare[:4]]) if bare else None


def without_bit(look: Look) -> list[Seen]:
    """Why the back end cannot do what the device is told to: what was seen; nothing: it can, or nothing says so."""
    said = look.lines(m.NOT_BY_DEVICE, m.NO_REPLY_ACK)
    if said:
        return said
    facts = look.facts
    backend = facts.get(k.BACKEND) or ""
    if not wanted(look):
        return []
    seen = look.seen(k.CONFIGURED, k.BACKEND)
    if facts.get(k.BACKEND_OFFERED) is False and _refuses(look):
        return [*seen, *look.seen(k.BACKEND_OFFERED)]
    translated = bool(facts.get(k.ACCEPTED)) and look.front is Front.TRANSLATING
    if translated and False in (facts.get(k.BACKEND_ACCEPTED), facts.get(k.BACKEND_OFFERED)):
        return [*look.seen(k.ACCEPTED, k.BACKEND_OFFERED, k.BACKEND_ACCEPTED), by_rule("the rings have I/O addresses")]
    if not _refuses(look) or facts.get(k.BACKEND_OFFERED) is not None:
        return []
    if (facts.get(k.MODEL) or "").startswith("vhost-scsi"):
        return [*seen, by_rule("vhost-scsi does not offer bit 33: VHOST_SCSI_FEATURES in Linux' drivers/vhost/scsi.c")]
    if facts.get(k.TYPE) == "fs" and backend == "vhost-user":
        return [*seen, by_rule("no virtiofsd offers bit 33")]
    return []


def _refuses(look: Look) -> bool:
    """Does QEMU refuse such a back end? On PCI, where a function has an address space of its own; and on s390's
    channel bus from 6.1 to the candidates of 7.0, by mistake."""
    transport = look.facts.get(k.TRANSPORT)
    if transport == "ccw":
        version = (look.machine.get(k.VMM_VERSION) or "").split(".")[:2]
        return version in (["6", "1"], ["6", "2"])
    return transport in ("pci", None)


def _product(look: Look) -> str:
    """Who serves the device, as far as that is known: its own word for it, or the name of its command."""
    options = look.get(k.BACKEND_OPTIONS) or ()
    command = options[0].rpartition("/")[2] if options else ""
    if command == "virtiofsd":
        # The one in Rust has long options only; the one that came with QEMU takes -o source=.
        command = "virtiofsd 1." if any(word.startswith("--shared-dir") for word in options) else command
    return look.get(k.BACKEND_PRODUCT) or command


def _confidential(look: Look) -> bool:
    return bool(look.machine.get(k.RESTRICTED)) and look.machine.get(k.IOMMU) in (None, "none")


def _no_bit(look: Look) -> Answer:
    product = _product(look)
    if _confidential(look) or goes_untranslated(look) or _RUST.match(product) or _DPDK.match(product):
        return None
    seen = without_bit(look)
    if seen:
        return Hit(seen)
    facts = look.facts
    unknown = facts.get(k.BACKEND_OFFERED) is None and facts.get(k.ACCEPTED) is None and facts.get(k.STATUS) is None
    if wanted(look) and facts.get(k.BACKEND) == "vhost-user" and unknown and _refuses(look):
        return Open(Input.QEMU_LOG)
    return None


def _no_bit_confidential(look: Look) -> Answer:
    seen = without_bit(look) if _confidential(look) else []
    return Hit([*seen, *look.seen(k.RESTRICTED, k.IOMMU, k.VMM_VERSION)]) if seen else None


def _no_bit_rust(look: Look) -> Answer:
    product = _product(look)
    if _confidential(look) or goes_untranslated(look) or not _RUST.match(product):
        return None
    seen = without_bit(look)
    if not seen and wanted(look) and look.facts.get(k.BACKEND) == "vhost-user" and _refuses(look):
        seen = look.seen(k.CONFIGURED, k.BACKEND)
    return Hit([*seen, *look.seen(k.BACKEND_PRODUCT, k.BACKEND_OPTIONS)]) if seen else None


def lacks_bit(look: Look) -> bool:
    """Is it said already that the back end has no bit 33, so that nothing starts, or works?"""
    return any(isinstance(ask(look), Hit) for ask in (_no_bit, _no_bit_confidential, _no_bit_rust))


def _firmware(look: Look) -> Answer:
    """A boot disk behind a virtio-iommu that lets nothing through until a driver has set it up."""
    address = (look.facts.get(k.ADDRESS) or "")[-7:]
    blocked = [quote(line) for line in look.view.log if address and not_set_up(line.text) == address]
    if blocked and k.TYPE not in look.facts:
        return Open(Input.COMMAND_LINE)
    if look.facts.get(k.TYPE) not in ("blk", "scsi") or not wanted(look):
        return None
    options = look.machine.fact(k.IOMMU_OPTIONS)
    if look.machine.get(k.IOMMU) != "virtio" or options is None or look.machine.get(k.FIRMWARE) == "direct":
        return None
    if "boot-bypass=off" not in options.value or look.front is not Front.TRANSLATING:
        return None
    return Hit([options.seen("virtio-iommu has boot-bypass=off"), *look.seen(k.CONFIGURED, k.FIRMWARE), *blocked[:4]])


_ELSE: Final = {
    "back end": "one that offers bit 33 and asks for translations: vhost-net of the kernel, DPDK when told to",
    "QEMU": "a device that QEMU serves itself, or vhost=off; do not just drop iommu_platform=on where it keeps "
    "memory from the device",
    "libvirt": "<driver name='qemu'/> in an interface instead of vhost; a <disk> instead of vhostuser",
}
_CHECK: Final = Citation(
    "QEMU", "virtio_bus_device_plugged()", "a device that is to offer bit 33 must have it from its back end, too"
)

RULES: Final = (
    Rule(
        "VA201",
        "QEMU does not start: bit 33 is asked of a device that can still be legacy",
        Severity.ERROR,
        About.DEVICE,
        _still_legacy,
        "A virtio PCI device in a conventional slot (all of i440fx's, and q35's root bus) also has the legacy "
        "interface, which has 32 feature bits and no room for bit 33.",
        {
            "QEMU": "{what}disable-legacy=on in -device; or the device behind a pcie-root-port, which has that default",
            "libvirt": "model='virtio-non-transitional' in the device, or an <address> on a pcie-root-port",
        },
        spec("2.2.3", "the legacy interface has no feature bits past 31"),
        "QEMU's hw/virtio/virtio-pci.c; autotest/tp-qemu#3685; AMDESE/AMDSEV#31",
    ),
    Rule(
        "VA202",
        "encrypted memory on a machine of conventional PCI, with devices that can be legacy",
        Severity.ERROR,
        About.MACHINE,
        _sev_on_i440fx,
        "The guest's memory is encrypted, so its drivers demand bit 33; i440fx has conventional slots only, where a "
        "virtio device is transitional unless told otherwise. The guest hangs, or its drivers give up.",
        {
            "QEMU": "-machine q35,confidential-guest-support=..., and each device behind a pcie-root-port; or "
            "disable-legacy=on,iommu_platform=on on each device",
            "libvirt": "<type machine='q35'>; <driver iommu='on'/> in each device",
        },
        Citation(
            "QEMU",
            "machine_run_board_init()",
            "with confidential-guest-support, iommu_platform=on and disable-legacy=on are the devices' defaults",
        ),
        "AMDESE/AMDSEV#31",
    ),
    Rule(
        "VA203",
        "the back end does not offer bit 33, and the device is told to",
        Severity.ERROR,
        About.DEVICE,
        _no_bit,
        "The rings would have I/O addresses, which a back end without bit 33 cannot translate. QEMU (6.1 and later) "
        "refuses to start; others start, and the back end reads the wrong memory, or ends.",
        _ELSE,
        _CHECK,
        "commit 04ceb61a40; Red Hat bug 1935019; seen with virtiofsd 7.2",
    ),
    Rule(
        "VA204",
        "the back end does not offer bit 33, in a confidential guest without an IOMMU",
        Severity.ERROR,
        About.DEVICE,
        _no_bit_confidential,
        "Here bit 33 only says that memory is limited: with nothing in front, the addresses are physical, and the back "
        "end need not translate. QEMU's check does not know that on PCI; on s390's channel bus it did not from 6.1 "
        "to the candidates of 7.0.",
        {
            **_ELSE,
            "QEMU": "s390 (ccw): 7.0 or newer. PCI: a device that QEMU serves itself, or another back end. "
            "iommu_platform=off on this device only moves the failure into the guest (VA301)",
        },
        _CHECK,
        "qemu-devel 20220202195438.379753-1-pasic@linux.ibm.com; AMDESE/AMDSEV#269",
    ),
    Rule(
        "VA206",
        "a back end of rust-vmm's, which has no IOTLB, behind an IOMMU",
        Severity.ERROR,
        About.DEVICE,
        _no_bit_rust,
        "The vhost-user half of rust-vmm's crates has no messages for an IOTLB: such a back end never offers bit 33, "
        "whatever it is told.",
        {
            "QEMU": "a device that QEMU serves itself, or this device out of the IOMMU's reach and without "
            "iommu_platform=on, if nothing has to be kept from it",
            "back end": "another one; upstream: rust-vmm/vhost#312",
            "Cloud Hypervisor": "no iommu=on for vhost-user devices: it is refused",
        },
        Citation("rust-vmm/vhost", "#312", "the IOTLB half of the protocol is not there"),
        "rust-vmm/vhost#312, cloud-hypervisor/cloud-hypervisor#3066",
    ),
    Rule(
        "VA308",
        "firmware cannot read its disk: the IOMMU lets nothing through at boot",
        Severity.ERROR,
        About.DEVICE,
        _firmware,
        "Firmware (SeaBIOS, EDK2, SLOF) takes bit 33, and has no driver for virtio-iommu: until the operating system "
        "sets it up, every access of the disk is blocked.",
        {
            "QEMU": "boot-bypass=on, which is the default, in -device virtio-iommu-pci; or boot with -kernel",
            "Cloud Hypervisor": "a release whose IOMMU offers VIRTIO_IOMMU_F_BYPASS_CONFIG, with bypass set at boot",
        },
        spec("5.13.6", "bypass set in the configuration: endpoints without a domain reach memory as it is"),
        "seen with SeaBIOS on QEMU 7.2; cloud-hypervisor/cloud-hypervisor#3941, #3987, #4014",
    ),
)
