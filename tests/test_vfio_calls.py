# SPDX-License-Identifier: Apache-2.0
"""VFIO's answers that no guest gives here: a kernel that refuses, IOMMUs with odd limits, a device whose own words are
absurd."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.dma.ram import MappedRam, RamBlock
from virtiova.dma.space import Miss
from virtiova.errors import AccessError, MachineError, NotPossibleError, ProtocolError, UsageError
from virtiova.machine.vfio import container, machine
from virtiova.machine.vfio.iommu import VfioIommu
from virtiova.machine.vfio.limits import Limits
from virtiova.machine.vfio.machine import VfioDevice
from virtiova.wire import pci, vfio

ADDRESS = "0000:01:00.0"


@dataclass
class Kernel:
    """What answers ioctls: a function for a request, else 0. ``asked`` are the requests."""

    answers: dict[int, Callable[[Any], int]] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def ioctl(self, _fd: int, request: int, argument: Any = 0) -> int:
        self.asked.append(request)
        return self.answers.get(request, lambda _: 0)(argument)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr("virtiova.machine.vfio.calls.fcntl.ioctl", made.ioctl)
    return made


def refuse(number: int) -> Callable[[Any], int]:
    def answer(_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return answer


def fill(form: str, at: int, *values: int) -> Callable[[Any], int]:
    """An answer of these values at a place of the structure."""

    def answer(structure: bytearray) -> int:
        struct.pack_into(form, structure, at, *values)
        return 0

    return answer


def information(ranges: list[tuple[int, int]], sizes: int = PAGE_SIZE) -> Callable[[bytearray], int]:
    """The answer to VFIO_IOMMU_GET_INFO; one that does not fit says how much room it takes."""
    cap = struct.pack("<HHIII", 1, 1, 0, len(ranges), 0) + b"".join(struct.pack("<QQ", *each) for each in ranges)

    def answer(info: bytearray) -> int:
        fits = 24 + len(cap) <= len(info)
        struct.pack_into("<IIQI", info, 0, 24 + len(cap), 1, sizes, 24 if fits and ranges else 0)
        if fits:
            info[24 : 24 + len(cap)] = cap
        return 0

    return answer


# -- limits ------------------------------------------------------------------------------------------------------


def test_ranges_that_want_more_room(kernel: Kernel) -> None:
    many = [(n << 20, (n << 20) + 0xFFFF) for n in range(1000)]
    kernel.answers[vfio.IOMMU_GET_INFO] = information(many)
    assert Limits(3).ranges == many
    assert kernel.asked == [vfio.IOMMU_GET_INFO] * 2


def test_a_kernel_that_never_has_room_enough(kernel: Kernel) -> None:
    def more(info: bytearray) -> int:
        struct.pack_into("<I", info, 0, 2 * len(info))
        return 0

    kernel.answers[vfio.IOMMU_GET_INFO] = more
    with pytest.raises(MachineError, match="to say what the IOMMU can"):
        Limits(3)


def test_without_ranges_the_window_of_the_messages_is_left_out(kernel: Kernel) -> None:
    kernel.answers[vfio.IOMMU_GET_INFO] = information([])
    limits = Limits(3)
    assert limits.holds(0xFEDFF000, PAGE_SIZE)
    assert not limits.holds(0xFEDFF000, 2 * PAGE_SIZE)
    assert not limits.holds(0xFEE00000, PAGE_SIZE)
    assert limits.place(0xFEDFF000, 2 * PAGE_SIZE) == 0xFEF00000
    assert limits.place(1 << 39, PAGE_SIZE) is None


def test_an_iommu_of_large_pages_only(kernel: Kernel) -> None:
    kernel.answers[vfio.IOMMU_GET_INFO] = information([(0, 1 << 32)], sizes=1 << 16)
    with pytest.raises(NotPossibleError, match="no pages of 4096 bytes"):
        Limits(3)


def test_iovas_are_handed_out_within_the_ranges_only(kernel: Kernel) -> None:
    ranges = [(0x1000, 0xFFFFF), (0x200000, 0x20FFFF), (0x400000, 0x5FFFFF)]
    kernel.answers[vfio.IOMMU_GET_INFO] = information(ranges)
    limits, tables = Limits(3), iommu(kernel)
    given: list[int] = []

    def go_on() -> None:
        for _ in range(1000):
            given.append(tables.allocate(0x3000))

    with pytest.raises(AccessError, match="no IOVAs are left"):
        go_on()
    assert given
    assert all(limits.holds(start, 0x3000) for start in given)


def small_ram() -> MappedRam:
    return MappedRam(mmap.mmap(-1, 0x10000), [RamBlock(GPA(0), 0x10000, 0)])


def iommu(kernel: Kernel) -> VfioIommu:
    ram: Any = SimpleNamespace(address=lambda gpa: 0x7000000 + gpa, ram=small_ram())
    log: Any = SimpleNamespace(read=list)
    kernel.answers.setdefault(vfio.IOMMU_GET_INFO, information([(0x1000, (1 << 39) - 1)]))
    return VfioIommu(3, Limits(3), ram, log)


@pytest.mark.parametrize(
    ("number", "access", "kind", "words"),
    [
        (errno.ENOMEM, Access.RW, NotPossibleError, "ulimit -l unlimited"),
        (errno.EINVAL, Access.WRITE, AccessError, "for writing only"),
        (errno.EINVAL, Access.RW, MachineError, "VFIO_IOMMU_MAP_DMA 0x5000: Invalid argument"),
        (errno.ENOSPC, Access.RW, MachineError, "No space left"),
    ],
)
def test_a_mapping_that_the_kernel_refuses(
    kernel: Kernel, number: int, access: Access, kind: type[Exception], words: str
) -> None:
    tables = iommu(kernel)
    kernel.answers[vfio.IOMMU_MAP_DMA] = refuse(number)
    with pytest.raises(kind, match=words):
        tables.map(IOVA(0x5000), GPA(0x9000), PAGE_SIZE, access)
    # What the device does not reach our own table does not have either, nor is it taken back.
    assert isinstance(tables.lookup(0x5000, 4, Access.READ), Miss)
    tables.unmap(IOVA(0x5000), PAGE_SIZE)
    assert vfio.IOMMU_UNMAP_DMA not in kernel.asked


def test_an_unmap_of_less_than_was_asked_for(kernel: Kernel) -> None:
    tables = iommu(kernel)
    tables.map(IOVA(0x5000), GPA(0x9000), PAGE_SIZE)
    kernel.answers[vfio.IOMMU_UNMAP_DMA] = fill("<Q", 16, 0)
    with pytest.raises(MachineError, match="unmapped 0x0 bytes at 0x5000"):
        tables.unmap(IOVA(0x5000), PAGE_SIZE)


# -- a group -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "number", "kind", "words"),
    [
        (vfio.SET_IOMMU, errno.EPERM, NotPossibleError, "allow_unsafe_interrupts"),
        (vfio.SET_IOMMU, errno.EBUSY, NotPossibleError, "fuser -v"),
        (vfio.SET_IOMMU, errno.ENODEV, MachineError, "VFIO_SET_IOMMU: No such device"),
        (vfio.GROUP_SET_CONTAINER, errno.EBUSY, NotPossibleError, "fuser -v"),
        (vfio.GROUP_GET_DEVICE_FD, errno.EBUSY, NotPossibleError, "fuser -v"),
        (vfio.GROUP_GET_DEVICE_FD, errno.ENODEV, MachineError, "does not hand it over"),
        (vfio.GROUP_GET_STATUS, errno.EIO, MachineError, "VFIO_GROUP_GET_STATUS"),
        (vfio.GET_API_VERSION, errno.ENOTTY, MachineError, "VFIO_GET_API_VERSION"),
    ],
)
def test_a_call_that_is_refused_leaves_nothing_open(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, request_: int, number: int, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(container.Opened, "_group", lambda _: "null")
    monkeypatch.setattr(container, "_FILES", "/dev")
    real = os.open
    monkeypatch.setattr("virtiova.machine.vfio.container.os.open", lambda path, flags: real("/dev/null", flags))
    kernel.answers = {
        vfio.CHECK_EXTENSION: lambda _: 1,
        vfio.GROUP_GET_STATUS: fill("<I", 4, vfio.GROUP_VIABLE),
        request_: refuse(number),
    }
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind, match=words):
        container.Opened(ADDRESS)
    assert len(os.listdir("/proc/self/fd")) == before


# -- a device's own words ----------------------------------------------------------------------------------------


def space(*caps: bytes, vendor: int = pci.VENDOR_VIRTIO, device: int = 0x1044, first: int = 0x40) -> bytes:
    """A configuration space whose capabilities begin at 0x40."""
    config = bytearray(pci.CONFIG_SIZE)
    struct.pack_into("<HH", config, 0, vendor, device)
    config[pci.STATUS] = pci.STATUS_CAPABILITIES
    config[pci.CAP_POINTER] = first
    at = 0x40
    for cap in caps:
        config[at : at + len(cap)] = cap
        at += len(cap)
    return bytes(config)


def virtio(kind: int, after: int, bar: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBBBB3xIII", pci.CAP_VENDOR, after, 20, kind, bar, offset, 0x1000, 4)


BOTH = (virtio(pci.COMMON, 0x54), virtio(pci.NOTIFY, 0))


@pytest.fixture
def hostile(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Puts a device there whose configuration space is these bytes. Its BARs have 4 KiB of zeros."""
    fd = os.memfd_create("device")
    os.ftruncate(fd, 1 << 16)

    def region(info: bytearray) -> int:
        index = struct.unpack_from("<I", info, 8)[0]
        at, size = (0, pci.CONFIG_SIZE) if index == vfio.CONFIG_REGION else (0x1000 * (1 + index), 0x1000)
        struct.pack_into("<QQ", info, 16, size, at)
        return 0

    kernel.answers[vfio.DEVICE_GET_INFO] = fill("<4I", 4, vfio.DEVICE_FLAG_PCI, 9, 5, 0)
    kernel.answers[vfio.DEVICE_GET_REGION_INFO] = region
    opened = SimpleNamespace(device=fd, container=3, address=ADDRESS, close=lambda: None)
    monkeypatch.setattr(machine, "Opened", lambda _: opened)
    yield lambda config: void(os.pwrite(fd, config, 0))
    os.close(fd)


