# SPDX-License-Identifier: Apache-2.0
"""Gathered machines by the dozen: the files of a small system, written as `gather` writes them."""

from __future__ import annotations

import json
from pathlib import Path

from virtiova.collect.gather import write

PCI = "/sys/devices/pci0000:00/0000:00:{slot:02x}.0"


def box(path: Path, name: str, *, bits: str = "1", uuid: str = "", qemu: str = "") -> Path:
    """A box of the system ``name``, with an IOMMU and a disk for each of ``bits``: whether it has bit 33."""
    tree = {
        "/proc/sys/kernel/hostname": f"{name}\n",
        "/proc/sys/kernel/osrelease": "6.1.0-made\n",
        "/proc/sys/kernel/arch": "x86_64\n",
        "/proc/cmdline": "quiet intel_iommu=on\n",
    }
    if uuid:
        tree["/sys/class/dmi/id/product_uuid"] = f"{uuid}\n"
    links = {"/sys/class/iommu/dmar0": "../../devices/virtual/iommu/dmar0"}
    for number, bit in enumerate(bits):
        at, virtio = PCI.format(slot=number + 2), f"virtio{number}"
        tree |= {
            f"{at}/vendor": "0x1af4\n",
            f"{at}/device": "0x1042\n",
            f"{at}/{virtio}/device": "0x0002\n",
            f"{at}/{virtio}/status": "0x0000000f\n",
            f"{at}/{virtio}/features": "0" * 32 + "1" + bit + "0" * 30 + "\n",
            f"/sys/kernel/iommu_groups/{number}/type": "DMA\n",
        }
        links |= {
            f"/sys/bus/virtio/devices/{virtio}": f"../../..{at.removeprefix('/sys')}/{virtio}",
            f"/sys/bus/pci/devices/{at.rpartition('/')[2]}": f"../../..{at.removeprefix('/sys')}",
            f"{at}/iommu_group": f"../../../kernel/iommu_groups/{number}",
            f"{at}/{virtio}/driver": "../../../../bus/virtio/drivers/virtio_blk",
        }
    head = {"schema": "virtiova/gather/1", "host": name, "kernel": "6.1.0-made", "time": "", "problems": []}
    files = {
        "virtiova-gather.json": json.dumps(head).encode(),
        **{f"tree{at}": data.encode() for at, data in tree.items()},
        "links": "".join(f"{at}\t{target}\n" for at, target in links.items()).encode(),
    }
    if qemu:
        files["qemu/12.cmdline"] = qemu.replace(" ", "\0").encode() + b"\0"
    with path.open("wb") as file:
        write(file, files)
    return path
