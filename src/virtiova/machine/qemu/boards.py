# SPDX-License-Identifier: Apache-2.0
"""The boards: which QEMU, how its processor is kept quiet, where its RAM and its PCI are, which IOMMUs it can have.

One row a board. How an IOMMU is programmed is the platform's business (`virtiova.iommu`); how it gets into the
machine is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from virtiova.addr import GPA
from virtiova.dma.ops import DirectOps
from virtiova.dma.ram import ByteOrder, PageAllocator, Ram
from virtiova.driver.iommu import IommuDriver
from virtiova.errors import MachineError, UsageError
from virtiova.features import DeviceId
from virtiova.iommu.amdvi import AmdViIommu, AmdViUnit
from virtiova.iommu.aside import AsideIommu
from virtiova.iommu.none import NoIommu
from virtiova.iommu.riscv import RiscvIommu
from virtiova.iommu.sabre import SabreIommu
from virtiova.iommu.smmuv3 import Smmuv3Iommu, Smmuv3Unit
from virtiova.iommu.tce import TceIommu
from virtiova.iommu.unit import PlatformIommu
from virtiova.iommu.virtio import VirtioIommu, VirtioUnit
from virtiova.iommu.vtd import VtdIommu, VtdUnit
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.gdb import GdbStub
from virtiova.machine.qemu.options import OptionSpec
from virtiova.machine.qemu.pci import RISCV_IOMMU, QemuFunction
from virtiova.machine.qemu.pci_host import EcamHost, PciHost, Q35Host, Windows
from virtiova.machine.qemu.spapr import RtasHost, SpaprCpu
from virtiova.transport.ats import Ats, find_ats
from virtiova.transport.mmio import Slots
from virtiova.transport.pci import open_transport
from virtiova.wire import pci, riscv_iommu

MiB: Final = 1 << 20
_VTD_BASE: Final = 0xFED90000
_AMDVI_BASE: Final = 0xFED80000
_SMMU_BASE: Final = 0x09050000
_BYPASS: Final = "bypass-bus"
_NEWER: Final = "bookworm-backports"
"""Where Debian 12 has a QEMU of later years: 10.0 at this time."""


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

    def arguments(self, spec: OptionSpec) -> list[str]:
        """The arguments beside ``-M`` for the IOMMU as the user named it."""
        theirs = {key: value for key, value in spec.options.items() if key not in self.ours}
        found = ["-device", str(OptionSpec(self.device, self.options | theirs))] if self.device else []
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
        return iommu.name != "none" and self.slots is None and not iommu.on(_BYPASS)

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


def _no_iommu(_: Parts) -> PlatformIommu:
    return NoIommu()


def _vtd(parts: Parts) -> PlatformIommu:
    # Only the queue invalidates the TLBs of devices; whoever asks for the registers has no ATS.
    way = parts.spec.options.get("invalidation", "queue" if parts.spec.on("device-iotlb") else "register")

    def ats(source: int) -> Ats | None:
        return next((find_ats(function) for function in parts.functions if function.source == source), None)

    unit = VtdUnit(parts.bus, parts.ram, parts.tables, _VTD_BASE, queued=way == "queue", ats=ats)
    return _on_its_bus(parts, VtdIommu(unit, _source(parts)))


def _smmuv3(parts: Parts) -> PlatformIommu:
    stage = {"1": 1, "2": 2}.get(parts.spec.options.get("stage", "auto"))
    last_bus = max(1, parts.last_bus)
    unit = Smmuv3Unit(parts.bus, parts.ram, parts.tables, _SMMU_BASE, stage=stage, last_bus=last_bus)
    smmu = Smmuv3Iommu(unit, parts.source)
    if parts.source is None:
        # No PCI function: no stream id of its own, so that the SMMU translates all of them.
        return AsideIommu(smmu, present=False)
    return _on_its_bus(parts, smmu)


def _on_its_bus(parts: Parts, iommu: PlatformIommu) -> PlatformIommu:
    """The IOMMU as the devices under test have it: in front, unless their bus was led around it."""
    return AsideIommu(iommu, present=True) if parts.spec.on(_BYPASS) else iommu


def _source(parts: Parts) -> int:
    if parts.source is None:
        raise UsageError(f"the IOMMU {parts.spec.name!r} is for PCI devices only")
    return parts.source


def _virt_host(bus: QtestBus) -> PciHost:
    windows = Windows(
        bridge_memory=(0x10000000, 0x20000000),
        bridge_io=(0x1000, 0x9000),
        root_memory=(0x20000000, 0x3E000000),
        root_io=(0x9000, 0x10000),
        io_offset=0x3EFF0000,
    )
    return EcamHost(bus, 0x4010000000, windows)


def _amdvi(parts: Parts) -> PlatformIommu:
    unit = AmdViUnit(parts.bus, parts.ram, parts.tables, _AMDVI_BASE, last_bus=parts.last_bus)
    return _on_its_bus(parts, AmdViIommu(unit, _source(parts)))


def virtio_iommu(parts: Parts) -> PlatformIommu:
    """The virtio-iommu on the machine's PCI buses, brought up. The same on every board."""
    source = _source(parts)
    for function in parts.functions:
        if function.vendor == pci.VENDOR_VIRTIO and function.virtio_type == DeviceId.IOMMU:
            driver = IommuDriver(open_transport(function), DirectOps(parts.ram, parts.tables))
            around = parts.spec.on(_BYPASS) or parts.around
            return _on_its_bus(parts, VirtioIommu(VirtioUnit(driver), source, around=around))
    raise MachineError("no virtio-iommu on the PCI buses of the machine")


