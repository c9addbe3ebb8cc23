# SPDX-License-Identifier: Apache-2.0
"""QEMU's tree of objects: which there are, and on which buses, by ``qom-list``, ``qom-get`` and ``query-pci``."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from virtiova.collect.asked import Ask, mappings, whole, word
from virtiova.collect.monitor import CommandError

CONTAINERS: Final = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
_CHILD: Final = re.compile(r"child<([\w.-]{1,80})>")
_PATH: Final = re.compile(r"(/[^\x00-\x1f/]{1,120}){1,32}")
_DEPTH: Final = 32
_LINKS: Final = 4096
_NUMBERS: Final = re.compile(r"pxb")


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a PCI function is: its root bus by number and by QEMU's path, and slot.function of each step from there.

    ``bypass``: the root bus is led around the IOMMU (null: not said).
    """

    root: int
    bus: str
    chain: tuple[str, ...]
    bypass: bool | None

    @property
    def place(self) -> str:
        """As `keys.PLACE` has it."""
        return f"pci:{self.root:02x}:" + "/".join(self.chain)


@dataclass(slots=True)
class _Bus:
    root: int
    path: str
    chain: tuple[str, ...]
    bypass: bool | None


@dataclass(slots=True)
class Tree:
    """What is asked of the tree, once each."""

    ask: Ask
    objects: dict[str, str] = field(default_factory=dict)
    """Types of the devices by path: those with a name, those without, and those of the board."""
    roots: dict[str, bool | None] = field(default_factory=dict)
    """The PCI root buses that devices are on, by name, and whether each is led around the IOMMU."""
    _buses: dict[str, _Bus | None] = field(default_factory=dict)
    _pci: list[dict[str, Any]] = field(default_factory=list)
    _addresses: dict[tuple[int, tuple[str, ...]], str] = field(default_factory=dict)

    def look(self) -> None:
        """Take in what there is."""
        for container in CONTAINERS:
            for entry in mappings(self.say("qom-list", path=container)):
                match = _CHILD.fullmatch(word(entry.get("type")))
                name = word(entry.get("name"), 100)
                if match and name and _PATH.fullmatch(f"/{name}"):
                    self.objects[f"{container}/{name}"] = match[1]
        self._pci = mappings(self.say("query-pci"))
        twice = [whole(bus.get("bus"), 256) for bus in self._pci]
        for bus in self._pci:
            number = whole(bus.get("bus"), 256)
            if number is not None and twice.count(number) == 1:  # else there are several domains, which are not told
                for chain, address in _addresses(bus, (), _DEPTH):
                    if len(self._addresses) < _LINKS:
                        self._addresses[number, chain] = address

    def say(self, command: str, **arguments: str | int) -> object:
        """An answer of any form; None where QEMU says no."""
        try:
            return self.ask.ask(command, **arguments)
        except CommandError:
            return None

    def get(self, path: str, name: str) -> object:
        """A property; None where there is none."""
        return self.say("qom-get", path=path, property=name)

    def link(self, path: str, name: str) -> str:
        """A property that is the path of another object; empty where it is none."""
        found = word(self.get(path, name), 1000)
        return found if _PATH.fullmatch(found) else ""

    def of_type(self, *types: str) -> list[str]:
        """The paths of the devices of these types."""
        return [path for path, kind in self.objects.items() if kind in types]

    def spot(self, path: str) -> Spot | None:
        """Where the device of that path is on PCI; None: it is not on PCI, or nothing says where."""
        step = self._step(path)
        bus = self._bus(self.link(path, "parent_bus"), path, _DEPTH) if step else None
        return Spot(bus.root, bus.path, (*bus.chain, step), bus.bypass) if bus and step else None

    def address(self, spot: Spot) -> str:
        """The address that a guest prints, once firmware has numbered the buses; empty before."""
        return self._addresses.get((spot.root, spot.chain), "")

    def _step(self, path: str) -> str | None:
        devfn = whole(self.get(path, "addr"), 256)
        return None if devfn is None else f"{devfn >> 3:02x}.{devfn & 7}"

    def _bus(self, bus: str, below: str, depth: int) -> _Bus | None:
        """A PCI bus by its path, as far as the root. ``below`` is a device that is on it."""
        if not bus or depth <= 0:
            return None
        if bus not in self._buses:
            self._buses[bus] = None
            self._buses[bus] = self._up(bus, below, depth)
        return self._buses[bus]

    def _up(self, bus: str, below: str, depth: int) -> _Bus | None:
        owner = posixpath.dirname(bus)
        step = self._step(owner)
        if step is not None:
            above = self._bus(self.link(owner, "parent_bus"), owner, depth - 1)
            return _Bus(above.root, above.path, (*above.chain, step), above.bypass) if above else None
        bypass = self.get(owner, "bypass-iommu")
        bypass = bypass if isinstance(bypass, bool) else None
        number = self._root(bus, owner, below)
        if number is None:
            return None
        self.roots[posixpath.basename(bus)] = bypass
        return _Bus(number, bus, (), bypass)

    def _root(self, bus: str, owner: str, below: str) -> int | None:
        """The number of a root bus: 0, or what a ``pxb-pcie`` was told."""
        kind = self.objects.get(owner) or word(self.get(owner, "type"))
        if not _NUMBERS.match(kind):
            return 0
        extenders = [path for path, each in self.objects.items() if _NUMBERS.match(each) and not each.endswith("host")]
        # The bus is called as its extender; one without a name has its bus called by QEMU.
        named = [path for path in extenders if posixpath.basename(path) == posixpath.basename(bus)]
        nameless = [path for path in extenders if path.startswith("/machine/peripheral-anon/")]
        chosen = named or (nameless if len(nameless) == 1 else [])
        if chosen:
            return whole(self.get(chosen[0], "bus_nr"), 256)
        name, step = posixpath.basename(below), self._step(below)
        found = [
            whole(each.get("bus"), 256)
            for each in self._pci
            for device in mappings(each.get("devices"))
            if device.get("qdev_id") == name and _step_of(device) == step
        ]
        return found[0] if len(found) == 1 else None


def _addresses(bus: dict[str, Any], above: tuple[str, ...], depth: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Chain and address of each function on a bus of ``query-pci`` and behind its bridges."""
    for device in mappings(bus.get("devices")):
        step, number = _step_of(device), whole(device.get("bus"), 256)
        if step is None or number is None:
            continue
        chain = (*above, step)
        yield chain, f"0000:{number:02x}:{step}"
        bridge = device.get("pci_bridge")
        # Before firmware has numbered it, a bridge's bus is number 0, and what QEMU lists behind it is not there.
        inner = bridge.get("bus") if isinstance(bridge, dict) else None
        if isinstance(bridge, dict) and isinstance(inner, dict) and whole(inner.get("secondary"), 256) and depth > 0:
            yield from _addresses(bridge, chain, depth - 1)


def _step_of(device: dict[str, Any]) -> str | None:
    slot, function = whole(device.get("slot"), 32), whole(device.get("function"), 8)
    return None if slot is None or function is None else f"{slot:02x}.{function}"
