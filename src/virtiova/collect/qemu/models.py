# SPDX-License-Identifier: Apache-2.0
"""QEMU's device models: which are virtio, of which type, on which bus, and which others take a place on a PCI bus."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final

_ALWAYS_MODERN: Final = "always"
_ONE_NAME: Final = "one-name"


@dataclass(frozen=True, slots=True)
class Stem:
    """What the models of one kind have in common: ``virtio-blk`` of virtio-blk-pci and virtio-blk-device.

    ``inner`` is the device behind the transport, with which it shares its properties. ``modern``: ``always`` where
    QEMU gives it no legacy interface whatever is said; ``one-name`` where it has no options about that at all.
    """

    type: str
    inner: str = ""
    backend: str = ""
    modern: str = ""


_STEMS: Final[dict[str, Stem]] = {
    "virtio-net": Stem("net"),
    "virtio-blk": Stem("blk"),
    "virtio-scsi": Stem("scsi"),
    "virtio-serial": Stem("console"),
    "virtio-rng": Stem("rng"),
    "virtio-balloon": Stem("balloon"),
    "virtio-9p": Stem("9p"),
    "virtio-gpu": Stem("gpu", modern=_ALWAYS_MODERN),
    "virtio-gpu-gl": Stem("gpu", modern=_ALWAYS_MODERN),
    "virtio-gpu-rutabaga": Stem("gpu", modern=_ALWAYS_MODERN),
    "virtio-keyboard": Stem("input", modern=_ALWAYS_MODERN),
    "virtio-mouse": Stem("input", modern=_ALWAYS_MODERN),
    "virtio-tablet": Stem("input", modern=_ALWAYS_MODERN),
    "virtio-multitouch": Stem("input", modern=_ALWAYS_MODERN),
    "virtio-input-host": Stem("input", modern=_ALWAYS_MODERN),
    "virtio-crypto": Stem("crypto", modern=_ALWAYS_MODERN),
    "virtio-iommu": Stem("iommu", modern=_ALWAYS_MODERN),
    "virtio-mem": Stem("mem", "virtio-mem", modern=_ALWAYS_MODERN),
    "virtio-pmem": Stem("pmem", "virtio-pmem", modern=_ALWAYS_MODERN),
    "virtio-sound": Stem("sound", modern=_ALWAYS_MODERN),
    "virtio-nsm": Stem("nitro-sec-mod", modern=_ALWAYS_MODERN),
    "vhost-scsi": Stem("scsi", "vhost-scsi", "vhost"),
    "vhost-vsock": Stem("vsock", backend="vhost", modern=_ALWAYS_MODERN),
    "vhost-vdpa-device": Stem("unknown", "vhost-vdpa-device", "vdpa"),
    "vhost-user-blk": Stem("blk", "vhost-user-blk", "vhost-user"),
    "vhost-user-scsi": Stem("scsi", "vhost-user-scsi", "vhost-user"),
    "vhost-user-fs": Stem("fs", backend="vhost-user", modern=_ONE_NAME),
    "vhost-user-rng": Stem("rng", "vhost-user-rng", "vhost-user", _ONE_NAME),
    "vhost-user-i2c": Stem("i2c", backend="vhost-user", modern=_ONE_NAME),
    "vhost-user-gpio": Stem("gpio", backend="vhost-user", modern=_ONE_NAME),
    "vhost-user-scmi": Stem("scmi", "vhost-user-scmi", "vhost-user", _ONE_NAME),
    "vhost-user-snd": Stem("sound", "vhost-user-snd", "vhost-user", _ONE_NAME),
    "vhost-user-device": Stem("unknown", "vhost-user-device", "vhost-user", _ONE_NAME),
    "vhost-user-test-device": Stem("unknown", "vhost-user-test-device", "vhost-user", _ONE_NAME),
    "vhost-user-vsock": Stem("vsock", backend="vhost-user", modern=_ALWAYS_MODERN),
    "vhost-user-gpu": Stem("gpu", "vhost-user-gpu", "vhost-user", _ALWAYS_MODERN),
    "vhost-user-input": Stem("input", "vhost-user-input", "vhost-user", _ALWAYS_MODERN),
}
_VGA: Final[dict[str, str]] = {
    "virtio-vga": "virtio-gpu",
    "virtio-vga-gl": "virtio-gpu-gl",
    "virtio-vga-rutabaga": "virtio-gpu-rutabaga",
    "vhost-user-vga": "vhost-user-gpu",
}
_SUFFIX: Final = re.compile(r"(.+?)-(pci(?:-transitional|-non-transitional)?|ccw|device)")
_ALIKE: Final = re.compile(r"(?:virtio|vhost)-[\w-]{1,60}", re.ASCII)
_ALIASED_NAMES: Final = """
    net blk scsi serial rng balloon 9p gpu gpu-gl gpu-rutabaga input-host keyboard mouse tablet multitouch iommu
    crypto sound
