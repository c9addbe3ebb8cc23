# SPDX-License-Identifier: Apache-2.0
"""A QEMU machine as the ports want it: started, enumerated, its RAM reached, its IOMMU in our hands."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from virtiova.addr import GPA
from virtiova.dma.ram import MappedRam, PageAllocator, RamBlock, VerbRam
from virtiova.driver.edu import EduFunction
from virtiova.driver.rtl8139 import Rtl8139Function
from virtiova.errors import MachineError, UsageError
from virtiova.features import DeviceId
from virtiova.iommu.aside import AsideIommu
from virtiova.machine.backend import PATH, BackEnd, Spawned
from virtiova.machine.image import IMAGE_SECTORS, SECTOR, disk_image
from virtiova.machine.qemu import command
from virtiova.machine.qemu.board import Board, Parts
from virtiova.machine.qemu.boards import Q35, find_board
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.command import AROUND_BUS, Descriptors, DeviceSpec, Where, parse_devices
from virtiova.machine.qemu.end import DeviceEnd
from virtiova.machine.qemu.gdb import GdbStub
from virtiova.machine.qemu.installation import Installation, qemu_version
from virtiova.machine.qemu.pci import CONTROLS, QemuFunction, enumerate_bus
from virtiova.machine.qemu.process import QemuProcess, memory_file
from virtiova.ports import Iommu, Peer, Ram
from virtiova.transport.mmio import open_slot
from virtiova.transport.pci import open_transport
from virtiova.wire import pci

if TYPE_CHECKING:
    from virtiova.machine.qemu.monitor import Monitor

# A halting BIOS: cli; hlt; jmp to hlt at the reset vector. No firmware, so no second driver of the devices.
_BIOS: Final = bytes(0xFFF0) + bytes.fromhex("faf4ebfd") + bytes(12)
_EXIT_SECONDS: Final = 5.0
_NO_REFUSAL: Final = (None, *range(-64, 1))
"""Ends that are no refusal: none at all, a signal, success."""
_MAX_FRAME: Final = 65536
_MAX_PICTURE: Final = 1 << 24
_SCREEN: Final = "/dev/fdset/2"
_answered: Final[set[str]] = set()
"""Binaries that this process has had an answer from."""
_mute: Final[set[str]] = set()
"""Those that were waited for in vain, and have never answered: to wait again in every cell would take hours."""
_NOISE: Final = re.compile(r"terminating on signal")
_GAVE_UP: Final = re.compile(r"vhost-user-[a-z]+: vhost start failed: [ -~]{1,200}")


def find_qemu(board: Board = Q35, qemu: str = "") -> str:
    """The path of a board's QEMU; `NotPossibleError` says what to install."""
    return Installation(qemu).binary(board)


class QemuPeer:
    """The other side of QEMU's devices: the memory behind the disk image, the far end of the network."""

    reach: Literal["own", "echo", "none"] = "own"

    def __init__(self, image: int, net: socket.socket, screen: int, dump: Callable[[], object]) -> None:
        self.kept: dict[int, bytes] = {}
        self._image = image
        self._net = net
        self._net.setblocking(False)
        self._screen = screen
        self._dump = dump

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

    def shown(self) -> bytes:
        # QEMU writes where the descriptor that it shares with us stands.
        os.ftruncate(self._screen, 0)
        os.lseek(self._screen, 0, os.SEEK_SET)
        self._dump()
        path = f"/proc/self/fd/{self._screen}"
        with open(path, "rb") as file:
            return file.read(_MAX_PICTURE)


