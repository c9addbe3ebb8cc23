# SPDX-License-Identifier: Apache-2.0
"""A q35 machine as the ports want it: started, enumerated, its RAM mapped here, its IOMMU in our hands."""

from __future__ import annotations

import functools
import mmap
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from virtiova.addr import GPA
from virtiova.dma.ram import MappedRam, PageAllocator, RamBlock
from virtiova.driver.edu import EduFunction
from virtiova.errors import MachineError, NotPossibleError
from virtiova.iommu.none import NoIommu
from virtiova.iommu.vtd import VtdIommu
from virtiova.machine.qemu import command
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.command import Descriptors, DeviceSpec
from virtiova.machine.qemu.pci import EDU, QemuFunction, enumerate_bus
from virtiova.machine.qemu.process import QemuProcess, memory_file
from virtiova.ports import Iommu, Peer, Ram, Transport
from virtiova.transport.pci import open_transport
from virtiova.wire import pci

if TYPE_CHECKING:
    from virtiova.machine.qemu.monitor import Monitor

BINARY: Final = "qemu-system-x86_64"
PACKAGE: Final = "qemu-system-x86"
# A halting BIOS: cli; hlt; jmp to hlt at the reset vector. No firmware, so no second driver of the devices.
_BIOS: Final = bytes(0xFFF0) + bytes.fromhex("faf4ebfd") + bytes(12)
_TABLES: Final = (GPA(0x200000), GPA(0x800000))
_PAGES: Final = (GPA(0x800000), GPA(command.RAM_SIZE))
_VTD_BASE: Final = 0xFED90000
SECTOR: Final = 512
IMAGE_SECTORS: Final = 2048
_EXIT_SECONDS: Final = 5.0
_NO_REFUSAL: Final = (None, *range(-64, 1))
"""Ends that are no refusal: none at all, a signal, success."""
_MAX_FRAME: Final = 65536
_NOISE: Final = re.compile(r"terminating on signal")


def sector_text(number: int) -> bytes:
    """What sector ``number`` of the disk image holds: 512 bytes that name it."""
    return (b"sector %08d " % number * 32)[:SECTOR]


@functools.cache
def _image() -> bytes:
    return b"".join(sector_text(number) for number in range(IMAGE_SECTORS))


def find_qemu(name: str = BINARY) -> str:
    """The path of QEMU; `NotPossibleError` says what to install."""
    path = shutil.which(name)
    if path is None:
        raise NotPossibleError(f"{name} is not installed (Debian: apt-get install {PACKAGE})")
    return path


@functools.cache
def qemu_version(binary: str) -> str:
    """``7.2.22``, or ``unknown``."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    match = re.search(r"version (\S+)", done.stdout)
    return match.group(1) if match else "unknown"


class QemuPeer:
    """The other side of QEMU's devices: the memory behind the disk image, the far end of the network."""

    def __init__(self, image: int, net: socket.socket) -> None:
        self._image = image
        self._net = net
        self._net.setblocking(False)

    def send(self, data: bytes) -> None:
        try:
            self._net.send(data)
        except OSError as error:
            raise MachineError(f"the network of the machine is gone: {error.strerror}") from error

    def received(self) -> list[bytes]:
        frames: list[bytes] = []
        while len(frames) < 1024:
            try:
                frames.append(self._net.recv(_MAX_FRAME))
            except BlockingIOError:
                break
            except OSError as error:
                raise MachineError(f"the network of the machine is gone: {error.strerror}") from error
        return frames

    def stored(self, offset: int, length: int) -> bytes:
        return os.pread(self._image, length, offset)