"""
_ALIASED: Final = frozenset(_ALIASED_NAMES.split())
"""What may be said without a transport: virtio-blk stands for the architecture's own."""
_BY_ARCH: Final = {"s390x": "ccw", "m68k": "device"}


@dataclass(frozen=True, slots=True)
class Model:
    """A virtio device model. ``interface`` is ``any`` where it can be told, else ``transitional`` or ``modern``."""

    name: str
    stem: str
    type: str
    transport: str
    inner: str
    interface: str = "any"
    backend: str = ""
    known: bool = True

    @property
    def outer_types(self) -> frozenset[str]:
        """The QOM types of the transport's side, as ``-global`` may name them."""
        if self.transport == "pci":
            bases = {f"{self.stem}-pci-base", f"{self.name}-base-type", f"{self.name}-base"}
            return frozenset({self.name, *bases, "virtio-pci", "pci-device", "device"})
        if self.transport == "ccw":
            return frozenset({self.name, "virtio-ccw-device", "ccw-device", "device"})
        return frozenset()

    @property
    def inner_types(self) -> frozenset[str]:
        """The QOM types of the device behind it."""
        shared = {"gpu": "virtio-gpu-base", "scsi": "virtio-scsi-common", "input": "virtio-input"}.get(self.type, "")
        return frozenset({self.inner, shared, "virtio-device", "device"}) - {""}


@functools.cache
def find(name: str, arch: str) -> Model | None:
    """The virtio model of that name; one of an unknown type where it only looks like it; None: it is no virtio."""
    if not _ALIKE.fullmatch(name):
        return None
    if name in _VGA:
        return _model(name, _VGA[name], "pci", "any")
    if name.removeprefix("virtio-") in _ALIASED:
        transport = _BY_ARCH.get(arch, "pci")
        return _model(f"{name}-{transport}", name, "mmio" if transport == "device" else transport, "any")
    for stem, row in _STEMS.items():
        if row.inner == name or (not row.inner and name == f"{stem}-device"):
            return _model(name, stem, "mmio", "any")
    match = _SUFFIX.fullmatch(name)
    if match is None:
        return None
    suffix = match[2]
    interface = {"pci-transitional": "transitional", "pci-non-transitional": "modern"}.get(suffix, "any")
    return _model(name, match[1], "mmio" if suffix == "device" else suffix[:3], interface)


def _model(name: str, stem: str, transport: str, interface: str) -> Model:
    row = _STEMS.get(stem)
    if row is None:
        return Model(name, stem, "unknown", transport, f"{stem}-device", interface, known=False)
    modern = row.modern and interface == "any"
    return Model(
        name=name,
        stem=stem,
        type=row.type,
        transport=transport,
        inner=row.inner or f"{stem}-device",
        interface="modern" if modern else interface,
        backend=row.backend,
    )


PORTS: Final = frozenset({"pcie-root-port", "ioh3420", "xio3130-downstream", "cxl-rp", "cxl-downstream"})
"""Bridges with a PCI Express bus of one slot."""
SWITCHES: Final = frozenset({"x3130-upstream", "cxl-upstream"})
"""Bridges with a PCI Express bus of many."""
BRIDGES: Final = frozenset(
    {"pci-bridge", "pci-bridge-seat", "pcie-pci-bridge", "i82801b11-bridge", "dec-21154-p2p-bridge"}
)
"""Bridges with a conventional bus."""
EXPANDERS: Final = frozenset({"pxb-pcie", "pxb-cxl", "pxb"})
"""Those bring a root bus of their own."""

SEGMENT: Final = "spapr-pci-host-bridge"
"""A further PCI host bridge of pseries."""

DISPLAYS: Final = frozenset({"VGA", "cirrus-vga", "qxl-vga", "qxl", "isa-vga", "vmware-svga", "ati-vga", *_VGA})
"""With one of them there is none by default."""

