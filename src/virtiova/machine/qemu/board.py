# SPDX-License-Identifier: Apache-2.0
"""What a board is: a machine type of QEMU as the probe uses it, the IOMMUs that it can have, and what there is to
program them with. The boards themselves are rows of `boards`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from virtiova.addr import GPA
from virtiova.dma.ram import ByteOrder, PageAllocator, Ram
from virtiova.errors import UsageError
from virtiova.iommu.unit import PlatformIommu
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.gdb import GdbStub
from virtiova.machine.qemu.options import OptionSpec
from virtiova.machine.qemu.pci import QemuFunction
from virtiova.machine.qemu.pci_host import PciHost
from virtiova.transport.mmio import Slots

MiB: Final = 1 << 20
BYPASS_BUS: Final = "bypass-bus"
"""An option of an IOMMU, ours: ``on`` leads the root bus around it."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What there is to program an IOMMU with, once the machine is up and its PCI is enumerated."""

    bus: QtestBus
    ram: Ram
    tables: PageAllocator
    """RAM for the IOMMU's own tables and queues."""
    functions: list[QemuFunction]
    source: int | None
    """Requester id of the first device under test; None if it is no PCI function."""
    spec: OptionSpec
    """The IOMMU as the user named it, with options."""
    stub: GdbStub | None = None
    """The machine's debugger, where the board has one."""
    around: bool = False
    """Whether that device is on a bus of its own that is led around the IOMMU."""

    @property
    def last_bus(self) -> int:
        """The highest number of a bus with devices on it."""
        return max((function.source >> 8 for function in self.functions), default=0)


@dataclass(frozen=True, slots=True)
class Needs:
    """Something that not every version of QEMU has: ``word`` in what it answers to ``asked``, arguments of help."""

    asked: tuple[str, ...]
    word: str
    suite: str
    """The suite of Debian that has such a QEMU."""


@dataclass(frozen=True, slots=True)
class IommuChoice:
    """One IOMMU of a board: what goes on the command line, and who programs it.

    ``machine`` is added to ``-M``; ``device`` is a ``-device`` with ``options``, to which the user's are added;
    ``ours`` are options that we take ourselves, with their values, and ``adds`` the arguments that such a
    ``key=value`` stands for. ``at_root``: devices under test go to that slot of the root bus, also on a board that
    has a root port for them; ``place=root-port`` puts them behind it. ``needs`` says which word QEMU's help has to
    have, for a ``key=value`` or (empty) in any case.
    """

    build: Callable[[Parts], PlatformIommu]
    machine: str = ""
    device: str = ""
    options: dict[str, str] = field(default_factory=dict)
    ours: dict[str, tuple[str, ...]] = field(default_factory=dict)
    adds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    at_root: str = ""
    needs: dict[str, Needs] = field(default_factory=dict)

    def told(self, spec: OptionSpec) -> OptionSpec:
        """The IOMMU's device with all that QEMU is told of it: our options, and over them the user's."""
        theirs = {key: value for key, value in spec.options.items() if key not in self.ours}
        return OptionSpec(self.device, self.options | theirs)

    def arguments(self, spec: OptionSpec) -> list[str]:
        """The arguments beside ``-M`` for the IOMMU as the user named it."""
        found = ["-device", str(self.told(spec))] if self.device else []
        for key, value in spec.options.items():
            found += self.adds.get(f"{key}={value}", ())
        return found


@dataclass(frozen=True, slots=True)
class Board:
    """One machine type of QEMU, as the probe uses it."""

    name: str
    binary: str
    package: str
    """The Debian package that has the binary."""
    machine: str
    """``-M``, without options of the IOMMU and of RAM."""
    arguments: tuple[str, ...]
    """Further arguments; ``{bios}`` stands for the halting BIOS."""
    ram_size: int
    ram_base: int
    """Guest-physical address of the first byte of the RAM file."""
    usable: int
    """Lowest guest-physical address that the probe may use: below are holes and tables of others."""
    host: Callable[[QtestBus], PciHost]
    iommus: dict[str, IommuChoice]
    root_port: bool = True
    """Devices go behind a PCI Express root port on ``pcie.0``."""
    place: dict[str, str] = field(default_factory=dict)
    """Without root port: the device's options where the user says nothing of bus or address."""
    ram_is_mapped: bool = True
    """RAM is a shared file; else it is reached by verbs."""
    slots: Slots | None = None
    """Where virtio-mmio transports are, if devices are on those instead of on PCI."""
    byte_order: ByteOrder = "little"
    """The guest's, which devices without VERSION_1 take for theirs."""
    controls: tuple[str, ...] = ("edu", "rtl8139")
    """Devices that are not virtio and show what the platform does to any device: the first one unless another is named.
    They are PCI functions: beside virtio-mmio they would say nothing of the device under test."""
    suite: str = ""
    """The suite of Debian 12 that has the package, if not the release itself."""
    memory_base: GPA | None = None
    """Where memory lies that comes with a device (``mem``, ``pmem``); None where there is no such device."""
    debug_stub: bool = False
    """Whether the machine starts stopped, with its processor in the hands of a debugger, which is us."""
    seats: tuple[int, ...] = tuple(range(6, 14))
    """Slots of the bus that devices are on, for several of them in one machine; none: one device only."""
    led_around: bool = True
    """Whether the machine can have a bus that is led around its IOMMU."""

    @property
    def has_places(self) -> bool:
        """Whether a device may be told where to go: `machine.qemu.command.PLACES`."""
        return self.root_port and bool(self.seats)

    @property
    def tables(self) -> tuple[GPA, GPA]:
        """The 6 MiB that hold the IOMMU's own tables."""
        return GPA(self.usable), GPA(self.usable + 6 * MiB)

    @property
    def pages(self) -> tuple[GPA, GPA]:
        """What is left for the probe's pages."""
        return self.tables[1], GPA(self.ram_base + self.ram_size)

    @property
    def natural(self) -> str:
        """The board's own IOMMU, for who names none."""
        return next(name for name in self.iommus if name != "none")

    def in_front(self, iommu: OptionSpec) -> bool:
        """Whether that IOMMU is in front of the devices of this board, as they are placed."""
        return iommu.name != "none" and self.slots is None and not iommu.on(BYPASS_BUS)

    def iommu(self, text: str) -> OptionSpec:
        """An IOMMU of this board as the user named it; `UsageError` with the nearest name if there is none."""
        spec = OptionSpec.parse(text)
        if spec.name not in self.iommus:
            raise UsageError.unknown(f"IOMMU of {self.name}", spec.name, self.iommus)
        choice = self.iommus[spec.name]
        if spec.options and not (choice.device or choice.ours):
            raise UsageError(f"the IOMMU {spec.name!r} has no options")
        for key, valid in choice.ours.items():
            if spec.options.get(key, valid[0]) not in valid:
                raise UsageError.unknown(key, spec.options[key], valid)
        if not choice.device and spec.options.keys() - choice.ours.keys():
            wrong = min(spec.options.keys() - choice.ours.keys())
            raise UsageError.unknown(f"option of the IOMMU {spec.name!r}", wrong, choice.ours)
        return spec
