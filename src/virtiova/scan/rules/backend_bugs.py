# SPDX-License-Identifier: Apache-2.0
"""VA205, VA401 to VA406: back ends that cannot translate, or have mistakes when they do."""

from __future__ import annotations

import fnmatch
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.products import PRODUCTS
from virtiova.policy import Front
from virtiova.result.scan import Seen, Severity
from virtiova.scan import history
from virtiova.scan.rule import About, Answer, Hit, Input, Look, Open, Rule, by_rule
from virtiova.spec import Citation, commit

_SPLIT: Final = frozenset({"vhost", "vhost-user"})
_GPA_ADDRESSES: Final = 21
_SHMEM_MAP: Final = 22
_RUST: Final = frozenset(product.name for product in PRODUCTS if product.rust)
# vhost-user device types for which QEMU 7.2 neither asks the back end for bit 33 nor refuses.
_NOT_ASKED: Final = frozenset({"rng", "i2c", "gpio"})


def _wants(look: Look) -> bool:
    """Is the device to offer bit 33, as it was told or as it does?"""
    return bool(look.get(k.CONFIGURED) or look.offered)


def _product(look: Look) -> str:
    """What serves the device; also what a back end's log says of itself, for all devices that one may serve."""
    return look.get(k.BACKEND_PRODUCT) or ""


def _version(look: Look, name: str) -> str:
    """QEMU's version, or the back end's."""
    if name != "qemu":
        return history.number_in(_product(look), name)
    return (look.machine.get(k.VMM_VERSION) or "") if look.machine.get(k.VMM) in (None, "qemu") else ""


def without_iommu_support(look: Look) -> bool:
    """Is this a device of DPDK's that was not told to offer bit 33, and has to?"""
    if look.facts.get(k.BACKEND) != "vhost-user" or not _wants(look):
        return False
    if look.machine.get(k.RESTRICTED) and look.machine.get(k.IOMMU) in (None, "none"):
        return False
    return _product(look).split(" ")[0] in ("dpdk", "ovs-vswitchd") and look.facts.get(k.BACKEND_OFFERED) is False


def _dpdk_off(look: Look) -> Answer:
    if not without_iommu_support(look):
        return None
    return Hit(look.seen(k.CONFIGURED, k.BACKEND_PRODUCT, k.BACKEND_OFFERED))


def goes_untranslated(look: Look) -> bool:
    """Is the back end handed addresses that it cannot translate, and does nobody refuse?"""
    if look.facts.get(k.BACKEND) not in _SPLIT or not _wants(look) or look.facts.get(k.BACKEND_OFFERED) is True:
        return False
    version = _version(look, "qemu")
    if version and history.UNCHECKED.has(version):
        return look.facts.get(k.TYPE) == "fs" or look.facts.get(k.BACKEND_OFFERED) is False
    if look.facts.get(k.TYPE) not in _NOT_ASKED or look.facts.get(k.BACKEND) != "vhost-user":
        return False
    return look.facts.get(k.BACKEND_OFFERED) is False and look.machine.get(k.VMM) in (None, "qemu")


def _untranslated(look: Look) -> Answer:
    if not goes_untranslated(look):
        return None
    return Hit(look.seen(k.CONFIGURED, k.BACKEND, k.BACKEND_PRODUCT, k.BACKEND_OFFERED, k.VMM_VERSION))


def _device_iotlb(look: Look) -> bool:
    return look.machine.get(k.IOMMU) == "intel" and "device-iotlb=on" in (look.machine.get(k.IOMMU_OPTIONS) or ())


def _deaf(look: Look) -> bool:
    """A kernel's or process' back end behind VT-d with a device IOTLB: the machine that the mistake is about."""
    return (
        look.facts.get(k.BACKEND) in _SPLIT
        and _wants(look)
        and _device_iotlb(look)
        and look.facts.get(k.BEHIND_IOMMU) is not False
        and look.facts.get(k.ACCEPTED) is not False
    )


def _never_enabled(look: Look) -> bool | None:
    """Has the guest never enabled ATS? It cannot where there is no such capability."""
    if look.facts.get(k.ATS_ENABLED) is not None:
        return not look.facts.get(k.ATS_ENABLED)
    return True if look.facts.get(k.ATS) is False else None


def _is_windows_net(look: Look) -> bool:
    return look.machine.get(k.OS) == "windows" and look.facts.get(k.TYPE) == "net"


