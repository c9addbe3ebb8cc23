# SPDX-License-Identifier: Apache-2.0
"""The native half: bounds, byte order, and that another process never sees half a store."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova._core import Window, fence

SIZE = 64


@pytest.fixture
def memory() -> bytearray:
    return bytearray(range(SIZE))


@pytest.fixture
def window(memory: bytearray) -> Window:
    return Window(memory)


def test_length_and_copies(window: Window, memory: bytearray) -> None:
    assert len(window) == SIZE
    assert window.read(3, 5) == bytes(memory[3:8])
    assert window.read(0, SIZE) == bytes(memory)
    window.write(1, b"abc")
    assert memory[:5] == b"\x00abc\x04"


@pytest.mark.parametrize("offset", [0, 1, SIZE])
def test_copies_of_nothing_are_fine_up_to_the_end(window: Window, memory: bytearray, offset: int) -> None:
    assert window.read(offset, 0) == b""
    window.write(offset, b"")
    assert memory == bytearray(range(SIZE))


def test_an_empty_buffer() -> None:
    window = Window(bytearray())
    assert len(window) == 0
    assert window.read(0, 0) == b""
    with pytest.raises(IndexError):
        window.load16(0)


def test_little_endian_unless_told(window: Window) -> None:
    assert window.load16(2) == 0x0302
    assert window.load16(2, True) == 0x0203
    assert window.load32(4) == 0x07060504
    assert window.load32(4, swap=True) == 0x04050607
    assert window.load_pair(8) == bytes(range(8, 24))


def test_stores_lie_in_memory_as_told(window: Window, memory: bytearray) -> None:
    window.store16(2, 0x1234)
    window.store16(4, 0x1234, True)
    window.store32(8, 0x12345678)
    window.store32(12, 0x12345678, swap=True)
    assert memory[:16] == bytes.fromhex("0001 3412 1234 0607 78563412 12345678")
    assert memory[16:] == bytes(range(16, SIZE))


def test_bits_are_added_to_a_byte(window: Window, memory: bytearray) -> None:
    window.or8(5, 0x42)
    window.or8(5, 0x80)
    window.or8(6, 0)
    assert memory == bytes(range(5)) + b"\xc7" + bytes(range(6, SIZE))
    for bits in (-1, 256):
        with pytest.raises(OverflowError):
            window.or8(5, bits)


Access = Callable[[Window, int], object]
SIZED: list[tuple[int, int, Access]] = [
    (2, 2, Window.load16),
    (4, 4, Window.load32),
    (16, 8, Window.load_pair),
    (2, 2, lambda window, offset: window.store16(offset, 0xFFFF)),
    (4, 4, lambda window, offset: window.store32(offset, 0xFFFFFFFF)),
    (1, 1, lambda window, offset: window.or8(offset, 0xFF)),
    (5, 1, lambda window, offset: window.read(offset, 5)),
    (5, 1, lambda window, offset: window.write(offset, b"\xff" * 5)),
]


@pytest.mark.parametrize(("size", "align", "access"), SIZED)
def test_bounds(window: Window, memory: bytearray, size: int, align: int, access: Access) -> None:
    last = SIZE - size
    outside = [
        -1,
        -size,
        -SIZE,
        last + 1,
        last + align,
        SIZE,
        SIZE + 8,
        2**31,
        2**63 - 1,
        2**64,
        -(2**63),
        -(2**70),
    ]
    for offset in outside:
        with pytest.raises(IndexError):
            access(window, offset)
    assert memory == bytearray(range(SIZE))
    access(window, last)


@pytest.mark.parametrize(("size", "align", "access"), SIZED)
def test_alignment(window: Window, memory: bytearray, size: int, align: int, access: Access) -> None:
    for offset in range(16):
        if offset % align:
            with pytest.raises(IndexError, match=f"not a multiple of {align}"):
                access(window, offset)
    assert memory == bytearray(range(SIZE))


@pytest.mark.parametrize(("size", "align", "access"), SIZED)
def test_no_access_after_release(window: Window, size: int, align: int, access: Access) -> None:
    window.release()
    with pytest.raises(ValueError, match="released"):
        access(window, 0)


@pytest.mark.parametrize("length", [-1, -SIZE, SIZE + 1, 2**63 - 1, 2**64, -(2**64)])
def test_bad_lengths(window: Window, length: int) -> None:
    with pytest.raises(IndexError):
        window.read(0, length)


@pytest.mark.parametrize("value", [-1, 2**16, 2**32, 2**70, -(2**70)])
def test_values_that_do_not_fit_16_bits(window: Window, memory: bytearray, value: int) -> None:
    with pytest.raises(OverflowError):
        window.store16(0, value)
    assert memory == bytearray(range(SIZE))


@pytest.mark.parametrize("value", [-1, 2**32, 2**70, -(2**70)])
def test_values_that_do_not_fit_32_bits(window: Window, memory: bytearray, value: int) -> None:
    with pytest.raises(OverflowError):
        window.store32(0, value)
    assert memory == bytearray(range(SIZE))


@pytest.mark.parametrize("data", [None, "text", bytearray(4), 4])
def test_only_bytes_are_written(window: Window, data: bytes) -> None:
    with pytest.raises(TypeError):
        window.write(0, data)


def test_a_fraction_is_no_offset(window: Window) -> None:
    offset: int = 2.0  # type: ignore[assignment]
    with pytest.raises(TypeError):
        window.load16(offset)


def test_buffers_that_will_not_do() -> None:
    with pytest.raises(BufferError):
        Window(bytes(16))
    with pytest.raises(BufferError):
        Window(memoryview(bytearray(16))[::2])
    with pytest.raises(TypeError):
        Window(None)
    with pytest.raises(ValueError, match="multiple of 8"):
        Window(memoryview(bytearray(16))[4:])


def test_a_refused_buffer_is_let_go() -> None:
    memory = bytearray(16)
    with pytest.raises(ValueError, match="multiple of 8"):
        Window(memoryview(memory)[4:])
    memory.append(0)


def test_holds_the_buffer_until_release() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    window = Window(memory)
    with pytest.raises(BufferError):
        memory.close()
    window.release()
    window.release()
    with pytest.raises(ValueError, match="released"):
        len(window)
    memory.close()


def test_holds_the_buffer_until_forgotten() -> None:
    memory = bytearray(16)
    window = Window(memory)
    with pytest.raises(BufferError):
        memory.append(0)
    del window
    memory.append(0)


def test_fence() -> None:
    fence()


Op = tuple[str, int, bytes, bool]
OPS = st.lists(
    st.tuples(st.sampled_from(["16", "32", "bytes"]), st.integers(0, SIZE - 1), st.binary(max_size=8), st.booleans()),
    max_size=30,
)


@given(OPS)
def test_agrees_with_a_model(ops: list[Op]) -> None:
    """Against plain Python integers and slices: every store, and every load after it."""
    model = bytearray(SIZE)
    window = Window(bytearray(SIZE))
    for kind, offset, data, big in ops:
        order = "big" if big else "little"
        if kind == "bytes":
            if offset + len(data) > SIZE:
                with pytest.raises(IndexError):
                    window.write(offset, data)
                continue
            window.write(offset, data)
            model[offset : offset + len(data)] = data
        else:
            size = int(kind) // 8
            at = offset - offset % size
            value = int.from_bytes(data[:size], "little")
            model[at : at + size] = value.to_bytes(size, "big" if big else "little")
            if size == 2:
                window.store16(at, value, big)
                assert window.load16(at, big) == value
            else:
                window.store32(at, value, big)
                assert window.load32(at, big) == value
        assert window.read(0, SIZE) == bytes(model), (kind, offset, order)
    for at in range(0, SIZE, 4):
        assert window.load32(at) == int.from_bytes(model[at : at + 4], "little")
        assert window.load16(at, True) == int.from_bytes(model[at : at + 2], "big")
    for at in range(0, SIZE - 8, 8):
        assert window.load_pair(at) == bytes(model[at : at + 16])


# A second process, not a thread: threads take turns between whole calls into the native half.
# That no torn value is seen proves little; that one is seen would prove much.
WRITER = """
import mmap, sys
from virtiova._core import Window

