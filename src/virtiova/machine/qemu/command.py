# SPDX-License-Identifier: Apache-2.0
"""From what a user names (a device, an IOMMU) to QEMU's command line, and what QEMU's refusal means."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.addr import GPA
from virtiova.errors import MachineError, NotPossibleError, RefusedError, UsageError
from virtiova.machine.qemu.ask import ask
from virtiova.machine.qemu.board import Board
from virtiova.machine.qemu.options import OptionSpec, is_on
from virtiova.transport.pci import INTERFACES

PLACES: Final = ("root-port", "root-bus", "bypass")
"""Where a device can be on a board with PCI Express."""
AROUND_BUS: Final = 16
"""Number of the bus that is led around the IOMMU: above those behind root ports, low enough for small tables."""
_ROOT_BUS: Final = "pcie.0"
_AROUND: Final = "around"
_AROUND_SLOT: Final = 0x1D
_PORT_SLOT: Final = 5
_PORT_SLOTS: Final = 0x10
"""Slots of root ports: of a device that is alone, and of the first of several."""
_PLAIN: Final = re.compile(r"virtio-[a-z0-9]+-pci")
_KINDS: Final = ("blk", "net", "rng", "balloon", "gpu")
_ONE_INTERFACE: Final = ("gpu",)
"""Kinds that were never legacy: their devices have one name."""
_MEMORY: Final = {"mem": 16 << 20, "pmem": 2 << 20}
"""Kinds that bring memory of their own, and how much; both are multiples of the largest page that may back them."""
_OWN_MEMORY: Final = "m0"
_UNDRIVEN: Final = (
    *("9p", "console", "crypto", "fs", "gpio", "i2c", "input", "input-host", "iommu", "keyboard", "mouse", "pstore"),
    *("scmi", "scsi", "serial", "snd", "sound", "tablet", "vga", "vsock"),
)
"""Types of virtio devices that QEMU may have and that there is no driver for here."""
_A_VIRTIO: Final = re.compile(r"(?:virtio|vhost-user|vhost)-([a-z0-9-]+?)(?:-(?:non-)?transitional|-pci|-device)*")
_BACK_ENDS: Final = ("blk", "rng")
"""QEMU has no vhost-user-net-pci: such a network device is a virtio-net-pci with another netdev."""
_PCI: Final = ("-pci", "-pci-transitional", "-pci-non-transitional")
_MMIO: Final = ("-device",)
VHOST_USER: Final = "vhost-user-"
"""Devices whose other half is a process of its own, and gets the guest's memory."""
CONTROL_DEVICES: Final = ("edu", "rtl8139")
"""Not virtio: they show what the platform does to any device."""
_MOST_NAMES: Final = 2000
_FORCE_LEGACY: Final = {"auto": "false", "modern": "false", "legacy": "true"}


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


def _no_such_device(name: str, board: Board) -> UsageError:
    """There may be such a device: on another board, or without a driver here."""
    valid = devices(board)
    match = _A_VIRTIO.fullmatch(name)
    if match is not None and match[1] in _UNDRIVEN:
        some = ", ".join(each for each in valid if each.endswith("-pci") or not board.has_places)
        asks = "'virtiova matrix --only types' asks its negotiation"
        return UsageError(f"{name}: there is no driver for it here; {asks}; with a driver: {some}")
    if match is not None and match[1] in (*_KINDS, *_MEMORY) and match[1] not in valid.values():
        return UsageError(f"{board.name} has no {name}; valid there: {', '.join(valid)}")
    return UsageError.unknown("device", name, valid)


