# SPDX-License-Identifier: Apache-2.0
"""Guests in which this very Python runs, as rows: what the kernel of each hands over to user space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.guest.boot import Disk
from virtiova.guest.inside import Setting

ON: Final = ",iommu_platform=on"
_KERNEL: Final = ("linux-image-amd64", r"linux-image-[0-9].*-amd64")
_FIRST_SLOT: Final = 0x10
_VTD: Final = (
    *("-M", "q35,kernel-irqchip=split", "-cpu", "qemu64"),
    *("-device", "intel-iommu,intremap=on,caching-mode=on"),
)
_PLAIN: Final = ("-M", "q35", "-cpu", "qemu64")


@dataclass(frozen=True, slots=True)
class Seat:
    """A device of the guest: QEMU's text of it, and the disk behind it, if it has one. Each that is ``handed`` over to
    user space is behind a root port of its own, in an IOMMU group of its own; the others are on the root bus."""

    device: str
    disk: Disk | None = None
    handed: bool = True


def arguments(seats: Sequence[Seat]) -> tuple[str, ...]:
    """QEMU's arguments for a machine with VT-d and these devices, in their order."""
    found = list(_VTD)
    for number, seat in enumerate(seats, 1):
        slot = f"addr={_FIRST_SLOT + number - 1:x}"
        disk = f",drive={seat.disk.node},serial={seat.disk.name},id={seat.disk.name}" if seat.disk else ""
        if seat.handed:
            found += ["-device", f"pcie-root-port,id=port{number},chassis={number},{slot}"]
        found += ["-device", f"{seat.device}{disk},disable-legacy=on,{f'bus=port{number}' if seat.handed else slot}"]
    return tuple(found)


def port(number: int) -> str:
    """The PCI address, in the guest, of the root port of a seat; they are numbered from 1."""
    return f"0000:00:{_FIRST_SLOT + number - 1:02x}.0"


def _vfio(name: str, seats: Sequence[Seat]) -> Setting:
    return Setting(
        name,
        *_KERNEL,
        ("vfio_iommu_type1", "vfio_pci", "virtio_blk"),
        arguments(seats),
        append="intel_iommu=on",
        disks=tuple(seat.disk for seat in seats if seat.disk),
        trace="vtd_dmar_translate",
    )


HANDED: Final = (
    Seat(f"virtio-rng-pci{ON}"),
    Seat("virtio-rng-pci"),
    Seat(f"virtio-blk-pci{ON}", Disk(bit=True)),
    Seat("virtio-blk-pci", Disk(bit=False)),
    Seat(f"virtio-rng-pci,packed=on{ON}"),
)
"""All of them for user space."""
MIXED: Final = (
    Seat(f"virtio-rng-pci{ON}"),
    Seat("virtio-rng-pci"),
    Seat(f"virtio-blk-pci{ON}", Disk(bit=True), handed=False),
    Seat("virtio-blk-pci", Disk(bit=False), handed=False),
)
"""Two for user space, beside two that the guest's kernel drives."""

VFIO: Final = _vfio("handed", HANDED)
MIX: Final = _vfio("handed", MIXED)
VHOST: Final = Setting("vhost", *_KERNEL, ("vhost_net", "vhost_vsock", "tun", "af_packet"), _PLAIN)
VDUSE: Final = Setting(
    "vduse",
    *_KERNEL,
    ("vduse", "vhost_vdpa", "virtio_vdpa", "virtio_blk", "virtio_net", "virtio_rng", "crc32c_generic", "ext4"),
    _PLAIN,
    suite="bookworm-backports",
)
"""Linux 6.12: ``/dev/vduse/control`` and ``/dev/vhost-vdpa-N``."""
