# SPDX-License-Identifier: Apache-2.0
"""Address Translation Services of a PCI function: a TLB of the device's own, which the platform's owner turns on."""

from __future__ import annotations

from virtiova.errors import ProtocolError
from virtiova.ports import PciFunction
from virtiova.wire import pci


class Ats:
    """The ATS capability of ``function``, at ``offset`` of its extended configuration space.

    While it is on, the device may keep translations that it asked for, so whoever changes a mapping has to tell the
    device too, and not only the IOMMU.

    Raises `ProtocolError` for an offset at which it does not fit: what is beyond belongs to another function.
    """

    def __init__(self, function: PciFunction, offset: int) -> None:
        if not pci.EXTENDED <= offset <= pci.EXTENDED_END - pci.ATS_SIZE:
            raise ProtocolError(f"PCI extended capability list: no room for ATS at 0x{offset:03x}")
        self._function = function
        self._control = offset + pci.ATS_CONTROL

    @property
    def enabled(self) -> bool:
        """What the device's control register says now."""
        return bool(self._function.read_config(self._control, 2) & pci.ATS_ENABLE)

    def set(self, *, on: bool) -> None:
        """Turn it on or off; the smallest unit of translation stays 4 KiB (STU 0)."""
        self._function.write_config(self._control, 2, pci.ATS_ENABLE if on else 0)


def find_ats(function: PciFunction) -> Ats | None:
    """The ATS of a function that has it. QEMU gives it to a device behind a root port only, and if ``ats=on``.

    Raises `ProtocolError` for a list of capabilities that loops or leaves its place.
    """
    at = pci.EXTENDED
    seen: set[int] = set()
    while at:
        if at in seen:
            raise ProtocolError(f"PCI extended capability list loops at 0x{at:03x}")
        seen.add(at)
        ident, after = pci.extended_capability(function.read_config(at, 4))
        if ident == pci.EXTENDED_ATS:
            return Ats(function, at)
        if ident in (0, 0xFFFF):
            return None
        at = after
    return None
