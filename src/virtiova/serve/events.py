# SPDX-License-Identifier: Apache-2.0
"""What a session tells its host: values, one for each thing that the front end wants, whatever it speaks.

Whoever takes an event owns the descriptors in it. Every event but `Refused` has a ``token``, for
`Session.acknowledge` or, where a docstring says so, `Session.answer`.
"""

from __future__ import annotations

from dataclasses import dataclass

from virtiova.dma.shared import PLAIN, Terms
from virtiova.wire.vhost_user import InflightDescription, IotlbMessage, LogDescription, MemoryRegion, VringAddr


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all of them."""

    token: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A message that was answered with a failure, or had to be ignored: why, and the descriptors to close."""

    request: int
    reason: str
    fds: tuple[int, ...] = ()


# -- negotiation


@dataclass(frozen=True, slots=True)
class FeaturesSet(Event):
    """``features`` are accepted from here on. May come again while rings run: the dirty log goes on or off."""

    features: int


@dataclass(frozen=True, slots=True)
class ProtocolFeaturesSet(Event):
    """``features`` of the protocol are agreed upon."""

    features: int


@dataclass(frozen=True, slots=True)
class BackendChannel(Event):
    """``fd`` is the socket on which the back end asks."""

    fd: int


@dataclass(frozen=True, slots=True)
class StatusSet(Event):
    """The driver wrote the device status; 0 is a reset."""

    status: int


@dataclass(frozen=True, slots=True)
class DeviceReset(Event):
    """All rings stop and the device is as after power-on; what was negotiated stays (RESET_DEVICE)."""


@dataclass(frozen=True, slots=True)
class RingsDisabled(Event):
    """RESET_OWNER, which has to mean this much at most (QEMU's ``docs/interop/vhost-user.rst``): the rings rest."""


@dataclass(frozen=True, slots=True)
class NewOwner(Event):
    """A second SET_OWNER on one connection: another device of the front end's, which starts from nothing.

    QEMU keeps the connection when it unplugs a device, takes no memory back, and gives it all again to the next one.
    """


# -- memory


@dataclass(frozen=True, slots=True)
class MemoryTable(Event):
    """All of the guest's memory, in place of what there was; ``fds`` in the order of ``regions``."""

    regions: tuple[MemoryRegion, ...]
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RegionAdded(Event):
    """One more region of memory, in the file ``fd``, on ``terms``: what may be done there, who says how long it is."""

    region: MemoryRegion
    fd: int
    terms: Terms = PLAIN


@dataclass(frozen=True, slots=True)
class RegionRemoved(Event):
    """One region less. ``fds`` may come along, and mean nothing."""

    region: MemoryRegion
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class IotlbUpdated(Event):
    """A mapping, asked for or not, in place of what was there."""

    message: IotlbMessage


@dataclass(frozen=True, slots=True)
class IotlbInvalidated(Event):
    """Addresses to forget. The acknowledgement promises that no access through the old mapping will happen."""

    message: IotlbMessage


# -- rings


@dataclass(frozen=True, slots=True)
class RingEvent(Event):
    """Base of what is about one ring, which exists."""

    index: int


@dataclass(frozen=True, slots=True)
class RingSize(RingEvent):
    """Entries of a ring: a power of two."""

    size: int


@dataclass(frozen=True, slots=True)
class RingBase(RingEvent):
    """The available index to go on from, below 2**16; of a packed ring the wrap counter is in bit 15."""

    base: int


@dataclass(frozen=True, slots=True)
class RingAddress(RingEvent):
    """Where a ring is."""

    address: VringAddr


@dataclass(frozen=True, slots=True)
class RingKick(RingEvent):
    """The ring starts; its kicks come by ``fd`` (None: there are none, look by yourself)."""

    fd: int | None


@dataclass(frozen=True, slots=True)
class RingCall(RingEvent):
    """The driver is told by ``fd`` (None: not at all)."""

    fd: int | None


@dataclass(frozen=True, slots=True)
class RingErr(RingEvent):
    """The front end is told of a broken ring by ``fd`` (None: not at all)."""

    fd: int | None


@dataclass(frozen=True, slots=True)
class RingEnabled(RingEvent):
    """A ring may be served, or not for now."""

    enabled: bool


@dataclass(frozen=True, slots=True)
class RingAsked(RingEvent):
    """Where does the ring stand? It goes on. Answer as for `RingStopped`."""


@dataclass(frozen=True, slots=True)
class RingStopped(RingEvent):
    """The ring stops. Answer with a `VringState` of its available index."""


# -- the rest


@dataclass(frozen=True, slots=True)
class ConfigRead(Event):
    """Answer with a `ConfigSpace` of ``size`` bytes at ``offset``; with an empty one if they do not exist."""

    offset: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class ConfigWritten(Event):
    """The driver wrote its configuration (``flags`` 0) or a migration restores it (1)."""

    offset: int
    data: bytes
    flags: int


@dataclass(frozen=True, slots=True)
class InflightWanted(Event):
    """Answer with an `InflightDescription` and the descriptor of a file for it."""

    wanted: InflightDescription


@dataclass(frozen=True, slots=True)
class InflightSet(Event):
    """The file of an earlier back end, with what it left unfinished."""

    description: InflightDescription
    fd: int


@dataclass(frozen=True, slots=True)
class LogSet(Event):
    """The dirty log. Answer with an empty number."""

    description: LogDescription
    fd: int


@dataclass(frozen=True, slots=True)
class LogNotice(Event):
    """``fd`` is to be told when the dirty log changes."""

    fd: int | None