def _ats(look: Look) -> Answer:
    if not _deaf(look) or _is_windows_net(look):
        return None
    never = _never_enabled(look)
    has = history.DEVICE_TLB.has(_version(look, "qemu"))
    if never is False or has is False:
        return None
    if never is None:
        return Open(Input.GUEST) if has else None
    seen = [*look.seen(k.IOMMU_OPTIONS, k.ATS, k.ATS_ENABLED, k.BACKEND), *_qemu(look)]
    return Hit(seen) if has else Open(Input.QMP)


def _windows_ats(look: Look) -> Answer:
    if not _deaf(look) or not _is_windows_net(look):
        return None
    has = history.DEVICE_TLB.has(_version(look, "qemu"))
    if has is None:
        return Open(Input.QMP)
    return Hit([*look.seen(k.OS, k.IOMMU_OPTIONS, k.BACKEND), *_qemu(look)]) if has else None


def _qemu(look: Look) -> list[Seen]:
    version = look.machine.fact(k.VMM_VERSION)
    return [version.seen(f"QEMU {version.value}")] if version is not None else []


def _migration(look: Look) -> Answer:
    if look.facts.get(k.BACKEND) not in _SPLIT or not look.machine.get(k.INCOMING) or not _wants(look):
        return None
    if look.front in (Front.NONE, Front.OFF, Front.PASSTHROUGH):
        return None
    seen = look.seen(k.INCOMING, k.BACKEND, k.IOMMU)
    behind = history.DPDK_LOG
    if behind.has(_version(look, "dpdk")):
        return Hit([*seen, *look.seen(k.BACKEND_PRODUCT)], {"fixed": behind.releases})
    has = history.DIRTY_RING.has(_version(look, "qemu"))
    if has is None:
        return Open(Input.QMP)
    return Hit([*seen, *_qemu(look)], {"fixed": history.DIRTY_RING.releases}) if has else None


def _dpdk_bugs(look: Look) -> Answer:
    version = _version(look, "dpdk")
    accepted = look.facts.get(k.BACKEND_ACCEPTED)
    if look.facts.get(k.BACKEND) not in ("vhost-user", "vdpa") or not _wants(look):
        return None
    if accepted is False or look.facts.get(k.BACKEND_OFFERED) is False:
        return None
    found = [row for row in history.DPDK if row.has(version)]
    vduse = look.facts.get(k.BACKEND) == "vdpa"
    found = [row for row in found if ("VDUSE" in row.what) == vduse]
    if not found:
        return None
    told = [by_rule(f"{row.what}: {row.citation}") for row in found]
    newest = max(found, key=lambda row: history.numbers(row.fixed) or (0, 0, 0, 0))
    # A third number is a long-term branch's, which may have got the fixes: which of them did is not known here.
    patched = (history.numbers(version) or (0, 0, 0))[2] > 0
    severity = Severity.NOTE if patched else None
    return Hit([*look.seen(k.BACKEND_PRODUCT, k.BACKEND_ACCEPTED), *told], {"fixed": newest.fixed}, severity)


def _bit_21(look: Look) -> Answer:
    word = look.facts.fact(k.BACKEND_PROTOCOL)
    if word is None or not word.value >> _GPA_ADDRESSES & 1 or word.value >> _SHMEM_MAP & 1:
        return None
    product = _product(look)
    if not product:
        return Open(Input.BACKEND)
    if not any(fnmatch.fnmatchcase(product, f"{name}*") for name in _RUST):
        return None
    return Hit([word.seen(f"protocol feature 21 is in use (0x{word.value:x})"), *look.seen(k.BACKEND_PRODUCT)])


