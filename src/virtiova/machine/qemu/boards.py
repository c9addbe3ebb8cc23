# SPDX-License-Identifier: Apache-2.0
"""The boards: which QEMU, how its processor is kept quiet, where its RAM and its PCI are, which IOMMUs it can have.

One row a board. How an IOMMU is programmed is the platform's business (`virtiova.iommu`); how it gets into the
machine is said here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtiova.addr import GPA
from virtiova.dma.ops import DirectOps
from virtiova.driver.iommu import IommuDriver
from virtiova.errors import MachineError, UsageError
from virtiova.features import DeviceId
from virtiova.iommu.amdvi import AmdViIommu, AmdViUnit
from virtiova.iommu.aside import AsideIommu
from virtiova.iommu.none import NoIommu
from virtiova.iommu.riscv import RiscvIommu, RiscvUnit
from virtiova.iommu.sabre import SabreIommu
from virtiova.iommu.smmuv3 import Smmuv3Iommu, Smmuv3Unit
from virtiova.iommu.tce import TceIommu
from virtiova.iommu.unit import PlatformIommu
from virtiova.iommu.virtio import VirtioIommu, VirtioUnit
from virtiova.iommu.vtd import VtdIommu, VtdUnit
from virtiova.machine.qemu.board import BYPASS_BUS, Board, IommuChoice, MiB, Needs, Parts
from virtiova.machine.qemu.bus import QtestBus
from virtiova.machine.qemu.pci import RISCV_IOMMU
from virtiova.machine.qemu.pci_host import EcamHost, PciHost, Q35Host, Windows
from virtiova.machine.qemu.spapr import RtasHost, SpaprCpu
from virtiova.transport.ats import Ats, find_ats
from virtiova.transport.mmio import Slots
from virtiova.transport.pci import open_transport
from virtiova.wire import pci, riscv_iommu

_VTD_BASE: Final = 0xFED90000
_AMDVI_BASE: Final = 0xFED80000
_SMMU_BASE: Final = 0x09050000
_NEWER: Final = "bookworm-backports"
"""Where Debian 12 has a QEMU of later years: 10.0 at this time."""


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
    return AsideIommu(iommu, present=True) if parts.spec.on(BYPASS_BUS) else iommu


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
            around = parts.spec.on(BYPASS_BUS) or parts.around
            return _on_its_bus(parts, VirtioIommu(VirtioUnit(driver), source, around=around))
    raise MachineError("no virtio-iommu on the PCI buses of the machine")


_BUS: Final[dict[str, tuple[str, ...]]] = {BYPASS_BUS: ("off", "on")}
_AROUND: Final[dict[str, tuple[str, ...]]] = {f"{BYPASS_BUS}=on": ("-machine", "default-bus-bypass-iommu=on")}
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
    unit = RiscvUnit(parts.bus, parts.ram, parts.tables, base, paging=paging)
    return RiscvIommu(unit, _source(parts))


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
        "virtio": replace(VIRTIO_IOMMU, ours={}, adds={}),
    },
    # Neither default-bus-bypass-iommu nor, in QEMU 10.0, pxb-pcie.
    led_around=False,
)

BOARDS: Final[dict[str, Board]] = {board.name: board for board in (Q35, VIRT, VIRT_MMIO, SUN4U, PSERIES, RISCV_VIRT)}


def find_board(name: str) -> Board:
    """A board by name; `UsageError` with the nearest one if there is none."""
    try:
        return BOARDS[name]
    except KeyError:
        raise UsageError.unknown("machine", name, (*BOARDS, "model")) from None