def void(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        (space(virtio(pci.COMMON, 0x40)), ProtocolError, "loops or leaves its place at 0x40"),
        (space(virtio(pci.COMMON, 0x10)), ProtocolError, "leaves its place at 0x10"),
        (space(*BOTH, first=0x04), ProtocolError, "leaves its place at 0x04"),
        (space(*BOTH, vendor=0xFFFF, device=0xFFFF), UsageError, "ffff:ffff.* is no virtio device"),
        (space(b"\x01\x00\x00\x00"), UsageError, "no modern interface"),
        (space(virtio(pci.COMMON, 0)), ProtocolError, "no virtio structure of type 2"),
        (space(virtio(pci.COMMON, 0x54, bar=5, offset=0xFFFFF000), BOTH[1]), ProtocolError, "the device names 0xfffff"),
        (space(virtio(pci.COMMON, 0x54, bar=7), BOTH[1]), UsageError, "no modern interface"),
        (space(*BOTH, device=0x2000), ProtocolError, "0x2000 is no virtio device"),
    ],
)
def test_absurd_configuration_space(
    hostile: Callable[[bytes], None],
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: bytes,
    kind: type[Exception],
    words: str,
) -> None:
    memory = SimpleNamespace(ram=small_ram(), pages=None, close=lambda: None)
    monkeypatch.setattr(machine, "PhysicalMemory", lambda _: memory)
    kernel.answers[vfio.IOMMU_GET_INFO] = information([(0, (1 << 39) - 1)])
    hostile(config)
    with pytest.raises(kind, match=words):
        VfioDevice(ADDRESS).look()
    assert main(["probe", "vfio", ADDRESS]) == (exits.USAGE if kind is UsageError else exits.COULD_NOT_LOOK)
    assert len(capsys.readouterr().err) < 400
