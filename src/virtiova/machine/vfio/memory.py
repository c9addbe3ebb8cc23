# SPDX-License-Identifier: Apache-2.0
"""Memory of this process whose physical addresses are known and stay: huge pages, held by a pipe.

A device with bit 33 clear takes physical addresses. So each page has to have one that is known
(``/proc/self/pagemap``, root), and must keep it: what a pipe refers to is not moved by the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from typing import Final

from virtiova.addr import GPA, PAGE_SIZE
from virtiova.dma.ram import MappedRam, PageAllocator, Ram, RamBlock
from virtiova.errors import AccessError, NotPossibleError

HUGE: Final = 2 << 20
_COUNT: Final = 4
"""Huge pages: two for the two homes of what is shared with the device, the others for all else."""
_PIPE: Final = 1 << 20
"""Bytes that a pipe holds: as many as anybody may have, unless the machine was told otherwise."""
_TRIES: Final = 16
_MADV_HUGEPAGE: Final = 14
_PRESENT: Final = 1 << 63
_FRAME: Final = (1 << 55) - 1
_NOT_SHOWN: Final = (
    "physical addresses are not shown to this user, and without them it is not known whose memory a device writes to "
    "that goes around the IOMMU: run it as root (CAP_SYS_ADMIN), as with sudo"
)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class PhysicalMemory:
    """Huge pages that are each one run of physical memory. Raises `NotPossibleError`, with what is missing.

    ``usable`` says of a physical address and a size whether the IOMMU can map an IOVA of the same number: a page's
    twin is at its address.
    """

    def __init__(self, usable: Callable[[int, int], bool]) -> None:
        self._usable = usable
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._map = mmap.mmap(-1, (_TRIES + 1) * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pipes: list[int] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        window = ctypes.c_char.from_buffer(self._map)
        self._base = ctypes.addressof(window)
        del window
        first = -self._base % HUGE
        with contextlib.suppress(OSError):
            # A kernel without huge pages: what comes will be in pieces.
            self._map.madvise(_MADV_HUGEPAGE)
        blocks = []
        for number in range(_TRIES):
            at = first + number * HUGE
            for page in range(0, HUGE, PAGE_SIZE):
                self._map[at + page] = 1
            gpa = self._run(at)
            if gpa is not None and self._usable(gpa, HUGE):
                self._hold(at)
                blocks.append(RamBlock(GPA(gpa), HUGE, at))
            if len(blocks) == _COUNT:
                break
        if len(blocks) < _COUNT:
            raise NotPossibleError(
                f"{_COUNT} huge pages are wanted, {len(blocks)} came: "
                "echo always > /sys/kernel/mm/transparent_hugepage/enabled"
            )
        self.ram = MappedRam(self._map, sorted(blocks, key=lambda block: block.gpa))
        self.pages: PageAllocator = HugePages(self.ram, [block.gpa for block in self.ram.blocks])

    def _run(self, at: int) -> int | None:
        """The physical address of a huge page; None if it is not in one piece."""
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                words = os.pread(file.fileno(), HUGE // PAGE_SIZE * 8, (self._base + at) // PAGE_SIZE * 8)
        except OSError as error:
            raise NotPossibleError(f"/proc/self/pagemap: {error.strerror}: {_NOT_SHOWN}") from error
        entries = struct.unpack(f"<{len(words) // 8}Q", words)
        frames = [entry & _FRAME for entry in entries if entry & _PRESENT]
        if frames and not frames[0]:
            raise NotPossibleError(_NOT_SHOWN)
        if len(frames) < HUGE // PAGE_SIZE:
            return None
        whole = frames == list(range(frames[0], frames[0] + len(frames)))
        return frames[0] * PAGE_SIZE if whole and frames[0] * PAGE_SIZE % HUGE == 0 else None

    def _hold(self, at: int) -> None:
        """Let a pipe refer to a huge page, so that it stays where it is."""
        for start in range(at, at + HUGE, _PIPE):
            read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._pipes += [read, write]
            try:
                fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE)
            except OSError as error:
                raise NotPossibleError(
                    f"a pipe of {_PIPE >> 20} MiB cannot be had: {error.strerror}: "
                    f"echo {_PIPE} > /proc/sys/fs/pipe-max-size"
                ) from error
            self._splice(write, _Iovec(self._base + start, _PIPE))

    def _splice(self, pipe: int, left: _Iovec) -> None:
        while left.length:
            done = self._libc.vmsplice(pipe, ctypes.byref(left), ctypes.c_ulong(1), ctypes.c_uint(0))
            if done <= 0:
                error = ctypes.get_errno()
                raise NotPossibleError(f"memory cannot be held where it is: {os.strerror(error)}")
            left.base += done
            left.length -= done

    def address(self, gpa: int) -> int:
        """Our own address of a physical one."""
        for block in self.ram.blocks:
            if block.gpa <= gpa < block.gpa + block.size:
                return self._base + block.offset + (gpa - block.gpa)
        raise AccessError(gpa, 1, "no memory of ours there")

    def close(self) -> None:
        """Give it back. May be called more than once."""
        for fd in self._pipes:
            os.close(fd)
        self._pipes.clear()
        if hasattr(self, "ram"):
            self.ram.close()
        self._map.close()


class HugePages(PageAllocator):
    """Pages out of several huge ones: each part that is carved out lies in one."""

    def __init__(self, ram: Ram, starts: list[GPA]) -> None:
        first, *self._others = starts
        super().__init__(ram, first, GPA(first + HUGE))

    def carve(self, count: int, align: int = PAGE_SIZE) -> PageAllocator:
        """As the other's, from a huge page of its own."""
        if not self._others or count * PAGE_SIZE > HUGE or align > HUGE:
            raise AccessError(0, count * PAGE_SIZE, "no memory left for the probe")
        start = self._others.pop()
        return PageAllocator(self._ram, start, GPA(start + count * PAGE_SIZE))
