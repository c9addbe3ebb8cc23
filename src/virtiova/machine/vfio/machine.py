# SPDX-License-Identifier: Apache-2.0
"""A device that is bound to vfio-pci, as a machine (`ports.Machine`): the IOMMU and the device are the real ones."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from virtiova.dma.space import MediatedSpace
from virtiova.errors import UsageError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, Feature, has
from virtiova.machine.backend import KINDS
from virtiova.machine.model_transport import ModelMsi
from virtiova.machine.vfio.container import Opened, full_address
from virtiova.machine.vfio.faults import KernelLog
from virtiova.machine.vfio.function import VfioFunction
from virtiova.machine.vfio.interrupts import Interrupts
from virtiova.machine.vfio.iommu import VfioIommu
from virtiova.machine.vfio.limits import Limits
from virtiova.machine.vfio.memory import PhysicalMemory
from virtiova.machine.vhost_user.connection import BackEndPeer
from virtiova.ports import Iommu, PciFunction, Peer, Ram, Transport
from virtiova.transport.pci import ModernPci
from virtiova.wire import pci

_NAP: Final = 0.001
_HYPERVISOR: Final = " hypervisor"


@dataclass(frozen=True, slots=True)
class VfioDevice:
    """A device that VFIO hands over (`machine.handed.Handed`). ``write``: its disk may be changed; ``echo``: its
    network sends back each frame; ``i_know``: it may be one that goes around the IOMMU; ``product``: its name and
    version, for who knows more than the device's numbers say."""

    machine: ClassVar[str] = "vfio"
    iommu: ClassVar[str] = VfioIommu.name

    address: str
    write: bool = False
    echo: bool = False
    i_know: bool = False
    product: str = ""

    @property
    def place(self) -> str:
        """Its address in full."""
        return full_address(self.address)

    def check(self) -> None:
        """`UsageError` for what is no PCI address."""
        full_address(self.address)

    def open(self, *, packed: bool = False) -> VfioMachine:
        """Have it from the kernel."""
        return VfioMachine(self, packed=packed)

    def look(self) -> str:
        """What the device is called; it does no DMA for that. `UsageError` for one that does not offer bit 33, unless
        ``i_know``: nothing that is mapped or not keeps such a device from any byte of memory."""
        with self.open() as machine:
            if not machine.offers_bit33 and not self.i_know:
                raise UsageError(
                    f"{machine.address} ({machine.device}) does not offer bit 33: it takes physical addresses and goes "
                    "around the IOMMU, so that whoever drives it from user space reaches all of memory, with no "
                    "mapping at all. --i-know lets it loose all the same, on memory of ours"
                )
            return machine.device


