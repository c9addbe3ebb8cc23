# SPDX-License-Identifier: Apache-2.0
"""What the other devices of a machine are at while one of them is asked: a request each, published, started, seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from virtiova.driver.base import Request
from virtiova.errors import ProtocolError
from virtiova.probe.canary import Snapshot, TwinRegion
from virtiova.probe.edu import ControlRig
from virtiova.probe.rig import COMPLETE_SECONDS, LENGTH, Rig
from virtiova.result import Neighbour


class Work(Protocol):
    """A request of another device, to write to a page of its own. Made before any is published: making one may take
    its time, or stop the machine."""

    device: str
    data: TwinRegion
    """What it writes to."""

    def publish(self) -> None:
        """Let the device find it, if it looks; it is not told to."""

    def start(self) -> None:
        """Tell the device."""

    def over(self) -> bool:
        """Has the device done it?"""

    def seen(self) -> Neighbour:
        """What became of it."""


class QueueWork:
    """A request in the ring of a virtio device. It is under way if it was published, and not over, when the device
    under test had its own: nobody is told before."""

    def __init__(self, other: Rig) -> None:
        self.device = other.machine.device
        self.data = other.data
        self._request = _request(other)
        self._kick = False
        self._published = False
        self._under_way = False
        self._snapshot = Snapshot(other.machine.ram, other.paint_data())

    def publish(self) -> None:
        if self._request is not None:
            self._kick = self._request.queue.ring.publish()
            self._published = True

    def start(self) -> None:
        if self._request is None:
            return
        self._under_way = self._published and not self.over()
        if self._kick:
            self._request.queue.kick()
        self._request.after()

    def over(self) -> bool:
        return self._request is not None and self._request.done()

    def seen(self) -> Neighbour:
        return Neighbour(self.device, self._under_way, self.over(), _pages(self._snapshot))


class ControlWork:
    """A write of a control device. It has no ring: it begins when it is told, and is over when its bytes are there. Of
    two in the board's hands edu takes 100 ms, and the network chip none, so that it is never seen under way."""

    def __init__(self, control: ControlRig) -> None:
        self.device = control.machine.device
        self.data = control.data
        self._control = control
        self._under_way = False
        self._snapshot = Snapshot(control.machine.ram, control.paint_data())

    def publish(self) -> None:
        # What was asked before may have left it off, where each device has that to itself.
        self._control.machine.iommu.enable()

    def start(self) -> None:
        self._control.start()
        self._under_way = not self.over()

    def over(self) -> bool:
        return bool(_pages(self._snapshot))

    def seen(self) -> Neighbour:
        return Neighbour(self.device, self._under_way, self.over(), _pages(self._snapshot))


def neighbours(rig: Rig) -> list[Work]:
    """A request for each of the other devices that were brought up. What became of the rest is for its own cell."""
    return [*(QueueWork(other) for other in rig.others if other.started), *map(ControlWork, rig.controls)]


def users_of_mappings(rig: Rig) -> list[Rig | ControlRig]:
    """The other devices that go through the IOMMU: not those without the bit, which have tables, too, and go around."""
    behind = [other for other in rig.others if other.iommu.in_front and other.started]
    controls = [control for control in rig.controls if control.machine.iommu.in_front]
    return [*(other for other in behind if other.facts().accepted), *controls]


def work_of(other: Rig | ControlRig) -> Work:
    """A request for one of them."""
    return QueueWork(other) if isinstance(other, Rig) else ControlWork(other)


def finish(rig: Rig, works: Sequence[Work]) -> list[Neighbour]:
    """Wait for all of them, each for as long as a request may take."""
    for work in works:
        rig.machine.wait(work.over, COMPLETE_SECONDS)
    return [work.seen() for work in works]


def not_at_once(seen: Sequence[Neighbour]) -> str:
    """Why nothing can be said of devices at work at the same time; empty if it can."""
    if not any(each.under_way for each in seen):
        return "no other device had a request under way"
    lost = [each.device for each in seen if not (each.done and each.pages)]
    return f"what {' and '.join(lost)} had under way did not complete" if lost else ""


def not_used(seen: Neighbour) -> str:
    """Why it cannot be said that the neighbour has used its own mapping; empty if it can."""
    if seen.done and seen.pages == ["A"]:
        return ""
    where = f"its bytes are in page {' and '.join(seen.pages)}" if seen.pages else "its bytes did not arrive"
    return f"{seen.device} did not use the mapping that is its own: {where}"


def _request(other: Rig) -> Request | None:
    """A request on rings of which all that was used before is taken: what is used next is this one. None if the rings
    mean nothing any more."""
    try:
        for queue in other.driver.queues():
            while queue.ring.poll() is not None:
                pass
        return other.driver.make_device_write([(other.data.addr, LENGTH)])
    except ProtocolError:
        return None


def _pages(snapshot: Snapshot) -> list[str]:
    return sorted({witness.page for witness in snapshot.look() if witness.touched})
