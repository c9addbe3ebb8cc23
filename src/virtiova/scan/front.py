# SPDX-License-Identifier: Apache-2.0
"""What is in front of a device, out of what was collected: an IOMMU, in which state, and how that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect import messages as m
from virtiova.collect.facts import Certainty, Device, View
from virtiova.policy import Front
from virtiova.result.scan import Seen

_TRANSLATING: Final = frozenset({"DMA", "DMA-FQ", "unmanaged", "blocked"})
_ALWAYS: Final = frozenset({"tce", "phb", "zpci"})
"""IOMMUs of platforms that have no other way to memory for PCI, and whose groups have no type to show."""
_OFF_PCI: Final = frozenset({"mmio", "ccw"})
_WITNESSES: Final = 16
"""Devices that are asked whether the IOMMU is seen at work: not all of a thousand, for each of a thousand."""
_HIDDEN: Final = frozenset({"RMAD", "XMAR"})
"""Xen's names for a DMAR that it keeps to itself."""


@dataclass(slots=True)
class InFront:
    """``front`` is None where it is not known, and ``why`` says why. ``iommu`` is its name in the output."""

    front: Front | None
    iommu: str = ""
    basis: list[Seen] = field(default_factory=list)
    assumes: list[str] = field(default_factory=list)
    why: str = ""


def in_front(view: View, device: Device) -> InFront:
    """What is in front of one device. The surest source first: what runs, what the guest set up, what is written."""
    for ask in _ASKED:
        found = ask(view, device)
        if found is not None:
            return found
    return InFront(None, why="nothing says whether an IOMMU is in front of it")


def hardware(view: View, device: Device) -> bool:
    """A physical function: on a system without a hypervisor it is nobody's emulation, so its DMA passes the physical
    IOMMU whatever it says of bit 33."""
    return view.machine.get(k.HYPERVISOR) == "none" and device.facts.get(k.TRANSPORT) == "pci"


def name_of(view: View, device: Device) -> str:
    """The IOMMU that the device is said to have, else the machine's; empty if there is none or nothing is known."""
    name = device.facts.get(k.IOMMU) or view.machine.get(k.IOMMU) or ""
    return "" if name == "none" else name


def _around(view: View, device: Device) -> InFront | None:
    """The machine leads its bus around, or it is in no place that an IOMMU is for."""
    behind = device.facts.fact(k.BEHIND_IOMMU)
    if behind is None or behind.value:
        return None
    return InFront(
        Front.NONE, "", [behind.seen("its bus goes around the IOMMU" if name_of(view, device) else "no IOMMU")]
    )


def _as_it_runs(view: View, device: Device) -> InFront | None:
    """What QEMU has put at the root of its DMA: it changes with what the guest set up for VT-d and virtio-iommu.

    Before the guest's driver has started the device, it only says that no guest has set up anything yet.
    """
    roots = device.facts.all(k.DMA_ROOT)
    states = {_state(fact.value) for fact in roots}
    if device.facts.get(k.STARTED) is False or len(states) != 1:
        # Devices of the same number on several buses: which root is whose is not told.
        return None
    state, name = states.pop(), name_of(view, device)
    if state is None:
        return None
    if state is Front.NONE and name == "virtio":
        return InFront(Front.OFF, name, [roots[0].seen("the IOMMU lets its DMA to the memory itself")])
    return InFront(state, name, [roots[0].seen("its DMA is to the memory itself" if state is Front.NONE else "")])


def _state(root: str) -> Front | None:
    if root.endswith("-nodmar"):
        return Front.OFF
    if root == "system":
        return Front.NONE
    return Front.TRANSLATING if root.startswith(("vtd-", "virtio-iommu-memory-region")) else None


