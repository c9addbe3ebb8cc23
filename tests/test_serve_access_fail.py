# SPDX-License-Identifier: Apache-2.0
"""ACCESS_FAIL: what a mapping does not allow and the front end refuses is said once, by a notice, and harms nobody."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import cast

import pytest

from serve_kit import DATA, HEADER, PAGE, RING, STATUS, USED, WITH_BIT, FrontEnd, disk, request
from virtiova.addr import IOVA, UVA, Access
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.machine.backend import BackEnd
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.serve.misses import MAX_NOTICES
from virtiova.wire.vhost_user import Framer, IotlbKind, IotlbMessage

LENGTH = 512
OLD = b"\xee" * LENGTH
OUR = f"{shlex.quote(sys.executable)} -m virtiova serve"


def asked(end: FrontEnd) -> list[tuple[IotlbKind, int, Access, bool]]:
    """What was sent on the back-end channel: kind, offset, permission, and whether an answer is wanted."""
    while end.host.rounds.work():
        pass
    framer = Framer()
    messages = [message for data in end.host.outbox for message in framer.feed(data)]
    end.host.outbox.clear()
    found = [(IotlbMessage.decode(message.payload), message.need_reply) for message in messages]
    return [(said.kind, said.iova - end.dma(0), said.perm, reply) for said, reply in found]


def ready(end: FrontEnd) -> None:
    end.negotiate(WITH_BIT)
    end.start()
    for page in (RING, USED, HEADER, STATUS):
        end.map(page)


def test_a_mapping_that_is_not_enough_is_asked_for_and_then_complained_of() -> None:
    """The page may be read, and the device is to write. The request fails; the next one asks again."""
    with FrontEnd(disk()) as end:
        ready(end)
        end.map(DATA, access=Access.READ)
        for count in range(1, 3):
            request(end)
            assert asked(end) == [(IotlbKind.MISS, DATA, Access.WRITE, True)]
            assert end.host.counters.access_fails == count - 1
            end.answer(False)
            # A notice: of an answer nothing would come but trouble.
            assert asked(end) == [(IotlbKind.ACCESS_FAIL, DATA, Access.WRITE, False)]
            assert (end.used(), end.get(STATUS, 1)) == (count, b"\1")
            assert (end.host.counters.access_fails, end.host.counters.faults) == (count, count)
        request(end)
        assert len(asked(end)) == 1
        end.map(DATA)
        end.answer(True)
        assert asked(end) == []
        assert (end.used(), end.get(STATUS, 1)) == (3, b"\0")


def test_of_a_page_without_a_mapping_the_refusal_is_all() -> None:
    with FrontEnd(disk()) as end:
        ready(end)
        request(end)
        assert len(asked(end)) == 1
        end.answer(False)
        assert asked(end) == []
        assert (end.host.counters.access_fails, end.host.counters.faults) == (0, 1)


def test_a_driver_cannot_fill_anybodys_log() -> None:
    with FrontEnd(disk()) as end:
        ready(end)
        end.map(DATA, access=Access.READ)
        notices = 0
        for _ in range(MAX_NOTICES + 10):
            request(end)
            while sent := asked(end):
                notices += sum(kind is IotlbKind.ACCESS_FAIL for kind, *_ in sent)
                for kind, *_ in sent:
                    if kind is IotlbKind.MISS:
                        end.answer(False)
        assert notices == end.host.counters.access_fails == MAX_NOTICES
        assert end.host.counters.faults == MAX_NOTICES + 10


def test_its_form() -> None:
    said = IotlbMessage(IOVA(0x7000), PAGE, UVA(0), Access.WRITE, IotlbKind.ACCESS_FAIL)
    assert said.encode() == (0x7000).to_bytes(8, "little") + (PAGE).to_bytes(8, "little") + bytes(8) + b"\2\4" + bytes(
        6
    )


# -- who hears it


class TwoWays:
    """A page that the device may read. It does, and so has the mapping; then it is to write to it."""

    def __init__(self, machine: VhostUserMachine | QemuMachine) -> None:
        self.machine = machine
        self.driver = cast(BlkDriver, open_device(machine))
        self.page = IOVA(self.driver.ops.alloc(LENGTH).addr)
        self.gpa = machine.pages.page()
        self.map(Access.READ)
        machine.ram.write(self.gpa, OLD)

    def map(self, access: Access) -> None:
        self.machine.iommu.unmap(self.page, PAGE)
        self.machine.iommu.map(self.page, self.gpa, PAGE, access)
        self.machine.iommu.invalidate()

    def read(self) -> None:
        request = self.driver.make_device_read([(self.page, LENGTH)])
        self.driver.run(request)
        assert request.arrived() == OLD
        self.machine.iommu.faults()

    def written(self) -> bool:
        """The device is to write; whether it did."""
        self.driver.run(self.driver.make_device_write([(self.page, LENGTH)]))
        return self.machine.ram.read(self.gpa, LENGTH) != OLD


def test_our_front_end_has_it_among_its_faults() -> None:
    with VhostUserMachine(BackEnd(spawn=f"{OUR} blk {{image}} --socket-path {{socket}}", kind="blk")) as machine:
        page = TwoWays(machine)
        page.read()
        assert not page.written()
        faults: list[str] = []

        def told() -> bool:
            # The notice goes out after the request was given back.
            faults.extend(fault.reason for fault in machine.iommu.faults())
            return len(faults) > 1

        assert machine.wait(told, 5.0)
        assert faults == ["not writable", "access fail, says the back end"]
        page.map(Access.RW)
        assert page.written()


@pytest.mark.qemu
@pytest.mark.parametrize("iommu", ["intel", "virtio"])
def test_qemu_gives_more_than_was_asked_for(iommu: str) -> None:
    """What the platform's IOMMU allows is looked at for the access that was asked for; the answer allows both
    (`address_space_get_iotlb_entry()`: ``perm = IOMMU_RW``). If this fails, QEMU has learned it: then it has to say
    so in docs/serve.md, and ACCESS_FAIL comes to be of use behind it."""
    spawn = f"{OUR} blk {{image}} --socket-path {{socket}}"
    with QemuMachine("vhost-user-blk-pci,iommu_platform=on", iommu, backend=BackEnd(spawn=spawn)) as machine:
        page = TwoWays(machine)
        assert not page.written(), "it does refuse what is not allowed, as long as it is asked for that"
        page.read()
        assert page.written(), "it was told that it may"


TELLS = """
import sys
from virtiova.addr import Access
from virtiova.cli import main
from virtiova.serve.host import Host

perform = Host._perform

def tells(host, event):
    answered = perform(host, event)
    if type(event).__name__ == "IotlbUpdated" and not host.counters.access_fails:
        host._tell([(event.message.iova, Access.WRITE)])
    return answered

Host._perform = tells
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.qemu
def test_qemu_takes_it_and_goes_on(tmp_path: Path) -> None:
    """It has a line for its log, and nothing else: `vhost_backend_handle_iotlb_msg()`."""
    program = tmp_path / "tells.py"
    program.write_text(TELLS)
    spawn = f"{shlex.quote(sys.executable)} {program} serve blk {{image}} --socket-path {{socket}}"
    with QemuMachine("vhost-user-blk-pci,iommu_platform=on", backend=BackEnd(spawn=spawn)) as machine:
        page = TwoWays(machine)
        page.read()
        page.map(Access.RW)
        assert page.written()
        words = machine.words()
    assert sum("Access failure IOTLB message type not supported" in line for line in words) == 1, words
