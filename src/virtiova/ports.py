# SPDX-License-Identifier: Apache-2.0
"""The ports: the only things that an experiment, or a driver, sees of a machine.

Whoever implements them - QEMU over qtest, the in-process model, a vhost-user socket, what the kernel hands over -
runs every experiment unchanged. If an experiment needs to know which one it is on, a port is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from virtiova.addr import GPA, IOVA, Access
from virtiova.dma.ram import ByteOrder, PageAllocator, Ram

__all__ = [
    "Access",
    "BusMaster",
    "Fault",
    "Iommu",
    "Machine",
    "Mmio",
    "Msi",
    "PciFunction",
    "Peer",
    "Ram",
    "Transport",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault record, decoded. ``raw`` holds the record's words as the hardware wrote them."""

    address: int
    """The faulting address as recorded: some IOMMUs keep the page only; -1 if not recorded."""
    write: bool | None
    """Was it a write of the device? None if not recorded."""
    source: int
    """PCI requester id, bus << 8 | devfn; -1 if not recorded."""
    reason: str
    raw: tuple[int, ...]


class Iommu(Protocol):
    """A platform's IOMMU, programmed from outside, for the one device under test.

    Addresses and sizes are multiples of ``page_size``. Nothing is cached by the implementation: `map`
    and `unmap` change the tables only; what a device may still see is ended by `invalidate`.
    """

    name: str
    """As in the output: ``none``, ``intel``, ``amd``, ``virtio``, ``soft``."""
    present: bool
    """Whether there is an IOMMU for devices of this kind at all. Without one, no control can show anything."""
    in_front: bool
    """Whether the machine put it in front of the device under test, and did not lead its bus around it."""
    caches: bool
    """Whether a device may use a mapping until `invalidate`, although it is gone from the tables."""
    page_size: int
    """Bytes of the pages that it maps: a power of two, 4096 at least."""
    write_only: bool
    """Whether a mapping can allow writing without reading. If not, `map` raises `AccessError` for that."""
    can_be_off: bool
    """Whether `disable` exists: some IOMMUs know no state in which addresses go through as they are."""

    shared: bool
    """Whether all devices behind it share one table: what is mapped for one is then mapped for all."""

    @property
    def own_bit33(self) -> tuple[bool, bool] | None:
        """Bit 33 of the IOMMU itself, offered and accepted, if it is a virtio device: mappings, and the addresses that
        they lead to, then travel in requests on its virtqueue. None if it is no such device."""

    def enable(self) -> None:
        """Start to translate, with whatever is mapped. On and off may be one state for all devices behind it."""

    def disable(self) -> None:
        """Stop to translate: addresses go through as they are. `NotPossibleError` unless ``can_be_off``."""

    def map(self, iova: IOVA, gpa: GPA, size: int, access: Access = Access.RW) -> None:
        """Point ``iova`` at ``gpa``; an existing mapping there is replaced."""

    def unmap(self, iova: IOVA, size: int) -> None:
        """Take a mapping out of the tables."""

    def invalidate(self) -> None:
        """End every use of mappings that are no longer in the tables."""

    def faults(self) -> list[Fault]:
        """The fault records since the last call, oldest first; reading clears them."""

    def allocate(self, size: int) -> IOVA:
        """An unused IOVA range, never equal to an address of RAM."""


class Msi(Protocol):
    """A device's interrupts as messages, pointed at memory so that they can be seen."""

    name: str
    """Who writes the message: ``msi-x``, the device itself; ``call``, its machine, once the device has called."""

    def arm(self, vector: int, address: int, data: int) -> None:
        """Let ``vector`` write the 32-bit ``data`` to ``address``, and enable it."""

    def disarm(self) -> None:
        """Disable all vectors."""


class PciFunction(Protocol):
    """One PCI function: its configuration space and its BARs. Values are little-endian registers.

    Writes are posted, as on a real bus: they happen in order, and are done when a read returns or `flush` does.
    """

    source: int
    """Requester id: bus << 8 | devfn."""

    def read_config(self, offset: int, size: int) -> int:
        """A register of 1, 2 or 4 bytes."""

    def write_config(self, offset: int, size: int, value: int) -> None: ...

    def config(self) -> bytes:
        """The first 256 bytes of the configuration space."""

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """A register of 1, 2, 4 or 8 bytes in a BAR (I/O: up to 4)."""

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None: ...

    def flush(self) -> None:
        """Wait until all writes are done."""


