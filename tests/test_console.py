# SPDX-License-Identifier: Apache-2.0
"""The console, by hand and through its driver on the model machine."""

from __future__ import annotations

import pytest

from probe_kit import wrong
from ring_kit import make_ram
from virtiova import probe
from virtiova.addr import GPA
from virtiova.device.console import EMERGENCY_AT, MAX_WAITING, RX, TX, Console
from virtiova.dma.ram import MappedRam
from virtiova.dma.space import FlatSpace
from virtiova.driver.console import ConsoleDriver
from virtiova.driver.open import open_device
from virtiova.errors import AccessError, UsageError
from virtiova.features import DeviceId
from virtiova.machine.model import ModelMachine
from virtiova.ring.chain import Chain

DATA, NOWHERE = 0x1000, 0x10_0000


class Screen:
    def __init__(self) -> None:
        self.text = b""
        self.busy = False

    def send(self, data: bytes, /) -> None:
        self.text += data

    def full(self) -> bool:
        return self.busy


@pytest.fixture
def ram() -> MappedRam:
    return make_ram(0x20000)


@pytest.fixture
def screen() -> Screen:
    return Screen()


def test_output(ram: MappedRam, screen: Screen) -> None:
    ram.write(GPA(DATA), b"hello, world")
    console = Console(screen)
    chain = Chain(FlatSpace(ram), 0, [(DATA, 5), (DATA + 5, 7)], [])
    console.handle(TX, chain)
    assert (screen.text, chain.written) == (b"hello, world", 0)


def test_output_in_one_long_buffer(ram: MappedRam, screen: Screen) -> None:
    ram.write(GPA(DATA), bytes(range(256)) * 400)
    Console(screen).handle(TX, Chain(FlatSpace(ram), 0, [(DATA, 102400)], []))
    assert screen.text == bytes(range(256)) * 400


def test_input_waits_for_buffers_and_is_cut_to_them(ram: MappedRam, screen: Screen) -> None:
    console = Console(screen)
    assert not console.pending(RX)
    console.deliver(b"0123456789")
    written = []
    while console.pending(RX):
        chain = Chain(FlatSpace(ram), 0, [], [(DATA, 4)])
        console.handle(RX, chain)
        written.append((chain.written, ram.read(GPA(DATA), chain.written)))
    assert written == [(4, b"0123"), (4, b"4567"), (2, b"89")]


def test_what_is_not_fetched_is_bounded_and_counted(screen: Screen) -> None:
    console = Console(screen)
    console.deliver(b"x" * (MAX_WAITING - 1))
    assert console.room == 1
    console.deliver(b"abc")
    assert (console.room, console.lost) == (0, 2)
    console.reset()
    assert (console.room, console.pending(RX)) == (MAX_WAITING, False)


def test_output_stays_in_the_ring_while_nobody_takes_it(screen: Screen) -> None:
    console = Console(screen)
    assert console.pending(TX)
    screen.busy = True
    assert not console.pending(TX)


def test_memory_out_of_reach(ram: MappedRam, screen: Screen) -> None:
    console = Console(screen)
    console.deliver(b"input")
    with pytest.raises(AccessError):
        console.handle(RX, Chain(FlatSpace(ram), 0, [], [(NOWHERE, 8)]))
    with pytest.raises(AccessError):
        console.handle(TX, Chain(FlatSpace(ram), 0, [(NOWHERE, 8)], []))
    assert screen.text == b""


def test_config(screen: Screen) -> None:
    assert Console(screen, columns=132, rows=43).config() == bytes([43, 0, 132, 0, 1, 0, 0, 0]) + bytes(4)
    assert (Console(screen, columns=1, rows=1).features, Console(screen).features) == (5, 4)
    for columns, rows in ((80, 0), (0, 25), (-1, -1), (65536, 1)):
        with pytest.raises(UsageError, match="both or none"):
            Console(screen, columns=columns, rows=rows)


def test_emergency_write(screen: Screen) -> None:
    console = Console(screen)
    console.configure(EMERGENCY_AT, b"A\0\0\0")
    console.configure(0, b"\0" * 8)
    console.configure(EMERGENCY_AT - 2, b"\0\0B")
    console.configure(EMERGENCY_AT + 1, b"C")
    assert screen.text == b"AB"


# -- through the driver


def test_driver() -> None:
    with ModelMachine("honest", "console") as machine:
        driver = open_device(machine)
        assert isinstance(driver, ConsoleDriver)
        assert driver.transport.device_id == DeviceId.CONSOLE
        driver.write(b"out " * 300)
        assert b"".join(machine.peer.received()) == b"out " * 300
        assert driver.exchange(b"in " * 200) == b"in " * 200
        assert machine.transport is not None
        assert machine.transport.read_config(0, 4) == bytes([25, 0, 80, 0])
        machine.transport.write_config(8, b"!\0\0\0")
        assert machine.peer.received() == [b"!"]


@pytest.mark.parametrize("iommu", ["soft", "none"])
@pytest.mark.parametrize("behaviour", ["honest", "quirky"])
def test_probed(behaviour: str, iommu: str) -> None:
    cells = list(probe.model(behaviour, "console", iommu=iommu))
    assert wrong(cells) == []
    applicable = {cell.experiment for cell in cells if cell.observed != "n/a"}
    assert {"device-writes", "device-reads", "ring", "indirect", "split-buffer"} <= applicable
    assert ("write-only" in applicable) is (iommu == "soft"), "a console reads, too"


def test_a_lying_console_is_found() -> None:
    for cell in probe.model("lying", "console", ["device-writes", "device-reads", "ring", "unmapped", "write-only"]):
        assert (cell.observed, cell.mismatch) == ("bypass", True), cell.experiment
