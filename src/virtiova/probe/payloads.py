# SPDX-License-Identifier: Apache-2.0
"""Experiments on addresses that travel inside requests: GPU backing entries, balloon page numbers, memory blocks,
the region of persistent memory, and the physical addresses that virtio-iommu is told to map to.

Each is an X with two homes, as in all experiments: page A, where the IOMMU maps X, and page B, at guest-physical X.
What is read, taken away or reached says for which of them the device took the address. Where an IOMMU is expected to
have no say in that, it is shown first that it could have had one: the device writes to X by descriptor, and reaches
page A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from virtiova.addr import GPA, IOVA, PAGE_SIZE, Access
from virtiova.driver import gpu
from virtiova.driver.balloon import BalloonDriver
from virtiova.driver.base import Request
from virtiova.driver.gpu import GpuDriver
from virtiova.driver.memory import MemDriver, PmemDriver
from virtiova.errors import MachineError
from virtiova.features import DeviceId
from virtiova.policy import Mapping as Tables
from virtiova.policy import Payload
from virtiova.probe.canary import Watch, paint
from virtiova.probe.experiment import bring_up, bring_up_any, experiment, need_iommu, need_type, prove_alive
from virtiova.probe.rig import LENGTH, NotApplicableError, Outcome, Rig, Watched
from virtiova.result import Delivery, Witness
from virtiova.spec import Citation, spec

_BACKING: Final = spec("5.7.6.8", "a backing entry is an address and a length in guest memory")
_TOLD: Final = Citation("Intel VT-d specification", "6.5", "what was invalidated is not used any more")


def _goes_through(rig: Rig) -> bool:
    """Is the device expected to go through an IOMMU: is one in front, and was bit 33 taken?"""
    return rig.iommu.in_front and rig.negotiated is not None and rig.negotiated.bit33[1]


def _led(rig: Rig, pages: Mapping[str, GPA], make: Callable[[], Request]) -> list[Witness]:
    """What shows that the tables lead from X to page A, now and nowhere else: ``make`` makes a request whose answer the
    device writes to X, by descriptor. `MachineError` if the answer is not in page A of ``pages``, and in no other: then
    the question has not been put yet. Of a device that goes around the tables nothing is to be seen: none."""
    if not _goes_through(rig):
        return []
    for page, gpa in pages.items():
        rig.machine.ram.write(gpa, paint(page, gpa, LENGTH))
    request = make()
    watched = rig.observe(request, [Watch("mapped", page, gpa, LENGTH) for page, gpa in pages.items()])
    seen = [witness for witness in watched.witnesses if witness.role == "mapped"]
    reached = "".join(sorted(witness.page for witness in seen if witness.touched))
    if reached != "A" or request.queue.ring.poll() is None:
        where = f"page {' and '.join(reached)}" if reached else "no page"
        raise MachineError(f"X is not mapped as it was to be: what was written to it by descriptor is in {where}")
    return seen


def _beside(outcome: Outcome, mapped: list[Witness]) -> Outcome:
    """The outcome, with what showed where the tables led."""
    evidence = outcome.evidence
    return replace(outcome, evidence=replace(evidence, witnesses=[*evidence.witnesses, *mapped]))


# -- GPU ---------------------------------------------------------------------------------------------------------------


def _gpu(rig: Rig) -> GpuDriver:
    """The driver of a GPU that was brought up, with a resource that has no memory yet."""
    need_type(rig, DeviceId.GPU)
    bring_up(rig)
    return _resource(rig)


def _resource(rig: Rig) -> GpuDriver:
    driver = rig.driver
    assert isinstance(driver, GpuDriver)  # the device's type says so
    if driver.create() != gpu.OK_NODATA:
        raise MachineError("the GPU made no resource")
    return driver


def _attach(rig: Rig, driver: GpuDriver) -> Watched:
    """Give the resource the memory at X; see whose paint is on the screen."""
    request = driver.make_attach([(rig.data.addr, gpu.PICTURE)])
    return _watch_screen(rig, request, _homes(rig))


def _homes(rig: Rig) -> dict[str, GPA]:
    return {page: rig.data.gpa(page) for page in rig.data.homes}


def _watch_screen(rig: Rig, request: Request, pages: dict[str, GPA]) -> Watched:
    """Paint these pages with pictures, the colours of which are text that names the page; do the request; see what
    is on the screen."""
    texts = {page: paint(page, gpa, gpu.COLOURS) for page, gpa in pages.items()}
    for page, gpa in pages.items():
        rig.machine.ram.write(gpa, gpu.pixels(texts[page]))
    held = {page: text.hex() for page, text in texts.items()}
    gpas = {page: int(gpa) for page, gpa in pages.items()}
    return rig.observe(request, [], delivery=lambda shown: [Delivery("data", shown.hex(), held, gpas)])


@experiment("gpu-backing", "a GPU's backing entry names X: whose pixels are on the screen?", _BACKING, "gpu")
def gpu_backing(rig: Rig) -> Outcome:
    """The address is in RESOURCE_ATTACH_BACKING, not in a descriptor; TRANSFER_TO_HOST_2D makes the device read it,
    and the screen shows what it read."""
    watched = _attach(rig, _gpu(rig))
    facts = rig.facts(access=Access.READ, payload=Payload.BACKING)
    return rig.outcome(facts, watched, x=rig.data.addr)


@experiment("gpu-unmapped", "a GPU's backing entry names an X that is not mapped", _BACKING, "gpu")
def gpu_backing_unmapped(rig: Rig) -> Outcome:
    """Page A exists, but nothing points to it: the screen must not show it."""
    need_iommu(rig)
    driver = _gpu(rig)
    rig.iommu.unmap(IOVA(rig.data.addr), rig.ops.page_size)
    rig.iommu.invalidate()
    rig.expect_fault(rig.data.addr, write=False)
    watched = _attach(rig, driver)

    def mend() -> None:
        rig.ops.map(rig.data)
        rig.iommu.invalidate()

    live = prove_alive(rig, watched, mend, lambda: _attach(rig, _resource(rig)))
    facts = rig.facts(mapping=Tables.UNMAPPED, access=Access.READ, payload=Payload.BACKING)
    return rig.outcome(facts, watched, live=live, x=rig.data.addr)


@experiment("gpu-remap", "X points to another page after a GPU's backing entry named it", _TOLD, "gpu")
def gpu_backing_remap(rig: Rig) -> Outcome:
    """X points to page C when the entry is attached. Then it points to page A, and the IOMMU is told: what the same
    device writes to X by descriptor is in page A. Then it is made to read, and page A is all that it may reach."""
    need_iommu(rig)
    driver = _gpu(rig)
    former = rig.ops.spare("C")
    rig.iommu.map(IOVA(rig.data.addr), former, rig.ops.page_size)
    rig.iommu.invalidate()
    if _attach(rig, driver).done is False:
        raise MachineError("the GPU did not answer the request to attach memory")
    rig.ops.map(rig.data)
    rig.iommu.invalidate()
    pages = {**_homes(rig), "C": former}
    mapped = _led(rig, pages, lambda: driver.make_device_write([(rig.data.addr, LENGTH)]))
    watched = _watch_screen(rig, driver.make_transfer(), pages)
    facts = rig.facts(mapping=Tables.REMAPPED, access=Access.READ, payload=Payload.BACKING)
    return _beside(rig.outcome(facts, watched, x=rig.data.addr), mapped)


# -- balloon -----------------------------------------------------------------------------------------------------------


def _balloon(rig: Rig) -> BalloonDriver:
    need_type(rig, DeviceId.BALLOON)
    if rig.ops.page_size > PAGE_SIZE:
        # The host could not take away less than one of them.
        raise NotApplicableError("the machine's pages are larger than those that have a number")
    bring_up_any(rig)
    driver = rig.driver
    assert isinstance(driver, BalloonDriver)  # the device's type says so
    return driver


@experiment(
    "balloon-inflate",
    "a balloon is given the page with X's number: which page is taken away?",
    spec("5.5.6", "the driver gives an array of page addresses, each divided by 4096"),
    "balloon",
)
def balloon_inflate(rig: Rig) -> Outcome:
    """The host takes the page away at once, and whoever looks finds zeros in its place."""
    driver = _balloon(rig)
    watched = rig.observe(driver.make_inflate([rig.data.addr]), rig.paint_data(PAGE_SIZE))
    return rig.outcome(rig.facts(payload=Payload.PAGE_NUMBER), watched, x=rig.data.addr)


@experiment(
    "balloon-report",
    "a balloon is told by descriptor that X is free: which page is taken away?",
    spec("5.5.6.7", "free pages are reported as the buffers of a descriptor chain"),
    "balloon",
)
def balloon_report(rig: Rig) -> Outcome:
    """The contrast to page numbers: the same is done to the page, and the address is one of a descriptor."""
    driver = _balloon(rig)
    if not driver.reports:
        raise NotApplicableError("free page reporting is not offered")
    request = driver.make_report([(rig.data.addr, PAGE_SIZE)])
    watched = rig.observe(request, rig.paint_data(PAGE_SIZE))
    return rig.outcome(rig.facts(), watched, x=rig.data.addr)


# -- memory devices ----------------------------------------------------------------------------------------------------


@experiment(
    "mem-unplug",
    "a memory device unplugs the block at X: which block is emptied?",
    spec("5.15.6.4", "UNPLUG names the guest-physical address of the first block"),
    "mem",
)
def mem_unplug(rig: Rig) -> Outcome:
    """Two blocks are plugged, and the IOMMU maps the first one's address to the second one, where the device then
    writes an answer. The first one's address is unplugged: what is lost is the content of block B, at X, or of block A,
    where the IOMMU points."""
    need_type(rig, DeviceId.MEMORY)
    bring_up_any(rig)
    driver = rig.driver
    assert isinstance(driver, MemDriver)  # the device's type says so
    config = driver.config
    driver.plug(config.addr, 2)
    x, other = GPA(config.addr), GPA(config.addr + config.block_size)
    rig.iommu.map(IOVA(x), other, rig.ops.page_size)
    rig.iommu.invalidate()
    mapped = _led(rig, {"A": other, "B": x}, lambda: driver.make_state(x, 1, x))
    watches = [Watch("data", "A", other, LENGTH), Watch("data", "B", x, LENGTH)]
    for watch in watches:
        rig.machine.ram.write(GPA(watch.gpa), paint(watch.page, watch.gpa, watch.length))
    watched = rig.observe(driver.make_unplug(x, 1), watches)
    return _beside(rig.outcome(rig.facts(payload=Payload.BLOCK), watched, x=x), mapped)


@experiment(
    "pmem-region",
    "persistent memory lies at X, says its device: which bytes are stored?",
    spec("5.19.4", "start is the physical address of the persistent memory"),
    "pmem",
)
def pmem_region(rig: Rig) -> Outcome:
    """The driver stores at guest-physical X and flushes. The IOMMU maps X to a page A, where the device writes the
    answer to a flush, and which then holds something else. What is in the file was in page A, or in B, at X.

    That it is B is so by definition: the flush carries no address, and no access of the device leads to the region.
    Only a device that copied on a flush what it finds at X would store A. What is seen is that this one does not."""
    need_type(rig, DeviceId.PMEM)
    bring_up_any(rig)
    driver = rig.driver
    assert isinstance(driver, PmemDriver)  # the device's type says so
    x, _ = driver.region
    other = rig.ops.spare("A")
    rig.iommu.map(IOVA(x), other, rig.ops.page_size)
    rig.iommu.invalidate()
    homes = {"A": other, "B": GPA(x)}
    mapped = _led(rig, homes, lambda: driver.make_flush(0, LENGTH, x))
    held = {page: paint(page, gpa, LENGTH) for page, gpa in homes.items()}
    for page, text in held.items():
        rig.machine.ram.write(homes[page], text)
    pages = {page: text.hex() for page, text in held.items()}
    watched = rig.observe(
        driver.make_flush(0, LENGTH),
        [],
        delivery=lambda stored: [Delivery("data", stored.hex(), pages, {"A": other, "B": x})],
    )
    facts = rig.facts(access=Access.READ, payload=Payload.REGION)
    return _beside(rig.outcome(facts, watched, x=x), mapped)


# -- virtio-iommu ------------------------------------------------------------------------------------------------------


@experiment(
    "map-target",
    "virtio-iommu maps something to X, which is mapped, too: is X translated?",
    spec("5.13.6.5", "phys_start lies in the guest-physical address space"),
    "iommu",
)
def map_target(rig: Rig) -> Outcome:
    """MAP carries X as ``phys_start``. A device behind the IOMMU first writes to X, which is mapped to page A, and then
    to the address that is mapped to X: that arrives in page B, at guest-physical X, unless X is translated once more,
    by the tables of the device that writes, and page A has it. Bit 33 in the row is the IOMMU's own.

    That X is no address of the IOMMU's own function is so by definition: that one has no tables, nor could it have any
    that its rings are not in, so that for it X is guest-physical either way."""
    need_iommu(rig)
    own = rig.iommu.own_bit33
    if own is None:
        raise NotApplicableError("only virtio-iommu is told of a mapping by request")
    bring_up(rig)
    if not _goes_through(rig):
        raise NotApplicableError("a device that goes around the IOMMU shows nothing of its mappings")
    target = rig.ops.alloc(LENGTH)
    rig.iommu.map(IOVA(rig.data.addr), GPA(target.addr), rig.ops.page_size)
    rig.iommu.invalidate()
    homes = {page: target.gpa(page) for page in target.homes}
    mapped = _led(rig, homes, lambda: rig.driver.make_device_write([(target.addr, LENGTH)]))
    target.paint(0, LENGTH)
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)])
    watched = rig.observe(request, target.watch("data", 0, LENGTH))
    facts = replace(rig.facts(payload=Payload.MAP_TARGET), offered=own[0], accepted=own[1])
    return _beside(rig.outcome(facts, watched, x=target.addr), mapped)
