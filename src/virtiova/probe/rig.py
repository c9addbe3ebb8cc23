# SPDX-License-Identifier: Apache-2.0
"""The rig: one machine, brought up the way an experiment wants it, and the watching of one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from virtiova.addr import PAGE_MASK, Access
from virtiova.dma.ops import DmaRegion
from virtiova.driver.base import QUEUE_SIZE, Driver, Request
from virtiova.driver.negotiate import Negotiated, begin, driver_ok, finish
from virtiova.driver.open import DRIVER_FEATURES, driver_class
from virtiova.errors import UsageError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, Feature, driver_features, has, mask
from virtiova.policy import Facts, Front, Mapping, Payload
from virtiova.ports import Fault, Machine, Transport
from virtiova.probe.canary import CanaryOps, Snapshot, TwinRegion, Watch
from virtiova.result import Delivery, Evidence, FaultRecord, Witness
from virtiova.ring.ends import Answer

if TYPE_CHECKING:
    from virtiova.probe.edu import ControlRig

LENGTH: Final = 512
"""Bytes of the usual payload: the least that all devices take."""
COMPLETE_SECONDS: Final = 2.0
"""How long a request may take that ought to complete, or to leave a fault record."""
DRIVER_BYTES: Final = 64
"""Bytes at the start of a driver's other pages that are watched: headers and status lie there."""
SILENT_SECONDS: Final = 0.05
"""How long to wait for a device that ought to stay silent: hundreds of times what a request takes."""
AFTER_FAULT_SECONDS: Final = 0.01
ARRIVE_SECONDS: Final = 0.25
RINGS_SAID: Final = "rings:"
"""How a line begins that says which kind of ring was negotiated, where there was a choice."""
_CONTROL_AT: Final = 0x40
_CONTROL_DATA: Final = 0x33C0FFEE
_VECTOR: Final = 0
_MAX_FAULTS: Final = 16

OutsideControl = Callable[[bool], Evidence]
"""A control from another machine of the same setting, for devices that have none; told whether the IOMMU is on."""


class NotApplicableError(Exception):
    """The experiment makes no sense here; the message says why. Caught where cells are run."""


class FeaturesRefusedError(Exception):
    """FEATURES_OK was refused to a driver that took all that it was offered. Caught where cells are run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment found, and the facts that it was made under."""

    facts: Facts
    evidence: Evidence


@dataclass(slots=True)
class Watched:
    """One request, from just before it was published to just after it was over."""

    done: bool
    witnesses: list[Witness]
    deliveries: list[Delivery]
    faults: list[Fault]
    status: int
    """The device status right after."""
    gave_up: str = ""
    """What the machine said when it gave the device up, if it did so by then."""

    @property
    def reached(self) -> bool:
        """Did the device reach the payload anywhere?"""
        arrived = any(d.arrived in d.pages.values() for d in self.deliveries)
        return arrived or any(w.touched and w.role.startswith("data") for w in self.witnesses)