RULES: Final = (
    Rule(
        "VA205",
        "DPDK does not offer bit 33: it was not asked to",
        Severity.ERROR,
        About.DEVICE,
        _dpdk_off,
        "DPDK's vhost library can translate, but offers bit 33 only to an application that asks for it. The device has "
        "to have the bit, so QEMU refuses to start.",
        {
            "back end": "dpdk-testpmd: --vdev net_vhost0,iface=...,iommu-support=1. Open vSwitch: "
            "ovs-vsctl set Open_vSwitch . other_config:vhost-iommu-support=true, and start it again. A program of "
            "your own: RTE_VHOST_USER_IOMMU_SUPPORT to rte_vhost_driver_register()",
            "QEMU": "2.9.1 or newer; or no iommu_platform=on, if nothing needs {device} to be kept out",
        },
        commit("002d6a7e5517", "vhost: add flag to enable IOMMU support", "DPDK 17.11"),
        "DPDK doc/guides/nics/vhost.rst; Open vSwitch Documentation/topics/dpdk/vhost-user.rst; observed with DPDK "
        "22.11",
    ),
    Rule(
        "VA401",
        "the back end is handed addresses that it cannot translate, and nobody refuses",
        Severity.ERROR,
        About.DEVICE,
        _untranslated,
        "The back end did not offer bit 33, and this QEMU gives it ring addresses as the guest's IOVAs all the same. "
        "virtiofsd ends as soon as the driver starts; others serve nothing, or take the addresses for physical ones "
        "and go around the IOMMU without a word.",
        {
            "QEMU": "6.1 or newer refuses to start instead (not for vhost-user-rng: 7.2 was seen not to); or no "
            "iommu_platform=on on {device}; or a device that QEMU serves itself",
            "libvirt": "no <driver iommu='on'/> in the device",
            "back end": "one that offers VIRTIO_F_ACCESS_PLATFORM and has an IOTLB",
        },
        history.UNCHECKED.citation,
        "virtio-win/kvm-guest-drivers-windows#483; bugzilla.redhat.com 1842832; vhost-user-rng observed with QEMU 7.2",
    ),
    Rule(
        "VA402",
        "vhost is deaf to invalidations: the guest has not enabled ATS",
        Severity.ERROR,
        About.DEVICE,
        _ats,
        "With device-iotlb=on this QEMU tells vhost of device-TLB invalidations only. A guest that has not enabled ATS "
        "on the device sends none of these, so the back end keeps translations that were taken away: it reads and "
        "writes pages that are used for something else by now.",
        {
            "QEMU": f"{history.DEVICE_TLB.releases}; until then -device intel-iommu,device-iotlb=off and ats=off "
            "on {device}, or vhost=off on its netdev",
            "libvirt": "<driver iotlb='off'/> in <iommu>, <driver ats='off'/> in the device",
        },
        history.DEVICE_TLB.citation,
        "206e91d14330, ee071f67f7a1, cd9b83468843; the announcements of QEMU 7.2.5 and 8.0.4; bugzilla.redhat.com "
        "2001312",
    ),
    Rule(
        "VA403",
        "migration: addresses of the IOMMU are logged as if they were physical",
        Severity.ERROR,
        About.DEVICE,
        _migration,
        "While a machine migrates, written pages are logged by their physical address. Here the used ring's IOVA is "
        "taken for one: QEMU crashes when it is beyond the end of memory, and otherwise marks the wrong page.",
        {"QEMU": "{fixed}; until then vhost=off while it migrates", "back end": "{fixed}"},
        history.DIRTY_RING.citation,
        "Debian's changelog of QEMU 7.2 names the fix among those of 7.2.1; DPDK: 1fc3b3f06aa9, fbda9f145927",
    ),
    Rule(
        "VA404",
        "this DPDK has known mistakes behind an IOMMU",
        Severity.WARNING,
        About.DEVICE,
        _dpdk_bugs,
        "The release of DPDK that serves the device has mistakes that show only when bit 33 is in use: ring errors, "
        "crashes, misses that are never answered, or a hundredth of the throughput.",
        {"back end": "DPDK {fixed} or newer; or a long-term release of its line whose notes name the fixes"},
        history.DPDK[-2].citation,
        "releases by git tag --contains; the long-term branches were not looked at",
    ),
    Rule(
        "VA405",
        "vhost-user protocol feature 21 may mean two things here",
        Severity.WARNING,
        About.DEVICE,
        _bit_21,
        "Crate vhost 0.16 says SHMEM with bit 21, the protocol says GPA_ADDRESSES: ring and memory addresses are then "
        "guest-physical, not the front end's. Both ends agree on the bit and mean different things.",
        {"back end": "built with crate vhost 0.17 or newer", "QEMU": "before 11.1, which does not know the bit"},
        Citation("vhost-user", "protocol features", "GPA_ADDRESSES is bit 21, SHMEM_MAP is bit 22"),
        "rust-vmm/vhost#367",
    ),
    Rule(
        "VA406",
        "a Windows guest with vhost and a device IOTLB: corrupt packets",
        Severity.ERROR,
        About.DEVICE,
        _windows_ats,
        "Packets are corrupted when Windows remaps DMA for its network card and vhost serves it: vhost waits for "
        "device-TLB invalidations that the guest does not send.",
        {
            "QEMU": f"{history.DEVICE_TLB.releases}; or vhost=off on its netdev",
            "libvirt": "<driver name='qemu'/> in the interface",
            "guest": "NetKVM of after October 2021 does not ask for remapping unless the driver verifier is on",
        },
        history.DEVICE_TLB.citation,
        "virtio-win/kvm-guest-drivers-windows#647, #671, #1178, #1311; that the cause is VA402's follows from their "
        "common author and symptom",
    ),
)
