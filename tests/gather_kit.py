# SPDX-License-Identifier: Apache-2.0
"""Made systems, boxes of them, and who looks over a collector's shoulder."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from virtiova.collect.facts import View
from virtiova.collect.files import CPU, IOMEM, KERNEL_OPTIONS, ROWS
from virtiova.collect.gather import gather
from virtiova.collect.tree import LIMIT, Tree, matching

PCI = "/sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0"


def machine(root: Path) -> Path:
    """A system's files below ``root``: a virtio disk behind a root port, in an IOMMU group; a host with a QEMU."""
    files = {
        "/proc/sys/kernel/hostname": "made\n",
        "/proc/sys/kernel/osrelease": "6.1.0-made\n",
        "/proc/cmdline": "quiet intel_iommu=on app.token=hush,1 root=/dev/vda\n",
        "/proc/12/comm": "qemu-system-x86\n",
        "/proc/12/cmdline": "qemu-system-x86_64\0-object\0secret,id=s,data=hush,,1\0-vnc\0:1,password=hush\0-S\0",
        "/proc/13/comm": "psql\n",
        "/proc/13/cmdline": "psql\0--password=hush\0",
        "/etc/libvirt/qemu/vm.xml": "<domain>\n <graphics type='vnc' passwd='hush'/>\n <name>vm</name>\n</domain>\n",
        "/sys/hypervisor/type": "kvm\n",
        "/sys/kernel/iommu_groups/3/type": "DMA\n",
        f"{PCI}/vendor": "0x1af4\n",
        f"{PCI}/device": "0x1042\n",
        f"{PCI}/config": "\x1a\x10\0\n\r" * 12,
        f"{PCI}/virtio0/device": "0x0002\n",
        f"{PCI}/virtio0/status": "0x0000000f\n",
        f"{PCI}/virtio0/features": "0" * 32 + "11" + "0" * 30 + "\n",
        "/sys/devices/virtual/iommu/dmar0/intel-iommu/cap": "d2008c222f0686\n",
    }
    links = {
        "/sys/bus/virtio/devices/virtio0": f"../../../..{PCI}/virtio0",
        "/sys/bus/pci/devices/0000:01:00.0": f"../../../..{PCI}",
        "/sys/bus/pci/devices/0000:00:02.0": "../../../devices/pci0000:00/0000:00:02.0",
        f"{PCI}/virtio0/driver": "../../../../../../sys/bus/virtio/drivers/virtio_blk",
        f"{PCI}/iommu_group": "../../../../kernel/iommu_groups/3",
        "/sys/kernel/iommu_groups/3/devices/0000:01:00.0": f"../../../../..{PCI}",
        "/sys/class/iommu/dmar0": "../../devices/virtual/iommu/dmar0",
    }
    folders = ["/sys/bus/virtio/drivers/virtio_blk", "/sys/bus/pci/drivers/virtio-pci", "/sys/firmware/efi"]
    for name, content in files.items():
        path = Path(f"{root}{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("latin-1"))
    for name in folders:
        Path(f"{root}{name}").mkdir(parents=True)
    for name, target in links.items():
        path = Path(f"{root}{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return root


def facts(view: View) -> list[Any]:
    """All that a view knows, but for what changes while it is looked at."""
    devices = [(device.name, [(f.key, f.value, f.place) for f in device.facts]) for device in view.devices]
    return [devices, [(f.key, f.value, f.place) for f in view.machine]]


def boxed(tree: Tree, path: Path) -> Path:
    with path.open("wb") as file:
        gather(file, tree)
    return path


T = TypeVar("T")


class Recording:
    """A system's files; notes everything that is asked, and the answer."""

    def __init__(self, tree: Tree, *, live: bool = False) -> None:
        self._tree = tree
        self.source, self.problems = tree.source, tree.problems
        # Registers are only ever read on the spot: no box has them.
        self.live = live
        self.limits: dict[str, int] = {}
        self.asked: dict[tuple[str, str], object] = {}

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        self.limits[path] = limit
        return self._note("read", path, self._tree.read(path, limit))

    def names(self, path: str) -> list[str]:
        return self._note("names", path, self._tree.names(path))

    def link(self, path: str) -> str | None:
        return self._note("link", path, self._tree.link(path))

    def real(self, path: str) -> str | None:
        return self._note("real", path, self._tree.real(path))

    def exists(self, path: str) -> bool:
        return self._note("exists", path, self._tree.exists(path))

    def _note(self, verb: str, path: str, answer: T) -> T:
        self.asked[verb, path] = answer
        return answer

    def not_gathered(self) -> list[str]:
        """What was asked for and is not in the list."""
        asked = {path for _, path in self.asked} - {"/sys/devices/of_node"}  # there is nothing above a root bus
        return sorted(path for path in asked if not covered(self._tree, path))


def covered(tree: Tree, path: str) -> bool:
    """Is what is at ``path`` gathered, or a folder above something that is? By the list, whether it is there or not."""
    told = [KERNEL_OPTIONS, CPU, IOMEM]
    for row in ROWS:
        # As it is written, and where its links lead on this machine.
        places = [row.folder, *(real for folder in matching(tree, row.folder) if (real := tree.real(folder)))]
        told += [f"{place}/{name}" for place in places for name in (*row.files, *row.links)] + places
    parts = path.strip("/").split("/")
    for pattern in told:
        wanted = pattern.strip("/").split("/")[: len(parts)]
        if len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            return True
    return False
