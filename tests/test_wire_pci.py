# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space as bytes: bounded whatever a device says, and read as ``lspci -F`` reads it."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtiova.errors import ProtocolError
from virtiova.wire import pci
from virtiova.wire.pci import Bar, MsixCap, VirtioCap

LSPCI = shutil.which("lspci")
DEBIAN = Path("/etc/debian_version").exists()
STATUS_CAPABILITIES = 0x10

# What QEMU 7.2 shows: a transitional virtio-blk-pci on the root bus, a modern virtio-net-pci behind a root port.
BLK = bytes.fromhex(
    "f41a011003001000000000010000000001e00000000000c800000000000000000c4000c80000000000000000f41a0200"
    "00000000980000000000000000010000090010010400000000000000001000000940100304000000001000000010000009"
    "501004040000000020000000100000096014020400000000300000001000000400000009701405"
).ljust(0x98, b"\0") + bytes.fromhex("118401000100000001080000").ljust(256 - 0x98, b"\0")
NET = bytes.fromhex(
    "f41a411003001000010000020000000000000000000000c000000000000000000c4000c00000000000000000f41a001100"
    "000000dc000000000000000001000010000200008000100000000011040000000011"
).ljust(0x7C, b"\0") + bytes.fromhex(
    "0140030000000000097c100104000000000000000010000009841003040000000010000000100000099410040400000000"
    "2000000010000009a4140204000000003000000010000004000000"
    "09b4140500000000000000000000000000000000"
    "11c8030001000000"
    "01080000"
).ljust(256 - 0x7C, b"\0")


# -- examples from a real device -----------------------------------------------------------------------------------


def test_a_transitional_device() -> None:
    caps = pci.virtio_caps(BLK)
    assert list(pci.capabilities(BLK)) == [
        (pci.CAP_MSIX, 0x98),
        *((pci.CAP_VENDOR, at) for at in (0x84, 0x70, 0x60, 0x50, 0x40)),
    ]
    assert caps == {
        pci.COMMON: VirtioCap(pci.COMMON, 4, 0x0000, 0x1000, 0),
        pci.ISR: VirtioCap(pci.ISR, 4, 0x1000, 0x1000, 0),
        pci.DEVICE: VirtioCap(pci.DEVICE, 4, 0x2000, 0x1000, 0),
        pci.NOTIFY: VirtioCap(pci.NOTIFY, 4, 0x3000, 0x1000, 4),
    }
    assert pci.msix_cap(BLK) == MsixCap(at=0x98, size=2, bar=1, offset=0)
    assert pci.device_type(0x1001, 2) == 2


def test_a_modern_device_behind_a_port() -> None:
    assert [at for _, at in pci.capabilities(NET)] == [0xDC, 0xC8, 0xB4, 0xA4, 0x94, 0x84, 0x7C, 0x40]
    assert pci.virtio_caps(NET)[pci.NOTIFY] == VirtioCap(pci.NOTIFY, 4, 0x3000, 0x1000, 4)
    assert pci.msix_cap(NET) == MsixCap(at=0xDC, size=4, bar=1, offset=0)
    assert pci.device_type(0x1041, 0x1100) == 1


# -- lists as a hostile device makes them --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cap:
    """A capability as the tests write it: its id, what follows the two header bytes, and its place."""

    ident: int
    body: bytes
    at: int


def config_with(caps: Sequence[Cap], *, status: int = STATUS_CAPABILITIES) -> bytearray:
    """A configuration space with these capabilities, linked in order."""
    config = bytearray(pci.CONFIG_SIZE)
    struct.pack_into("<HHHH", config, 0, pci.VENDOR_VIRTIO, 0x1042, 0, status)
    pointer = pci.CAP_POINTER
    for cap in caps:
        config[pointer] = cap.at
        config[cap.at] = cap.ident
        config[cap.at + 2 : cap.at + 2 + len(cap.body)] = cap.body
        pointer = cap.at + 1
    return config


def virtio_body(kind: int, bar: int, offset: int, length: int, multiplier: int | None = None) -> bytes:
    """All of ``struct virtio_pci_cap`` but its first two bytes."""
    tail = b"" if multiplier is None else struct.pack("<I", multiplier)
    return struct.pack("<BBB3xII", 16 + len(tail), kind, bar, offset, length) + tail