class Where(enum.Enum):
    """Where a device is in its machine."""

    NAMED = "where the user said, by QEMU's own options"
    ROOT_PORT = "root-port"
    ROOT_BUS = "root-bus"
    BYPASS = "bypass"
    """Behind a root port on a root bus that is led around the IOMMU."""
    BOARD = "where the board has its devices"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device under test, as the user named it, on a board behind one of its IOMMUs.

    ``interface`` is ``auto``, ``modern`` or ``legacy``; ``place`` is one of `PLACES`, or empty: as usual. ``seat`` is
    its number among several devices in one machine, None if it is alone there.
    """

    spec: OptionSpec
    board: Board
    iommu: OptionSpec
    interface: str = "auto"
    place: str = ""
    seat: int | None = None

    @classmethod
    def parse(
        cls, text: str, board: Board, iommu: OptionSpec, *, interface: str = "auto", seat: int | None = None
    ) -> DeviceSpec:
        """Check the names; options are QEMU's to judge. ``iommu`` is one of the board's (`Board.iommu`).

        ``interface=`` and ``place=`` among the options are ours; the first one wins over the argument.
        """
        spec = OptionSpec.parse(text)
        options = dict(spec.options)
        interface = options.pop("interface", interface)
        place = options.pop("place", "")
        spec = OptionSpec(spec.name, options)
        if spec.name not in devices(board):
            raise _no_such_device(spec.name, board)
        if interface not in INTERFACES:
            raise UsageError.unknown("interface", interface, INTERFACES)
        return cls(spec, board, iommu, interface, place, seat)._checked()

    @classmethod
    def of_any_type(cls, text: str, board: Board, iommu: OptionSpec) -> DeviceSpec:
        """Any type that QEMU may have: whether it does is for QEMU to say. There may be no driver for it here."""
        return cls(OptionSpec.parse(text), board, iommu)

    def _checked(self) -> DeviceSpec:
        board, options = self.board, self.spec.options
        if self.place and not board.has_places:
            raise UsageError(f"{board.name} has one place for devices: place={self.place} is not possible")
        if self.place and self.place not in PLACES:
            raise UsageError.unknown("place", self.place, PLACES)
        if self.goes_around and not board.led_around:
            raise UsageError(f"{board.name} has no bus that is led around its IOMMU: place=bypass is not possible")
        if self.place and options.keys() & {"bus", "addr"}:
            raise UsageError(f"{self.spec.name}: place= is ours, bus= and addr= are QEMU's; name one of them")
        if self.seat is not None and options.keys() & {"bus", "addr"}:
            raise UsageError(f"{self.spec.name}: among several devices bus= and addr= are not free; place= is")
        if self.seat is not None and self.seat >= len(board.seats):
            some = f"{len(board.seats)} devices" if board.seats else "one device"
            raise UsageError(f"{board.name} takes {some} at most")
        if self.seat is not None and (self.has_back_end or self.kind in ("gpu", *_MEMORY)):
            raise UsageError(f"{self.spec.name} is alone in its machine: no other device beside it")
        return self

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
    def where(self) -> Where:
        """The place is ours to choose unless the user named one."""
        if not self._place_is_ours:
            return Where.NAMED
        if self.place:
            return Where(self.place)
        if not self.board.root_port:
            return Where.BOARD
        return Where.ROOT_PORT if self._goes_behind and not self._slot else Where.ROOT_BUS

    @property
    def _place_is_ours(self) -> bool:
        return not self.spec.options.keys() & {"bus", "addr"}

    @property
    def _goes_behind(self) -> bool:
        """Would the device go behind a root port? One without a modern interface has no place there."""
        return not self.is_control and not self.spec.on("disable-modern")

    @property
    def _slot(self) -> str:
        """The slot of the root bus that the IOMMU wants the device in; empty if it does not care."""
        behind_port = self.iommu.options.get("place") == "root-port"
        return "" if behind_port else self.board.iommus[self.iommu.name].at_root

    @property
    def behind_root_port(self) -> bool:
        """Is it behind a root port, of its own?"""
        return self.where in (Where.ROOT_PORT, Where.BYPASS)

    @property
    def goes_around(self) -> bool:
        """Is it behind a root bus that is led around the IOMMU?"""
        return self.where is Where.BYPASS

    @property
    def root_port(self) -> int:
        """Requester id of its root port."""
        bus = AROUND_BUS if self.goes_around else 0
        return bus << 8 | (_PORT_SLOT if self.seat is None else _PORT_SLOTS + self.seat) << 3

    @property
    def root_port_name(self) -> str:
        """What its root port is called on the command line."""
        return "rp" if self.seat is None else f"rp{self.seat}"

    @property
    def slot(self) -> int | None:
        """Its slot on its bus among several devices; None: it is alone, and its slot QEMU's choice or the user's."""
        if self.seat is None:
            return None
        return 0 if self.behind_root_port else self.board.seats[self.seat]

    @property
    def placed(self) -> OptionSpec:
        """The device with the place that it gets."""
        options = dict(self.spec.options)
        match self.where:
            case Where.ROOT_PORT | Where.BYPASS:
                options["bus"] = self.root_port_name
            case Where.ROOT_BUS if self._goes_behind:
                options = self._like_behind_a_port(options)
                if self._slot:
                    options["addr"] = self._slot
            case Where.BOARD | Where.ROOT_BUS:
                options = {key: value for key, value in self.board.place.items() if self._takes(key)} | options
        if self.slot is not None and not self.behind_root_port:
            options["addr"] = f"{self.slot:x}"
            if self.where is Where.ROOT_BUS:
                # Else QEMU may take the other root bus.
                options["bus"] = _ROOT_BUS
        return OptionSpec(self.spec.name, options)

    def _like_behind_a_port(self, options: dict[str, str]) -> dict[str, str]:
        """QEMU's own choice for a root bus is a transitional device; behind a root port it is a modern one."""
        said = options.keys() & {"disable-legacy", "disable-modern"} or self.interface == "legacy"
        return options if said or not _PLAIN.fullmatch(self.spec.name) else options | {"disable-legacy": "on"}

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
            on_root = not self.behind_root_port and spec.options.get("bus", _ROOT_BUS) == _ROOT_BUS
            return on_root or not self.board.root_port
        return not is_on(legacy)


