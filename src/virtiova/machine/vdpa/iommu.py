# SPDX-License-Identifier: Apache-2.0
"""What stands in front of a vDPA device: the mappings that the kernel was told of (`ports.Iommu`)."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_MASK, PAGE_SIZE, UVA, Access
from virtiova.dma.space import Miss, Span
from virtiova.errors import MachineError, NotPossibleError
from virtiova.iommu.soft import SoftIommu
from virtiova.machine.vdpa.device import VdpaFile
from virtiova.machine.vhost.device import CallError
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.ports import Fault
from virtiova.wire.vhost import BatchKind
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

_FIRST_IOVA: Final = 1 << 36
_GUARD: Final = 16 * PAGE_SIZE
_LEAST: Final = 1 << 32


class VdpaIommu:
    """What is mapped is mapped at once, and gone when `unmap` returns: then the kernel has told the device, and the
    device has answered. Nothing is asked for (no misses), and nothing is recorded of what was stopped. A table of our
    own says the same (`lookup`), for the message that we write when the device has called."""

    name = "vdpa"
    present = True
    in_front = True
    caches = False
    page_size = PAGE_SIZE
    write_only = True
    can_be_off = False
    shared = False
    own_bit33 = None

    def __init__(self, file: VdpaFile, memory: OwnMemory) -> None:
        self._file = file
        self._memory = memory
        self._mapped: set[int] = set()
        self._table = SoftIommu(memory.ram)
        self._table.enable()
        top = max(region.gpa + region.size for region in memory.regions)
        if file.first > 0 or file.last < 2 * top:
            raise NotPossibleError(
                f"{file.path} takes IOVAs from 0x{file.first:x} to 0x{file.last:x} only; the probe's are from 0 on"
            )
        # Past all RAM that a device could take them for, where there is room for that.
        self._next = _FIRST_IOVA if file.last >= _FIRST_IOVA + _LEAST else -(-top & -PAGE_SIZE)

    def enable(self) -> None:
        """Such a device is mapped for from the start."""

    def disable(self) -> None:
        """Raise `NotPossibleError`: the kernel lets nothing through as it is."""
        raise NotPossibleError("vDPA has no state without translation")

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        """Point ``iova`` at ``gpa``, page by page, so that each can be taken away by itself. The device learns of all
        of them at once, where the kernel has batches."""
        self._table.map(iova, gpa, size, access)
        with self._batch():
            for offset in range(0, size, PAGE_SIZE):
                page = iova + offset
                if page in self._mapped:
                    self._drop(page)
                self._update(page, self._memory.uva(gpa + offset), access)
                self._mapped.add(page)

    def _update(self, page: int, uva: UVA, access: Access) -> None:
        try:
            self._file.tell(IotlbMessage(IOVA(page), PAGE_SIZE, uva, access, IotlbKind.UPDATE))
        except CallError as error:
            raise MachineError(f"IOVA 0x{page:x} cannot be mapped: {error}. {self._why_not()}") from error

    def _why_not(self) -> str:
        """The kernel has one error for all reasons (EFAULT)."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "without limit" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB (ulimit -l)"
        return (
            f"The device did not take it, or no more memory may be locked: {limit}, {len(self._mapped)} pages are. "
            "More, in the shell that runs this:\n    ulimit -l unlimited"
        )

    def unmap(self, iova: IOVA, size: int) -> None:
        """Take it away. The kernel returns when the device has let go of it, or has said so."""
        self._table.unmap(iova, size)
        self._table.invalidate()
        with self._batch():
            for page in range(iova, iova + size, PAGE_SIZE):
                if page in self._mapped:
                    self._drop(page)

    def _drop(self, page: int) -> None:
        self._file.tell(IotlbMessage(IOVA(page), PAGE_SIZE, UVA(0), Access.RW, IotlbKind.INVALIDATE))
        self._mapped.discard(page)

    @contextlib.contextmanager
    def _batch(self) -> Iterator[None]:
        if not self._file.batches:
            yield
            return
        self._file.batch(BatchKind.BEGIN)
        try:
            yield
        finally:
            self._file.batch(BatchKind.END)

    def invalidate(self) -> None:
        """Done by `unmap` already."""
        self._table.invalidate()

    def lookup(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        """What the tables say, for whoever writes in the device's stead."""
        return self._table.lookup(address, length, access)

    def faults(self) -> list[Fault]:
        """Nobody records them."""
        return []

    def allocate(self, size: int) -> IOVA:
        """An unused range, with a gap behind it."""
        start, size = self._next, size + PAGE_MASK & ~PAGE_MASK
        if start + size - 1 > self._file.last:
            raise MachineError(f"{self._file.path}: no IOVAs left up to 0x{self._file.last:x}")
        self._next += size + _GUARD
        return IOVA(start)

    def clear(self) -> None:
        """Take everything away."""
        with self._batch():
            for page in sorted(self._mapped):
                self._drop(page)