def test_no_capabilities() -> None:
    config = bytes(pci.CONFIG_SIZE)
    assert list(pci.capabilities(config)) == []
    assert pci.virtio_caps(config) == {}
    assert pci.msix_cap(config) is None


@pytest.mark.parametrize("length", [0, 64, 255])
def test_a_short_configuration_space(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"{length} bytes"):
        list(pci.capabilities(bytes(length)))


@pytest.mark.parametrize("loop_to", [0x40, 0x50, 0x60])
def test_a_list_that_loops(loop_to: int) -> None:
    config = config_with([Cap(9, b"", at) for at in (0x40, 0x50, 0x60)])
    config[0x61] = loop_to
    seen: list[int] = []
    walk = pci.capabilities(bytes(config))
    for _ in range(3):
        seen.append(next(walk)[1])
    with pytest.raises(ProtocolError, match="loops"):
        next(walk)
    assert seen == [0x40, 0x50, 0x60]
    for whole in (pci.virtio_caps, pci.msix_cap):
        with pytest.raises(ProtocolError, match="loops"):
            whole(bytes(config))


@pytest.mark.parametrize("pointer", [0x04, 0x10, 0x3C])
def test_a_list_that_leaves_its_place(pointer: int) -> None:
    config = config_with([Cap(9, b"", 0x40)])
    config[0x41] = pointer
    with pytest.raises(ProtocolError, match=f"0x{pointer:02x}"):
        list(pci.capabilities(bytes(config)))


def test_the_two_low_bits_of_a_pointer_are_reserved() -> None:
    config = config_with([Cap(9, b"", 0x40), Cap(pci.CAP_MSIX, bytes(10), 0x80)])
    config[pci.CAP_POINTER] |= 3
    config[0x41] |= 2
    assert list(pci.capabilities(bytes(config))) == [(9, 0x40), (pci.CAP_MSIX, 0x80)]


@given(st.binary(min_size=pci.CONFIG_SIZE, max_size=pci.CONFIG_SIZE))
def test_any_configuration_space(config: bytes) -> None:
    seen: list[int] = []
    try:
        for _, at in pci.capabilities(config):
            seen.append(at)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            pci.virtio_caps(config)
    else:
        for kind, cap in pci.virtio_caps(config).items():
            assert kind == cap.kind
            assert kind in (pci.COMMON, pci.NOTIFY, pci.ISR, pci.DEVICE)
            assert 0 <= cap.bar <= 5
            assert kind == pci.NOTIFY or cap.multiplier == 0
        msix = pci.msix_cap(config)
        assert msix is None or (1 <= msix.size <= 2048 and msix.offset % 8 == 0)
    assert len(seen) == len(set(seen)) <= 48
    assert all(0x40 <= at <= 0xFC and at % 4 == 0 for at in seen)


@given(st.lists(st.integers(0, 255), min_size=192, max_size=192), st.integers(0, 63).map(lambda n: n * 4))
def test_any_list_of_virtio_structures(body: list[int], first: int) -> None:
    """Every place a vendor capability, every pointer the device's choice: as bad as it gets."""
    config = bytearray(64) + bytearray(body)
    config[pci.CAP_POINTER] = first
    for at in range(0x40, 0x100, 4):
        config[at] = pci.CAP_VENDOR if config[at] & 1 else pci.CAP_MSIX
    try:
        caps = pci.virtio_caps(bytes(config))
    except ProtocolError:
        return
    assert set(caps) <= {1, 2, 3, 4}
    pci.msix_cap(bytes(config))


def test_the_first_structure_of_a_type_counts() -> None:
    """A device offers them in the order of its preference (virtio 1.4, 4.1.4.1)."""
    config = config_with(
        [
            Cap(9, virtio_body(pci.COMMON, 4, 0x100, 64), 0x40),
            Cap(9, virtio_body(pci.COMMON, 2, 0x200, 64), 0x60),
        ]
    )
    assert pci.virtio_caps(bytes(config)) == {pci.COMMON: VirtioCap(pci.COMMON, 4, 0x100, 64, 0)}


@pytest.mark.parametrize("bar", [6, 7, 0xFF])
def test_structures_in_reserved_bars_are_passed_over(bar: int) -> None:
    """A driver must ignore them (virtio 1.4, 4.1.4): the next one of the type counts."""
    config = config_with(
        [
            Cap(9, virtio_body(pci.DEVICE, bar, 0, 64), 0x40),
            Cap(9, virtio_body(pci.DEVICE, 1, 0x80, 64), 0x60),
        ]
    )
    assert pci.virtio_caps(bytes(config)) == {pci.DEVICE: VirtioCap(pci.DEVICE, 1, 0x80, 64, 0)}