class QemuMachine:
    """A running q35 machine with one device under test (`ports.Machine`). Use it as a context manager.

    ``device`` and ``iommu`` are as on the command line: ``virtio-blk-pci,iommu_platform=on``, ``intel``.
    Raises `NotPossibleError` without QEMU, `UsageError` for unknown names, `RefusedError` where QEMU will not
    have the device. ``prefer`` is ``auto``, ``modern`` or ``legacy``: which interface of a transitional device.
    """

    name = "q35"
    insists: bool | None = True
    # Evidence: QEMU, hw/virtio/virtio.c, virtio_validate_features(): -EFAULT when bit 33 is offered and not taken.

    def __init__(self, device: str, iommu: str = "intel", *, prefer: str = "auto", binary: str | None = None) -> None:
        self._spec = DeviceSpec.parse(device)
        self._iommu_spec = command.parse_iommu(iommu)
        self._binary = binary or find_qemu()
        self.device = self._spec.spec.name
        self._cleanup: list[Callable[[], object]] = []
        self._monitor: Monitor | None = None
        try:
            self._start()
            self._wire(prefer)
        except BaseException:
            self.close()
            raise

    @property
    def product(self) -> str:
        """QEMU and its version, asked for once per binary."""
        return f"QEMU {qemu_version(self._binary)}"

    # -- starting ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ram = self._memory("virtiova-ram", command.RAM_SIZE)
        bios = self._memory("virtiova-bios", len(_BIOS))
        os.pwrite(bios, _BIOS, 0)
        image = self._memory("virtiova-image", IMAGE_SECTORS * SECTOR)
        if self._spec.kind == "blk":
            os.pwrite(image, _image(), 0)
        qtest, qtest_qemu = self._pair(socket.SOCK_STREAM)
        self._qmp, qmp_qemu = self._pair(socket.SOCK_STREAM)
        net, net_qemu = self._pair(socket.SOCK_DGRAM)
        fds = Descriptors(bios, ram, qtest_qemu.fileno(), qmp_qemu.fileno(), image, net_qemu.fileno())
        argv = command.command_line(self._binary, self._spec, self._iommu_spec, fds)
        self._process = QemuProcess(argv, fds.all())
        self._cleanup.append(self._process.close)
        for ours_no_more in (qtest_qemu, qmp_qemu, net_qemu):
            ours_no_more.close()
        self._bus = QtestBus(qtest, self._gone)
        self.peer: Peer = QemuPeer(image, net)
        self._map(ram)
        try:
            self._bus.ping()
        except MachineError as error:
            if isinstance(error.__cause__, TimeoutError) or self._process.exit_code(_EXIT_SECONDS) in _NO_REFUSAL:
                raise
            raise command.refusal(self._binary, self._spec, self._process.stderr()) from error

    def _memory(self, name: str, size: int) -> int:
        fd = memory_file(name, size)
        self._cleanup.append(functools.partial(os.close, fd))
        return fd

    def _pair(self, kind: int) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self._cleanup += [ours.close, theirs.close]
        return ours, theirs

    def _map(self, ram: int) -> None:
        buffer = mmap.mmap(ram, command.RAM_SIZE)
        self._cleanup.append(buffer.close)
        # Below 1 MiB lie holes (VGA, BIOS); nothing of ours goes there.
        start = 0x100000
        mapped = MappedRam(buffer, [RamBlock(GPA(start), command.RAM_SIZE - start, start)])
        self._cleanup.append(mapped.close)
        self.ram: Ram = mapped
        self.pages = PageAllocator(mapped, *_PAGES)

    def _wire(self, prefer: str) -> None:
        """Enumerate PCI, find the device under test, and take the IOMMU in hand."""
        functions = enumerate_bus(self._bus)
        self.transport: Transport | None = None
        self.edu: EduFunction | None = None
        function = self._under_test(functions)
        if self._spec.kind == command.CONTROL_DEVICE:
            self.edu = EduFunction(function)
        else:
            self.transport = open_transport(function, prefer)
        if self._iommu_spec.name == "intel":
            tables = PageAllocator(self.ram, *_TABLES)
            queued = self._iommu_spec.options.get(command.INVALIDATION) == "queue"
            self.iommu: Iommu = VtdIommu(self._bus, self.ram, tables, function.source, _VTD_BASE, queued=queued)
        else:
            self.iommu = NoIommu()

    def _under_test(self, functions: Sequence[QemuFunction]) -> QemuFunction:
        for function in functions:
            if self._spec.kind == command.CONTROL_DEVICE:
                if (function.vendor, function.device) == EDU:
                    return function
            elif function.vendor == pci.VENDOR_VIRTIO:
                return function
        raise MachineError(f"no {self._spec.spec.name} on the PCI buses of the machine", self._process.stderr())

    # -- ports.Machine -------------------------------------------------------------------------------------------

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Poll memory; a verb in between keeps QEMU's main loop turning, a nap leaves it the processor."""
        deadline = time.monotonic() + seconds
        turns = 0
        while not done():
            if time.monotonic() > deadline:
                return done()
            self._bus.ping()
            turns += 1
            if turns > 50:
                time.sleep(0.0002)
        return True

    def words(self) -> list[str]:
        lines = self._process.stderr().splitlines()
        return [line[:300] for line in lines if line.strip() and not _NOISE.search(line)][:50]

    def close(self) -> None:
        """Kill QEMU and let go of everything, in reverse order. Nothing has a name, so nothing stays."""
        while self._cleanup:
            self._cleanup.pop()()

    def __enter__(self) -> QemuMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- beside the ports ----------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    @property
    def bus(self) -> QtestBus:
        """The buses of the machine, for whoever wants to drive it by hand."""
        return self._bus

    @property
    def declared(self) -> bool:
        """Was the device asked to offer bit 33?"""
        return self._spec.declared

    def qmp(self, name: str, **arguments: object) -> object:
        """One QMP command on the monitor beside qtest: QEMU's own view, a witness apart from ours."""
        if self._monitor is None:
            # Imported late: asyncio is nothing that a cell needs.
            from virtiova.machine.qemu.monitor import Monitor

            self._monitor = Monitor(self._qmp, self._gone)
            self._cleanup.append(self._monitor.close)
        return self._monitor.execute(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    def _gone(self, message: str) -> MachineError:
        code = self._process.exit_code(0.5)
        how = "it is still running" if code is None else f"exit status {code}"
        stderr = self._process.stderr().strip()
        tail = f": {stderr.splitlines()[-1][:200]}" if stderr else ""
        return MachineError(f"{message} ({how}){tail}", stderr)
