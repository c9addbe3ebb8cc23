# SPDX-License-Identifier: Apache-2.0
"""Memory files that shrink under us: the access goes on, the region is flagged; a foreign SIGBUS goes where it went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from virtiova._core import Mapping, faults
from virtiova.addr import GPA, UVA, Access
from virtiova.dma.cached import CachedSpace
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.regions import RegionRam

PAGE = 0x1000


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which may die of it."""
    command = [sys.executable, *options, "-c", PRELUDE + textwrap.dedent(script)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


PRELUDE = """
import ctypes, faulthandler, mmap, os, resource, signal, sys
from virtiova._core import Mapping
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def file(pages):
    fd = os.memfd_create("shrinks")
    os.ftruncate(fd, pages * 4096)
    return fd

def guarded():
    fd = file(4)
    mapping = Mapping(fd, 0, 4 * 4096, 4096)
    return fd, mapping, mapping.window(0, 4 * 4096)

def foreign():
    fd = file(1)
    memory = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    return memory
"""


def test_a_region_that_shrinks() -> None:
    fd = os.memfd_create("shrinks")
    os.ftruncate(fd, 8 * PAGE)
    ram = RegionRam()
    ram.add(GPA(0), 4 * PAGE, UVA(0), 0, fd)
    ram.add(GPA(8 * PAGE), 4 * PAGE, UVA(8 * PAGE), 4 * PAGE, fd)
    ram.write(GPA(8 * PAGE), b"here")
    ram.write(GPA(9 * PAGE), b"gone")
    assert not ram.damaged
    before = faults()
    os.ftruncate(fd, 5 * PAGE)
    assert ram.read(GPA(8 * PAGE), 4) == b"here", "what is still in the file is still seen"
    assert not ram.damaged
    assert ram.read(GPA(9 * PAGE), 4) == bytes(4)
    assert list(ram.damaged) == [8 * PAGE]
    ram.write(GPA(11 * PAGE), b"nobody sees it")
    assert ram.load16(GPA(10 * PAGE)) == 0
    assert ram.read(GPA(11 * PAGE), 6) == b"nobody"
    assert faults() == before + 3, "a page each"
    assert os.fstat(fd).st_size == 5 * PAGE
    ram.write(GPA(0), b"the other one")
    assert list(ram.damaged) == [8 * PAGE]
    ram.remove(GPA(8 * PAGE), 4 * PAGE, UVA(8 * PAGE))
    assert not ram.damaged
    ram.clear()
    os.close(fd)


def test_a_region_that_shrinks_behind_the_native_table() -> None:
    fd = os.memfd_create("shrinks")
    os.ftruncate(fd, 4 * PAGE)
    ram = RegionRam()
    ram.add(GPA(0), 4 * PAGE, UVA(0), 0, fd)
    iotlb = Iotlb(ram)
    space = CachedSpace(ram, iotlb)
    iotlb.update(0x100000, 4 * PAGE, UVA(0), Access.RW)
    space.write(0x100000, b"x" * 4 * PAGE)
    assert iotlb.radix.covers(0x100000, 4 * PAGE, 3)
    os.ftruncate(fd, PAGE)
    assert space.read(0x100FFF, 2) == b"x\0"
    space.store16(0x102000, 7)
    assert list(ram.damaged) == [0]
    ram.clear()
    os.close(fd)


def test_pages_of_the_kernel_s_size() -> None:
    """A replaced page never reaches past the end of its mapping, whatever page size was said."""
    fd = os.memfd_create("shrinks")
    os.ftruncate(fd, 3 * PAGE)
    first = Mapping(fd, 0, 3 * PAGE, 2 * PAGE)
    window = first.window(0, 3 * PAGE)
    os.ftruncate(fd, 0)
    assert window.read(2 * PAGE, 1) == b"\0"
    assert first.faults == 1
    assert window.read(0, 2 * PAGE) == bytes(2 * PAGE)
    assert first.faults == 2
    window.release()
    first.close()
    assert first.faults == 0
    os.close(fd)


def test_a_truncated_file_does_not_end_the_process() -> None:
    done = run("""
        fd, mapping, window = guarded()
        os.ftruncate(fd, 4096)
        window.write(4096 - 2, b"four")
        print(window.read(4096 - 2, 5), mapping.faults)
    """)
    assert (done.returncode, done.stdout) == (0, "b'four\\x00' 1\n"), done.stderr


@pytest.mark.parametrize("others", ["", "-Xfaulthandler"])
@pytest.mark.parametrize(
    "die",
    ["memory[0]", "ctypes.string_at(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1)"],
    ids=["get", "copy"],
)
def test_a_foreign_fault_ends_it_as_before(die: str, others: str) -> None:
    done = run(f"_, mapping, window = guarded()\nmemory = foreign()\n{die}", *([others] if others else []))
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == bool(others), "and faulthandler says where, if it is on"


def test_faulthandler_switched_on_later_does_not_come_first() -> None:
    """Each mapping makes sure that our handler is asked first; a foreign fault still gets its traceback, and ends."""
    done = run("""
        guarded()
        faulthandler.enable()
        fd, mapping, window = guarded()
        os.ftruncate(fd, 0)
        print(window.read(0, 2), mapping.faults, flush=True)
        foreign()[0]
    """)
    assert done.stdout == "b'\\x00\\x00' 1\n"
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr


def test_a_fault_after_the_mapping_is_gone_is_foreign() -> None:
    done = run("""
        fd, mapping, window = guarded()
        window.release()
        mapping.close()
        foreign()[0]
    """)
    assert done.returncode == -signal.SIGBUS


def test_a_signal_that_was_sent_is_no_fault() -> None:
    done = run("guarded()\nos.kill(os.getpid(), signal.SIGBUS)\nprint('alive')")
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "")


