# SPDX-License-Identifier: Apache-2.0
"""VA107, VA304, VA306, VA307, VA309: drivers that cannot have the bit, or do not do what it takes."""

from __future__ import annotations

from typing import Final

from virtiova.collect import keys as k
from virtiova.collect import messages as m
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM
from virtiova.policy import Front
from virtiova.result import Path
from virtiova.result.scan import Severity
from virtiova.scan.rule import About, Answer, Hit, Input, Look, Open, Rule
from virtiova.spec import Citation, commit, spec

_DRIVER_OK: Final = 4
_FEATURES_OK: Final = 8
_FAILED: Final = 128
# Drivers that let a group be handed to user space: vfio's own, and those that only hold a device.
_HOLDERS: Final = ("vfio", "pci-stub", "pcieport", "xen-pciback")
_UIO: Final = ("uio", "igb_uio")
# Windows drivers whose INF declines DMA remapping.
_OPTS_OUT: Final = frozenset({"fs", "mem"})
_SHOWN: Final = 6


def unprotected(look: Look) -> Hit | None:
    """A user-space driver has the device, and nothing would keep any device from memory."""
    if not look.facts.get(k.VFIO):
        return None
    driver, kind = look.facts.get(k.DRIVER) or "", look.facts.get(k.GROUP_TYPE) or ""
    others = [each for each in look.facts.get(k.GROUP_DRIVERS) or () if each and not each.startswith(_HOLDERS)]
    if driver.startswith("vfio") and others:
        seen = look.seen(k.DRIVER, k.GROUP, k.GROUP_DRIVERS)
        return Hit([*seen, *look.said(m.NOT_VIABLE.text)], severity=Severity.ERROR)
    if driver.startswith(_UIO):
        return Hit(look.seen(k.DRIVER, k.GROUP))
    if driver.startswith("vfio") and look.machine.get(k.NOIOMMU) and not kind.startswith("DMA"):
        return Hit(look.seen(k.DRIVER, k.NOIOMMU, k.GROUP_TYPE))
    return None


def is_windows(look: Look) -> bool:
    """Is it a Windows guest, whose drivers have a rule of their own?"""
    return look.machine.get(k.OS) == "windows"


def _windows(look: Look) -> Answer:
    if not is_windows(look) or not look.offered:
        return None
    accepted = look.facts.get(k.ACCEPTED)
    if accepted is False:
        return Hit(look.seen(k.OS, k.OFFERED, k.ACCEPTED, k.STATUS))
    if look.front is not Front.TRANSLATING:
        return None
    if look.facts.get(k.TYPE) in _OPTS_OUT:
        return Hit(look.seen(k.OS, k.TYPE, k.IOMMU), severity=Severity.NOTE)
    return Open(Input.DRIVER_VERSION) if accepted is None else None


def carries_on(look: Look) -> bool:
    """Did the driver of a modern device go on without FEATURES_OK?"""
    status, started = look.facts.get(k.STATUS), look.facts.get(k.STARTED)
    if status is None or status & (_FEATURES_OK | _FAILED) or look.facts.get(k.VERSION_1) is not True:
        return False
    rings = look.facts.get(k.RING_ADDRESSES) or ()
    return bool(status & _DRIVER_OK or started or any(rings))


def _never_read(look: Look) -> Answer:
    if not carries_on(look):
        return None
    return Hit(look.seen(k.STATUS, k.STARTED, k.RING_ADDRESSES, k.VERSION_1, k.OFFERED, k.ACCEPTED))


def vdpa(look: Look) -> Hit | None:
    """A device on the vDPA bus whose driver has not taken the bit, or a back end there that does not offer it."""
    if look.facts.get(k.TRANSPORT) == "vdpa":
        status = look.facts.get(k.STATUS)
        stopped = look.facts.get(k.DRIVER) == "" or (status is not None and bool(status & _FAILED))
        word = look.facts.get(k.FEATURES)
        without = look.offered is False or (word is not None and not word >> VIRTIO_F_ACCESS_PLATFORM & 1)
        if look.facts.get(k.ACCEPTED) is False or (without and stopped):
            return Hit(look.seen(k.TRANSPORT, k.OFFERED, k.ACCEPTED, k.DRIVER, k.STATUS))
        return None
    if look.facts.get(k.BACKEND) == "vdpa" and look.facts.get(k.BACKEND_OFFERED) is False:
        return Hit(look.seen(k.BACKEND, k.BACKEND_OFFERED))
    return None


def _kata(look: Look) -> Answer:
    """Devices of a sandbox that do not offer the bit although something needs it."""
    machine = look.machine
    restricted = bool(machine.get(k.RESTRICTED))
    iommu = machine.get(k.IOMMU) or "none"
    if not machine.get(k.KATA) or not (restricted or iommu != "none"):
        return None
    severity = Severity.ERROR if restricted else Severity.WARNING
    seen = look.seen(k.KATA, k.RESTRICTED, k.IOMMU)
    if not look.view.devices:
        asked = machine.fact(k.KATA_IOMMU_PLATFORM)
        # QEMU turns the bit on by itself for the guests that it protects itself.
        if asked is None or asked.value or (restricted and machine.get(k.VMM) == "qemu"):
            return None
        return Hit([asked.seen(f"enable_iommu_platform = {str(asked.value).lower()}"), *seen], severity=severity)
    left = [
        fact.seen(f"{device.name} does not offer bit 33")
        for device, row in zip(look.view.devices, look.rows, strict=False)
        # What goes around an IOMMU is a finding of its own, with the same cause.
        if row.verdict is not Path.BYPASS and (fact := device.facts.fact(k.OFFERED)) and not fact.value
    ]
    return Hit([*left[:_SHOWN], *seen], severity=severity) if left else None