_PCI_NAMES: Final = """
    AC97 AMDVI-PCI ES1370 VGA acpi-erst am53c974 ati-vga bochs-display cirrus-vga cmd646-ide ctucan_pci cxl-type3
    dc390 e1000 e1000-82540em e1000-82544gc e1000-82545em e1000e edu i6300esb i82378 i82550 i82551 i82557a i82557b
    i82557c i82558a i82558b i82559a i82559b i82559c i82559er i82562 i82801 ich9-ahci ahci ich9-intel-hda
    ich9-usb-ehci1 ich9-usb-ehci2 ich9-usb-uhci1 ich9-usb-uhci2 ich9-usb-uhci3 ich9-usb-uhci4 ich9-usb-uhci5
    ich9-usb-uhci6 igb intel-hda ivshmem ivshmem-doorbell ivshmem-plain kvaser_pci lsi lsi53c810 lsi53c895a
    megasas megasas-gen2 mioe3680_pci mptsas1068 ne2k_pci nec-usb-xhci nvme pci-ipmi-bt pci-ipmi-kcs pci-ohci
    pci-serial pci-serial-2x pci-serial-4x pci-testdev pcm3680_pci pcnet piix3-ide piix3-usb-uhci piix4-ide
    piix4-usb-uhci pvpanic-pci pvrdma pvscsi qemu-xhci qxl qxl-vga riscv-iommu-pci rocker rtl8139 sdhci-pci
    secondary-vga sii3112 sm501 sungem sunhme tpci200 tulip ufs usb-ehci vfio-pci vfio-pci-nohotplug
    vmware-svga vmxnet3 x-pci-proxy-dev xen-platform xen-pci-passthrough
"""
VFIO_USER: Final = frozenset({"vfio-user-pci", "vfio-user-pci-nohotplug"})
"""Those another process serves, by the vfio-user protocol (QEMU 10.1 and later)."""
PCI: Final = VFIO_USER | frozenset([*_PCI_NAMES.split(), "AMDVI-PCI"])
"""Other models that take a place on a PCI bus."""

_OTHERS_NAMES: Final = """
    adb-keyboard adb-mouse amd-iommu arm-smmuv3 ccid-card-emulated ccid-card-passthru diag288 eTSEC emulated-ccid
    floppy generic-sdhci guest-loader hda-duplex hda-micro hda-output hv-balloon hv-syndbg intel-iommu
    ipmi-bmc-extern ipmi-bmc-sim loader nvdimm nvme-ns nvme-subsys pc-dimm pnv-phb ramfb sclpconsole sclplmconsole
    scsi-block scsi-cd scsi-disk scsi-generic scsi-hd sd-card spapr-nvdimm spapr-pci-host-bridge spapr-rng
    spapr-tpm-proxy spapr-vlan spapr-vscsi spapr-vty sgx-epc tpm-crb tpm-spapr tpm-tis tpm-tis-device
    uefi-vars-x64 vfio-ap vfio-ccw vfio-platform virtconsole virtserialport vmbus-bridge vmcoreinfo vmgenid wm8750
    x-terminal3270 xen-backend xen-disk xen-console zpci i8042 sb16 gus adlib cs4231a pvpanic tpm-tis-i2c
    pc-testdev hyperv-testdev kvm-pit kvm-i8259 vmport pcspk port92 dpcd led nand max7310 ads7846 lm8323 sii9022
    smbus-ipmi ivshmem-flat riscv-iommu-device
"""
OTHERS: Final = frozenset(_OTHERS_NAMES.split())
"""Models without one: on other buses, or none."""
_OTHER_NAMES: Final = re.compile(
    r"(?:usb|scsi|ide|isa|xen|ccid|aspeed|bcm\d+|npcm7xx|vfio|smbus|i2c|u2f|megasas|hid|tmp|m25p|mx25|w25|n25q)-.+"
    r"|.+-(?:cpu|core|nand|eeprom|isa|i2c)|.+-[\w.]+-cpu",
    re.ASCII,
)


def is_other(name: str) -> bool:
    """Is it a model that is known to take no place on a PCI bus?"""
    return name in OTHERS or _OTHER_NAMES.fullmatch(name) is not None


def takes_pci(name: str) -> bool:
    """Does a model that is no virtio take a place on a PCI bus?"""
    return name in PCI or name in PORTS or name in SWITCHES or name in BRIDGES or name in EXPANDERS