@pytest.mark.parametrize("kind", [0, 5, 8, 9, 255])
def test_structures_that_do_not_lie_in_a_bar_or_are_not_known(kind: int) -> None:
    assert pci.virtio_caps(bytes(config_with([Cap(9, virtio_body(kind, 4, 0, 64), 0x40)]))) == {}


def test_a_structure_at_the_very_end_is_not_read_past_it() -> None:
    config = config_with([Cap(9, b"", 0xFC)])
    config[0xFE:0x100] = b"\x14\x01"
    assert pci.virtio_caps(bytes(config)) == {}
    # The 16 bytes fit, the multiplier behind them does not.
    config = config_with([Cap(9, virtio_body(pci.NOTIFY, 4, 0x3000, 0x1000), 0xF0)])
    config[0xF2] = 20
    assert pci.virtio_caps(bytes(config))[pci.NOTIFY].multiplier == 0


def test_a_pointer_without_the_status_bit_is_no_list() -> None:
    """Bit 4 of the status says whether the pointer means anything (PCI Local Bus 3.0, 6.2.3)."""
    config = config_with([Cap(9, virtio_body(pci.COMMON, 4, 0, 64), 0x40)], status=0)
    assert list(pci.capabilities(bytes(config))) == []


# -- BARs and ids --------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(4, 31), st.booleans())
def test_a_32_bit_memory_bar(index: int, bits: int, prefetchable: bool) -> None:
    low = ~((1 << bits) - 1) & 0xFFFFFFFF | prefetchable << 3
    assert pci.bar(index, low, 0xDEADBEEF) == Bar(index, 1 << bits, io=False, wide=False)


@given(st.integers(0, 4), st.integers(4, 63), st.booleans())
def test_a_64_bit_memory_bar(index: int, bits: int, prefetchable: bool) -> None:
    mask = ~((1 << bits) - 1) & (2**64 - 1)
    low = mask & 0xFFFFFFFF | prefetchable << 3 | 4
    assert pci.bar(index, low, mask >> 32) == Bar(index, 1 << bits, io=False, wide=True)


@given(st.integers(0, 5), st.integers(2, 15), st.booleans())
def test_an_io_bar(index: int, bits: int, upper: bool) -> None:
    """The upper 16 bits may be hard-wired to 0 (PCI Local Bus 3.0, 6.2.5.1)."""
    low = ~((1 << bits) - 1) & (0xFFFFFFFF if upper else 0xFFFF) | 1
    assert pci.bar(index, low, 0) == Bar(index, 1 << bits, io=True, wide=False)


@pytest.mark.parametrize("low", [0, 0xFFFFFFFF])
def test_no_bar(low: int) -> None:
    assert pci.bar(0, low, 0) is None


