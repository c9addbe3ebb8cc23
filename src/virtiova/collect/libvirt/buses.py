# SPDX-License-Identifier: Apache-2.0
"""PCI controllers of a domain, and the addresses of its devices, as libvirt tells them to QEMU."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from virtiova.collect.libvirt.argv import Argv, Frontend
from virtiova.collect.libvirt.xml import Element

_NUMBER: Final = re.compile(r"0x[0-9a-f]{1,8}|[0-9]{1,9}", re.ASCII | re.IGNORECASE)
_ADDR: Final = re.compile(r"""\baddr(?:=|"\s*:\s*")(?:0x)?([0-9a-f]{1,2})\b""", re.ASCII | re.IGNORECASE)
_MODELS: Final = {
    "pcie-root-port": "pcie-root-port",
    "pcie-switch-upstream-port": "x3130-upstream",
    "pcie-switch-downstream-port": "xio3130-downstream",
    "pcie-to-pci-bridge": "pcie-pci-bridge",
    "dmi-to-pci-bridge": "i82801b11-bridge",
    "pci-bridge": "pci-bridge",
    "pcie-expander-bus": "pxb-pcie",
    "pci-expander-bus": "pxb",
    "pci-root": "spapr-pci-host-bridge",
}
_DEEPEST: Final = 64
_VGAS: Final = frozenset({"virtio-vga", "virtio-vga-gl", "vhost-user-vga"})
SPARE: Final = "virtiova."
"""The ids of ports that stand for those that libvirt is yet to make."""


def number(text: str) -> int | None:
    """A number as libvirt writes it, decimal or hexadecimal; None: it is none."""
    return int(text, 16 if text[:2].lower() == "0x" else 10) if _NUMBER.fullmatch(text) else None


def alias(element: Element, default: str) -> str:
    """The name that QEMU knows a device by: the alias that is written, else what libvirt would call it."""
    return (element.said("alias", "name") or default)[:128]


class Buses:
    """The PCI buses of a domain by the indexes of their controllers."""

    def __init__(self, argv: Argv, *, express: bool, exists: bool, chipset: bool) -> None:
        self._argv = argv
        self.express, self.exists, self.chipset = express, exists, chipset
        self._root = "pcie.0" if express else "pci.0"
        self._controllers: dict[int, Element] = {}
        self._made: dict[int, tuple[str, bool]] = {}
        self._busy: set[int] = set()
        self._used: set[int] = set()
        self._said: frozenset[int] = frozenset()
        self._ports = self._loose = self._bridged = 0
        self._switch = self._bridge = self._hub = ""

    def read(self, devices: Element, passed: Sequence[Element]) -> None:
        """Make all controllers, each after the one that it is plugged into. ``passed``: the words for QEMU itself,
        whose addresses are taken, too."""
        self._used.update(int(slot, 16) for word in passed for slot in _ADDR.findall(word.get("value")))
        for element in devices.all("controller"):
            if element.get("type") == "pci":
                index = number(element.get("index", "0"))
                if index is None:
                    self._argv.problem(element.line_of("index"), "a controller's index is no number")
                else:
                    self._controllers.setdefault(index, element)
        for element in devices:
            at = _pci(element)
            if at is not None and number(at.get("bus", "0")) == 0:
                self._used.add(number(at.get("slot", "0")) or 0)
        self._said = frozenset(self._used)
        self._used.update((1, 2))
        for index in sorted(self._controllers):
            self._bus(index, 0)

    def name_of(self, index: int) -> str:
        """The name of a bus."""
        return self._bus(index, 0)[0]

    def _bus(self, index: int, line: int) -> tuple[str, bool]:
        """The bus of a controller: its name, and whether the file says where it is."""
        if index in self._made:
            return self._made[index]
        element = self._controllers.get(index)
        if index == 0 and (element is None or element.get("model", "pci-root") in ("pci-root", "pcie-root")):
            self._made[0] = (self._root, True)
        elif element is None:
            # Where an address names a bus that is not there, libvirt makes one.
            self._made[index] = (self._port() if self.express else self._conventional(), False)
        elif index in self._busy or len(self._busy) >= _DEEPEST:
            words = "plugged into itself" if index in self._busy else f"more than {_DEEPEST} bridges deep"
            self._argv.problem(element.line, f"controller {index} is {words}")
            return self._root, False
        else:
            self._busy.add(index)
            self._made[index] = self._controller(index, element)
            self._busy.discard(index)
        return self._made[index]

    def _controller(self, index: int, element: Element) -> tuple[str, bool]:
        model = element.get("model") or ("pcie-root-port" if self.express else "pci-bridge")
        driver = element.said("model", "name") or _MODELS.get(model, "")
        if not driver:
            self._argv.problem(element.line_of("model"), f"PCI controller {model[:40]!r} is not known here")
            return f"pci.{index}", False
        made = Frontend(driver, alias(element, f"pci.{index}"), element.line)
        if driver in ("pxb", "pxb-pcie"):
            busy = number(element.said("target", "busNr"))
            made.properties["bus_nr"] = "?" if busy is None else str(busy)
        address = element.find("address")
        placed = address is not None and address.get("type", "pci") == "pci"
        if address is not None and placed:
            placed = self._put(made, address)
        elif driver == "spapr-pci-host-bridge":
            self._argv.device(made)
            return f"{made.id}.0", True
        else:
            self._anywhere(made, port=driver != "pci-bridge" and self.express)
        self._argv.device(made)
        # The root bus of an expander has the number that is said, wherever the expander itself is.
        return made.id, placed or "bus_nr" in made.properties

    def put(self, made: Frontend, element: Element, *, conventional: bool = False) -> None:
        """Put a device where its element says; else where libvirt will: behind a port of its own, if there are such."""
        address = element.find("address")
        if (address is None or address.get("type") != "pci") and made.driver in _VGAS and self.chipset:
            # The primary display has the first slot beside the chip set, unless somebody else was put there.
            slot = 1 if self.express else 2
            made.placed = slot not in self._said
            made.properties |= {"bus": self._root, "addr": f"0x{slot:x}" if made.placed else self._free()}
        elif address is None or address.get("type") != "pci":
            made.placed = False
            self._anywhere(made, port=self.express and not conventional)
        else:
            made.placed = self._put(made, address)

    def _put(self, made: Frontend, address: Element) -> bool:
        at = [number(address.get(key, "0")) for key in ("bus", "slot", "function")]
        if any(each is None for each in at):
            self._argv.problem(address.line, "no PCI address")
            return False
        bus, slot, function = (each or 0 for each in at)
        name, placed = self._bus(bus, address.line_of("bus"))
        zpci = address.find("zpci")
        uid = number(zpci.get("uid")) if zpci is not None else None
        if zpci is not None and uid is not None:
            # On s390x a guest knows a function by a number of its own.
            about = {"driver": "zpci", "uid": uid, "target": made.id, "id": f"zpci{uid}"}
            self._argv.option("device", json.dumps(about), zpci.line_of("uid"))
        made.set("bus", name, address.line_of("bus"))
        made.set("addr", f"0x{slot:x}.{function}" if function else f"0x{slot:x}", address.line_of("slot"))
        return placed

    def _anywhere(self, made: Frontend, *, port: bool) -> None:
        if port:
            made.properties["bus"] = self._port()
            made.properties["addr"] = "0x0"
        elif self.express or self._loose + len(self._used) >= 26:
            made.properties["bus"] = self._conventional()
        else:
            self._loose += 1
            self.on_root(made)

    def on_root(self, made: Frontend) -> None:
        """A slot of the root bus, as nobody said which."""
        made.placed = False
        made.properties |= {"bus": self._root, "addr": self._free()}

    def _free(self) -> str:
        """A slot of the root bus that nobody said, for what stands in."""
        slot = next((each for each in range(30, 0, -1) if each not in self._used), 30)
        self._used.add(slot)
        return f"0x{slot:x}"

    def _port(self) -> str:
        """A port of one slot, as libvirt adds them. All are below one switch here: that they are ports counts."""
        if self._ports % 256 == 0:
            self._switch = f"{SPARE}switch{self._ports // 256}"
            self._stand_in("x3130-upstream", self._switch, self._root, self._free())
        slot, function = divmod(self._ports % 256, 8)
        self._ports += 1
        name = f"{SPARE}{self._ports}"
        self._stand_in("xio3130-downstream", name, self._switch, f"0x{slot:x}.{function}")
        return name

    def _conventional(self) -> str:
        """A conventional bus behind a bridge, with a slot that is free."""
        model = "pcie-pci-bridge" if self.express else "pci-bridge"
        which, used = divmod(self._bridged, 24)
        if used == 0:
            if which % 24 == 0:
                # Bridges are behind a bridge, and the next such one in its last slot: that there is one is what counts.
                above, slot = (self._hub, "0x1f") if self._hub else (self._root, self._free())
                self._hub = f"{SPARE}hub{which}"
                self._stand_in(model, self._hub, above, slot)
            self._bridge = f"{SPARE}bridge{which}"
            self._stand_in(model, self._bridge, self._hub, f"0x{which % 24 + 1:x}")
        self._bridged += 1
        return self._bridge

    def _stand_in(self, driver: str, name: str, bus: str, addr: str) -> None:
        properties: dict[str, str | bool] = {"bus": bus, "addr": addr}
        self._argv.device(Frontend(driver, name, 0, properties, implied=True, placed=False))


def _pci(element: Element) -> Element | None:
    address = element.find("address")
    return address if address is not None and address.get("type") == "pci" else None
