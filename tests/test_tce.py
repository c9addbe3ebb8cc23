# SPDX-License-Identifier: Apache-2.0
"""TCEs over a hypervisor of our own: which hypercalls are made, and what is refused before one is."""

from __future__ import annotations

import pytest

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.errors import AccessError, MachineError, NotPossibleError
from virtiova.iommu.tce import LIOBN, WINDOW, TceIommu

RAM_END = 512 << 20


class Hypervisor:
    """Keeps the window's entries as H_PUT_TCE (0x20) and H_STUFF_TCE (0x138) are specified."""

    def __init__(self) -> None:
        self.entries: dict[int, int] = {}
        self.calls = 0
        self.result = 0

    def call(self, number: int, *arguments: int) -> int:
        self.calls += 1
        liobn, address, value, *count = arguments
        assert liobn == LIOBN == 0x80000000
        if number == 0x20:
            self.entries[address] = value
        else:
            assert number == 0x138
            self.entries |= {address + index * PAGE_SIZE: value for index in range(count[0])}
        return self.result


def make() -> tuple[Hypervisor, TceIommu]:
    hypervisor = Hypervisor()
    return hypervisor, TceIommu(hypervisor.call, RAM_END)


@pytest.mark.parametrize(
    ("access", "flags"), [(Access.READ, 1), (Access.WRITE, 2), (Access.RW, 3), (Access.NONE, None)]
)
def test_entries(access: Access, flags: int | None) -> None:
    hypervisor, iommu = make()
    iommu.map(IOVA(0x5000), GPA(0x4000000), 2 * PAGE_SIZE, access)
    wanted = [0x4000000, 0x4001000] if flags is not None else [0, 0]
    assert hypervisor.entries == {0x5000: wanted[0] | (flags or 0), 0x6000: wanted[1] | (flags or 0)}


def test_a_range_is_unmapped_by_one_call() -> None:
    hypervisor, iommu = make()
    iommu.map(IOVA(0), GPA(0x4000000), 4 * PAGE_SIZE)
    calls = hypervisor.calls
    iommu.unmap(IOVA(PAGE_SIZE), 2 * PAGE_SIZE)
    assert hypervisor.calls == calls + 1
    assert [address for address, entry in hypervisor.entries.items() if entry] == [0, 3 * PAGE_SIZE]


def test_there_is_no_off() -> None:
    hypervisor, iommu = make()
    iommu.enable()
    iommu.invalidate()
    assert hypervisor.calls == 0
    assert not iommu.can_be_off
    with pytest.raises(NotPossibleError):
        iommu.disable()


def test_refusals() -> None:
    hypervisor, iommu = make()
    for iova, size in ((1, PAGE_SIZE), (0, 1), (0, 0), (WINDOW, PAGE_SIZE), (-PAGE_SIZE, PAGE_SIZE)):
        with pytest.raises(AccessError):
            iommu.map(IOVA(iova), GPA(0), size)
        with pytest.raises(AccessError):
            iommu.unmap(IOVA(iova), size)
    with pytest.raises(AccessError):
        iommu.map(IOVA(0), GPA(1), PAGE_SIZE)
    assert hypervisor.calls == 0
    hypervisor.result = -4
    with pytest.raises(MachineError, match="0x20 for bus address 0x1000 failed: -4"):
        iommu.map(IOVA(PAGE_SIZE), GPA(0), PAGE_SIZE)


def test_an_iova_is_never_an_address_of_ram() -> None:
    _, iommu = make()
    assert [iommu.allocate(1), iommu.allocate(PAGE_SIZE)] == [RAM_END, RAM_END + 2 * PAGE_SIZE]
    with pytest.raises(AccessError, match="no IOVAs left"):
        iommu.allocate(WINDOW - RAM_END)