class Rig:
    """One machine under one experiment."""

    ends_with_fault = True
    """Whether a request is over once a fault was recorded."""

    def __init__(self, machine: Machine, outside: OutsideControl | None = None) -> None:
        self.machine = machine
        self.iommu = machine.iommu
        self.ops = CanaryOps(machine.ram, machine.pages, machine.iommu)
        self.iommu_on = False
        self.others: Sequence[Rig] = ()
        """The other devices of the same machine, as far as they are virtio devices."""
        self.controls: Sequence[ControlRig] = ()
        """Those that are not: its control devices."""
        self.negotiated: Negotiated | None = None
        self._outside = outside
        self._driver: Driver | None = None
        self._written = 0
        # Handed out before anything else, so that they are the first pages of their arenas.
        self.data = self.ops.alloc(LENGTH)
        self._control = self.ops.alloc(LENGTH)
        self._control_seen: list[Witness] = []
        self._fault_pages: set[int] | None = None
        self._fault_write: bool | None = None

    @property
    def transport(self) -> Transport:
        """The registers of the device under test."""
        if self.machine.transport is None:
            raise UsageError(f"{self.machine.device} is no virtio device")
        return self.machine.transport

    @property
    def started(self) -> bool:
        """Was the driver started?"""
        return self._driver is not None

    @property
    def driver(self) -> Driver:
        """The driver, once `start` has been called."""
        if self._driver is None:
            raise UsageError("the driver has not been started")
        return self._driver

    # -- bringing up ---------------------------------------------------------------------------------------------

    def enable_iommu(self) -> None:
        """Let the IOMMU translate, if there is one."""
        self.iommu.enable()
        self.iommu_on = self.iommu.present

    def disable_iommu(self) -> None:
        """Let addresses through as they are."""
        self.iommu.disable()
        self.iommu_on = False

    def offers(self, bit: int) -> bool:
        """Whether the device offers this bit; it is reset for that, so before anything is negotiated."""
        return bool(begin(self.transport) >> bit & 1)

    def negotiate(
        self, *, take: bool = True, version_1: bool = True, take_unoffered: bool = False, leave: Iterable[Feature] = ()
    ) -> Negotiated:
        """Reset and negotiate, with or without bit 33, whatever the device offers besides but what is to be left."""
        offered = begin(self.transport)
        cls = driver_class(self.transport.device_id)
        word = driver_features(offered, cls.table, legacy=self.transport.legacy) & DRIVER_FEATURES
        if not take:
            word &= ~(1 << VIRTIO_F_ACCESS_PLATFORM)
        if take_unoffered:
            word |= 1 << VIRTIO_F_ACCESS_PLATFORM
        if not version_1:
            # Nor what came with version 1: packed rings, and promises about their order.
            word &= ~mask([VIRTIO_F_VERSION_1, Feature.RING_PACKED, Feature.IN_ORDER])
        word &= ~mask(leave)
        self._written = word
        self.negotiated = finish(self.transport, offered, word)
        return self.negotiated

    def start(self, *, bus_master: bool = True, ok: bool = True, size: int = QUEUE_SIZE) -> Driver:
        """Make the queues, of ``size`` entries, in canary memory, point the control at its canary, and set
        DRIVER_OK."""
        transport, negotiated = self.transport, self.negotiated
        if negotiated is None:
            raise UsageError("negotiate before the start")
        if transport.bus_master is not None and bus_master:
            transport.bus_master.set_bus_master(True)
        if transport.msi is not None:
            transport.msi.arm(_VECTOR, self.control_address, _CONTROL_DATA)
        self._driver = self.new_driver(size=size)
        if ok:
            driver_ok(transport)
        return self._driver

    def new_driver(self, *, size: int = QUEUE_SIZE, first: int = 0) -> Driver:
        """A driver of the device's queues from ``first`` on; DRIVER_OK is the caller's."""
        transport, machine, negotiated = self.transport, self.machine, self.negotiated
        if negotiated is None:
            raise UsageError("negotiate before the start")
        vector = None if transport.msi is None else _VECTOR
        cls = driver_class(transport.device_id)
        driver: Driver = cls(
            transport, self.ops, negotiated, machine.peer, machine.wait, vector, size=size, first=first
        )
        driver.start()
        return driver

    def restart(self) -> None:
        """Reset the device and start again, as a proper driver does: new rings, the bit taken if offered."""
        self.negotiate()
        self.start()

    def regions(self) -> list[TwinRegion]:
        """All driver memory handed out so far."""
        return self.ops.regions

    # -- one request ---------------------------------------------------------------------------------------------

    def paint_data(self, length: int = LENGTH, offset: int = 0) -> list[Watch]:
        """Paint the payload's pages, and watch the part that the device is to reach."""
        self.data.paint(offset, length)
        return self.data.watch("data", offset, length)

    def observe(
        self,
        request: Request,
        watches: Sequence[Watch],
        *,
        delivery: Callable[[bytes], list[Delivery]] | None = None,
        seconds: float = COMPLETE_SECONDS,
    ) -> Watched:
        """Publish a request, wait until it is used, or a fault is recorded, or the time is over; then look."""
        self._control.paint(_CONTROL_AT, 16)
        control = Snapshot(self.machine.ram, self._control.watch("control", _CONTROL_AT, 4))
        queue = request.queue
        ring = _answers("ring", queue.region, queue.ring.answers())
        memory = Snapshot(self.machine.ram, [*watches, *ring, *self._driver_pages(watches, queue.region)])
        self.iommu.faults()
        faults: list[Fault] = []
        turns = 0

        def over() -> bool:
            nonlocal turns
            turns += 1
            # A fault register is a round trip away, so it is asked for now and then only.
            if turns % 8 == 0 and self.ends_with_fault:
                faults.extend(self.iommu.faults())
            return request.done() or bool(faults)

        request.go()
        self.machine.wait(over, seconds)
        # After a fault the device may still complete the request, and only then is it over.
        done = request.done() or (bool(faults) and self.machine.wait(request.done, AFTER_FAULT_SECONDS))
        # Before anything is asked for what arrived: that may take requests of its own.
        witnesses = memory.look()
        deliveries = self._await_delivery(request, delivery, done=done) if delivery else []
        faults += self.iommu.faults()
        if done:
            # The interrupt follows the used index; it is the control, so it is waited for.
            self.machine.wait(lambda: any(w.touched for w in control.look()), self._interrupt_seconds)
        seen = control.look()
        if any(w.touched for w in seen):
            self._control_seen = seen
        return Watched(done, witnesses, deliveries, faults, self.transport.read_status(), self.machine.gave_up)

    def _driver_pages(self, payload: Sequence[Watch], ring: DmaRegion) -> list[Watch]:
        """All other memory that the driver shares with its device: headers, a status byte. Whatever the device
        writes there shows its path as well."""
        known = {watch.gpa - watch.offset for watch in payload}
        # Of another ring, that which only the device writes: the rest is the driver's, who may go on with it.
        queues = self.driver.queues()
        found: list[Watch] = []
        for queue in queues:
            seen = queue.ring.answers() if queue.region is ring else []
            own = [each for each in queue.ring.own_answers() if each not in seen]
            found += _answers("driver", queue.region, own)
        no_more = [ring, self._control, *(queue.region for queue in queues)]
        for region in self.ops.regions:
            pages = {gpa for home in region.homes.values() for gpa in home.gpas}
            if not any(region is each for each in no_more) and not pages & known:
                found += region.watch("driver", 0, DRIVER_BYTES)
        return found

    @property
    def _interrupt_seconds(self) -> float:
        return 0.0 if self.transport.msi is None else ARRIVE_SECONDS

    def _await_delivery(
        self, request: Request, delivery: Callable[[bytes], list[Delivery]], *, done: bool
    ) -> list[Delivery]:
        arrived: list[bytes] = []

        def came() -> bool:
            data = request.arrived()
            if data is not None:
                arrived.append(data)
            return bool(arrived)

        self.machine.wait(came, ARRIVE_SECONDS if done else 0.0)
        return delivery(arrived[0] if arrived else b"")

    # -- putting the outcome together ----------------------------------------------------------------------------

    def facts(
        self,
        *,
        mapping: Mapping = Mapping.MAPPED,
        access: Access = Access.WRITE,
        bus_master: bool = True,
        carries_on: bool = False,
        wrote_unoffered: bool = False,
        hardware: bool = False,
        payload: Payload = Payload.NONE,
    ) -> Facts:
        """The facts of this machine and negotiation, and those that the experiment adds."""
        offered: bool | None = None
        accepted: bool | None = None
        if self.negotiated is not None:
            offered, accepted = self.negotiated.bit33
        front = Front.NONE
        if self.iommu.in_front:
            front = Front.TRANSLATING if self.iommu_on else Front.OFF
        return Facts(
            offered=offered,
            accepted=accepted,
            front=front,
            version_1=bool(self._written >> VIRTIO_F_VERSION_1 & 1),
            insists=self.machine.insists,
            hardware=hardware or self.machine.hardware,
            wrote_unoffered=wrote_unoffered,
            carries_on=carries_on,
            bus_master=bus_master,
            mapping=mapping,
            access=access,
            iommu=self.iommu.name,
            bridged=self.machine.bridged,
            vhost=self.machine.vhost,
            pass_through=self.machine.pass_through,
            payload=payload,
        )

    def outcome(self, facts: Facts, watched: Watched | None, *, live: str = "", x: int | None = None) -> Outcome:
        """Evidence from what was watched, with the control and all that the machine said."""
        negotiated = self.negotiated
        evidence = Evidence(
            x=x,
            transfer="none" if watched is None else ("read" if watched.deliveries else "write"),
            features_ok=None if negotiated is None else negotiated.features_ok,
            carried_on=facts.carries_on,
            live=live,
            words=list(self.machine.words()),
        )
        if watched is None and negotiated is not None:
            evidence = replace(evidence, status=self.transport.read_status())
        if watched is not None:
            control, kind = self._control_evidence()
            faults = [_record(fault) for fault in watched.faults[:_MAX_FAULTS]]
            evidence = replace(
                evidence,
                witnesses=[*watched.witnesses, *control],
                deliveries=watched.deliveries,
                faults=faults,
                control=kind,
                status=watched.status,
                words=[*self._rings_said(), *evidence.words],
                live=live or self.fault_proof(watched) or watched.gave_up,
            )
        return Outcome(facts, evidence)

    def _rings_said(self) -> list[str]:
        if self.negotiated is None or not has(self.negotiated.offered, Feature.RING_PACKED):
            return []
        said = (
            "packed" if self.negotiated.in_rings(Feature.RING_PACKED) else "split: the driver did not take packed ones"
        )
        return [f"{RINGS_SAID} {said}"]

    def expect_fault(self, address: int, *, write: bool) -> None:
        """From now on only a fault of that kind, in the IOMMU page of ``address``, is proof of life."""
        first = address & ~(self.ops.page_size - 1)
        self._fault_pages = set(range(first, first + self.ops.page_size, PAGE_MASK + 1))
        self._fault_write = write

    def fault_proof(self, watched: Watched) -> str:
        """A fault shows that the device tried: at the payload if the experiment named one (`expect_fault`), else at
        any memory of the driver's. The control's page never counts: its message is no virtio access."""
        pages = self.ops.known - {int(self._control.addr)} if self._fault_pages is None else self._fault_pages
        for fault in watched.faults:
            other_way = self._fault_write is not None and fault.write is not None and fault.write != self._fault_write
            if fault.address & ~PAGE_MASK in pages and not other_way:
                return f"fault record: {fault.reason} at 0x{fault.address:08x}"
        return ""

    @property
    def control_address(self) -> int:
        """Where the control's message goes."""
        return self._control.addr + _CONTROL_AT

    @property
    def control_seen(self) -> list[Witness]:
        """Both homes of the control's message, if it was seen in one of them."""
        return self._control_seen

    def _control_evidence(self) -> tuple[list[Witness], str]:
        if not self.iommu.present:
            return [], "machine"
        if self._control_seen:
            return self._control_seen, "none" if self.transport.msi is None else self.transport.msi.name
        if self._outside is not None and self.transport.msi is None:
            outside = self._outside(self.iommu_on)
            return [witness for witness in outside.witnesses if witness.role == "control"], outside.control
        return [], "none"


def twin(region: DmaRegion) -> TwinRegion:
    """A region of the driver's, as the canary that it is."""
    if not isinstance(region, TwinRegion):
        raise UsageError("the driver under an experiment has canary memory only")
    return region


def _answers(role: str, region: DmaRegion, answers: Sequence[Answer]) -> list[Watch]:
    home = twin(region)
    return [watch for each in answers for watch in home.watch(role, each.offset, each.length, each.until)]


def _record(fault: Fault) -> FaultRecord:
    return FaultRecord(fault.address, fault.write, fault.source, fault.reason, list(fault.raw))
