# SPDX-License-Identifier: Apache-2.0
"""From what a user names (a device, an IOMMU) to QEMU's command line, and what QEMU's refusal means."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Final

from virtiova.addr import GPA
from virtiova.errors import MachineError, NotPossibleError, RefusedError, UsageError
from virtiova.machine.qemu.boards import Board
from virtiova.machine.qemu.options import OptionSpec, is_on
from virtiova.transport.pci import INTERFACES

_ROOT_PORT: Final = "pcie-root-port,id=rp,bus=pcie.0,addr=5,chassis=1"
_PLAIN: Final = re.compile(r"virtio-[a-z0-9]+-pci")
_KINDS: Final = ("blk", "net", "rng", "balloon", "gpu")
_ONE_INTERFACE: Final = ("gpu",)
"""Kinds that were never legacy: their devices have one name."""
_MEMORY: Final = {"mem": 16 << 20, "pmem": 2 << 20}
"""Kinds that bring memory of their own, and how much; both are multiples of the largest page that may back them."""
_BACK_ENDS: Final = ("blk", "rng")
"""QEMU has no vhost-user-net-pci: such a network device is a virtio-net-pci with another netdev."""
_PCI: Final = ("-pci", "-pci-transitional", "-pci-non-transitional")
_MMIO: Final = ("-device",)
VHOST_USER: Final = "vhost-user-"
"""Devices whose other half is a process of its own, and gets the guest's memory."""
CONTROL_DEVICES: Final = ("edu", "rtl8139")
"""Not virtio: they show what the platform does to any device."""
_FORCE_LEGACY: Final = {"auto": "false", "modern": "false", "legacy": "true"}
_HELP_SECONDS: Final = 10.0