_BUS: Final[dict[str, tuple[str, ...]]] = {_BYPASS: ("off", "on")}
_AROUND: Final[dict[str, tuple[str, ...]]] = {f"{_BYPASS}=on": ("-machine", "default-bus-bypass-iommu=on")}
NONE: Final = IommuChoice(_no_iommu)
VIRTIO_IOMMU: Final = IommuChoice(
    virtio_iommu, device="virtio-iommu-pci", options={"addr": "4"}, ours=_BUS, adds=_AROUND
)

Q35: Final = Board(
    name="q35",
    binary="qemu-system-x86_64",
    package="qemu-system-x86",
    machine="q35",
    arguments=("-bios", "{bios}"),
    ram_size=64 * MiB,
    ram_base=0,
    usable=2 * MiB,
    memory_base=GPA(1 << 32),
    host=Q35Host,
    iommus={
        "none": NONE,
        "intel": IommuChoice(
            _vtd, device="intel-iommu", ours={"invalidation": ("register", "queue")} | _BUS, adds=_AROUND
        ),
        # QEMU 7.2 knows a device by the bus number that it had when it was plugged, before buses were numbered: a
        # device behind a bridge is then looked up as one on bus 0. Upstream: "amd_iommu: Fix handling device on
        # buses != 0" (2025).
        "amd": IommuChoice(
            _amdvi,
            device="amd-iommu",
            # With pt=on, which is the default, some versions take no notice of the tables (QEMU-AMD-PASS-THROUGH).
            options={"pt": "off"},
            ours={"place": ("root-bus", "root-port")} | _BUS,
            adds=_AROUND,
            at_root="3",
        ),
        "virtio": VIRTIO_IOMMU,
    },
)

VIRT: Final = Board(
    name="virt",
    binary="qemu-system-aarch64",
    package="qemu-system-arm",
    machine="virt",
    arguments=("-cpu", "cortex-a57", "-global", "cpu.start-powered-off=on"),
    ram_size=128 * MiB,
    ram_base=0x40000000,
    # QEMU puts a device tree into the first pages.
    usable=0x40000000 + 2 * MiB,
    memory_base=GPA(0x80000000),
    host=_virt_host,
    iommus={
        "none": NONE,
        "smmuv3": IommuChoice(
            _smmuv3,
            machine="iommu=smmuv3",
            ours={"stage": ("auto", "1", "2")} | _BUS,
            adds=_AROUND | {"stage=2": ("-global", "arm-smmuv3.stage=2")},
            needs={"stage=2": Needs(("-device", "arm-smmuv3,help"), "stage=", _NEWER)},
        ),
        "virtio": VIRTIO_IOMMU,
    },
)

