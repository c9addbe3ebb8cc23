# SPDX-License-Identifier: Apache-2.0
"""Experiments on the path of one access: payload in both directions, rings, tables, buffers over two pages."""

from __future__ import annotations

from dataclasses import replace

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.features import Feature
from virtiova.policy import Mapping
from virtiova.probe.canary import TwinRegion, Watch, paint
from virtiova.probe.experiment import bring_up, experiment, need_iommu, need_reads, prove_alive
from virtiova.probe.rig import LENGTH, NotApplicableError, Outcome, Rig, Watched, twin
from virtiova.result import Delivery
from virtiova.ring.layout import DESC_SIZE, Desc
from virtiova.ring.split_driver import SplitDriver
from virtiova.spec import Citation, spec

PAST = 16
"""Bytes past the end: enough that random ones do not happen to be the paint."""
_ANY = spec("2.7", "descriptors, rings and buffers are addressed alike")


@experiment("device-writes", "the device writes into a buffer at X", _ANY)
def device_writes(rig: Rig) -> Outcome:
    """Ask for bytes at X; see whether page A (through the IOMMU) or page B (the bare address) has them."""
    bring_up(rig)
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)])
    watched = rig.observe(request, rig.paint_data())
    return rig.outcome(rig.facts(), watched, x=rig.data.addr)


@experiment("device-reads", "the device reads a buffer at X", _ANY)
def device_reads(rig: Rig) -> Outcome:
    """Let the device send what is at X; see whose paint arrives on its other side."""
    need_reads(rig)
    bring_up(rig)
    watches = rig.paint_data()
    request = rig.driver.make_device_read([(rig.data.addr, LENGTH)])
    watched = rig.observe(request, [], delivery=lambda data: deliveries(watches, data))
    return rig.outcome(rig.facts(access=Access.READ), watched, x=rig.data.addr)


def deliveries(watches: list[Watch], arrived: bytes) -> list[Delivery]:
    """What arrived, beside what each page held."""
    held = {watch.page: paint(watch.page, watch.gpa, watch.length).hex() for watch in watches}
    return [Delivery("data", arrived[:LENGTH].hex(), held, {watch.page: watch.gpa for watch in watches})]


@experiment("ring", "the ring itself lies at X: descriptors, available and used ring", _ANY)
def ring(rig: Rig) -> Outcome:
    """The two copies differ in which chain is available and in where each chain's buffer lies: the buffer that is
    written says which copy each was read from, and the used ring says where it was written. A packed ring is one
    table, in which what is available is said by the descriptor itself: there the copies differ in the buffer."""
    bring_up(rig)
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)])
    region = twin(request.queue.region)
    ends = request.queue.ring
    watches = two_splits(rig, region, ends) if isinstance(ends, SplitDriver) else redirected(rig, region)
    watched = rig.observe(request, watches)
    return rig.outcome(rig.facts(), watched, x=region.addr)


def two_splits(rig: Rig, region: TwinRegion, ring: SplitDriver) -> list[Watch]:
    """Let the copies of a split ring make different chains available, with other buffers; watch those."""
    order = rig.transport.byte_order
    buffers = {"A": rig.data, "B": rig.ops.alloc(LENGTH), "AB": rig.ops.alloc(LENGTH), "BA": rig.ops.alloc(LENGTH)}
    # The chain as it is, is what copy A makes available; a second one, of free descriptors, what copy B does.
    layout = ring.layout
    slot, descs = ring.last_added
    others = dict(zip(descs, ring.free, strict=False))
    for page, first, other in (("A", "A", "BA"), ("B", "AB", "B")):
        home = region.homes[page]
        for index in descs:
            desc = Desc.unpack(home.read(layout.desc + DESC_SIZE * index, DESC_SIZE), order)
            mine = desc.addr == rig.data.addr
            moved = replace(desc, addr=buffers[first].addr if mine else desc.addr)
            again = replace(desc, addr=buffers[other].addr if mine else desc.addr, next=others.get(desc.next, 0))
            home.write(layout.desc + DESC_SIZE * index, moved.pack(order))
            home.write(layout.desc + DESC_SIZE * others[index], again.pack(order))
    region.homes["B"].store16(layout.avail + layout.avail_entry(slot), others[descs[0]], order)
    watches = []
    for copies, buffer in buffers.items():
        buffer.paint(0, LENGTH)
        watches += buffer.watch(f"via-{copies}", 0, LENGTH)
    return watches