def test_a_handler_in_python_still_gets_what_was_sent() -> None:
    done = run("""
        signal.signal(signal.SIGBUS, lambda number, frame: print("heard", flush=True))
        guarded()
        os.kill(os.getpid(), signal.SIGBUS)
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        guarded()
        os.kill(os.getpid(), signal.SIGBUS)
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "heard\nalive\n")


def test_who_was_first_hears_from_who_came_in_front_of_us() -> None:
    """Our predecessor, we, one who has us as his predecessor, we again: what nobody wants goes down the whole chain."""
    done = run("""
        class Action(ctypes.Structure):
            _fields_ = [
                ("handler", ctypes.c_void_p), ("mask", ctypes.c_char * 128),
                ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p),
            ]

        Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

        def install(function):
            action, old = Action(ctypes.cast(function, ctypes.c_void_p).value, b"", 0x40000004, None), Action()
            assert ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(old)) == 0
            return old

        heard = []
        first = Handler(lambda *_: heard.append("first"))
        install(first)
        guarded()

        def passes_on(*given):
            heard.append("second")
            Handler(old.handler)(*given)

        second = Handler(passes_on)
        old = install(second)
        for _ in range(3):
            guarded()
        os.kill(os.getpid(), signal.SIGBUS)
        os.kill(os.getpid(), signal.SIGBUS)
        print(*heard)
    """)
    assert (done.returncode, done.stdout) == (0, "second first second first\n"), done.stderr


def test_pages_at_random_do_not_use_up_all_mappings() -> None:
    """Every other page of a file that is gone: one mapping each would be more than the kernel allows."""
    done = run("""
        pages = 140_000
        fd = file(pages)
        mapping = Mapping(fd, 0, pages * 4096, 4096)
        window = mapping.window(0, pages * 4096)
        window.write(0, b"kept")
        os.ftruncate(fd, 4096)
        for page in range(pages - 1, 0, -2):
            window.store16(page * 4096, 1)
        print(window.read(0, 4), mapping.faults > 65530, len(open("/proc/self/maps").readlines()) < 1000)
    """)
    assert (done.returncode, done.stdout) == (0, "b'kept' True True\n"), done.stderr


def test_numbers_that_mean_nothing() -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE)
    for wrong in ((fd, 0, 0, PAGE), (fd, 0, PAGE, 0), (fd, 0, -1, PAGE)):
        with pytest.raises(ValueError, match="some bytes"):
            Mapping(*wrong)
    with pytest.raises(OSError, match="Invalid argument"):
        Mapping(fd, 1, PAGE, PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Mapping(-1, 0, PAGE, PAGE)
    mapping = Mapping(fd, 0, PAGE, PAGE)
    for offset, length in ((0, PAGE + 1), (PAGE, 1), (-1, 1), (0, -1), (1 << 63, 1)):
        with pytest.raises(IndexError):
            mapping.window(offset, length)
    window = mapping.window(0, PAGE)
    with pytest.raises(BufferError):
        mapping.close()
    window.release()
    mapping.close()
    mapping.close()
    with pytest.raises((ValueError, IndexError)):
        mapping.window(0, 1)
    os.close(fd)