class QemuMachine:
    """A running QEMU machine (`ports.Machine` of its first device). Use it as a context manager.

    ``device`` and ``iommu`` are as on the command line: ``virtio-blk-pci,iommu_platform=on``, ``intel``
    (None: the machine's own). Several devices are a list of such texts; `ends` has a port for each of them.
    Raises `NotPossibleError` without QEMU, `UsageError` for unknown names, `RefusedError` where QEMU will not
    have the device. ``prefer`` is ``auto``, ``modern`` or ``legacy``: which interface of a transitional device.
    ``qemu`` is the directory of a QEMU installation other than the machine's own. ``backend`` starts the other half
    of a ``vhost-user-*-pci`` device.
    """

    insists: bool | None = True
    # Evidence: QEMU, hw/virtio/virtio.c, virtio_validate_features(): -EFAULT when bit 33 is offered and not taken.

    def __init__(
        self,
        device: str | DeviceSpec | Sequence[str],
        iommu: str | None = None,
        *,
        machine: str = "q35",
        prefer: str = "auto",
        binary: str | None = None,
        qemu: str = "",
        backend: BackEnd | None = None,
    ) -> None:
        self.board = find_board(machine)
        self.name = self.board.name
        self._iommu_spec = self.board.iommu(self.board.natural if iommu is None else iommu)
        self._specs = (
            [device]
            if isinstance(device, DeviceSpec)
            else parse_devices([device] if isinstance(device, str) else device, self.board, self._iommu_spec, prefer)
        )
        self.pass_through = self.board.iommus[self._iommu_spec.name].told(self._iommu_spec).on("pt")
        one = self._specs[0]
        if one.has_back_end != (backend is not None):
            raise UsageError(f"{one.spec}: a back end is for vhost-user devices, and they cannot be without")
        if backend is not None:
            backend.words((PATH,))
        self._backend = backend
        self._spawned: Spawned | None = None
        self._installation = Installation(qemu)
        self._binary = binary or self._installation.binary(self.board)
        self.device = self._specs[0].spec.name
        self.ends: list[DeviceEnd] = []
        """The devices, in the order in which they were named."""
        self._cleanup = contextlib.ExitStack()
        self._monitor: Monitor | None = None
        try:
            self._start()
            self._wire()
        except BaseException:
            self.close()
            raise

    @property
    def product(self) -> str:
        """QEMU and its version, asked for once per binary."""
        return f"QEMU {qemu_version(self._binary)}"

    # -- starting ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ram = self._memory("virtiova-ram", self.board.ram_size)
        bios = self._memory("virtiova-bios", len(_BIOS))
        os.pwrite(bios, _BIOS, 0)
        qtest, qtest_qemu = self._pair(socket.SOCK_STREAM)
        self._qmp, qmp_qemu = self._pair(socket.SOCK_STREAM)
        screen = self._written_only(self._memory("virtiova-screen", 0))
        self._peers: list[QemuPeer] = []
        backs = [self._behind(spec, screen) for spec in self._specs]
        own = tuple((image, net.fileno()) for image, net in backs)
        fds = Descriptors(bios, ram, qtest_qemu.fileno(), qmp_qemu.fileno(), own, screen)
        handed_over = [qtest_qemu, qmp_qemu, *(net for _, net in backs)]
        if self._backend is not None:
            # A device with a back end is alone.
            self._spawned = Spawned(self._backend, *own[0])
            self._cleanup.callback(self._spawned.close)
            fds = replace(fds, back_end=self._spawned.path)
            self._peers[0].reach = "own" if self._backend.owns(self._specs[0].kind) else "none"
        self._stub: GdbStub | None = None
        if self.board.debug_stub:
            stub, stub_qemu = self._pair(socket.SOCK_STREAM)
            handed_over.append(stub_qemu)
            fds = replace(fds, gdb=stub_qemu.fileno())
            self._stub = GdbStub(stub, self._gone)
        argv = command.command_line(self._binary, self._specs, fds)
        argv[1:1] = self._installation.arguments
        if self._binary in _mute:
            raise MachineError(f"{self._binary} did not answer when it was started before; it is not asked again")
        self._process = QemuProcess(argv, fds.all(), self._installation.environment)
        self._cleanup.callback(self._process.close)
        for ours_no_more in handed_over:
            ours_no_more.close()
        self._bus = QtestBus(qtest, self._gone)
        self._map(ram)
        try:
            self._bus.ping()
            _answered.add(self._binary)
        except MachineError as error:
            if isinstance(error.__cause__, TimeoutError) and self._binary not in _answered:
                _mute.add(self._binary)
            if isinstance(error.__cause__, TimeoutError) or self._process.exit_code(_EXIT_SECONDS) in _NO_REFUSAL:
                raise
            raise command.refusal(self._binary, self._specs, self._process.stderr()) from error

    def _behind(self, spec: DeviceSpec, screen: int) -> tuple[int, socket.socket]:
        """What a device has behind it: a disk image, or memory of its own, and QEMU's end of a network."""
        size = IMAGE_SECTORS * SECTOR if spec.memory is None else spec.memory[1]
        image = self._memory("virtiova-image", size)
        if spec.kind == "blk":
            os.pwrite(image, disk_image(IMAGE_SECTORS), 0)
        net, net_qemu = self._pair(socket.SOCK_DGRAM)
        self._peers.append(QemuPeer(image, net, screen, lambda: self.qmp("screendump", filename=_SCREEN)))
        return image, net_qemu

    def _memory(self, name: str, size: int) -> int:
        fd = memory_file(name, size)
        self._cleanup.callback(os.close, fd)
        return fd

    def _written_only(self, fd: int) -> int:
        """The same file for writing only: what QEMU wants of a descriptor that it is to put a picture into."""
        again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        self._cleanup.callback(os.close, again)
        return again

    def _pair(self, kind: int) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self._cleanup.callback(ours.close)
        self._cleanup.callback(theirs.close)
        return ours, theirs

    def _map(self, ram: int) -> None:
        board = self.board
        # Below the usable address lie holes and other people's tables; nothing of ours goes there.
        offset = board.usable - board.ram_base
        blocks = [RamBlock(GPA(board.usable), board.ram_size - offset, offset)]
        own = self._specs[0].memory
        if own is not None:
            # Memory that comes with a device lies in no file of ours from the start: verbs reach both.
            blocks.append(RamBlock(*own, 0))
        if board.ram_is_mapped and own is None:
            buffer = mmap.mmap(ram, board.ram_size)
            self._cleanup.callback(buffer.close)
            mapped = MappedRam(buffer, blocks)
            self._cleanup.callback(mapped.close)
            self.ram: Ram = mapped
        else:
            self.ram = VerbRam(self._bus.read_bytes, self._write_ram, blocks)
        self.pages = PageAllocator(self.ram, *board.pages)

    def _write_ram(self, address: int, data: bytes) -> None:
        self._bus.write_bytes(address, data)
        self._bus.flush()

    def _wire(self) -> None:
        """Find the devices under test, and take the IOMMU in hand."""
        functions: list[QemuFunction] = []
        sources: list[int | None] = [None]
        if self.board.slots is not None:
            end = DeviceEnd(self, self._specs[0], self._peers[0], bridged=False)
            end.transport = open_slot(self._bus, self.board.slots, self.board.byte_order)
            self.ends.append(end)
        else:
            roots = (0, AROUND_BUS) if any(spec.goes_around for spec in self._specs) else (0,)
            functions = enumerate_bus(self.board.host(self._bus), self._bus, roots)
            under_test = [self._function(spec, functions) for spec in self._specs]
            sources = [function.source for function in under_test]
            self.ends += map(self._end, self._specs, self._peers, under_test)
        tables = PageAllocator(self.ram, *self.board.tables)
        around = self._specs[0].goes_around
        parts = Parts(self._bus, self.ram, tables, functions, sources[0], self._iommu_spec, self._stub, around)
        first = self.board.iommus[self._iommu_spec.name].build(parts)
        for end, source in zip(self.ends, sources, strict=True):
            iommu = first
            if source is not None and source != sources[0]:
                iommu = first.beside(source, around=end.spec.goes_around)
            end.iommu = AsideIommu(iommu, present=True) if end.spec.goes_around and iommu.in_front else iommu
        one = self.ends[0]
        self.transport, self.control = one.transport, one.control
        self.bridged, self.vhost, self.hardware = one.bridged, one.vhost, one.hardware
        self.iommu: Iommu = one.iommu
        self.peer: Peer = one.peer

    def _end(self, spec: DeviceSpec, peer: Peer, function: QemuFunction) -> DeviceEnd:
        """Open a PCI function as a device under test."""
        end = DeviceEnd(self, spec, peer, bridged=function.source >> 8 != 0)
        if spec.is_control:
            is_edu = spec.kind == "edu"
            end.control = EduFunction(function, self.board.byte_order) if is_edu else Rtl8139Function(function)
        else:
            end.transport = open_transport(function, spec.interface, self.board.byte_order)
        return end

    def _function(self, spec: DeviceSpec, functions: Sequence[QemuFunction]) -> QemuFunction:
        """A device under test among all functions: by its place, as far as that is ours to say, and by what it is."""
        for function in functions:
            if spec.slot is not None and not _is_at(function, spec, functions):
                continue
            if spec.is_control:
                if (function.vendor, function.device) == CONTROLS[spec.kind]:
                    return function
            elif function.vendor == pci.VENDOR_VIRTIO and function.virtio_type != DeviceId.IOMMU:
                return function
        raise MachineError(f"no {spec.spec.name} on the PCI buses of the machine", self._process.stderr())

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

    @property
    def gave_up(self) -> str:
        """QEMU 10.0 lets go of a back end whose rings it cannot start, and says so. One that has ended by itself is no
        device that could not reach something."""
        if self._spawned is None or not self._spawned.alive:
            return ""
        match = _GAVE_UP.search(self._process.stderr())
        return match.group() if match else ""

    def words(self) -> list[str]:
        lines = self._process.stderr().splitlines()
        said = [] if self._spawned is None else self._spawned.words()
        own = [line[:300] for line in lines if line.strip() and not _NOISE.search(line)][:50]
        return own + [f"back end: {line}" for line in said]

    def close(self) -> None:
        """Kill QEMU and let go of everything, in reverse order. Nothing has a name, so nothing stays."""
        # One step that fails, or is interrupted, does not cost the others.
        self._cleanup.close()

    def __enter__(self) -> QemuMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- beside the ports ----------------------------------------------------------------------------------------

    @property
    def edu(self) -> EduFunction | None:
        """The edu device, on a machine that was made for it."""
        return self.control if isinstance(self.control, EduFunction) else None

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
        return self._specs[0].declared

    def qmp(self, name: str, **arguments: object) -> object:
        """One QMP command on the monitor beside qtest: QEMU's own view, a witness apart from ours."""
        if self._monitor is None:
            # Imported late: asyncio is nothing that a cell needs.
            from virtiova.machine.qemu.monitor import Monitor

            self._monitor = Monitor(self._qmp, self._gone)
            self._cleanup.callback(self._monitor.close)
        return self._monitor.execute(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    def _gone(self, message: str) -> MachineError:
        code = self._process.exit_code(0.5)
        how = "it is still running" if code is None else f"exit status {code}"
        stderr = self._process.stderr().strip()
        tail = f": {stderr.splitlines()[-1][:200]}" if stderr else ""
        return MachineError(f"{message} ({how}){tail}", stderr)


def _is_at(function: QemuFunction, spec: DeviceSpec, functions: Sequence[QemuFunction]) -> bool:
    """Is it function 0 of the slot that the device was given?"""
    bus = function.source >> 8
    if function.source & 0xFF != (spec.slot or 0) << 3:
        return False
    if spec.behind_root_port:
        return any(each.source == spec.root_port and each.secondary == bus for each in functions)
    # The board's own bus may be behind a bridge of the machine's, as with sabre.
    return bus == 0 or spec.where is Where.BOARD