def parse_devices(texts: Sequence[str], board: Board, iommu: OptionSpec, interface: str = "auto") -> list[DeviceSpec]:
    """The devices of one machine, as the user named them: one, or several beside each other."""
    if not texts:
        raise UsageError("a machine without a device shows nothing")
    if len(texts) == 1:
        return [DeviceSpec.parse(texts[0], board, iommu, interface=interface)]
    return [DeviceSpec.parse(text, board, iommu, interface=interface, seat=n) for n, text in enumerate(texts)]


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The inherited descriptors that the command line names, and the path that a vhost-user back end listens at.
    ``backs``: image and network of each device; ``screen`` is for one that has a picture."""

    bios: int
    ram: int
    qtest: int
    qmp: int
    backs: tuple[tuple[int, int], ...]
    screen: int
    gdb: int | None = None
    back_end: str = ""

    def all(self) -> tuple[int, ...]:
        """All of them."""
        behind = (fd for back in self.backs for fd in back)
        some = (self.bios, self.ram, self.qtest, self.qmp, *behind, self.screen)
        return some if self.gdb is None else (*some, self.gdb)


def command_line(binary: str, devices: Sequence[DeviceSpec], fds: Descriptors) -> list[str]:
    """The whole command line: a machine whose processor does nothing, its IOMMU, and the devices under test, of
    which there is one at least, all on the same board behind the same IOMMU."""
    board, iommu = devices[0].board, devices[0].iommu
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
    if own := sum(device.memory[1] for device in devices if device.memory is not None):
        size += f",maxmem={(board.ram_size + own) >> 20}M"
    argv += ["-M", ",".join(machine), "-m", size, *ram, "-accel", "tcg"]
    argv += [argument.format(bios=f"/proc/self/fd/{fds.bios}") for argument in board.arguments]
    # qtest insists on a character device of that name.
    argv += ["-chardev", f"socket,id=qtest,fd={fds.qtest}", "-qtest", "chardev:qtest", "-qtest-log", "none"]
    argv += ["-chardev", f"socket,id=qmp,fd={fds.qmp}", "-mon", "chardev=qmp,mode=control"]
    if fds.gdb is not None:
        argv += ["-chardev", f"socket,id=gdb,fd={fds.gdb}", "-gdb", "chardev:gdb"]
    argv += choice.arguments(iommu)
    if board.slots is not None:
        argv += ["-global", f"virtio-mmio.force-legacy={_FORCE_LEGACY[devices[0].interface]}"]
    if any(device.goes_around for device in devices):
        around = f"pxb-pcie,id={_AROUND},bus={_ROOT_BUS},addr={_AROUND_SLOT:x},bus_nr={AROUND_BUS},bypass_iommu=on"
        argv += ["-device", around]
    for device, back in zip(devices, fds.backs, strict=True):
        argv += _device_arguments(device, *back, fds)
    return argv


def _device_arguments(device: DeviceSpec, image: int, net: int, fds: Descriptors) -> list[str]:
    """A device under test with what it needs behind it."""
    argv = []
    number = device.seat or 0
    argument = _argument(device)
    if device.has_back_end:
        argv += ["-chardev", f"socket,id=v0,path={fds.back_end.replace(',', ',,')}"]
    if device.kind == "gpu":
        argv += ["-add-fd", f"fd={fds.screen},set=2"]
    if device.memory is not None and argument.options.get("memdev") == _OWN_MEMORY:
        size = device.memory[1]
        where = "ram" if device.kind == "mem" else "file"
        path = "" if device.kind == "mem" else f",mem-path=/proc/self/fd/{image},share=on"
        argv += ["-object", f"memory-backend-{where},id={_OWN_MEMORY},size={size}{path}"]
    if argument.options.get("drive") == f"d{number}":
        argv += ["-add-fd", f"fd={image},set={number + 1}"]
        file = f"file.driver=file,file.filename=/dev/fdset/{number + 1}"
        argv += ["-blockdev", f"driver=raw,node-name=d{number},{file}"]
    if argument.options.get("netdev") == f"n{number}":
        argv += ["-netdev", f"dgram,id=n{number},local.type=fd,local.str={net}"]
    if device.behind_root_port:
        bus, slot = _AROUND if device.goes_around else _ROOT_BUS, device.root_port >> 3 & 31
        port = f"pcie-root-port,id={device.root_port_name},bus={bus},addr={slot:x},chassis={number + 1}"
        argv += ["-device", port]
    return [*argv, "-device", str(argument)]


def _argument(device: DeviceSpec) -> OptionSpec:
    """The device with its place and what it has behind it."""
    number = device.seat or 0
    options = dict(device.placed.options)
    if device.has_back_end:
        options.setdefault("chardev", "v0")
        if device.declared and device.behind_root_port and device.iommu.on("device-iotlb"):
            # Without it QEMU tells the back end of few of the IOMMU's invalidations.
            options.setdefault("ats", "on")
    elif device.kind == "blk":
        options.setdefault("drive", f"d{number}")
    if device.kind == "net":
        options.setdefault("netdev", f"n{number}")
    if device.kind == "balloon":
        # The contrast to page numbers: the same by descriptors.
        options.setdefault("free-page-reporting", "on")
    if device.memory is not None and "memdev" not in options:
        base, size = device.memory
        options["memdev"] = _OWN_MEMORY
        options.setdefault("memaddr", str(base))
        if device.kind == "mem":
            options.setdefault("requested-size", str(size))
    if device.kind == "edu":
        # It would mask its addresses with 28 bits, and RAM may lie above those.
        options.setdefault("dma_mask", str((1 << 64) - 1))
    return OptionSpec(device.spec.name, options)


def refusal(binary: str, devices: Sequence[DeviceSpec], stderr: str) -> MachineError | UsageError | NotPossibleError:
    """What QEMU's refusal means: a name that it does not know, a device that it will not have, or that it is old."""
    words = stderr.strip() or "QEMU ended without a word"
    # QEMU repeats the option that it complains about.
    number, device = next(
        ((n, each) for n, each in enumerate(devices) if f"-device {_argument(each)}:" in words), (0, devices[0])
    )
    if match := re.search(r"can't apply global [^:]+: Property '([^']+)' not found", words):
        # Globals are ours, never the user's: QEMU lacks what we asked for.
        return NotPossibleError(f"this {device.board.binary} cannot do that: it has no property {match.group(1)!r}")
    if match := re.search(r"Property '[\w.-]+-machine\.([\w-]+)' not found", words):
        # So are the machine's own properties.
        return NotPossibleError(f"this {device.board.binary} cannot do that: its machine has no {match.group(1)!r}")
    if "is not a valid device model name" in words:
        return UsageError.unknown("device", device.spec.name, _help(binary, "help", r'name "([^"]{1,64})"'))
    match = re.search(r"Property '([\w-]+)\.([\w.-]+)' not found", words)
    iommu = device.board.iommus[device.iommu.name].device
    if match and (match.group(1) == iommu or match.group(1).startswith(device.spec.name.split("-")[0])):
        name = iommu if match.group(1) == iommu else device.spec.name
        properties = _help(binary, f"{name},help", r"^\s+([\w-]{1,64})=")
        return UsageError.unknown(f"option of {name}", match.group(2), properties)
    # Only a refusal on account of the bit says anything about the device; the rest is what the user typed. QEMU
    # quotes the command line, so the option's own name proves nothing.
    if re.search(
        "VIRTIO_F_IOMMU_PLATFORM|iommu_platform=true is not supported|IOMMU support requires reply-ack", words
    ):
        return RefusedError(f"QEMU refused {device.spec}", words, number)
    if "-device " in words:
        return UsageError(f"QEMU: {words}")
    return MachineError("QEMU would not start", words)


def _help(binary: str, what: str, pattern: str) -> list[str]:
    try:
        return re.findall(pattern, ask([binary, "-device", what]).out, re.MULTILINE)[:_MOST_NAMES]
    except NotPossibleError:
        return []