class Mmio(Protocol):
    """Memory-mapped registers of the machine, little-endian. Writes are posted, reads and `flush` wait for them."""

    def read(self, address: int, size: int) -> int: ...

    def write(self, address: int, size: int, value: int) -> None: ...

    def flush(self) -> None: ...


class BusMaster(Protocol):
    """A device's permission to do DMA at all (PCI: COMMAND bit 2)."""

    def set_bus_master(self, on: bool) -> None:
        """Give or take the permission."""


class Transport(Protocol):
    """How a driver reaches one virtio device's registers."""

    device_id: int
    """Virtio device type: 1 net, 2 blk, 4 rng (virtio 1.4, 5)."""
    legacy: bool
    """The legacy interface: 32 feature bits, no FEATURES_OK, rings in guest byte order."""
    byte_order: ByteOrder
    """Of rings and device configuration, as the features that the driver took make it."""
    msi: Msi | None
    bus_master: BusMaster | None

    @property
    def confirms(self) -> bool:
        """Whether FEATURES_OK has an answer: not on the legacy interface, nor where there is nobody to give one."""

    def reset(self) -> None:
        """Write status 0 and wait until it reads 0."""

    def read_features(self) -> int:
        """The bits that the device offers."""

    def write_features(self, bits: int) -> None:
        """The bits that the driver takes."""

    def read_status(self) -> int: ...

    def write_status(self, status: int) -> None: ...

    def queue_size(self, index: int) -> int:
        """The largest size of a queue; 0 if it does not exist. Legacy: the only size."""

    def enable_queue(self, index: int, size: int, desc: int, avail: int, used: int, vector: int | None) -> None:
        """Hand the ring addresses over; of a packed ring the descriptor ring, the driver's event suppression and the
        device's. Legacy takes only the layout with ``used`` at the next 4096."""

    def notify(self, index: int) -> None:
        """Kick the queue. All earlier RAM and register writes are done by then."""

    def read_config(self, offset: int, length: int) -> bytes:
        """Bytes of the device-specific configuration."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the device-specific configuration; which of them a device takes is its own matter."""


class Peer(Protocol):
    """The world on the other side of the device: a disk image, a network. The driver's counterpart.

    ``reach`` says whose it is. ``own``: ours, to be looked at. ``echo``: somebody else's, which we may change and see
    through the device only: a disk that is read back, a network that returns every frame. ``none``: out of reach.
    """

    reach: Literal["own", "echo", "none"]
    kept: dict[int, bytes]
    """What a disk that is somebody else's held, by sector, before we wrote there."""

    def send(self, data: bytes) -> None:
        """Hand the device something that it will pass to the driver (a network frame)."""

    def received(self) -> list[bytes]:
        """What the device has passed on since the last call, without waiting (network frames)."""

    def stored(self, offset: int, length: int) -> bytes:
        """What the device has stored (bytes of the disk image, or of persistent memory)."""

    def shown(self) -> bytes:
        """What the device shows on its screen: a picture as a portable pixmap (PPM, format P6)."""


class Machine(Protocol):
    """A machine with one device under test behind (or not behind) an IOMMU."""

    name: str
    """As in the output: ``q35``, ``model``."""
    device: str
    """The device as the machine calls it, e.g. ``virtio-blk-pci``."""
    insists: bool | None
    """Whether this product is known to refuse a driver that does not take an offered bit 33; None: not known."""
    bridged: bool
    """Whether the device is behind a bridge, on another bus than the root's."""
    vhost: bool
    """Whether its rings are served outside of the machine, by a back end of which the machine is the front end."""
    pass_through: bool
    """Whether the IOMMU was told, when the machine was made, that it may let addresses through (``pt=on``)."""
    hardware: bool
    """Whether the device is a physical one: its DMA passes the physical IOMMU, whatever it says."""
    ram: Ram
    pages: PageAllocator
    iommu: Iommu
    transport: Transport | None
    """None for a machine that holds only the control device."""
    peer: Peer

    @property
    def product(self) -> str:
        """Who made the device end, with its version, e.g. ``QEMU 7.2.22``: known departures are looked up by it."""

    @property
    def gave_up(self) -> str:
        """What the machine said when it gave the device up, as it could not reach what the driver had set up; empty
        if it did not, or if that may have had another reason."""

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Let the device work until ``done()`` is true; False if it is not after ``seconds``."""

    def words(self) -> Sequence[str]:
        """What the machine itself had to say so far (stderr lines), for the evidence."""

    def close(self) -> None:
        """Stop it and leave nothing behind. May be called more than once."""