class VfioMachine:
    """One device at a PCI address. Use it as a context manager: the device is reset when it ends. ``packed``: the
    driver is offered packed rings if the device offers them. Raises `NotPossibleError` with what
    is missing, and the command that supplies it; `UsageError` for what is no virtio device.
    """

    name = "vfio"
    bridged = False
    vhost = False
    pass_through = False
    gave_up = ""
    insists: bool | None = None

    def __init__(self, handed: VfioDevice, *, packed: bool = False) -> None:
        self._cleanup = contextlib.ExitStack()
        self._product = handed.product
        try:
            self._open(handed, packed=packed)
        except BaseException:
            self.close()
            raise

    def _open(self, handed: VfioDevice, *, packed: bool) -> None:
        opened = Opened(handed.address)
        self._cleanup.callback(opened.close)
        function = self._function = VfioFunction(opened.device, opened.address)
        config = function.config()
        _virtio(opened.address, config)
        function.reset()
        function.write_config(pci.COMMAND, 2, pci.COMMAND_MEMORY)
        limits = Limits(opened.container)
        memory = self._memory = PhysicalMemory(limits.holds)
        self._cleanup.callback(memory.close)
        self.log = KernelLog(function.source)
        self._cleanup.callback(self.log.close)
        self.ram: Ram = memory.ram
        self.pages = memory.pages
        tables = VfioIommu(opened.container, limits, memory, self.log)
        self.iommu: Iommu = tables
        self.registers = _Registers(function, config, packed=packed)
        # Nothing that the device does may go on once its memory is somebody else's.
        self._cleanup.callback(self._quiet)
        self.interrupts = Interrupts(
            opened.device, msix=pci.msix_cap(config) is not None, acknowledge=self.registers.read_isr
        )
        self._cleanup.callback(self.interrupts.close)
        self._messages = ModelMsi(MediatedSpace(memory.ram, tables), "call")
        # The message that an experiment points at memory is ours to write, once the device has signalled.
        self.registers.msi = self._messages if self.interrupts.kind else None
        self.registers.vectors = self.interrupts.kind == "msi-x"
        self.transport: Transport | None = self.registers
        kinds: dict[int, str] = {number: kind for kind, number in KINDS.items()}
        self.kind = kinds.get(self.registers.device_id, "")
        self.device = f"virtio-{self.kind or self.registers.device_id}"
        self.address = opened.address
        self.hardware = not in_a_machine()
        ours = {"blk": handed.write, "net": handed.echo}.get(self.kind, False)
        self.peer: Peer = BackEndPeer("echo" if ours else "none")

    @property
    def offers_bit33(self) -> bool:
        """Whether the device offers bit 33. It is reset for the question."""
        self.registers.reset()
        return has(self.registers.read_features(), VIRTIO_F_ACCESS_PLATFORM)

    def _quiet(self) -> None:
        """Reset the device, and take its permission to do DMA away."""
        with contextlib.suppress(Exception):
            self.registers.reset()
        with contextlib.suppress(Exception):
            self._function.write_config(pci.COMMAND, 2, 0)

    @property
    def product(self) -> str:
        """Who made the device; where nobody knows, its vendor's numbers are all that there is."""
        if self._product:
            return self._product
        config = self._function.config()
        return f"pci {config[0x2C + 1]:02x}{config[0x2C]:02x}:{config[0x2E + 1]:02x}{config[0x2E]:02x}"

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Look at memory now and then, and whenever the device has signalled."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return done()
            ready, _, _ = select.select([self.interrupts.fd], [], [], min(left, _NAP))
            if ready and self.interrupts.taken():
                self._messages.fire(0)
        return True

    def words(self) -> list[str]:
        """What the kernel logged of it."""
        return list(self.log.words)

    def close(self) -> None:
        """Reset the device, let go of it. May be called more than once."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Registers(ModernPci):
    """The device's, without the offer of packed rings unless somebody asks for them."""

    vectors = True
    """Has it MSI-X? Else there is no vector to be named."""

    def __init__(self, function: PciFunction, config: bytes, *, packed: bool) -> None:
        super().__init__(function, config)
        self._kept_back = 0 if packed else 1 << Feature.RING_PACKED
        self._isr = pci.virtio_caps(config).get(pci.ISR)

    def read_features(self) -> int:
        """The bits that the device offers."""
        return super().read_features() & ~self._kept_back

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        """As the other's, without a vector where there is none."""
        super().enable_queue(index, size, desc, avail, used, vector if self.vectors else None)

    def read_isr(self) -> int:
        """Why the device holds its interrupt line; it lets go of it (virtio 1.4, 4.1.4.5)."""
        return self._function.read_bar(self._isr.bar, self._isr.offset, 1) if self._isr is not None else 0


def _virtio(address: str, config: bytes) -> None:
    """`UsageError` for what is no virtio device, or one from before version 1."""
    vendor, device = (int.from_bytes(config[at : at + 2], "little") for at in (0, 2))
    if vendor != pci.VENDOR_VIRTIO:
        raise UsageError(f"{address} ({vendor:04x}:{device:04x}) is no virtio device")
    if pci.COMMON not in pci.virtio_caps(config):
        raise UsageError(
            f"{address} ({vendor:04x}:{device:04x}) has no modern interface: it cannot offer bit 33, takes physical "
            "addresses, and is not driven here"
        )


def in_a_machine() -> bool:
    """Is this a virtual machine? Its devices are somebody's program, and not behind the IOMMU by their wiring."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return any(line.startswith("flags") and f"{_HYPERVISOR} " in f"{line.rstrip()} " for line in file)
    return False
