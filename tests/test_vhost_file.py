# SPDX-License-Identifier: Apache-2.0
"""A file of the kernel's vhost interface, without a kernel that has one: what is missing, and what nobody can ask."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtiova.addr import IOVA, PAGE_MASK, UVA, Access
from virtiova.errors import MachineError, NotPossibleError, ProtocolError, UsageError
from virtiova.machine.vhost.device import CallError, VhostFile
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.wire import vhost
from virtiova.wire.vhost import BackendFeature
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

MISS = IotlbMessage(IOVA(0x5000), 0, UVA(0), Access.READ, IotlbKind.MISS)


def test_what_is_missing_and_what_brings_it() -> None:
    with pytest.raises(NotPossibleError, match=r"(?s)no such device.*modprobe vhost_nonsense"):
        VhostFile("/dev/vhost-nonsense", "modprobe vhost_nonsense")


def test_what_is_no_device(tmp_path: Path) -> None:
    file = tmp_path / "vhost-net"
    file.write_bytes(b"")
    for path in (file, tmp_path, file / "below"):
        with pytest.raises(UsageError, match="no device of the kernel"):
            VhostFile(str(path), "modprobe vhost_net")


def test_a_device_of_another_kind_says_no_to_everything() -> None:
    with VhostFile("/dev/null", "") as file:
        with pytest.raises(CallError, match="GET_FEATURES: Inappropriate ioctl") as refused:
            file.features()
        assert refused.value.errno == 25
        assert file.backend_features() == BackendFeature(0)
        assert file.asked() is None
    file.close()
    assert file.fd == -1


@pytest.fixture
def kernel() -> Iterator[tuple[VhostFile, socket.socket]]:
    """A file whose messages come from us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with VhostFile("/dev/null", "") as file, theirs:
        os.close(file.fd)
        ours.setblocking(False)
        file.fd = ours.detach()
        yield file, theirs


def test_misses_are_read_one_by_one(kernel: tuple[VhostFile, socket.socket]) -> None:
    file, theirs = kernel
    assert file.asked() is None
    for v2 in (False, True):
        theirs.send(vhost.encode_iotlb(MISS, v2=v2))
    assert [file.asked(), file.asked(), file.asked()] == [MISS, MISS, None]


@pytest.mark.parametrize(
    "data",
    [
        b"\1" * 72,
        bytes(72),
        vhost.encode_iotlb(MISS, v2=True)[:40],
        *(
            vhost.encode_iotlb(IotlbMessage(IOVA(0), 1, UVA(0), Access.RW, kind), v2=True)
            for kind in (IotlbKind.UPDATE, IotlbKind.INVALIDATE, IotlbKind.ACCESS_FAIL)
        ),
    ],
)
def test_what_nobody_can_ask_for(kernel: tuple[VhostFile, socket.socket], data: bytes) -> None:
    file, theirs = kernel
    theirs.send(data)
    with pytest.raises(ProtocolError):
        file.asked()


def test_a_message_goes_out_in_the_form_that_was_agreed_on(kernel: tuple[VhostFile, socket.socket]) -> None:
    file, theirs = kernel
    update = IotlbMessage(IOVA(0x5000), 0x1000, UVA(0x7F0000000000), Access.RW, IotlbKind.UPDATE)
    file.tell(update)
    file.v2 = True
    file.tell(update)
    assert [theirs.recv(100)[0], theirs.recv(100)[0]] == [1, 2]
    theirs.close()
    with pytest.raises(MachineError, match="IOTLB UPDATE: Broken pipe"):
        file.tell(update)


def test_no_two_addresses_of_a_byte_are_alike() -> None:
    memory = OwnMemory()
    try:
        for region in memory.regions:
            assert len({region.gpa, region.uva, region.offset}) == 3
            assert not region.uva & PAGE_MASK
            memory.ram.write(region.gpa, b"virtiova")
            # What is at our own address is what the guest sees.
            with open("/proc/self/mem", "rb", buffering=0) as maps:
                assert os.pread(maps.fileno(), 8, region.uva) == b"virtiova"
            assert memory.part_of_file(region.offset, 8) == b"virtiova"
        first, second, third = memory.table
        assert second[0] + second[1] == third[0]
        assert second[2] + second[1] != third[2]
        assert first[2] != second[2]
    finally:
        memory.close()
    memory.close()
