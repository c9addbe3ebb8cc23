# SPDX-License-Identifier: Apache-2.0
"""The in-process machine through its ports: where each behaviour's bytes land, faults, interrupts."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from model_rig import BIT33, LIVE, V1, Rig
from virtiova import __version__
from virtiova.addr import GPA, IOVA, PAGE_SIZE
from virtiova.errors import AccessError, NotPossibleError, ProtocolError, UsageError
from virtiova.machine.model import Behaviour, ModelIommu, ModelMachine
from virtiova.ports import Machine


@pytest.fixture
def rig() -> Iterator[Rig]:
    it = Rig()
    yield it
    it.machine.close()


def test_it_is_a_machine() -> None:
    with ModelMachine("honest", "rng") as model:
        machine: Machine = model
        assert (machine.name, machine.device, machine.insists) == ("model", "model-rng", True)
        assert machine.product == f"virtiova model {__version__}"
        assert machine.iommu.name == "soft"
        assert machine.words() == ()


@pytest.mark.parametrize(
    ("behaviour", "offers", "iommu", "page"),
    [
        ("honest", True, "soft", "A"),
        ("honest", False, "soft", "B"),
        ("quirky", True, "soft", "B"),
        ("lying", True, "soft", "B"),
        ("lying", False, "soft", "B"),
        ("honest", True, "none", "B"),
        ("quirky", True, "none", "B"),
    ],
)
def test_where_the_bytes_land(behaviour: Behaviour, offers: bool, iommu: ModelIommu, page: str) -> None:
    rig = Rig(behaviour, offers=offers, iommu=iommu)
    offered = rig.transport.read_features()
    assert bool(offered & BIT33) is (offers and behaviour != "quirky")
    rig.start()
    rig.ask()
    assert rig.landed() == "", "the kick itself moves nothing"
    assert rig.done()
    assert rig.landed() == page
    target = {"A": rig.a, "B": rig.b}[page]
    assert rig.ram.read(target, 32) == b"sector 00000007 sector 00000007 "
    assert rig.ring.used_element(0) == (0, 513)
    assert rig.iommu.faults() == []
    rig.machine.close()


@pytest.mark.parametrize(("behaviour", "source"), [("honest", "a"), ("quirky", "b"), ("lying", "b")])
def test_where_the_bytes_come_from(behaviour: Behaviour, source: str) -> None:
    rig = Rig(behaviour)
    rig.ram.write(rig.a, b"a" * 512)
    rig.ram.write(rig.b, b"b" * 512)
    rig.start()
    rig.ask(kind=1, sector=3)
    assert rig.done()
    assert rig.machine.peer.stored(3 * 512, 512) == source.encode() * 512
    assert rig.machine.peer.stored(4 * 512, 16) == b"sector 00000004 "
    rig.machine.close()


def test_shuffled_they_are_told_apart() -> None:
    for seed in range(5):
        names: list[Behaviour] = ["honest", "quirky", "lying"] * 3
        random.Random(seed).shuffle(names)
        answers = []
        for name in names:
            rig = Rig(name)
            offered = bool(rig.transport.read_features() & BIT33)
            rig.start()
            rig.ask()
            assert rig.done()
            answers.append({"A": "honest", "B": "lying" if offered else "quirky"}[rig.landed()])
            rig.machine.close()
        assert answers == names


def test_not_taking_an_offered_bit_the_device_does_not_insist_on() -> None:
    rig = Rig(insists=None)
    assert rig.machine.insists is None
    rig.start(V1)
    rig.ask()
    assert rig.done()
    assert rig.landed() == "B", "bit 33 was not accepted: the device takes physical addresses"
    rig.machine.close()


# -- faults, and the cache in front of the device


def test_data_fault_is_recorded_and_answered_with_an_error(rig: Rig) -> None:
    rig.iommu.unmap(IOVA(rig.b), PAGE_SIZE)
    rig.ram.write(rig.a, bytes(PAGE_SIZE))
    rig.start()
    rig.ask()
    assert rig.done()
    assert rig.ram.read(GPA(rig.head + 64), 1) == b"\1", "status IOERR"
    assert rig.landed() == ""
    assert [(f.address, f.write) for f in rig.iommu.faults()] == [(rig.b, True)]
    rig.iommu.map(IOVA(rig.b), rig.a, PAGE_SIZE)
    rig.ask()
    assert rig.done(2)
    assert rig.ram.read(GPA(rig.head + 64), 1) == b"\0", "the device is alive"
    assert rig.landed() == "A"


def test_unmapped_without_invalidation_is_still_used(rig: Rig) -> None:
    rig.start()
    rig.ask()
    assert rig.done()
    rig.iommu.unmap(IOVA(rig.b), PAGE_SIZE)
    rig.ram.write(rig.a, bytes(PAGE_SIZE))
    rig.ask()
    assert rig.done(2)
    assert rig.landed() == "A"
    rig.ram.write(rig.a, bytes(PAGE_SIZE))
    rig.iommu.invalidate()
    rig.ask()
    assert rig.done(3)
    assert rig.landed() == ""
    assert len(rig.iommu.faults()) == 1


def test_with_translation_off_the_path_is_direct(rig: Rig) -> None:
    rig.iommu.disable()
    rig.start()
    rig.ask()
    assert rig.done()
    assert rig.landed() == "B"


# -- interrupts and bus mastering


@pytest.mark.parametrize("behaviour", ["honest", "quirky", "lying"])
def test_msi_goes_through_the_platform_whatever_the_bit_is(behaviour: Behaviour) -> None:
    rig = Rig(behaviour)
    target, bare = rig.machine.pages.page(), rig.machine.pages.page()
    rig.iommu.map(IOVA(bare), target, PAGE_SIZE)
    msi = rig.transport.msi
    assert msi is not None
    msi.arm(3, bare + 8, 0xCAFE0003)
    rig.start(vector=3)
    rig.ask()
    assert rig.done()
    assert rig.ram.load32(GPA(target + 8)) == 0xCAFE0003
    assert rig.ram.read(bare, PAGE_SIZE) == bytes(PAGE_SIZE)
    rig.ram.store32(GPA(target + 8), 0)
    msi.disarm()
    rig.ask()
    assert rig.done(2)
    assert rig.ram.load32(GPA(target + 8)) == 0
    rig.machine.close()


def test_msi_is_not_sent_when_the_driver_does_not_want_it_and_faults_when_unmapped(rig: Rig) -> None:
    msi = rig.transport.msi
    assert msi is not None
    msi.arm(0, 0x7000_0000, 1)
    rig.start(vector=0)
    rig.ring.put16(rig.ring.avail, 1)
    rig.ask()
    assert rig.done()
    assert rig.iommu.faults() == []
    rig.ring.put16(rig.ring.avail, 0)
    rig.ask()
    assert rig.done(2)
    assert [(f.address, f.write) for f in rig.iommu.faults()] == [(0x7000_0000, True)]
    assert rig.transport.read_status() == LIVE


def test_msi_without_an_iommu() -> None:
    rig = Rig(iommu="none")
    page = rig.machine.pages.page()
    msi = rig.transport.msi
    assert msi is not None
    msi.arm(0, page, 5)
    rig.start(vector=0)
    rig.ask()
    assert rig.done()
    assert rig.ram.load32(page) == 5
    rig.machine.close()


@pytest.mark.parametrize("behaviour", ["honest", "quirky", "lying"])
def test_bus_master_off_is_no_dma_at_all(behaviour: Behaviour) -> None:
    rig = Rig(behaviour)
    master = rig.transport.bus_master
    assert master is not None
    rig.start()
    rig.ask()
    master.set_bus_master(False)
    rig.transport.notify(0)
    before = rig.ram.read(GPA(rig.ring.desc), PAGE_SIZE)
    assert not rig.done()
    assert rig.ram.read(GPA(rig.ring.desc), PAGE_SIZE) == before, "not even the ring's flags"
    assert rig.landed() == ""
    assert rig.iommu.faults() == []
    master.set_bus_master(True)
    assert not rig.done(), "a new kick is needed"
    rig.transport.notify(0)
    assert rig.done()
    rig.machine.close()


# -- the other devices and the rest of the ports


def test_rng() -> None:
    rig = Rig(device="rng")
    assert rig.transport.device_id == 4
    rig.start()
    rig.ring.put_chain(0, (rig.b, 64, True))
    rig.ring.offer(0)
    rig.transport.notify(0)
    assert rig.done()
    assert rig.ring.used_element(0) == (0, 64)
    assert rig.landed() == "A"
    rig.machine.close()


def test_net_sends() -> None:
    rig = Rig(device="net")
    rig.negotiate(V1 | BIT33)
    rig.queue(1)
    rig.transport.write_status(LIVE)
    rig.ram.write(rig.a, bytes(12) + b"a frame")
    rig.ring.put_chain(0, (rig.b, 19, False))
    rig.ring.offer(0)
    rig.transport.notify(1)
    assert rig.done()
    assert rig.machine.peer.received() == [b"a frame"]
    assert rig.machine.peer.received() == []
    rig.machine.close()


def test_net_receives_later_without_a_kick() -> None:
    rig = Rig(device="net")
    rig.start()
    rig.ring.put_chain(0, (rig.b, 2048, True))
    rig.ring.offer(0, 0)
    rig.transport.notify(0)
    assert not rig.done()
    rig.machine.peer.send(b"frame 1")
    assert rig.done(1)
    rig.machine.peer.send(b"frame 2")
    assert rig.done(2)
    assert rig.ram.read(rig.a, 19) == bytes(10) + b"\1\0frame 2"
    rig.machine.peer.send(b"frame 3")
    assert not rig.done(3), "no buffer: it waits"
    rig.ring.offer(0)
    rig.transport.notify(0)
    assert rig.done(3)
    assert rig.ram.read(GPA(rig.a + 12), 7) == b"frame 3"
    rig.machine.close()


def test_config(rig: Rig) -> None:
    assert int.from_bytes(rig.transport.read_config(0, 8), "little") == 2048
    for offset, length in ((-1, 1), (0, 1000), (60, 1)):
        with pytest.raises(AccessError):
            rig.transport.read_config(offset, length)


def test_queues_that_do_not_exist(rig: Rig) -> None:
    transport = rig.transport
    assert (transport.queue_size(0), transport.queue_size(1), transport.queue_size(-1)) == (256, 0, 0)
    transport.notify(9)
    rig.negotiate(V1 | BIT33)
    for index, size in ((1, 8), (0, 512), (0, 0), (0, 7)):
        with pytest.raises(ProtocolError):
            transport.enable_queue(index, size, 0, 0, 0, None)
    rig.start()
    with pytest.raises(ProtocolError, match="after DRIVER_OK"):
        rig.queue()


def test_peers_have_only_what_the_device_is_made_of(rig: Rig) -> None:
    with pytest.raises(NotPossibleError):
        rig.machine.peer.send(b"x")
    assert rig.machine.peer.received() == []
    with ModelMachine("honest", "net") as machine, pytest.raises(NotPossibleError):
        machine.peer.stored(0, 1)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="did you mean 'honest'"):
        ModelMachine("honset")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="model device"):
        ModelMachine("honest", "gpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="IOMMU"):
        ModelMachine("honest", iommu="intel")  # type: ignore[arg-type]


def test_wait_gives_up_early_when_nothing_can_happen_any_more(rig: Rig) -> None:
    calls = []

    def never() -> bool:
        calls.append(0)
        return False

    assert not rig.machine.wait(never, 1e9)
    assert len(calls) < 5


def test_close_may_be_called_twice_and_gives_the_memory_back() -> None:
    machine = ModelMachine("honest")
    machine.close()
    machine.close()
    with pytest.raises((AccessError, ValueError)):
        machine.ram.read(GPA(0), 1)


def test_pages_lie_in_ram_and_iovas_do_not(rig: Rig) -> None:
    page = rig.machine.pages.page()
    assert page >= 1 << 20
    with pytest.raises(AccessError):
        rig.ram.read(GPA(int(rig.iommu.allocate(PAGE_SIZE))), 1)