RULES: Final = (
    Rule(
        "VA107",
        "a user-space driver has the device, and no IOMMU protects memory from it",
        Severity.WARNING,
        About.DEVICE,
        unprotected,
        "With uio, and with vfio's noiommu mode, a program hands the device physical addresses: who has the device has "
        "all of memory. With vfio proper, all functions of an IOMMU group go to user space together: one that the "
        "kernel still drives makes the group unusable ('group is not viable').",
        {
            "guest": "bind every function of its IOMMU group to vfio-pci or to no driver; leave "
            "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode at N",
            "QEMU": "an IOMMU (-device intel-iommu,intremap=on,caching-mode=on and kernel-irqchip=split on q35, "
            "-M virt,iommu=smmuv3), and iommu_platform=on,disable-legacy=on on the device, each on a root port of "
            "its own",
            "libvirt": "<iommu model='intel'><driver intremap='on' caching_mode='on'/></iommu>, and <driver "
            "iommu='on'/> in the device",
            "kernel": "intel_iommu=on (VT-d; some distributions have it on)",
        },
        commit("03a76b60f8ba", "vfio: Include No-IOMMU mode", "v4.5"),
        "openvswitch/ovs-issues#191; spdk/spdk#447, #1300, #2021; k8snetworkplumbingwg/sriov-network-device-plugin#272",
    ),
    Rule(
        "VA304",
        "a Windows driver that does not go along with the IOMMU",
        Severity.ERROR,
        About.DEVICE,
        _windows,
        "A Windows driver that does not accept bit 33 is refused by QEMU, and the device does not start. viofs and "
        "viomem accept it, but ask Windows not to remap their DMA, so that the IOMMU does not restrict them.",
        {
            "guest": "virtio-win of 2018 or newer for network and disks; for viostor a build that heeds a refusal "
            "(2026). virtio-fs and virtio-mem: nothing to be had yet",
            "QEMU": "no iommu_platform=on on {device}, if nothing needs it to be kept out",
            "libvirt": "no <driver iommu='on'/> in {device}",
        },
        spec("6.1", "a driver SHOULD accept VIRTIO_F_ACCESS_PLATFORM if it is offered"),
        "virtio-win/kvm-guest-drivers-windows#260, #261, #1138, #1183, #1597, #1612",
    ),
    Rule(
        "VA306",
        "the driver goes on although the device did not accept its features",
        Severity.ERROR,
        About.DEVICE,
        _never_read,
        "The device left FEATURES_OK clear: it refuses what the driver chose. The driver did not read the status back "
        "and set its queues up all the same; what the device does with them is not defined.",
        {"guest": "a driver that reads the status back after writing FEATURES_OK, and sets FAILED if the bit is clear"},
        spec("3.1.1", "the driver re-reads the status to ensure that FEATURES_OK is still set, before it goes on"),
        "rcore-os/virtio-drivers 9742c44: begin_init()",
    ),
    Rule(
        "VA307",
        "a vDPA device without bit 33: its driver must map",
        Severity.ERROR,
        About.DEVICE,
        vdpa,
        "A vDPA device has its own address space, which only the driver fills. The kernel's simulator refuses a driver "
        "that does not accept bit 33, VDUSE a device that does not offer it (both EINVAL; what VDUSE's driver accepts "
        "is left to the device's process), and so does Cloud Hypervisor. "
        "QEMU and DPDK's virtio-user set the bit towards a vDPA back end by themselves, whatever the guest has; that "
        "DPDK's virtio-user clears it towards vhost-net is meant, too.",
        {
            "guest": "a driver that accepts VIRTIO_F_ACCESS_PLATFORM (Linux: all but virtio_balloon)",
            "back end": "a vDPA device (VDUSE: VDUSE_CREATE_DEV) with VIRTIO_F_ACCESS_PLATFORM among its features",
        },
        commit("2c53d0f64c06", "vdpasim: vDPA device simulator", "v5.7"),
        "Linux drivers/vdpa; DPDK drivers/net/virtio/virtio_user; Cloud Hypervisor virtio-devices/src/vdpa.rs; VDUSE "
        "observed with 6.1 and 6.12",
    ),
    Rule(
        "VA309",
        "Kata: devices without bit 33 in a sandbox that needs it",
        Severity.WARNING,
        About.MACHINE,
        _kata,
        "Kata leaves iommu_platform out unless it is told otherwise. A guest whose memory is protected then refuses "
        "such devices, and an IOMMU in the sandbox does not restrict them.",
        {
            "Kata": "enable_iommu_platform = true in [hypervisor.qemu] of configuration.toml, or the annotation "
            "io.katacontainers.config.hypervisor.enable_iommu_platform; check that every device has got it",
        },
        Citation("Kata Containers", "src/runtime/virtcontainers/qemu.go", "IOMMUPlatform is false by default"),
        "kata-containers/runtime#2830; src/runtime/pkg/katautils/config-settings.go.in: defaultEnableIOMMUPlatform",
    ),
)
