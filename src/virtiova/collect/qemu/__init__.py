# SPDX-License-Identifier: Apache-2.0
"""A QEMU command line: what it says of the machine and of each virtio device, and what QEMU adds where it is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device, View, ViewKind
from virtiova.collect.linux.units import told
from virtiova.collect.qemu import iommus, machines, models
from virtiova.collect.qemu.backends import BackEnds
from virtiova.collect.qemu.buses import Buses, Seat
from virtiova.collect.qemu.create import Made, made
from virtiova.collect.qemu.iommus import place_of
from virtiova.collect.qemu.keyvals import switch
from virtiova.collect.qemu.models import Model
from virtiova.collect.qemu.options import CommandLine, Option, Reader, parse
from virtiova.collect.qemu.platform import default_properties, put_platform
from virtiova.collect.qemu.properties import Properties
from virtiova.collect.qemu.words import words_of
from virtiova.result.scan import Place

__all__ = ["collect", "words_of"]

_PROBLEMS: Final = 64
_NAME: Final = 200
_HELP: Final = ("", "help", "?")


def collect(words: Sequence[str], place: Place, *, read: Reader | None = None, version: str = "") -> View:
    """All that a command line says. ``place`` is where it was read, ``read`` gives the files that it names
    (``-readconfig``), ``version`` is QEMU's where that is known.

    Raises `UsageError` where the words are no QEMU command, and `ProtocolError` where no QEMU would take them.
    """
    return _Collector(parse(words, read), place.name, version).view()


class _Collector:
    """One command line on its way to a view."""

    def __init__(self, line: CommandLine, name: str, version: str) -> None:
        self._line = line
        self._name = name
        self._machine = iommus.machine_options(line)
        arch = machines.arch_of(line.binary)
        self._type = machines.machine_type(self._machine.get("type"), arch)
        if self._is_microvm() and switch(self._machine.get("pcie", "off")):
            self._type = replace(self._type, family=machines.MICROVM_PCIE)
        self._properties = Properties(line.all("global"))
        self._made = list(made(line, self._type.family, self._type.arch))
        self._iommu = iommus.find(self._machine, self._type, self._made)
        self._backends = BackEnds(line)
        self._names: dict[str, int] = {}
        self._vfio_user: list[str] = []
        self._view = View(ViewKind.CONFIGURATION, name, name)
        self._version = version
        self._buses = self._all_buses()

    def view(self) -> View:
        """The view, complete."""
        view, line = self._view, self._line
        put_platform(line, self._machine, self._type, self._version, view, self._name)
        default_properties(self._properties, line, self._machine, self._type, self._version)
        for each in self._made:
            self._take(each)
        self._put_iommu()
        told(view.machine)
        if self._vfio_user:
            view.machine.put(k.VFIO_USER, tuple(self._vfio_user[:_PROBLEMS]), self._at(None), Certainty.SAID)
        view.problems += line.problems[:_PROBLEMS]
        if line.unknown:
            view.machine.put(k.UNKNOWN_OPTIONS, tuple(line.unknown[:_PROBLEMS]), self._at(None), Certainty.SAID)
            view.problems += [f"{self._name}: {each[:120]}: not known here" for each in line.unknown[:_PROBLEMS]]
        if len(view.problems) > _PROBLEMS:
            view.problems[_PROBLEMS:] = [f"{len(view.problems) - _PROBLEMS} more problems of that kind"]
        return view

    def _at(self, option: Option | None) -> Place:
        return place_of(option, self._name)

    def _all_buses(self) -> Buses:
        family = self._type.family
        usb = self._line.last("usb") is not None or bool(switch(self._machine.get("usb", "off")))
        transports = 8 if self._is_microvm() and self._few_transports() else None
        around = iommus.around_by_default(self._machine) is not None
        return Buses(family, mmio=transports, around=around, usb=usb, only=iommus.only_for(self._made))

    def _is_microvm(self) -> bool:
        return self._type.family is not None and self._type.family.name == "microvm"

    def _few_transports(self) -> bool:
        """A microvm has 24 of them if it has a second interrupt controller, which it has unless it is told not to."""
        return switch(self._machine.get("ioapic2", "on")) is False

    def _put_iommu(self) -> None:
        iommu, put = self._iommu, self._view.machine.put
        if iommu.name:
            put(k.IOMMU, iommu.name, self._at(iommu.option), iommu.certainty)
        iommus.put_options(iommu, self._properties, self._view.machine, self._name)
        # An expander without an id has a name that nobody can say.
        names = [(bus.name if bus.name.isprintable() else f"bus {bus.root}", bus.around) for bus in self._buses.roots()]
        roots = tuple(f"{name} (around the IOMMU)" if around else name for name, around in names)
        if roots:
            around = iommus.around_by_default(self._machine)
            put(k.ROOT_BUSES, roots, self._at(around), Certainty.SAID if around else Certainty.DEFAULT)

    def _take(self, each: Made) -> None:
        """One device: its seat, and its facts if it is a virtio device."""
        model = models.find(each.driver, self._type.arch)
        if model is not None:
            self._device(each, model)
            return
        driver, identity = each.driver, each.get("id")
        if driver in models.VFIO_USER:
            self._vfio_user.append(identity or driver)
        if models.takes_pci(driver):
            is_bridge = driver in models.PORTS or driver in models.SWITCHES or driver in models.BRIDGES
            seat = self._buses.pci(
                self._main_bus(each), each.get("addr"), driver, identity=identity, is_bridge=is_bridge
            )
            if seat.why and each.option is not None:
                self._problem(each, seat.why)
            if driver in models.EXPANDERS:
                around = bool(switch(each.get("bypass_iommu") or "off"))
                self._buses.add_expander(driver, identity, each.get("bus_nr") or "0", around=around)
            elif is_bridge:
                self._buses.add_bridge(driver, identity, seat)
        elif driver == models.SEGMENT:
            self._buses.add_domain(identity, each.get("index"))
        elif driver == "zpci":
            self._buses.add_zpci(each.get("target"), each.get("uid"))
        elif not models.is_other(driver) and driver not in _HELP:
            self._line.unknown.append(f"-device {driver}"[:200])
            if not each.get("bus"):
                self._buses.unsure = driver[:60]

    def _main_bus(self, each: Made) -> str:
        """The bus that was named; that of a root bus of its own is the machine's."""
        bus = each.get("bus")
        if not bus and each.driver in models.EXPANDERS and self._buses.root is not None:
            return self._buses.root.name
        return bus

    def _problem(self, each: Made, why: str) -> None:
        self._view.problems.append(f"{self._name}: {str(each.option or each.driver)[:120]}: {why}")

    def _device(self, each: Made, model: Model) -> None:
        device = Device(self._unique(each.get("id") or model.name))
        self._view.devices.append(device)
        put, at = device.facts.put, self._at(each.option)
        sure = Certainty.SAID if each.option is not None else Certainty.DEFAULT
        put(k.MODEL, model.name, at, sure)
        put(k.TRANSPORT, model.transport, at, sure)
        if model.known:
            if model.type != "unknown":
                put(k.TYPE, model.type, at, sure)
        else:
            put(k.UNKNOWN_OPTIONS, (f"-device {each.driver}",), at, sure)
            self._problem(each, "a virtio device of a type that is not known here")
        seat = self._seat(each, model)
        self._where(device, model, seat, at)
        if seat.why:
            self._problem(each, seat.why)
        self._bit(device, each, model, seat)
        backend, said, certainty = self._backends.of(each, model)
        put(k.BACKEND, backend, self._at(said or each.option), certainty)
        socket = self._backends.socket(each) if backend == "vhost-user" else None
        if socket is not None and socket.get("path"):
            put(k.BACKEND_SOCKET, socket.get("path"), self._at(socket), Certainty.SAID)

    def _unique(self, name: str) -> str:
        """A name that no other device of the machine has; anonymous ones are numbered."""
        found, count = name[:_NAME], self._names.get(name, 1)
        while found in self._names:
            count += 1
            found = f"{name[:_NAME]}#{count}"
        self._names[name] = count
        self._names.setdefault(found, 1)
        return found

    def _seat(self, each: Made, model: Model) -> Seat:
        if model.transport == "mmio":
            return self._buses.mmio(each.get("bus"))
        if model.transport == "ccw":
            return self._buses.ccw(each.get("devno"))
        return self._buses.pci(each.get("bus"), each.get("addr"), model.name, identity=each.get("id"))

    def _where(self, device: Device, model: Model, seat: Seat, at: Place) -> None:
        put = device.facts.put
        if seat.place:
            put(k.PLACE, seat.place, at, Certainty.INFERRED)
            put(k.ADDRESS, seat.address, at, Certainty.INFERRED)
        if seat.bus is not None:
            put(k.BRIDGED, not seat.bus.is_root, at, Certainty.INFERRED)
        behind = iommus.is_behind(self._iommu, self._type, model, seat)
        if behind is not None:
            put(k.BEHIND_IOMMU, behind, at, Certainty.INFERRED)

    def _bit(self, device: Device, each: Made, model: Model, seat: Seat) -> None:
        """Bit 33 as it is offered, and the interfaces that the device has."""
        put = device.facts.put
        legacy = self._legacy(device, each, model, seat)
        asked = self._properties.of(each.option, model, "iommu_platform", "off")
        at = self._at(asked.option or each.option)
        wanted = switch(asked.text)
        if asked.certainty is Certainty.DEFAULT and self._silent(model):
            return
        if wanted is None:
            self._problem(each, f"iommu_platform={asked.text[:40]} is no boolean")
            return
        put(k.CONFIGURED, wanted, at, asked.certainty)
        # A device that has the legacy interface only has no room for the bit; a PCI device of that kind is refused.
        room = not (model.transport == "mmio" and legacy)
        put(k.OFFERED, wanted and room, at, asked.certainty)
        ats = self._properties.of(each.option, model, "ats", "off")
        if model.transport == "pci" and switch(ats.text) is not None:
            put(k.ATS, bool(switch(ats.text)) and seat.behind_port, self._at(ats.option or each.option), ats.certainty)

    def _silent(self, model: Model) -> bool:
        """Is QEMU's default not known? That of sun4u is another from 9.1 on."""
        return self._type.name.startswith("sun4u") and not self._version

    def _legacy(self, device: Device, each: Made, model: Model, seat: Seat) -> bool:
        """Which interfaces it has: does it have the legacy one?"""
        put = device.facts.put
        if model.transport == "mmio":
            forced = self._properties.of_type(frozenset({"virtio-mmio"}), "force-legacy", "on")
            legacy = switch(forced.text) is not False
            at = self._at(forced.option or each.option)
            put(k.VERSION_1, not legacy, at, max(forced.certainty, Certainty.INFERRED))
            return legacy
        if model.transport == "ccw":
            return False
        said = self._properties.of(each.option, model, "disable-legacy", "auto")
        modern = self._properties.of(each.option, model, "disable-modern", "off")
        at = self._at(said.option or each.option)
        if model.interface == "any":
            if said.text not in ("on", "off", "auto"):
                self._problem(each, f"disable-legacy={said.text[:40]} is neither on, off nor auto")
                return False
            resolved = self._resolved(said.text, seat)
            if resolved is None:
                return False
            legacy, certainty = resolved == "off", said.certainty
        else:
            legacy, certainty = model.interface == "transitional", Certainty.SAID
        put(k.DISABLE_LEGACY, "off" if legacy else "on", at, certainty)
        put(k.CAN_BE_LEGACY, legacy, at, certainty)
        if model.interface == "any" and switch(modern.text):
            put(k.VERSION_1, False, self._at(modern.option or each.option), Certainty.INFERRED)
        return legacy

    def _resolved(self, said: str, seat: Seat) -> str | None:
        """``disable-legacy`` as QEMU resolves it; None: it is not known on which bus the device is."""
        if said != "auto":
            return said
        if seat.bus is None:
            return None
        return "on" if seat.behind_port else "off"