def devices(board: Board) -> dict[str, str]:
    """The devices that can be tested on a board, by QEMU's name; the values are their kinds: ``blk``, ``net``,
    ``rng``, ``balloon``, ``gpu``, ``mem``, ``pmem``, or the name itself of a control device."""
    suffixes = _PCI if board.slots is None else _MMIO
    found = {
        f"virtio-{kind}{suffix}": kind
        for kind in _KINDS
        for suffix in (suffixes[:1] if kind in _ONE_INTERFACE else suffixes)
    }
    if board.memory_base is not None:
        found |= {f"virtio-{kind}-pci": kind for kind in _MEMORY}
    if board.slots is None and board.ram_is_mapped:
        found |= {f"{VHOST_USER}{kind}-pci": kind for kind in _BACK_ENDS}
    return found | {name: name for name in board.controls}


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """The device under test, as the user named it, on a board behind one of its IOMMUs.

    ``interface`` is ``auto``, ``modern`` or ``legacy``.
    """

    spec: OptionSpec
    board: Board
    iommu: OptionSpec
    interface: str = "auto"

    @classmethod
    def parse(cls, text: str, board: Board, iommu: OptionSpec, *, interface: str = "auto") -> DeviceSpec:
        """Check the names; options are QEMU's to judge. ``iommu`` is one of the board's (`Board.iommu`)."""
        spec = OptionSpec.parse(text)
        if spec.name not in devices(board):
            raise UsageError.unknown("device", spec.name, devices(board))
        if interface not in INTERFACES:
            raise UsageError.unknown("interface", interface, INTERFACES)
        return cls(spec, board, iommu, interface)

    @classmethod
    def of_any_type(cls, text: str, board: Board, iommu: OptionSpec) -> DeviceSpec:
        """Any type that QEMU may have: whether it does is for QEMU to say. There may be no driver for it here."""
        return cls(OptionSpec.parse(text), board, iommu)

    @property
    def kind(self) -> str:
        """``blk``, ``net``, ``rng`` and so on; the name itself of a control device."""
        return devices(self.board).get(self.spec.name, self.spec.name)

    @property
    def memory(self) -> tuple[GPA, int] | None:
        """Where memory lies that comes with the device, and how much it is; None for a device without any."""
        base = self.board.memory_base
        return None if base is None or self.kind not in _MEMORY else (base, _MEMORY[self.kind])

    @property
    def is_control(self) -> bool:
        """Is it no virtio device, but one that shows what the platform does to any device?"""
        return self.spec.name in CONTROL_DEVICES

    @property
    def has_back_end(self) -> bool:
        """Is its other half a vhost-user back end?"""
        return self.spec.name.startswith(VHOST_USER)

    @property
    def declared(self) -> bool:
        """Was the device asked to offer bit 33?"""
        return self.spec.on("iommu_platform")

    @property
    def _place_is_ours(self) -> bool:
        return not self.spec.options.keys() & {"bus", "addr"}

    @property
    def _goes_behind(self) -> bool:
        """Would the device go behind a root port? One without a modern interface has no place there."""
        return self._place_is_ours and not self.is_control and not self.spec.on("disable-modern")

    @property
    def _slot(self) -> str:
        """The slot of the root bus that the IOMMU wants the device in; empty if it does not care."""
        behind_port = self.iommu.options.get("place") == "root-port"
        return "" if behind_port else self.board.iommus[self.iommu.name].at_root

    @property
    def behind_root_port(self) -> bool:
        """The place is ours to choose unless the user named one."""
        return self._goes_behind and self.board.root_port and not self._slot

    @property
    def placed(self) -> OptionSpec:
        """The device with the place that it gets."""
        options = dict(self.spec.options)
        if self.behind_root_port:
            options["bus"] = "rp"
        elif self._goes_behind and self._slot:
            options["addr"] = self._slot
            if _PLAIN.fullmatch(self.spec.name) and not options.keys() & {"disable-legacy", "disable-modern"}:
                # As behind a root port: QEMU's own choice for the root bus is a transitional device.
                options["disable-legacy"] = "on"
        elif self._place_is_ours:
            options = {key: value for key, value in self.board.place.items() if self._takes(key)} | options
        return OptionSpec(self.spec.name, options)

    def _takes(self, key: str) -> bool:
        """Does the device have this option of the board's place? Not where it is said otherwise which interface."""
        if key == "iommu_platform":
            return not self.is_control
        plain = self.spec.name.endswith("-pci") and not self.spec.on("disable-modern")
        return plain or key != "disable-legacy"

    @property
    def can_be_legacy(self) -> bool:
        """Does the device have a legacy interface? QEMU's ``auto`` means: yes, unless behind a PCI Express port."""
        if self.board.slots is not None:
            # A virtio-mmio transport has one interface, which we choose; QEMU refuses neither.
            return False
        spec = self.placed
        if spec.name.endswith("-non-transitional"):
            return False
        if spec.name.endswith("-transitional") or spec.on("disable-modern"):
            return True
        legacy = spec.options.get("disable-legacy", "auto")
        if legacy == "auto":
            on_root = not self.behind_root_port and spec.options.get("bus", "pcie.0") == "pcie.0"
            return on_root or not self.board.root_port
        return not is_on(legacy)


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The inherited descriptors that the command line names; and the path that a vhost-user back end listens at."""

    bios: int
    ram: int
    qtest: int
    qmp: int
    image: int
    net: int
    screen: int
    gdb: int | None = None
    back_end: str = ""

    def all(self) -> tuple[int, ...]:
        """All of them."""
        some = (self.bios, self.ram, self.qtest, self.qmp, self.image, self.net, self.screen)
        return some if self.gdb is None else (*some, self.gdb)


def command_line(binary: str, device: DeviceSpec, fds: Descriptors) -> list[str]:
    """The whole command line: a machine whose processor does nothing, its IOMMU, and the device under test."""
    board, iommu = device.board, device.iommu
    choice = board.iommus[iommu.name]
    machine = [board.machine]
    ram: list[str] = []
    if board.ram_is_mapped:
        machine.append("memory-backend=ram0")
        path = f"mem-path=/proc/self/fd/{fds.ram}"
        ram = ["-object", f"memory-backend-file,id=ram0,size={board.ram_size},{path},share=on"]
    machine += [choice.machine] if choice.machine else []
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "none", "-monitor", "none"]
    size = f"{board.ram_size >> 20}M"
    if device.memory is not None:
        size += f",maxmem={(board.ram_size + device.memory[1]) >> 20}M"
    argv += ["-M", ",".join(machine), "-m", size, *ram, "-accel", "tcg"]
    argv += [argument.format(bios=f"/proc/self/fd/{fds.bios}") for argument in board.arguments]
    # qtest insists on a character device of that name.
    argv += ["-chardev", f"socket,id=qtest,fd={fds.qtest}", "-qtest", "chardev:qtest", "-qtest-log", "none"]
    argv += ["-chardev", f"socket,id=qmp,fd={fds.qmp}", "-mon", "chardev=qmp,mode=control"]
    if fds.gdb is not None:
        argv += ["-chardev", f"socket,id=gdb,fd={fds.gdb}", "-gdb", "chardev:gdb"]
    return argv + choice.arguments(iommu) + _device_arguments(device, fds)


def _device_arguments(device: DeviceSpec, fds: Descriptors) -> list[str]:
    """The device under test with what it needs behind it."""
    argv = []
    options = dict(device.placed.options)
    if device.has_back_end:
        argv += ["-chardev", f"socket,id=v0,path={fds.back_end.replace(',', ',,')}"]
        options.setdefault("chardev", "v0")
        if device.declared and device.behind_root_port and device.iommu.on("device-iotlb"):
            # Without it QEMU tells the back end of few of the IOMMU's invalidations.
            options.setdefault("ats", "on")
    elif device.kind == "blk" and "drive" not in options:
        argv += ["-add-fd", f"fd={fds.image},set=1"]
        argv += ["-blockdev", "driver=raw,node-name=d0,file.driver=file,file.filename=/dev/fdset/1"]
        options["drive"] = "d0"
    if device.kind == "gpu":
        argv += ["-add-fd", f"fd={fds.screen},set=2"]
    if device.kind == "net" and "netdev" not in options:
        argv += ["-netdev", f"dgram,id=n0,local.type=fd,local.str={fds.net}"]
        options["netdev"] = "n0"
    if device.kind == "balloon":
        # The contrast to page numbers: the same by descriptors.
        options.setdefault("free-page-reporting", "on")
    if device.memory is not None and "memdev" not in options:
        argv += _memory_device(device, fds, options)
    if device.kind == "edu":
        # It would mask its addresses with 28 bits, and RAM may lie above those.
        options.setdefault("dma_mask", str((1 << 64) - 1))
    if device.board.slots is not None:
        argv += ["-global", f"virtio-mmio.force-legacy={_FORCE_LEGACY[device.interface]}"]
    if device.behind_root_port:
        argv += ["-device", _ROOT_PORT]
    return [*argv, "-device", str(OptionSpec(device.spec.name, options))]


def _memory_device(device: DeviceSpec, fds: Descriptors, options: dict[str, str]) -> list[str]:
    """Memory for a device that brings some, at a place of our choice: the arguments. Adds to the options."""
    assert device.memory is not None
    base, size = device.memory
    options["memdev"] = "m0"
    options.setdefault("memaddr", str(base))
    if device.kind == "mem":
        options.setdefault("requested-size", str(size))
        return ["-object", f"memory-backend-ram,id=m0,size={size}"]
    return ["-object", f"memory-backend-file,id=m0,size={size},mem-path=/proc/self/fd/{fds.image},share=on"]


def refusal(binary: str, device: DeviceSpec, stderr: str) -> MachineError | UsageError | NotPossibleError:
    """What QEMU's refusal means: a name that it does not know, a device that it will not have, or that it is old."""
    words = stderr.strip() or "QEMU ended without a word"
    if match := re.search(r"can't apply global [^:]+: Property '([^']+)' not found", words):
        # Globals are ours, never the user's: QEMU lacks what we asked for.
        return NotPossibleError(f"this {device.board.binary} cannot do that: it has no property {match.group(1)!r}")
    if match := re.search(r"Property '[\w.-]+-machine\.([\w-]+)' not found", words):
        # So are the machine's own properties.
        return NotPossibleError(f"this {device.board.binary} cannot do that: its machine has no {match.group(1)!r}")
    if "is not a valid device model name" in words:
        return UsageError.unknown("device", device.spec.name, _help(binary, "help", r'name "([^"]+)"'))
    match = re.search(r"Property '([\w-]+)\.([\w.-]+)' not found", words)
    iommu = device.board.iommus[device.iommu.name].device
    if match and (match.group(1) == iommu or match.group(1).startswith(device.spec.name.split("-")[0])):
        name = iommu if match.group(1) == iommu else device.spec.name
        properties = _help(binary, f"{name},help", r"^\s+([\w-]+)=")
        return UsageError.unknown(f"option of {name}", match.group(2), properties)
    # Only a refusal on account of the bit says anything about the device; the rest is what the user typed. QEMU
    # quotes the command line, so the option's own name proves nothing.
    if re.search(
        "VIRTIO_F_IOMMU_PLATFORM|iommu_platform=true is not supported|IOMMU support requires reply-ack", words
    ):
        return RefusedError(f"QEMU refused {device.spec}", words)
    if "-device " in words:
        return UsageError(f"QEMU: {words}")
    return MachineError("QEMU would not start", words)


def _help(binary: str, what: str, pattern: str) -> list[str]:
    try:
        done = subprocess.run(
            [binary, "-device", what], capture_output=True, text=True, timeout=_HELP_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(pattern, done.stdout, re.MULTILINE)
