# SPDX-License-Identifier: Apache-2.0
"""The boards: which QEMU, how its processor is kept quiet, where its RAM and its PCI are, which IOMMUs it can have.

One row a board. How an IOMMU is programmed is the platform's business (`virtiova.iommu`); how it gets into the
machine is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from virtiova.addr import GPA
from virtiova.dma.ram import ByteOrder, PageAllocator, Ram
from virtiova.errors import UsageError
from virtiova.iommu.none import NoIommu
from virtiova.iommu.sabre import SabreIommu
from virtiova.iommu.tce import TceIommu
from virtiova.iommu.vtd import VtdIommu
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.gdb import GdbStub
from virtiova.machine.qemu.options import OptionSpec
from virtiova.machine.qemu.pci import QemuFunction
from virtiova.machine.qemu.pci_host import EcamHost, PciHost, Q35Host, Windows
from virtiova.machine.qemu.spapr import RtasHost, SpaprCpu
from virtiova.ports import Iommu

MiB: Final = 1 << 20
_VTD_BASE: Final = 0xFED90000


@dataclass(frozen=True, slots=True)
class Parts:
    """What there is to program an IOMMU with, once the machine is up and its PCI is enumerated."""

    bus: QtestBus
    ram: Ram
    tables: PageAllocator
    """RAM for the IOMMU's own tables and queues."""
    functions: list[QemuFunction]
    source: int
    """Requester id of the device under test."""
    spec: OptionSpec
    """The IOMMU as the user named it, with options."""
    stub: GdbStub | None = None
    """The machine's debugger, where the board has one."""


@dataclass(frozen=True, slots=True)
class IommuChoice:
    """One IOMMU of a board: what goes on the command line, and who programs it.

    ``machine`` is added to ``-M``; ``device`` is a ``-device``, to which the user's options are added; ``ours`` are
    options that we take ourselves, with their values.
    """

    build: Callable[[Parts], Iommu]
    machine: str = ""
    device: str = ""
    ours: dict[str, tuple[str, ...]] = field(default_factory=dict)


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
    byte_order: ByteOrder = "little"
    """The guest's, which devices without VERSION_1 take for theirs."""
    control: str = "edu"
    """The device that is not virtio and shows what the platform does to any device."""
    debug_stub: bool = False
    """Whether the machine starts stopped, with its processor in the hands of a debugger, which is us."""

    @property
    def tables(self) -> tuple[GPA, GPA]:
        """The 6 MiB that hold the IOMMU's own tables."""
        return GPA(self.usable), GPA(self.usable + 6 * MiB)

    @property
    def pages(self) -> tuple[GPA, GPA]:
        """What is left for the probe's pages."""
        return self.tables[1], GPA(self.ram_base + self.ram_size)

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
        return spec


def _no_iommu(_: Parts) -> Iommu:
    return NoIommu()


def _vtd(parts: Parts) -> Iommu:
    queued = parts.spec.options.get("invalidation") == "queue"
    return VtdIommu(parts.bus, parts.ram, parts.tables, parts.source, _VTD_BASE, queued=queued)


NONE: Final = IommuChoice(_no_iommu)

Q35: Final = Board(
    name="q35",
    binary="qemu-system-x86_64",
    package="qemu-system-x86",
    machine="q35",
    arguments=("-bios", "{bios}"),
    ram_size=64 * MiB,
    ram_base=0,
    usable=2 * MiB,
    host=Q35Host,
    iommus={
        "none": NONE,
        "intel": IommuChoice(_vtd, device="intel-iommu", ours={"invalidation": ("register", "queue")}),
    },
)

_SABRE: Final = 0x1FE00000000
_SUN4U_RAM: Final = 128 * MiB


def _sun4u_host(bus: QtestBus) -> PciHost:
    windows = Windows(
        bridge_memory=(0x20000000, 0x30000000),
        bridge_io=(0x1000, 0x8000),
        root_memory=(0x30000000, 0x40000000),
        root_io=(0x8000, 0x10000),
        memory_offset=0x1FF00000000,
        io_offset=_SABRE + 0x2000000,
    )
    return EcamHost(bus, _SABRE + 0x1000000, windows, shift=8)


def _sabre(parts: Parts) -> Iommu:
    return SabreIommu(parts.bus, parts.ram, parts.tables, _SABRE, _SUN4U_RAM)


SUN4U: Final = Board(
    name="sun4u",
    binary="qemu-system-sparc64",
    package="qemu-system-sparc",
    machine="sun4u",
    # Powered off, not stopped: some devices work in a running machine only.
    arguments=("-global", "cpu.start-powered-off=on"),
    ram_size=_SUN4U_RAM,
    ram_base=0,
    usable=2 * MiB,
    host=_sun4u_host,
    iommus={"sabre": IommuChoice(_sabre)},
    root_port=False,
    place={"bus": "pciB", "addr": "1", "disable-legacy": "on"},
    ram_is_mapped=False,
    byte_order="big",
    control="rtl8139",
)

_PSERIES_RAM: Final = 512 * MiB
_PSERIES_USABLE: Final = 64 * MiB
_PSERIES_SCRATCH: Final = GPA(_PSERIES_USABLE - MiB)
"""For the arguments of firmware calls and for code: between the firmware's image and our own RAM."""


def _pseries_host(bus: QtestBus) -> PciHost:
    windows = Windows(
        bridge_memory=(0x80000000, 0xA0000000),
        bridge_io=(0x1000, 0x8000),
        root_memory=(0xA0000000, 0xF0000000),
        root_io=(0x8000, 0x10000),
        memory_offset=0x200000000000,
        io_offset=0x200000000000,
    )
    return RtasHost(bus, windows, _PSERIES_SCRATCH)


def _tce(parts: Parts) -> Iommu:
    assert parts.stub is not None  # the board has one
    cpu = SpaprCpu(parts.bus, parts.stub, _PSERIES_SCRATCH)
    return TceIommu(cpu.hypercall, _PSERIES_RAM)


PSERIES: Final = Board(
    name="pseries",
    binary="qemu-system-ppc64",
    package="qemu-system-ppc",
    # Mitigations that TCG does not have: without these four it warns at every start.
    machine="pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
    arguments=("-cpu", "power9", "-S"),
    ram_size=_PSERIES_RAM,
    ram_base=0,
    usable=_PSERIES_USABLE,
    host=_pseries_host,
    iommus={"tce": IommuChoice(_tce)},
    root_port=False,
    place={"addr": "1", "disable-legacy": "on"},
    byte_order="big",
    control="rtl8139",
    debug_stub=True,
)

BOARDS: Final[dict[str, Board]] = {board.name: board for board in (Q35, SUN4U, PSERIES)}


def find_board(name: str) -> Board:
    """A board by name; `UsageError` with the nearest one if there is none."""
    try:
        return BOARDS[name]
    except KeyError:
        raise UsageError.unknown("machine", name, (*BOARDS, "model")) from None
