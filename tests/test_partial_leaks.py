# SPDX-License-Identifier: Apache-2.0
"""Devices that go around the IOMMU for a few of their accesses only: each such access has to show somewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from virtiova.addr import Access
from virtiova.dma.ram import ByteOrder, MappedRam
from virtiova.dma.space import AddressSpace, FlatSpace, Miss, Span
from virtiova.machine.model import ModelDevice, ModelMachine
from virtiova.machine.model_transport import ModelTransport
from virtiova.probe.cell import run_cell
from virtiova.probe.experiment import find
from virtiova.probe.judge import judge
from virtiova.result import Cell, Delivery, Evidence, Path, Witness

Leak = Callable[[str, int], bool]
"""Does an access of that kind (a method's name) and length go around?"""


class Leaky:
    """The IOMMU's address space, but for the accesses that ``leaks`` sends around it (`AddressSpace`)."""

    def __init__(self, through: AddressSpace, around: AddressSpace, leaks: Leak) -> None:
        self._ways = (through, around)
        self._leaks = leaks

    def _way(self, kind: str, length: int) -> AddressSpace:
        return self._ways[self._leaks(kind, length)]

    def translate(self, address: int, length: int, access: Access) -> Sequence[Span] | Miss:
        return self._way("translate", length).translate(address, length, access)

    def read(self, address: int, length: int) -> bytes:
        return self._way("read", length).read(address, length)

    def write(self, address: int, data: bytes) -> None:
        self._way("write", len(data)).write(address, data)

    def load16(self, address: int, order: ByteOrder = "little") -> int:
        return self._way("load16", 2).load16(address, order)

    def load_pair(self, address: int) -> bytes:
        return self._way("load_pair", 16).load_pair(address)

    def store16(self, address: int, value: int, order: ByteOrder = "little") -> None:
        self._way("store16", 2).store16(address, value, order)

    def store32(self, address: int, value: int, order: ByteOrder = "little") -> None:
        self._way("store32", 4).store32(address, value, order)

    def fence(self) -> None:
        self._ways[0].fence()


def probe(name: str, leaks: Leak, kind: ModelDevice = "blk") -> Cell:
    """One experiment on an otherwise honest model device with that leak."""

    def make() -> ModelMachine:
        machine = ModelMachine("honest", kind)
        registers = machine.transport
        assert isinstance(registers, ModelTransport)
        assert isinstance(machine.ram, MappedRam)
        flat, choose = FlatSpace(machine.ram), registers._choose_space
        registers._choose_space = lambda accepted: Leaky(choose(accepted), flat, leaks)
        return machine

    return run_cell(make, find(name), machine="model", iommu="soft", device="model")


def test_without_a_leak_all_is_as_predicted() -> None:
    for name in ("device-writes", "device-reads", "ring", "indirect", "unmapped"):
        assert not probe(name, lambda kind, length: False).mismatch


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("write 1", "device-writes"),  # the status byte of a block request
        ("load16 2", "ring"),  # the available ring: index and entries
        ("load_pair 16", "ring"),  # the descriptors
        ("store16 2", "ring"),  # the used index
        ("write 8", "ring"),  # the used elements
        ("write 512", "device-writes"),
        ("read 512", "device-reads"),
    ],
)
def test_every_access_that_leaks_shows(what: str, name: str) -> None:
    cell = probe(name, lambda kind, length: f"{kind} {length}" == what)
    assert cell.mismatch, cell.evidence
    assert cell.observed in (Path.MIXED, Path.BYPASS)


@pytest.mark.parametrize("name", ["unmapped", "read-only", "empty-tables"])
def test_a_leak_beside_a_blocked_payload_is_no_block(name: str) -> None:
    cell = probe(name, lambda kind, length: kind == "write" and length == 1)
    assert cell.predicted == [Path.BLOCKED]
    if name != "empty-tables":  # there the rings stop it before it comes to the status byte
        assert cell.observed is Path.MIXED


PAGE_A, PAGE_B = b"page A 00800000." * 4, b"page B 00a00000." * 4


def reading(arrived: bytes) -> Evidence:
    delivery = Delivery("data", arrived.hex(), {"A": PAGE_A.hex(), "B": PAGE_B.hex()}, {"A": 0x800000, "B": 0xA00000})
    control = [
        Witness("control", "A", 0x802000, 64, "00" * 4, "11" * 4),
        Witness("control", "B", 0xA02000, 64, "00" * 4, "00" * 4),
    ]
    return Evidence(transfer="read", deliveries=[delivery], witnesses=control, control="msi-x", live="alive")


@pytest.mark.parametrize(
    ("arrived", "path"),
    [
        (PAGE_A, Path.TRANSLATED),
        (PAGE_B, Path.BYPASS),
        (PAGE_A[:48] + bytes(16), Path.MIXED),  # most of a page that must not be read is not nothing
        (bytes(48) + PAGE_A[48:], Path.MIXED),
        (PAGE_A[:32] + PAGE_B[32:], Path.MIXED),
        (bytes(64), Path.BLOCKED),
        (b"", Path.BLOCKED),
        (b"something else. " * 4, Path.BLOCKED),
    ],
)
def test_parts_of_what_was_read_count(arrived: bytes, path: Path) -> None:
    evidence = reading(arrived)
    assert judge(evidence) is path
    if path is Path.BLOCKED:
        assert judge(replace(evidence, live="")) is Path.UNKNOWN
