# SPDX-License-Identifier: Apache-2.0
"""Real kernels in the matrix: the platforms of `virtiova.guest`, where it is part of this installation.

It is looked for by name, so that the matrix works without it. One boot gives two cells, both states of bit 33.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Final

from virtiova.matrix.systems import IOMMU, MOST, NOTHING, PPC64, XEN
from virtiova.packages.store import Store
from virtiova.policy import RULES, Rules
from virtiova.result import Cell

MACHINE: Final = "guest"
EXPERIMENT: Final = "guest-driver"
BITS: Final = (True, False)
_OF_MACHINE: Final = {"pseries": PPC64, "powernv9": PPC64, "s390-ccw": NOTHING, "virt-mmio": NOTHING}


def available() -> bool:
    """Can this installation boot guests at all? What each needs is found out when it is booted."""
    return importlib.util.find_spec("virtiova.guest") is not None


def guests() -> Iterator[tuple[str, str, str, str]]:
    """System, machine, IOMMU and name of every guest platform."""
    for name, row in _module("platforms").PLATFORMS.items():
        plain = MOST if row.iommu == "none" else IOMMU
        system = XEN if row.xen is not None else _OF_MACHINE.get(row.machine, plain)
        yield system, row.machine, row.iommu, name


def boot(name: str, *, offline: bool, rules: Rules = RULES) -> list[Cell]:
    """Boot a platform once; the cells of `BITS`, whatever comes of it."""
    store = Store(offline=offline)
    cells: list[Cell] = _module("run").run(_module("platforms").PLATFORMS[name], BITS, store=store, rules=rules)
    return cells


def _module(name: str) -> Any:
    return importlib.import_module(f"virtiova.guest.{name}")