@experiment("indirect", "the indirect descriptor table lies at X", spec("2.7.5.3", "indirect descriptors"))
def indirect(rig: Rig) -> Outcome:
    """The same with the two copies of an indirect table."""
    bring_up(rig)
    negotiated = rig.negotiated
    if negotiated is None or not negotiated.has(Feature.RING_INDIRECT_DESC):
        raise NotApplicableError("indirect descriptors are not offered")
    table = rig.ops.alloc(PAGE_SIZE)
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)], table)
    watches = redirected(rig, table)
    watched = rig.observe(request, watches)
    return rig.outcome(rig.facts(), watched, x=table.addr)


def redirected(rig: Rig, region: TwinRegion) -> list[Watch]:
    """Let copy B of a ring or table name another buffer than copy A, and watch both buffers."""
    other = rig.ops.alloc(LENGTH)
    region.redirect("B", rig.data.addr, other.addr, rig.transport.byte_order)
    for buffer in (rig.data, other):
        buffer.paint(0, LENGTH)
    return [*rig.data.watch("via-A", 0, LENGTH), *other.watch("via-B", 0, LENGTH)]


@experiment(
    "split-buffer",
    "one buffer over two pages that are not adjacent behind the IOMMU",
    spec("6.1", "the driver configures the IOMMU to translate bus addresses, page by page"),
)
def split_buffer(rig: Rig) -> Outcome:
    """Half of the payload ends one page, half begins the next; each half is judged by itself."""
    bring_up(rig)
    page_size = rig.ops.page_size
    rig.data = rig.ops.alloc(2 * page_size)
    start, half = page_size - LENGTH // 2, LENGTH // 2
    watches = []
    for role, offset in (("data", start), ("data2", page_size)):
        rig.data.paint(offset, half)
        watches += rig.data.watch(role, offset, half)
    request = rig.driver.make_device_write([(rig.data.addr + start, LENGTH)])
    watched = rig.observe(request, watches)
    return rig.outcome(rig.facts(), watched, x=rig.data.addr + start)


@experiment(
    "past-end",
    "the buffer runs past the end of the mapping",
    Citation("Intel VT-d specification", "3.7", "an access without a present entry with that permission is blocked"),
)
def past_end(rig: Rig) -> Outcome:
    """All but the last 16 bytes are mapped; only their fate counts, from the byte one past the end on."""
    need_iommu(rig)
    bring_up(rig)
    page_size = rig.ops.page_size
    start = page_size - LENGTH + PAST
    # What follows each home in RAM: for A, what a device reaches that ignores where the mapping ends.
    after = {page: GPA(home.gpas[0] + page_size) for page, home in rig.data.homes.items()}

    def write() -> Watched:
        for page, gpa in after.items():
            rig.machine.ram.write(gpa, paint(page, gpa, PAST))
        watches = [Watch("data", page, gpa, PAST) for page, gpa in after.items()]
        return rig.observe(rig.driver.make_device_write([(rig.data.addr + start, LENGTH)]), watches)

    def mend() -> None:
        rig.iommu.map(IOVA(rig.data.addr + page_size), after["A"], page_size)
        rig.iommu.invalidate()

    rig.expect_fault(rig.data.addr + page_size, write=True)
    watched = write()
    live = prove_alive(rig, watched, mend, write)
    facts = rig.facts(mapping=Mapping.UNMAPPED)
    return rig.outcome(facts, watched, live=live, x=rig.data.addr + page_size)
