# SPDX-License-Identifier: Apache-2.0
"""Experiments on several devices in one machine: all of them at work at once, and one given another's address."""

from __future__ import annotations

from dataclasses import replace

from virtiova.addr import IOVA
from virtiova.driver.base import Request
from virtiova.errors import ProtocolError
from virtiova.policy import Mapping
from virtiova.probe.experiment import bring_up, experiment, prove_alive
from virtiova.probe.rig import COMPLETE_SECONDS, LENGTH, NotApplicableError, Outcome, Rig, Watched
from virtiova.spec import Citation, spec

_PER_DEVICE = spec("6", "VIRTIO_F_ACCESS_PLATFORM is a feature of one device, and says nothing of another")
_DOMAIN = Citation(
    "Intel VT-d specification", "3.2", "memory of a domain is out of reach of devices not assigned to it"
)


@experiment("at-once", "several devices, each with a request under way at the same time", _PER_DEVICE, several=True)
def at_once(rig: Rig) -> Outcome:
    """All requests are published before any is waited for; this device's own bytes are looked at."""
    bring_up(rig)
    others = [other for other in rig.others if other.started]
    # Made before any is published: making one may stop the machine, or take its time.
    pending = [made for other in others if (made := _request(other))]
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)])

    def all_of_them() -> None:
        request.after()
        for each in pending:
            each.go()

    watched = rig.observe(replace(request, after=all_of_them), rig.paint_data())
    for each in pending:
        _over(rig, each)
    return rig.outcome(rig.facts(), watched, x=rig.data.addr)


def _request(other: Rig) -> Request | None:
    """A request of another device's, on rings of which all that was used before is taken: what is used next is its.
    None if its rings mean nothing any more, which is for its own cell to say."""
    try:
        for queue in other.driver.queues():
            while queue.ring.poll() is not None:
                pass
        return other.driver.make_device_write([(other.data.addr, LENGTH)])
    except ProtocolError:
        return None


def _over(rig: Rig, request: Request) -> None:
    """Wait for another device's request. What becomes of it is for its own cell to say."""
    rig.machine.wait(request.done, COMPLETE_SECONDS)


@experiment("others-page", "several devices, one of them given an X that was mapped for another", _DOMAIN, several=True)
def others_page(rig: Rig) -> Outcome:
    """Page A is where the *other* device's mapping points. Behind an IOMMU with a domain for each device it is out of
    reach; where all share one table it is not; and a device that goes around has no use for any of it."""
    behind = [other for other in rig.others if other.iommu.in_front]
    if not behind:
        raise NotApplicableError("no other device of this machine is behind an IOMMU")
    # One that uses its mapping, if there is one: a device without the bit has tables, too, and goes around them.
    owner = next((other for other in behind if other.facts().accepted), behind[0])
    bring_up(rig)
    x = owner.data.addr
    # Used by its owner, so that a cached translation is there for whoever does not ask whose it is.
    if owner.started and (use := _request(owner)):
        use.go()
        _over(rig, use)

    def write() -> Watched:
        return rig.observe(rig.driver.make_device_write([(x, LENGTH)]), owner.paint_data())

    def mend() -> None:
        rig.ops.map(owner.data)
        rig.iommu.invalidate()

    rig.expect_fault(x, write=True)
    watched = write()
    live = prove_alive(rig, watched, mend, write)
    if live:
        rig.iommu.unmap(IOVA(x), rig.ops.page_size)
        rig.iommu.invalidate()
    mapping = Mapping.MAPPED if rig.iommu.shared else Mapping.UNMAPPED
    return rig.outcome(rig.facts(mapping=mapping), watched, live=live, x=x)