VIRT_MMIO: Final = replace(
    VIRT,
    name="virt-mmio",
    memory_base=None,
    iommus={"none": NONE, "smmuv3": IommuChoice(_smmuv3, machine="iommu=smmuv3")},
    root_port=False,
    controls=(),
    seats=(),
    slots=Slots(base=0x0A000000, step=0x200, count=32),
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


def _sabre(parts: Parts) -> PlatformIommu:
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
    # From 9.1 on this machine's devices offer the bit unless they are told not to ("hw/sparc64: set iommu_platform=on
    # for virtio devices attached to the sun4u machine").
    place={"bus": "pciB", "addr": "1", "disable-legacy": "on", "iommu_platform": "off"},
    ram_is_mapped=False,
    byte_order="big",
    controls=("rtl8139",),
    seats=(1, 2, 3, 0),
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


def _tce(parts: Parts) -> PlatformIommu:
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
    controls=("rtl8139", "edu"),
    debug_stub=True,
    seats=tuple(range(1, 9)),
)

_RISCV_IOMMU: Final = 0x03010000
_RISCV_RAM: Final = 0x80000000


def _riscv_host(bus: QtestBus) -> PciHost:
    windows = Windows(
        bridge_memory=(0x40000000, 0x50000000),
        bridge_io=(0x1000, 0x9000),
        root_memory=(0x50000000, 0x80000000),
        root_io=(0x9000, 0x10000),
        io_offset=0x03000000,
    )
    return EcamHost(bus, 0x30000000, windows)


def _riscv(parts: Parts) -> PlatformIommu:
    options = parts.spec.options
    paging = riscv_iommu.PAGINGS[options.get("paging", "sv39")]
    base = _RISCV_IOMMU if options.get("kind", "sys") == "sys" else _riscv_pci_base(parts)
    return RiscvIommu(parts.bus, parts.ram, parts.tables, _source(parts), base, paging=paging)


def _riscv_pci_base(parts: Parts) -> int:
    """Where the registers of the one that is a PCI function are: its BAR 0, as it was placed."""
    for function in parts.functions:
        if (function.vendor, function.device) == RISCV_IOMMU and 0 in function.places:
            # It reads its own tables and queues by DMA.
            function.write_config(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
            return function.places[0][1]
    raise MachineError("no RISC-V IOMMU on the PCI buses of the machine")


RISCV_VIRT: Final = Board(
    name="riscv-virt",
    binary="qemu-system-riscv64",
    package="qemu-system-riscv",
    suite=_NEWER,
    machine="virt",
    arguments=("-bios", "none", "-global", "cpu.start-powered-off=on"),
    ram_size=128 * MiB,
    ram_base=_RISCV_RAM,
    usable=_RISCV_RAM + 2 * MiB,
    host=_riscv_host,
    iommus={
        "none": NONE,
        "riscv": IommuChoice(
            _riscv,
            machine="aia=aplic-imsic,iommu-sys=on",
            ours={"kind": ("sys", "pci"), "paging": tuple(riscv_iommu.PAGINGS), "place": ("root-bus", "root-port")},
            adds={"kind=pci": ("-machine", "iommu-sys=off", "-device", "riscv-iommu-pci,addr=4")},
            # As for AMD-Vi: QEMU takes the bus number from before the buses were numbered.
            at_root="3",
            needs={"": Needs(("-M", "virt,help"), "iommu-sys=", _NEWER)},
        ),
        "virtio": VIRTIO_IOMMU,
    },
    seats=(),
)

BOARDS: Final[dict[str, Board]] = {board.name: board for board in (Q35, VIRT, VIRT_MMIO, SUN4U, PSERIES, RISCV_VIRT)}


def find_board(name: str) -> Board:
    """A board by name; `UsageError` with the nearest one if there is none."""
    try:
        return BOARDS[name]
    except KeyError:
        raise UsageError.unknown("machine", name, (*BOARDS, "model")) from None
