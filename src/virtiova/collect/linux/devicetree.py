# SPDX-License-Identifier: Apache-2.0
"""What a device tree says of a machine: who made it, which IOMMUs there are, pools that bounce. Any size, any bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from virtiova.collect.linux.read import SHORT
from virtiova.collect.tree import Tree

ROOT: Final = "/sys/firmware/devicetree/base"
_IOMMUS: Final = {
    "arm,smmu-v3": "smmuv3",
    "arm,mmu-500": "smmu",
    "arm,smmu-v2": "smmu",
    "riscv,iommu": "riscv",
    "riscv,pci-iommu": "riscv",
    "virtio,pci-iommu": "virtio",
    "virtio,mmio-iommu": "virtio",
    "apple,t8103-dart": "dart",
}
_IOMMU_NAMES: Final = r"(iommu|smmu|smmuv3|mmu)(@[0-9a-f,]+)?"
_BRIDGES: Final = r"(pcie?|soc|bus|axi|amba)(@[0-9a-f,]+)?"
_NODES: Final = 512
_DEPTH: Final = 3


def strings(tree: Tree, path: str) -> list[str]:
    """A property that is a list of strings; empty if it is not there."""
    found = tree.read(path, SHORT)
    return [part.decode("ascii", "replace") for part in (found or b"").split(b"\0") if part]


def compatible(tree: Tree, node: str = ROOT) -> list[str]:
    """What a node is compatible with."""
    return strings(tree, f"{node}/compatible")


def iommus(tree: Tree) -> list[tuple[str, str]]:
    """(node, kind) of each IOMMU that it names. They are at the top, below a bus, or below a PCI host bridge."""
    found = []
    for node in _walk(tree):
        kinds = {_IOMMUS[name] for name in compatible(tree, node) if name in _IOMMUS}
        found += [(node, kind) for kind in sorted(kinds)]
    return found


def _walk(tree: Tree) -> Iterator[str]:
    """The nodes that may be IOMMUs, by their names; boundedly many, not deep."""
    level = [ROOT]
    looked = 0
    for _ in range(_DEPTH):
        below: list[str] = []
        for node in level:
            for name in tree.names(node):
                if looked >= _NODES:
                    return
                if re.fullmatch(_IOMMU_NAMES, name):
                    looked += 1
                    yield f"{node}/{name}"
                elif re.fullmatch(_BRIDGES, name):
                    looked += 1
                    below.append(f"{node}/{name}")
        level = below


def restricted_pool(tree: Tree, path: str) -> str:
    """The node of the ``restricted-dma-pool`` that the property at ``path`` leads to; empty if to none.

    A device with one bounces all its buffers through it, whatever bit 33 is (Linux, ``kernel/dma/swiotlb.c``, since
    "swiotlb: Add restricted DMA pool initialization" (v5.15)).
    """
    wanted = tree.read(path, 64) or b""
    handles = {wanted[at : at + 4] for at in range(0, len(wanted) - 3, 4)}
    reserved = f"{ROOT}/reserved-memory"
    for name in tree.names(reserved)[:_NODES]:
        node = f"{reserved}/{name}"
        if "restricted-dma-pool" in compatible(tree, node) and (tree.read(f"{node}/phandle", 4) or b"-") in handles:
            return name
    return ""