with open(sys.argv[1], "r+b") as file:
    window = Window(mmap.mmap(file.fileno(), 0))
stop = 4000
print("ready", flush=True)
while not window.load16(stop):
    {body}
"""


@contextmanager
def writer(path: Path, body: str) -> Iterator[Window]:
    """A process that does ``body`` over and over on a shared page, until the block ends."""
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file:
        window = Window(mmap.mmap(file.fileno(), 0))
    process = subprocess.Popen([sys.executable, "-c", WRITER.format(body=body), str(path)], stdout=subprocess.PIPE)
    try:
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            try:
                yield window
            finally:
                window.store16(4000, 1)
        assert process.returncode == 0
    finally:
        process.kill()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("bits", [16, 32])
def test_no_torn_values(tmp_path: Path, bits: int, swap: bool) -> None:
    first, second = {16: (0x1122, 0xEEDD), 32: (0x11223344, 0xEEDDCCBB)}[bits]
    body = f"window.store{bits}(64, {first}, {swap}); window.store{bits}(64, {second}, {swap})"
    seen = set[int]()
    with writer(tmp_path / "ram", body) as window:
        load = window.load16 if bits == 16 else window.load32
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < 0.2 or (len(seen - {0}) < 2 and passed < 30):
            seen.update(load(64, swap) for _ in range(1000))
    assert seen - {0} == {first, second}


def test_a_pair_is_loaded_in_order(tmp_path: Path) -> None:
    """The second half is stored first, so that a reader of the first half finds it at least as new."""
    body = "count = (window.load32(64) + 1) % 2**32; window.store32(72, count); window.store32(64, count)"
    newest = 0
    with writer(tmp_path / "ram", body) as window:
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < 0.2 or (newest < 1000 and passed < 30):
            for _ in range(1000):
                pair = window.load_pair(64)
                newest = int.from_bytes(pair[:4], "little")
                assert int.from_bytes(pair[8:12], "little") >= newest
    assert newest >= 1000


def test_an_index_that_releases_the_window(window: Window) -> None:
    """Whatever runs while an offset is converted, the memory is looked at only afterwards."""

    class Releasing:
        def __index__(self) -> int:
            window.release()
            return 0

    with pytest.raises(ValueError, match="released"):
        window.load16(Releasing())  # type: ignore[arg-type]
