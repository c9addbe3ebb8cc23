# SPDX-License-Identifier: Apache-2.0
"""The machine's IOMMU, out of its type, its options and its devices, and which devices it is in front of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Facts
from virtiova.collect.qemu.buses import Seat
from virtiova.collect.qemu.create import Made
from virtiova.collect.qemu.keyvals import Pairs, switch
from virtiova.collect.qemu.machines import MachineType
from virtiova.collect.qemu.models import Model
from virtiova.collect.qemu.options import CommandLine, Option
from virtiova.collect.qemu.properties import Properties
from virtiova.result.scan import Place

_DEVICES: Final = {
    "intel-iommu": "intel", "amd-iommu": "amd", "virtio-iommu-pci": "virtio", "virtio-iommu": "virtio",
    "virtio-iommu-pci-non-transitional": "virtio", "riscv-iommu-pci": "riscv", "arm-smmuv3": "smmuv3",
}  # fmt: skip
_AROUND: Final = ("default_bus_bypass_iommu", "default-bus-bypass-iommu")
_NOT_ITS: Final = frozenset({"driver", "id", "bus", "addr", "primary-bus"})
_TYPES: Final = {
    "intel": frozenset({"intel-iommu", "x86-iommu"}),
    "amd": frozenset({"amd-iommu", "x86-iommu"}),
    "virtio": frozenset({"virtio-iommu-pci", "virtio-iommu-device"}),
    "smmuv3": frozenset({"arm-smmuv3", "arm-smmu"}),
    "riscv": frozenset({"riscv-iommu-pci", "riscv-iommu-device", "riscv-iommu"}),
}


@dataclass(frozen=True, slots=True)
class Iommu:
    """``name`` as in the output, ``none`` where there is none; empty where that is not known."""

    name: str
    option: Option | None = None
    certainty: Certainty = Certainty.DEFAULT


def machine_options(line: CommandLine) -> Option:
    """All ``-machine`` options as one: QEMU merges them."""
    merged: Pairs = []
    options = line.all("machine")
    for option in options:
        merged += option.pairs
    number = options[0].line if options else 0
    return Option("machine", ",".join(option.text for option in options)[:4096], number, pairs=merged)


def around_by_default(machine: Option) -> Option | None:
    """The machine's own root bus is led around the IOMMU."""
    said = next(((k, v) for k, v in reversed(machine.pairs) if k in _AROUND), None)
    return machine if said is not None and switch(said[1]) else None


def find(machine: Option, type_: MachineType, devices: list[Made]) -> Iommu:
    """The IOMMU of the machine."""
    for each in devices:
        if each.driver in _DEVICES and each.option is not None:
            return Iommu(_DEVICES[each.driver], each.option, Certainty.SAID)
    said = machine.get("iommu")
    if said and said != "none":
        # Before QEMU 4.0 it was a switch, for what x86 has.
        name = {"on": "intel"}.get(said, said)
        return Iommu("none" if switch(said) is False else name, machine, Certainty.SAID)
    if switch(machine.get("iommu-sys", "off")):
        return Iommu("riscv", machine, Certainty.SAID)
    if type_.family is None:
        return Iommu("")
    if type_.arch == "s390x":
        return Iommu("zpci" if any(each.driver.endswith("-pci") for each in devices) else "none")
    return Iommu(type_.family.iommu)


def put_options(iommu: Iommu, properties: Properties, facts: Facts, name: str) -> None:
    """What the IOMMU was told, by its own option and by ``-global``."""
    types = _TYPES.get(iommu.name)
    if types is None:
        return
    own = iommu.option is not None and iommu.option.name == "device"
    told = dict(pair for pair in iommu.option.pairs if pair[0] not in _NOT_ITS) if own and iommu.option else {}
    for prop in ("device-iotlb", "caching-mode", "intremap", "pt", "dma-translation", "stage", "granule", "eim"):
        found = properties.of_type(types, prop, "")
        if found.option is not None:
            told.setdefault(prop, found.text)
    if iommu.name == "amd":
        # QEMU's default matters: some of its versions translate for nobody then.
        told.setdefault("pt", "on")
    words = tuple(f"{key}={_plainly(value)}" for key, value in told.items())
    facts.put(k.IOMMU_OPTIONS, words, place_of(iommu.option, name), iommu.certainty)


def _plainly(value: str) -> str:
    said = switch(value)
    return value if said is None else "on" if said else "off"


def only_for(devices: list[Made]) -> frozenset[str]:
    """The root buses that SMMUs were given to: newer QEMUs can have several, each of one bus."""
    return frozenset(each.get("primary-bus") for each in devices if each.driver == "arm-smmuv3") - {""}


def is_behind(iommu: Iommu, type_: MachineType, model: Model, seat: Seat) -> bool | None:
    """Is the machine's IOMMU in front of a device? None: it is not known where the device is, or which IOMMU."""
    if iommu.name in ("", "none"):
        return None
    if model.transport != "pci" or model.type == "iommu":
        # No IOMMU is in front of transports and channels, nor of itself.
        return False
    if iommu.name in ("tce", "phb", "sabre", "zpci"):
        return True
    return None if seat.bus is None else not seat.bus.around


def place_of(option: Option | None, name: str) -> Place:
    """Where an option was read; the command line as a whole where nothing is written."""
    if option is None:
        return Place("command line", name)
    return Place("command line", option.source or name, option.line)
