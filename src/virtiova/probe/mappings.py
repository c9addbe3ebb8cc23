# SPDX-License-Identifier: Apache-2.0
"""Experiments on what the IOMMU's tables say: absent, half allowed, taken away, changed."""

from __future__ import annotations

from collections.abc import Callable

from virtiova.addr import GPA, IOVA, Access
from virtiova.policy import Mapping
from virtiova.probe.canary import Watch, paint
from virtiova.probe.experiment import bring_up, experiment, need_iommu, need_reads, prove_alive
from virtiova.probe.paths import deliveries
from virtiova.probe.rig import LENGTH, NotApplicableError, Outcome, Rig
from virtiova.spec import Citation

_TABLES = Citation("Intel VT-d specification", "3.6", "the tables say what a device may reach")
_CACHE = Citation("Intel VT-d specification", "6.5", "software invalidates after it changed the tables")


def _allow(rig: Rig) -> Callable[[], None]:
    def mend() -> None:
        rig.ops.map(rig.data)
        rig.iommu.invalidate()

    return mend


def _write_with(rig: Rig, access: Access | None, mapping: Mapping) -> Outcome:
    """The device writes to X, which is mapped with ``access``, or not at all."""
    need_iommu(rig)
    bring_up(rig)
    _remap(rig, access)
    watched = rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
    live = prove_alive(rig, watched, _allow(rig))
    return rig.outcome(rig.facts(mapping=mapping), watched, live=live, x=rig.data.addr)


def _remap(rig: Rig, access: Access | None) -> None:
    rig.iommu.unmap(IOVA(rig.data.addr), rig.ops.page_size)
    if access is not None:
        rig.ops.map(rig.data, access)
    rig.iommu.invalidate()


@experiment("unmapped", "the device writes to an X that is not mapped", _TABLES)
def unmapped(rig: Rig) -> Outcome:
    """Page A exists, but nothing points to it."""
    return _write_with(rig, None, Mapping.UNMAPPED)


@experiment("read-only", "the device writes to an X that is mapped read-only", _TABLES)
def read_only(rig: Rig) -> Outcome:
    """Page A must stay as it was."""
    return _write_with(rig, Access.READ, Mapping.READ_ONLY)


@experiment("write-only", "the device reads an X that is mapped write-only", _TABLES)
def write_only(rig: Rig) -> Outcome:
    """What is in page A must not arrive on the other side."""
    need_iommu(rig)
    need_reads(rig)
    if not rig.iommu.write_only:
        raise NotApplicableError("this IOMMU cannot allow writing without reading")
    bring_up(rig)
    _remap(rig, Access.WRITE)
    watches = rig.paint_data()
    request = rig.driver.make_device_read([(rig.data.addr, LENGTH)])
    watched = rig.observe(request, [], delivery=lambda data: deliveries(watches, data))
    live = prove_alive(rig, watched, _allow(rig))
    facts = rig.facts(mapping=Mapping.WRITE_ONLY, access=Access.READ)
    return rig.outcome(facts, watched, live=live, x=rig.data.addr)


def _after_change(rig: Rig, *, remap: bool, invalidate: bool) -> Outcome:
    """X points to page C and is used; then it points to page A, or nowhere; then it is used again."""
    need_iommu(rig)
    bring_up(rig)
    x = IOVA(rig.data.addr)
    former = rig.ops.spare("C")
    rig.iommu.map(x, former, rig.ops.page_size)
    rig.iommu.invalidate()
    rig.observe(rig.driver.make_device_write([(x, LENGTH)]), [])
    rig.driver.queues()[0].ring.poll()
    rig.iommu.unmap(x, rig.ops.page_size)
    if remap:
        rig.ops.map(rig.data)
    if invalidate:
        rig.iommu.invalidate()
    # Painted after the change: unmapping may have poisoned the page, and the first request has written to it.
    watches = [*rig.paint_data(), _former(rig, former)]
    watched = rig.observe(rig.driver.make_device_write([(x, LENGTH)]), watches)
    live = prove_alive(rig, watched, _allow(rig))
    now = Mapping.REMAPPED if remap else Mapping.REMOVED
    untold = Mapping.REMAPPED_UNTOLD if remap else Mapping.REMOVED_UNTOLD
    return rig.outcome(rig.facts(mapping=now if invalidate else untold), watched, live=live, x=x)


def _former(rig: Rig, gpa: GPA) -> Watch:
    rig.machine.ram.write(gpa, paint("C", gpa, LENGTH))
    return Watch("data", "C", gpa, LENGTH)


@experiment("unmap", "X was mapped and used; then it is unmapped, and the IOMMU is told", _CACHE)
def unmap(rig: Rig) -> Outcome:
    """After the invalidation the old page is out of reach."""
    return _after_change(rig, remap=False, invalidate=True)


@experiment("unmap-stale", "X was mapped and used; then it is unmapped, and the IOMMU is not told", _CACHE)
def unmap_stale(rig: Rig) -> Outcome:
    """Without the invalidation the old page may still be reached."""
    return _after_change(rig, remap=False, invalidate=False)


@experiment("remap", "X pointed to another page and was used; the IOMMU is told of the change", _CACHE)
def remap(rig: Rig) -> Outcome:
    """After the invalidation the new page is reached, and only that."""
    return _after_change(rig, remap=True, invalidate=True)


@experiment("remap-stale", "X pointed to another page and was used; the IOMMU is not told of the change", _CACHE)
def remap_stale(rig: Rig) -> Outcome:
    """Without the invalidation either page may be reached."""
    return _after_change(rig, remap=True, invalidate=False)
