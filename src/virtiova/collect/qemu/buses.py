# SPDX-License-Identifier: Apache-2.0
"""Where devices are: PCI buses with their slots, virtio-mmio transports, channel devices; given out as QEMU does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from virtiova.collect.qemu import models
from virtiova.collect.qemu.machines import Family

_ADDR: Final = re.compile(r"(?:0x)?0{0,8}([0-9a-f]{1,2})(?:\.(?:0x)?0{0,8}([0-7]))?", re.ASCII | re.IGNORECASE)
_MMIO_BUS: Final = re.compile(r"virtio-mmio-bus\.(\d{1,4})", re.ASCII)
_DEVNO: Final = re.compile(r"([0-9a-f]{1,2})\.([0-3])\.([0-9a-f]{1,4})", re.ASCII | re.IGNORECASE)
_VIRTUAL: Final = 0xFE
"""The channel subsystem that QEMU's own devices are in."""
_PHBS: Final = 6
"""Host bridges of one chip of POWER9."""
_DEVNOS: Final = 1 << 16
_DEEPEST: Final = 64
"""Bridges behind bridges. A PCI segment has 256 buses in all."""


@dataclass(slots=True)
class Bus:
    """One PCI bus. ``chain``: the slots of the bridges on the way from its root bus, whose number is ``root`` in PCI
    domain ``domain``; None where that is not known."""

    name: str
    express: bool = False
    root: int | None = 0
    domain: int | None = 0
    chain: tuple[str, ...] = ()
    bridges_only: bool = False
    around: bool = False
    """Its root bus is led around the IOMMU."""
    used: dict[str, str] = field(default_factory=dict)
    """Who is where, by slot and function."""
    next: int = 0

    @property
    def is_root(self) -> bool:
        """Is it no bus behind a bridge?"""
        return not self.chain

    def take(self, addr: str, who: str) -> str | None:
        """A place for one more device: ``02.0``; None if there is none. ``addr`` as said; empty: the next free slot."""
        if addr:
            match = _ADDR.fullmatch(addr)
            at = f"{int(match[1], 16):02x}.{match[2] or '0'}" if match and int(match[1], 16) < 32 else ""
            if not at or at in self.used:
                return None
            self.used[at] = who
            return at
        # Slots are only ever taken, so that what was full stays full.
        while self.next < 32 and f"{self.next:02x}.0" in self.used:
            self.next += 1
        if self.next >= 32:
            return None
        at = f"{self.next:02x}.0"
        self.used[at] = who
        return at


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a device is. ``place`` as `collect.keys.PLACE` has it, empty where that is not known, with ``why``."""

    place: str = ""
    address: str = ""
    bus: Bus | None = None
    why: str = ""

    @property
    def behind_port(self) -> bool:
        """Is it on a PCI Express bus that is no root bus?"""
        return self.bus is not None and self.bus.express and not self.bus.is_root


class Buses:
    """All buses of one machine."""

    def __init__(
        self,
        family: Family | None,
        *,
        mmio: int | None = None,
        around: bool = False,
        usb: bool = False,
        only: frozenset[str] = frozenset(),
    ):
        """``only``: the root buses that IOMMUs were given to, one each; empty: the IOMMU is in front of all."""
        self._only = only
        around = around or (family is not None and bool(only) and family.root not in only)
        self._named: dict[str, Bus] = {}
        self._expanders: list[Bus] = []
        self._powernv = family is not None and family.name == "powernv"
        self.root: Bus | None = None
        if family is not None and family.root:
            taken = (*family.taken, *(family.usb if usb else ()))
            used = {slot: family.name for slot in taken}
            self.root = self._named[family.root] = Bus(family.root, family.express, around=around, used=used)
            for name, slot in family.bridges.items():
                self._named[name] = Bus(name, False, chain=(slot,), around=around)
        if self._powernv:
            for number in range(_PHBS):
                name = f"pcie.{number}"
                self._named[name] = Bus(name, express=True, domain=number, chain=("00.0",))
        self._mmio = family.mmio if family is not None else None
        self._transports = dict.fromkeys(range(mmio if mmio is not None else self._mmio.count if self._mmio else 0))
        self._devnos: set[int] = set()
        self._devno = 0
        self._zpci = family is not None and family.name.startswith("s390")
        self._uids: set[int] = set()
        self._next_uid = 1
        self._targets: dict[str, int] = {}
        self.unsure = ""
        """A device of a model that is not known here: it may have taken a slot, too."""

    def roots(self) -> list[Bus]:
        """The root buses, the machine's own first."""
        return ([self.root] if self.root is not None else []) + self._expanders

    def pci(self, bus: str, addr: str, who: str, *, identity: str = "", is_bridge: bool = False) -> Seat:
        """A seat on a PCI bus: the one that was named, else the one that QEMU finds first."""
        found = self._find(bus)
        if found is None:
            return Seat(why=f"no bus {bus!r} in this machine" if bus else "the machine's PCI buses are not known here")
        if found.bridges_only and not is_bridge:
            return Seat(bus=found, why=f"{found.name} takes bridges only")
        at = found.take(addr, who)
        if at is None:
            return Seat(bus=found, why=f"no place {addr} on bus {found.name}".replace("place  on", "free place on"))
        if self.unsure and not addr:
            return Seat(bus=found, why=f"{self.unsure} is not known here, and may be in the slot before it")
        return self._on_s390x(found, identity) if self._zpci else _seat(found, at)

    def add_zpci(self, target: str, uid: str) -> None:
        """s390x: what a function is known by, said before the function itself."""
        self._targets[target] = self._uid(uid)

    def _uid(self, said: str = "") -> int:
        try:
            number = int(said, 0)
        except ValueError:
            number = 0
        while not number or number in self._uids:
            number = self._next_uid
            self._next_uid += 1
        self._uids.add(number)
        return number

    def _on_s390x(self, bus: Bus, identity: str) -> Seat:
        """A guest of s390x sees each function in a domain of its own, whose number is its uid."""
        uid = self._targets.pop(identity, 0) if identity else 0
        uid = uid or self._uid()
        # Behind a bridge it is at another slot there.
        return _seat(Bus(bus.name, root=0, domain=uid), "00.0", bus) if bus.is_root else Seat(bus=bus)

    def _find(self, name: str) -> Bus | None:
        if name:
            return self._named.get(name)
        if self._expanders:
            # QEMU searches from the newest child of the system bus.
            return self._expanders[-1]
        return self._named.get("pcie.5") if self._powernv else self.root

    def add_bridge(self, model: str, identity: str, seat: Seat) -> None:
        """The bus behind a bridge that got ``seat``. Without an id QEMU makes up a name, which is not offered here."""
        above = seat.bus
        if above is None or not identity or len(above.chain) >= _DEEPEST:
            return
        slot = seat.place.rpartition("/")[2].rpartition(":")[2]
        chain = (*above.chain, slot or "?")
        express = model in models.PORTS or model in models.SWITCHES
        self._named.setdefault(
            identity,
            Bus(
                identity,
                express=express,
                root=above.root if slot else None,
                domain=above.domain,
                chain=chain,
                around=above.around,
            ),
        )

    def add_expander(self, model: str, identity: str, number: str, *, around: bool) -> None:
        """A root bus of its own, of the number that was said. That of ``pxb`` is behind a bridge."""
        try:
            root: int | None = int(number, 0)
        except ValueError:
            root = None
        name = identity or f"\0{len(self._expanders)}"
        around = around or (bool(self._only) and name not in self._only)
        if model == "pxb":
            bus = Bus(name, root=root, chain=("00.0",), around=around)
        else:
            bus = Bus(name, express=True, root=root, around=around, bridges_only=True)
        self._expanders.append(bus)
        self._named.setdefault(name, bus)

    def add_domain(self, identity: str, index: str) -> None:
        """A further host bridge of pseries: a PCI domain of its own, whose number is its index."""
        domain = int(index) if index.isascii() and index.isdigit() and len(index) < 6 else None
        bus = Bus(f"{identity}.0" if identity else f"\0{len(self._expanders)}", domain=domain)
        self._expanders.append(bus)
        self._named.setdefault(bus.name, bus)

    def mmio(self, bus: str) -> Seat:
        """A virtio-mmio transport: the one that was named, else the last free one."""
        if self._mmio is None:
            return Seat(why="the machine's virtio-mmio transports are not known here")
        match = _MMIO_BUS.fullmatch(bus)
        number = int(match[1]) if match else next(reversed(self._transports), -1) if not bus else -1
        if number not in self._transports:
            return Seat(why=f"no virtio-mmio transport {bus or 'is free'}".rstrip())
        del self._transports[number]
        address = self._mmio.base + number * self._mmio.step
        return Seat(f"mmio:0x{address:x}", f"{address:x}.virtio_mmio")

    def ccw(self, devno: str) -> Seat:
        """A channel device's number, as said, else the first free one of subchannel set 0."""
        if devno:
            match = _DEVNO.fullmatch(devno)
            if match is None:
                return Seat(why=f"devno={devno} is no device number")
            number = int(match[3], 16)
            if int(match[1], 16) == _VIRTUAL and match[2] == "0":
                self._devnos.add(number)
            return self._channel(int(match[1], 16), match[2], number)
        while self._devno in self._devnos:
            self._devno += 1
        if self._devno >= _DEVNOS:
            return Seat(why="no device number is free")
        self._devnos.add(self._devno)
        return self._channel(_VIRTUAL, "0", self._devno)

    @staticmethod
    def _channel(css: int, ssid: str, number: int) -> Seat:
        # A guest calls the channel subsystem for virtual devices its first one.
        return Seat(f"ccw:{css:x}.{ssid}.{number:04x}", f"{0 if css == _VIRTUAL else css:x}.{ssid}.{number:04x}")


def _seat(bus: Bus, at: str, real: Bus | None = None) -> Seat:
    """A place on a bus as both sides of a machine know it, and as Linux prints it where no bridge is on the way."""
    if bus.root is None or bus.domain is None:
        return Seat(bus=real or bus)
    domain = f"{bus.domain:04x}:" if bus.domain else ""
    place = f"{domain}{bus.root:02x}:{'/'.join((*bus.chain, at))}"
    return Seat(f"pci:{place}", f"{bus.domain:04x}:{bus.root:02x}:{at}" if bus.is_root else place, real or bus)