def _own_tables(view: View, device: Device) -> InFront | None:
    """A vDPA device with tables of its own: VDUSE's, or those that a program fills through vhost-vdpa."""
    facts = device.facts
    users, iommu, driver = facts.fact(k.USERS), facts.fact(k.IOMMU), facts.fact(k.DRIVER)
    if facts.get(k.TRANSPORT) != "vdpa":
        return None
    handed = driver is not None and driver.value == "vhost_vdpa"
    basis: list[Seen] = []
    if iommu is not None and iommu.value == "vduse":
        told = "" if handed else ": the kernel maps bounce pages there, never a buffer itself"
        basis.append(iommu.seen(f"VDUSE's own tables are in front of it{told}"))
    if handed and driver is not None:
        basis.append(driver.seen("vhost-vdpa hands it to user space, which fills its tables"))
    if users is not None:
        basis.append(users.seen(f"has it open: {', '.join(users.value)}"))
    served = facts.fact(k.BACKEND_PRODUCT)
    if served is not None and basis:
        basis.append(served.seen(f"served by {served.value}"))
    return InFront(Front.TRANSLATING, name_of(view, device) or "vdpa", basis) if basis else None


def _xen(view: View, _: Device) -> InFront | None:
    """Xen has the IOMMU to itself, and hides it from its domains."""
    machine = view.machine
    if machine.get(k.XEN_DOMAIN) and (told_by := _xen_says(view)) is not None:
        return told_by
    tables = machine.fact(k.FIRMWARE_TABLES)
    hidden = tables is not None and bool(_HIDDEN & set(tables.value))
    told = machine.get(k.IOMMU) not in (None, "none")
    if not machine.get(k.XEN_DOMAIN) or not (hidden or told):
        return None
    basis = [tables.seen("Xen hides the firmware's description of an IOMMU")] if hidden and tables is not None else []
    return InFront(
        None,
        "",
        basis,
        why="Xen has the IOMMU, and does not tell its domains what it does; its log does (xl dmesg, --log)",
    )


def _xen_says(view: View) -> InFront | None:
    """What Xen's own console says of its IOMMU, and of domain 0; the last word counts."""
    said = [line for line in view.log if m.XEN_IO.text in line.text]
    if not said:
        return None
    modes = [line for line in view.log if m.XEN_DOM0.text in line.text]
    basis = [Seen(line.text, line.place) for line in (*said[-1:], *modes[-1:])]
    if f"{m.XEN_IO.text}enabled" not in said[-1].text:
        return InFront(Front.NONE, "", basis)
    if not modes:
        return None
    # Only of Intel's table is the name hidden.
    name = "intel" if _HIDDEN & set(view.machine.get(k.FIRMWARE_TABLES) or ()) else view.machine.get(k.IOMMU) or "iommu"
    return InFront(Front.PASSTHROUGH if "Passthrough" in modes[-1].text else Front.TRANSLATING, name, basis)


def _off_pci(view: View, device: Device) -> InFront | None:
    """Not on PCI. There an IOMMU is in front if a device tree puts it there, and the kernel made a group for it."""
    facts = device.facts
    transport = facts.fact(k.TRANSPORT)
    if transport is None or transport.value not in _OFF_PCI or k.GROUP in facts or facts.get(k.BEHIND_IOMMU):
        return None
    node = facts.fact(k.IOMMU_NODE)
    if node is not None:
        return InFront(Front.OFF, name_of(view, device), [node.seen("its device tree node names an IOMMU, unused")])
    return InFront(Front.NONE, "", [transport.seen(f"no IOMMU is in front of {transport.value} devices")])


def _by_group(view: View, device: Device) -> InFront | None:
    """What the system set up for the device's group."""
    facts, name = device.facts, name_of(view, device) or "iommu"
    group, kind, driver = facts.fact(k.GROUP), facts.fact(k.GROUP_TYPE), facts.get(k.DRIVER) or ""
    if group is None and kind is None:
        return None
    seen = kind.seen(f"its IOMMU group is of type {kind.value}") if kind is not None else None
    if facts.get(k.VFIO) and "vfio" in driver:
        basis = [fact.seen() for fact in (group, facts.fact(k.DRIVER)) if fact is not None]
        return InFront(Front.TRANSLATING, name, basis, ["vfio gave it a table of its own, as a program opens it"])
    if kind is not None and seen is not None:
        if kind.value == "identity":
            return InFront(Front.PASSTHROUGH, name, [kind.seen("its IOMMU group lets addresses through (identity)")])
        if kind.value in _TRANSLATING:
            return InFront(Front.TRANSLATING, name, [seen])
    machine = view.machine.fact(k.IOMMU)
    if machine is not None and machine.value in _ALWAYS and group is not None:
        basis = [group.seen(), machine.seen(f"the platform's IOMMU: {name}")]
        window = facts.fact(k.IOMMU_OPTIONS)
        if window is not None and "window=direct" in window.value:
            basis.append(window.seen("its window is onto all of memory: translated, but not kept out of anything"))
        return InFront(Front.TRANSLATING, name, basis)
    why = "whose type is not said" if kind is None else f"of type {kind.value}"
    return InFront(None, name, [found for found in (seen,) if found], why=f"it is in an IOMMU group {why}")


