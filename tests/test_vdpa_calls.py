# SPDX-License-Identifier: Apache-2.0
"""A vDPA device's answers without a kernel: those that make no sense, calls that are refused, locked memory."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest

from virtiova.addr import GPA, IOVA
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.errors import MachineError
from virtiova.machine.vdpa import bus
from virtiova.machine.vdpa.device import VdpaFile
from virtiova.machine.vdpa.iommu import VdpaIommu
from virtiova.machine.vdpa.machine import VdpaDevice
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.wire import vhost

ON = 1 << 33 | 1 << 32
Answers = dict[int, bytes | int]
"""By ioctl what it answers, or the error."""


class Kernel:
    """Answers the calls on ``/dev/null``."""

    def __init__(self) -> None:
        self.answers: Answers = {
            vhost.VDPA_GET_DEVICE_ID: (2).to_bytes(4, "little"),
            vhost.SET_OWNER: b"",
            vhost.GET_BACKEND_FEATURES: bytes(8),
            vhost.VDPA_GET_IOVA_RANGE: bytes(8) + (2**64 - 1).to_bytes(8, "little"),
            vhost.VDPA_GET_VQS_COUNT: (1).to_bytes(4, "little"),
            vhost.VDPA_GET_VRING_NUM: (256).to_bytes(2, "little"),
            vhost.GET_FEATURES: ON.to_bytes(8, "little"),
            vhost.VDPA_SET_STATUS: b"",
            vhost.VDPA_GET_STATUS: b"\0",
            vhost.VDPA_SET_CONFIG_CALL: b"",
            vhost.VDPA_GET_CONFIG_SIZE: (96).to_bytes(4, "little"),
        }
        self.asked: list[int] = []

    def ioctl(self, fd: int, request: int, argument: object = 0) -> int:
        self.asked.append(request)
        answer = self.answers.get(request, errno.ENOTTY)
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))
        if isinstance(argument, bytearray):
            argument[: len(answer)] = answer
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    monkeypatch.setattr(bus, "maker", lambda _: "vduse")
    before = sorted(os.listdir("/proc/self/fd"))
    yield made
    assert sorted(os.listdir("/proc/self/fd")) == before


def probed(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["probe", "vdpa", "/dev/null", "--experiment", "ring"])
    return code, capsys.readouterr().err


def span(first: int, last: int) -> bytes:
    return first.to_bytes(8, "little") + last.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("request_", "answer", "code", "words"),
    [
        (vhost.VDPA_GET_VQS_COUNT, bytes(4), exits.COULD_NOT_LOOK, "it has 0 queues; 1 to 1024 make sense"),
        (vhost.VDPA_GET_VQS_COUNT, b"\xff" * 4, exits.COULD_NOT_LOOK, "it has 4294967295 queues"),
        (vhost.VDPA_GET_VRING_NUM, bytes(2), exits.COULD_NOT_LOOK, "its rings have no entries"),
        (vhost.VDPA_GET_IOVA_RANGE, span(2, 1), exits.COULD_NOT_LOOK, "the IOVA range begins at 0x2 and ends at 0x1"),
        (vhost.VDPA_GET_IOVA_RANGE, span(0, 4095), exits.NOT_POSSIBLE, "takes IOVAs from 0x0 to 0xfff only"),
        (vhost.VDPA_GET_IOVA_RANGE, span(1 << 40, 1 << 50), exits.NOT_POSSIBLE, "from 0x10000000000 to"),
        (vhost.GET_FEATURES, (1 << 32).to_bytes(8, "little"), exits.USAGE, "does not offer bit 33"),
        (vhost.VDPA_GET_DEVICE_ID, b"\xff" * 4, exits.USAGE, "virtio device type 4294967295; there are drivers"),
        (vhost.VDPA_GET_DEVICE_ID, errno.ENOTTY, exits.USAGE, "/dev/null is no vDPA device"),
        (vhost.SET_OWNER, errno.EBUSY, exits.COULD_NOT_LOOK, "SET_OWNER: Device or resource busy"),
        (vhost.SET_OWNER, errno.EPERM, exits.COULD_NOT_LOOK, "SET_OWNER: Operation not permitted"),
        (vhost.VDPA_GET_VRING_NUM, errno.EINTR, exits.COULD_NOT_LOOK, "GET_VRING_NUM: Interrupted"),
        (vhost.VDPA_GET_IOVA_RANGE, errno.EIO, exits.COULD_NOT_LOOK, "its program has ended, or hangs"),
    ],
)
def test_answers_that_make_no_sense(
    kernel: Kernel, capsys: pytest.CaptureFixture[str], request_: int, answer: bytes | int, code: int, words: str
) -> None:
    kernel.answers[request_] = answer
    ended, said = probed(capsys)
    assert words in said
    assert ended == code
    assert "Traceback" not in said


@pytest.mark.parametrize(("told", "largest"), [(1, 1), (3, 2), (300, 256), (65535, 1024)])
def test_rings_are_powers_of_two_and_bounded(kernel: Kernel, told: int, largest: int) -> None:
    kernel.answers[vhost.VDPA_GET_VRING_NUM] = told.to_bytes(2, "little")
    with VdpaFile("/dev/null", "") as file:
        assert file.largest == largest


def test_kernels_that_do_not_know_a_question(kernel: Kernel) -> None:
    for request in (vhost.VDPA_GET_VQS_COUNT, vhost.GET_BACKEND_FEATURES, vhost.VDPA_GET_CONFIG_SIZE):
        kernel.answers[request] = errno.ENOTTY
    with VdpaFile("/dev/null", "") as file:
        assert (file.queues, file.v2, file.batches, file.config_size()) == (1, False, False, 4096)


def test_locked_memory_that_is_used_up(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    memory = OwnMemory()
    try:
        with VdpaFile("/dev/null", "") as file:
            tables = VdpaIommu(file, memory)
            monkeypatch.setattr(os, "write", full)
            with pytest.raises(
                MachineError, match=r"(?s)cannot be mapped: .*IOTLB UPDATE: Cannot allocate.*\n    ulimit -l"
            ):
                tables.map(IOVA(1 << 36), GPA(memory.regions[0].gpa), 4096)
            assert tables._mapped == set()
    finally:
        memory.close()


def test_hardware_is_not_asked_to_go_without_the_bit(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.answers[vhost.SET_FEATURES] = b""
    for maker, asked in (("mlx5_core", False), ("vduse", True)):
        monkeypatch.setattr(bus, "maker", lambda _, who=maker: who)
        kernel.asked.clear()
        with VdpaDevice("/dev/null").open() as machine:
            if asked:
                machine.registers.write_features(1 << 32)
            else:
                with pytest.raises(MachineError, match="is hardware: without bit 33"):
                    machine.registers.write_features(1 << 32)
                assert vhost.SET_FEATURES not in kernel.asked
                machine.registers.write_features(ON)
        assert vhost.SET_FEATURES in kernel.asked
