# SPDX-License-Identifier: Apache-2.0
"""Controls: what shows that the tables are right, that they block, and that nothing translates when told not to."""

from __future__ import annotations

from dataclasses import replace

from virtiova.addr import IOVA
from virtiova.policy import Mapping
from virtiova.probe.experiment import bring_up, experiment, need_iommu, need_writes
from virtiova.probe.rig import LENGTH, SILENT_SECONDS, NotApplicableError, Outcome, Rig
from virtiova.result import Witness
from virtiova.spec import Citation, spec

_MSI = Citation("PCI Local Bus 3.0", "6.8", "a message-signalled interrupt is a memory write by the device")
_BUS_MASTER = Citation("PCI Local Bus 3.0", "6.2.2", "bit 2 of COMMAND allows the device to act as master")


@experiment("msi", "positive control: the device's own MSI-X message, addressed to RAM", _MSI)
def msi(rig: Rig) -> Outcome:
    """The message is no virtio access, so the platform translates it whatever bit 33 is."""
    if rig.transport.msi is None:
        raise NotApplicableError("the device has no MSI-X")
    bring_up(rig)
    watched = rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), [])
    outcome = rig.outcome(rig.facts(hardware=True), watched, x=rig.control_address)
    control = rig.control_seen
    # Here the control is the payload; ring and data of the request that caused it are not asked about.
    evidence = replace(outcome.evidence, witnesses=[*_as_data(control), *control])
    return Outcome(outcome.facts, evidence)


def _as_data(control: list[Witness]) -> list[Witness]:
    return [replace(witness, role="data") for witness in control]


@experiment(
    "empty-tables",
    "negative control: the IOMMU translates, and nothing at all is mapped",
    spec("6.1", "the driver configures the IOMMU to translate bus addresses"),
)
def empty_tables(rig: Rig) -> Outcome:
    """A device behind the IOMMU cannot even read its rings; one that goes around it does not notice."""
    need_iommu(rig)
    need_writes(rig)
    for region in rig.regions():
        rig.iommu.unmap(IOVA(region.addr), region.size)
    rig.ops.map_pages = False
    bring_up(rig)
    watched = rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
    negotiated = rig.negotiated
    rig.ops.map_pages = True
    for region in rig.regions():
        rig.ops.map(region)
    rig.iommu.invalidate()
    rig.restart()
    # Done whatever was seen: the control's own message needs a mapping, too, to tell bypass from nothing in front.
    again = rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
    rig.negotiated = negotiated
    live = "" if rig.fault_proof(watched) or not again.reached else "the same request completed once it was mapped"
    return rig.outcome(rig.facts(mapping=Mapping.UNMAPPED), watched, live=live, x=rig.data.addr)


@experiment(
    "translation-off",
    "the IOMMU is there, and switched off",
    spec("6.1", "the driver disables the IOMMU, or configures it"),
)
def translation_off(rig: Rig) -> Outcome:
    """Whatever is negotiated, the bare address is what counts, and the control says so."""
    need_iommu(rig)
    if not rig.iommu.can_be_off:
        raise NotApplicableError("this IOMMU cannot be switched off: an address without an entry goes nowhere")
    need_writes(rig)
    rig.disable_iommu()
    rig.negotiate()
    rig.start()
    watched = rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
    return rig.outcome(rig.facts(), watched, x=rig.data.addr)


@experiment("bus-master-off", "the device was never allowed to be bus master", _BUS_MASTER)
def bus_master_off(rig: Rig) -> Outcome:
    """No DMA at all; given the permission, and kicked again, the same request completes."""
    transport = rig.transport
    need_writes(rig)
    if transport.bus_master is None:
        raise NotApplicableError("this transport has no bus master bit")
    transport.bus_master.set_bus_master(False)
    rig.enable_iommu()
    rig.negotiate()
    rig.start(bus_master=False)
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)])
    watched = rig.observe(request, rig.paint_data(), seconds=SILENT_SECONDS)
    transport.bus_master.set_bus_master(True)
    live = ""
    if watched.reached:
        # The control is a DMA, too: only with the permission can it tell bypass from nothing in front.
        rig.restart()
        rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), [])
    else:
        request.queue.kick()
        rig.machine.wait(request.done, 1.0)
        if request.done():
            live = "the same request completed once the device was bus master and was kicked again"
    return rig.outcome(rig.facts(bus_master=False), watched, live=live, x=rig.data.addr)