def _in_no_group(view: View, device: Device) -> InFront | None:
    """The system looked for IOMMUs, and put the device behind none."""
    machine, name = view.machine, name_of(view, device)
    units, groups = machine.fact(k.IOMMUS), machine.fact(k.IOMMU_GROUPS)
    if units is None:
        return None
    if units.value or (groups is not None and groups.value):
        return InFront(Front.NONE, "", [units.seen("it is in no IOMMU group, although the system has IOMMUs")])
    if name:
        lets, found = machine.fact(k.IOMMU_BYPASS), machine.fact(k.IOMMU)
        basis = [found.seen(f"the machine has an IOMMU: {name}")] if found is not None else []
        idle = units.seen("the kernel programs none")
        told = lets.seen("told to be off") if lets is not None and lets.certainty < Certainty.INFERRED else idle
        return InFront(Front.OFF, name, [*basis, told])
    return InFront(Front.NONE, "", [units.seen("the system has no IOMMU")])


def _as_written(view: View, device: Device) -> InFront | None:
    """What the machine was told to have, and the guest's kernel to do with it."""
    machine, name = view.machine, name_of(view, device)
    found, lets = machine.fact(k.IOMMU), machine.fact(k.IOMMU_BYPASS)
    if found is not None and found.value == "none":
        return InFront(Front.NONE, "", [found.seen("the machine has no IOMMU")])
    if lets is not None and lets.value:
        return InFront(Front.OFF if lets.value == "off" else Front.PASSTHROUGH, name, [lets.seen()])
    if not name:
        return None
    behind = device.facts.fact(k.BEHIND_IOMMU)
    told = [found.seen(f"the machine has an IOMMU: {name}")] if found is not None else []
    if behind is not None:
        told.append(behind.seen("its bus is behind it"))
    if name in _ALWAYS or view.machine.get(k.KERNEL) is not None:
        return InFront(Front.TRANSLATING, name, told)
    seen = next((each for each in map(_elsewhere, (device, *view.devices[:_WITNESSES])) if each is not None), None)
    if seen is not None:
        return InFront(Front.TRANSLATING, name, [*told, seen])
    seen = next((each for each in map(_as_they_are, (device, *view.devices[:_WITNESSES])) if each is not None), None)
    if seen is not None:
        return InFront(None, name, [*told, seen], why=f"{seen.text}: it lets them through, or maps them to themselves")
    return InFront(Front.TRANSLATING, name, told, ["the guest programs the IOMMU"])


def _elsewhere(device: Device) -> Seen | None:
    """The rings of a device were seen not to be where its addresses are in memory: the IOMMU is programmed."""
    here = device.facts.fact(k.RINGS_IN_RAM)
    if here is None or here.value or device.facts.get(k.BEHIND_IOMMU) is False:
        return None
    return here.seen(f"the IOMMU translates: the rings of {device.name} are not at its addresses in memory")


def _as_they_are(device: Device) -> Seen | None:
    """The rings of a device that has bit 33 were seen to be where its addresses are in memory."""
    here = device.facts.fact(k.RINGS_IN_RAM)
    if here is None or not here.value or not device.facts.get(k.ACCEPTED) or device.facts.get(k.BEHIND_IOMMU) is False:
        return None
    return here.seen(f"the rings of {device.name}, which has bit 33, are behind the IOMMU at its addresses in memory")


_ASKED: Final[tuple[Callable[[View, Device], InFront | None], ...]] = (
    _around,
    _own_tables,
    _as_it_runs,
    _xen,
    _off_pci,
    _by_group,
    _in_no_group,
    _as_written,
)
