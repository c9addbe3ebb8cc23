# SPDX-License-Identifier: Apache-2.0
"""Experiments on several devices in one machine: all of them at work at once, and one given another's address."""

from __future__ import annotations

from dataclasses import replace

from virtiova.addr import IOVA
from virtiova.policy import Mapping
from virtiova.probe.experiment import bring_up, experiment, prove_alive
from virtiova.probe.neighbours import finish, neighbours, not_at_once, not_used, users_of_mappings, work_of
from virtiova.probe.rig import LENGTH, NotApplicableError, Outcome, Rig, Watched
from virtiova.result import Neighbour
from virtiova.spec import Citation, spec

_PER_DEVICE = spec("6", "VIRTIO_F_ACCESS_PLATFORM is a feature of one device, and says nothing of another")
_DOMAIN = Citation(
    "Intel VT-d specification", "3.2", "memory of a domain is out of reach of devices not assigned to it"
)


@experiment("at-once", "several devices, each with a request under way at the same time", _PER_DEVICE, several=True)
def at_once(rig: Rig) -> Outcome:
    """All requests are published before any device but this one is told, and all are told before any is waited for.
    This device's own bytes are looked at; what came of the others is in the evidence, without which there is no
    answer."""
    bring_up(rig)
    works = neighbours(rig)
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)])
    for work in works:
        work.publish()

    def all_of_them() -> None:
        request.after()
        for work in works:
            work.start()

    watched = rig.observe(replace(request, after=all_of_them), rig.paint_data())
    seen = finish(rig, works)
    return _with(rig.outcome(rig.facts(), watched, x=rig.data.addr), seen, not_at_once(seen))


def _with(outcome: Outcome, seen: list[Neighbour], doubt: str) -> Outcome:
    return replace(outcome, evidence=replace(outcome.evidence, neighbours=seen, note=doubt))


@experiment("others-page", "several devices, one of them given an X that was mapped for another", _DOMAIN, several=True)
def others_page(rig: Rig) -> Outcome:
    """Page A is where the *other* device's mapping points. Behind an IOMMU with a domain for each device it is out of
    reach; where all share one table it is not; and a device that goes around has no use for any of it."""
    owners = users_of_mappings(rig)
    if not owners:
        raise NotApplicableError("no other device of this machine goes through a mapping of its own")
    owner = owners[0]
    bring_up(rig)
    x = owner.data.addr
    # Used by its owner, so that a cached translation is there for whoever does not ask whose it is.
    use = work_of(owner)
    use.publish()
    use.start()
    (used,) = finish(rig, [use])

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
    outcome = rig.outcome(rig.facts(mapping=mapping), watched, live=live, x=x)
    # It was over before this device had its own request.
    return _with(outcome, [replace(used, under_way=False)], not_used(used))
