# SPDX-License-Identifier: Apache-2.0
"""A file of the kernel's vhost interface, without a kernel that has one: what is missing, and what nobody can ask."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from virtiova.addr import IOVA, PAGE_MASK, UVA, Access
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.driver.vsock import Header, Op
from virtiova.errors import MachineError, NotPossibleError, ProtocolError, UsageError
from virtiova.machine.vhost.device import CallError, VhostFile
from virtiova.machine.vhost.frontend import MAX_MISSES, KernelFrontEnd
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.machine.vhost_user.iotlb import IotlbServer
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


# -- the front end, without a kernel -----------------------------------------------------------------------------


class _Told:
    """A kernel's end, as far as IOTLB messages go: it has asked for some, and keeps what it is told."""

    path = "/dev/vhost-none"

    def __init__(self, misses: Iterable[IotlbMessage]) -> None:
        self.misses = iter(misses)
        self.told: list[IotlbMessage] = []
        self.features = 1 << 33
        self.refuses = False
        self.closed = 0

    def own(self) -> None: ...

    def backend_features(self) -> BackendFeature:
        return BackendFeature.IOTLB_MSG_V2

    def set_backend_features(self, bits: BackendFeature) -> None:
        assert bits == BackendFeature.IOTLB_MSG_V2

    def set_features(self, word: int) -> None:
        if self.refuses:
            raise CallError(f"{self.path}: SET_FEATURES 0x{word:x}: Operation not supported", 95)

    def asked(self) -> IotlbMessage | None:
        return next(self.misses, None)

    def tell(self, message: IotlbMessage) -> None:
        self.told.append(message)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def memory() -> Iterator[OwnMemory]:
    """Ours."""
    memory = OwnMemory()
    yield memory
    memory.close()


def front_end(kernel: _Told, memory: OwnMemory) -> tuple[KernelFrontEnd, IotlbServer]:
    iotlb = IotlbServer(memory.ram)
    iotlb.enable()
    front = KernelFrontEnd(lambda: kernel, iotlb, memory)  # type: ignore[arg-type,return-value]
    assert front.set_features(1 << 33) == ""
    return front, iotlb


def test_misses_are_answered_by_the_tables(memory: OwnMemory) -> None:
    gpa = memory.pages.page()
    x = IOVA(1 << 40)
    wanted = [(x + 7, Access.READ), (x, Access.WRITE), (x + 0x1000, Access.READ)]
    kernel = _Told(IotlbMessage(IOVA(iova), 0, UVA(0), access, IotlbKind.MISS) for iova, access in wanted)
    front, iotlb = front_end(kernel, memory)
    iotlb.map(x, gpa, 0x1000, Access.READ)
    assert front.serve() == 1
    assert kernel.told == [IotlbMessage(x, 0x1000, memory.uva(gpa), Access.READ, IotlbKind.UPDATE)]
    assert [(fault.address, fault.reason) for fault in iotlb.faults()] == [
        (x, "not writable"),
        (x + 0x1000, "not mapped"),
    ]
    iotlb.unmap(x, 0x1000)
    iotlb.invalidate()
    assert kernel.told[1:] == [IotlbMessage(x, 0x1000, UVA(0), Access.NONE, IotlbKind.INVALIDATE)]
    assert front.words() == ["SET_FEATURES 0x200000000, 3 MISS, 1 UPDATE, 1 INVALIDATE, 2 without a mapping"]


def test_one_that_never_stops_asking_comes_to_an_end(memory: OwnMemory) -> None:
    front, iotlb = front_end(_Told(itertools.repeat(MISS)), memory)
    front.misses = MAX_MISSES - 1000
    while front.misses + 256 <= MAX_MISSES:
        assert front.serve() == 0
    with pytest.raises(MachineError, match=f"more than {MAX_MISSES} times"):
        front.serve()
    assert len(iotlb.faults()) <= 256


def test_features_that_are_refused_are_an_answer(memory: OwnMemory) -> None:
    kernel = _Told([])
    front, _ = front_end(kernel, memory)
    front.renew()
    assert not front.translating
    kernel.refuses = True
    assert "Operation not supported" in front.set_features(1 << 34)
    assert front.accepted == 0
    # Nobody is told of an IOTLB that there is none of.
    front.invalidate(0, 0x1000)
    assert kernel.told == []
    assert kernel.closed == 1


# -- the machine, as far as it comes without one -------------------------------------------------------------------


def test_the_module_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, module in (("vhost-net", "vhost_net"), ("vhost-vsock", "vhost_vsock")):
        assert main(["probe", "vhost", str(tmp_path / name)]) == exits.NOT_POSSIBLE
        said = capsys.readouterr()
        assert said.out == ""
        assert f"{name}: there is no such device. This makes it:\n    modprobe {module}\n" in said.err


@pytest.mark.parametrize("path", ["/dev/vhost-nett", "/dev/vhost-scsi", "", "/", "vhost-user"])
def test_what_is_no_device_of_these(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "vhost", path]) == exits.USAGE
    assert "unknown vhost device" in capsys.readouterr().err


def test_a_device_that_knows_no_vhost_is_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vhost-net").symlink_to("/dev/null")
    before = os.listdir("/proc/self/fd")
    assert main(["probe", "vhost", str(tmp_path / "vhost-net")]) == exits.COULD_NOT_LOOK
    assert "SET_OWNER: Inappropriate ioctl for device" in capsys.readouterr().err
    assert os.listdir("/proc/self/fd") == before


def test_the_script_says_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["probe", "vhost", str(tmp_path / "vhost-net"), "--experiment", "ring", "--script"]) == exits.OK
    assert f"vhost('{tmp_path}/vhost-net', experiments=['ring'])" in capsys.readouterr().out


# -- packets -------------------------------------------------------------------------------------------------------


def test_a_header_of_a_packet() -> None:
    header = Header(5, 2, 4033, 1024, 468, 1, Op.RW, 0, 1 << 20, 7)
    data = header.encode()
    assert data == struct.pack("<QQIIIHHIII", 5, 2, 4033, 1024, 468, 1, 5, 0, 1 << 20, 7)
    assert len(data) == 44
    assert Header.decode(data + b"payload") == header
    with pytest.raises(ProtocolError, match="43 bytes"):
        Header.decode(data[:43])