@given(st.integers(0, 5), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_any_bar(index: int, low: int, high: int) -> None:
    try:
        found = pci.bar(index, low, high)
    except ProtocolError:
        return
    if found is not None:
        assert found.index == index
        assert 0 < found.size <= 2**64
        assert found.io is bool(low & 1)
        assert not (found.io and found.wide)


@pytest.mark.parametrize(
    ("device", "subsystem", "kind"),
    [(0x1041, 0, 1), (0x1042, 0x1100, 2), (0x1044, 0, 4), (0x107F, 0, 63), (0x1000, 1, 1), (0x1005, 4, 4)],
)
def test_device_types(device: int, subsystem: int, kind: int) -> None:
    assert pci.device_type(device, subsystem) == kind


@pytest.mark.parametrize("device", [0, 0x0FFF, 0x1080, 0x10F0, 0xFFFF])
def test_ids_that_are_no_virtio_device(device: int) -> None:
    with pytest.raises(ProtocolError, match=f"0x{device:04x}"):
        pci.device_type(device, 2)


# -- lspci as the oracle -------------------------------------------------------------------------------------------

_KINDS = {"CommonCfg": pci.COMMON, "Notify": pci.NOTIFY, "ISR": pci.ISR, "DeviceCfg": pci.DEVICE}
_CAP = re.compile(r"^\tCapabilities: \[([0-9a-f]{2})\] (.*)$")
_PLACE = re.compile(r"BAR=(\d+) offset=([0-9a-f]+)(?: size=([0-9a-f]+))?(?: multiplier=([0-9a-f]+))?")
_MSIX = re.compile(r"MSI-X: Enable[+-] Count=(\d+)")


@dataclass
class Seen:
    """What lspci said of one function."""

    places: list[int]
    virtio: dict[int, VirtioCap]
    msix: MsixCap | None


@pytest.fixture
def tool() -> str:
    """The real lspci. One apt-get away on Debian, so that its absence there is a broken set-up."""
    if LSPCI is None:
        if DEBIAN:
            pytest.fail("lspci is not installed: apt install pciutils", pytrace=False)
        pytest.skip("lspci is not installed")
    return LSPCI


def lspci(tool: str, tmp_path: Path, configs: Sequence[bytes]) -> list[Seen]:
    """Let the real tool read a dump of these configuration spaces."""
    dump = tmp_path / "dump"
    with dump.open("w", encoding="ascii") as out:
        for slot, config in enumerate(configs):
            out.write(f"{slot >> 5:02x}:{slot & 31:02x}.0 x\n")
            for at in range(0, len(config), 16):
                out.write(f"{at:02x}: {config[at : at + 16].hex(' ')}\n")
            out.write("\n")
    done = subprocess.run([tool, "-F", str(dump), "-n", "-vv"], capture_output=True, text=True, timeout=20, check=True)
    blocks = done.stdout.strip().split("\n\n")
    assert len(blocks) == len(configs), done.stderr
    return [_parse(block) for block in blocks]


def _parse(block: str) -> Seen:
    seen = Seen([], {}, None)
    lines = block.splitlines()
    for number, line in enumerate(lines):
        match = _CAP.match(line)
        if match is None:
            continue
        at, text = int(match[1], 16), match[2]
        seen.places.append(at)
        place = _PLACE.search(lines[number + 1]) if number + 1 < len(lines) else None
        kind = _KINDS.get(text.rpartition("VirtIO: ")[2])
        if kind is not None and place is not None:
            bar, offset, size = int(place[1]), int(place[2], 16), int(place[3], 16)
            multiplier = int(place[4] or "0", 16)
            if bar <= 5:
                seen.virtio.setdefault(kind, VirtioCap(kind, bar, offset, size, multiplier))
        count = _MSIX.match(text)
        if count is not None and place is not None and seen.msix is None:
            seen.msix = MsixCap(at, int(count[1]), int(place[1]), int(place[2], 16))
    return seen


def ours(config: bytes) -> Seen:
    return Seen([at for _, at in pci.capabilities(config)], pci.virtio_caps(config), pci.msix_cap(config))


def test_lspci_reads_the_real_devices_as_we_do(tool: str, tmp_path: Path) -> None:
    assert lspci(tool, tmp_path, [BLK, NET]) == [ours(BLK), ours(NET)]


def test_lspci_goes_by_the_status_bit(tool: str, tmp_path: Path) -> None:
    without = BLK[:6] + bytes([BLK[6] & ~STATUS_CAPABILITIES]) + BLK[7:]
    (seen,) = lspci(tool, tmp_path, [without])
    assert seen == ours(without) == Seen([], {}, None)


_structures = st.builds(
    lambda kind, bar, offset, length, multiplier: (
        9,
        virtio_body(kind, bar, offset, length, multiplier if kind == pci.NOTIFY else None),
    ),
    st.integers(1, 5),
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
_msix = st.builds(
    lambda size, bar, offset: (pci.CAP_MSIX, struct.pack("<HII", size - 1, offset << 3 | bar, 0x800)),
    st.integers(1, 2048),
    st.integers(0, 5),
    st.integers(0, 2**29 - 1),
)


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """A well-formed list of virtio and MSI-X capabilities in any order, at any places."""
    chosen = draw(st.lists(st.one_of(_structures, _msix), max_size=6))
    slots = draw(st.permutations(range(8)))
    return bytes(
        config_with([Cap(ident, body, 0x40 + 24 * slot) for (ident, body), slot in zip(chosen, slots, strict=False)])
    )


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(configs(), min_size=1, max_size=40))
def test_lspci_reads_any_list_as_we_do(
    tool: str, tmp_path_factory: pytest.TempPathFactory, configs: list[bytes]
) -> None:
    assert lspci(tool, tmp_path_factory.mktemp("lspci"), configs) == [ours(config) for config in configs]
