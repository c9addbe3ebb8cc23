# SPDX-License-Identifier: Apache-2.0
"""Cases on what outlives a back end, or leaves with its guest: requests in flight, and the log of dirty pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from virtiova.addr import PAGE_SIZE
from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.fence import homes
from virtiova.conformance.life import landed, used_index
from virtiova.conformance.stand import Stand
from virtiova.driver.base import Queue
from virtiova.driver.negotiate import driver_ok
from virtiova.errors import MachineError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, has
from virtiova.machine.qemu.process import sealed_file
from virtiova.machine.vhost_user.frontend import WANTED
from virtiova.machine.vhost_user.memory import FILE_SIZE
from virtiova.probe.canary import Snapshot
from virtiova.probe.rig import COMPLETE_SECONDS, LENGTH, SILENT_SECONDS, twin
from virtiova.ring.layout import SplitLayout
from virtiova.wire.vhost_user import (
    F_LOG_ALL,
    InflightDescription,
    LogDescription,
    ProtocolFeature,
    Request,
)

_HEADER: Final = 16
_ENTRY: Final = 16
"""Bytes in the file of what is in flight: of a ring's header, and of each descriptor's entry."""
_VERSION: Final = slice(8, 10)
_ENTRIES: Final = slice(10, 12)
_USED: Final = slice(14, 16)
_LOG_BYTES: Final = 4096
_FLAG_LOG: Final = 1


def _u16(data: bytes, where: slice) -> int:
    return int.from_bytes(data[where], "little")


@case(
    "inflight",
    "the next back end does what the last one took and did not give back, once",
    vhost_user("Inflight I/O tracking", "requests that are marked as in flight are submitted again, in their order"),
    why="A back end that is restarted under a running guest loses reads that never end, or repeats writes that newer "
    "ones have gone past.",
    fix="At the start of a ring look into the file of SET_INFLIGHT_FD: first what is marked there, then the ring, from "
    "the used index plus what is marked on.",
)
def inflight(stand: Stand) -> str:
    """Kill the back end (or hang up, if it is not ours). Of two requests that it took the second is given back, and the
    first is noted as in flight. Start the rings again with that file."""
    with stand.again(wanted=[*WANTED, ProtocolFeature.INFLIGHT_SHMFD]) as other:
        other.need(ProtocolFeature.INFLIGHT_SHMFD)
        return _inflight(other, stand)


def _inflight(stand: Stand, asker: Stand) -> str:
    fd, description = _begin(stand)
    try:
        stand.prove(stand.home)
        asker.asking = True
        queue = stand.driver.queues()[0]
        done = used_index(queue)
        notes = os.pread(fd, _HEADER, description.mmap_offset)
        if (_u16(notes, _VERSION), _u16(notes, _ENTRIES), _u16(notes, _USED)) != (1, _size(queue), done):
            stand.unclear(
                f"after {done} requests the file of what is in flight begins with {notes.hex()}",
                "the file has the layout that the protocol describes",
                "the file is the back end's own, and the layout one that it can have",
            )
        word, translating = stand.front.accepted, stand.front.translating
        stand.come_back(wanted=[*WANTED, ProtocolFeature.INFLIGHT_SHMFD], kill=True)
        second = stand.ops.alloc(LENGTH)
        for region in (stand.data, second):
            region.paint(0, LENGTH)
        first = Snapshot(stand.machine.ram, stand.data.watch("data", 0, LENGTH))
        other = Snapshot(stand.machine.ram, second.watch("data", 0, LENGTH))
        heads = _take_two(stand, queue, [stand.data.addr, second.addr])
        _note(fd, description.mmap_offset, heads[0], done + 1)
        stand.front.set_features(word, translating=translating)
        stand.registers.share_memory()
        stand.front.must(Request.SET_INFLIGHT_FD, description.encode(), [fd])
        stand.registers.start_queue(queue.index, done + 1)
        stand.registers.notify(queue.index)
        stand.machine.wait(lambda: used_index(queue) >= done + 2, COMPLETE_SECONDS)
        stand.pump(SILENT_SECONDS)
        if landed(other):
            stand.fail("the request that had been given back is done once more")
        if landed(first) != stand.home or used_index(queue) < done + 2:
            stand.fail("the request that was in flight is lost")
        if used_index(queue) != done + 2:
            stand.fail(f"one request was in flight, and {used_index(queue) - done - 1} were given back")
        return f"the request in flight was done by the next {'process' if stand.ours else 'connection'}, once"
    finally:
        os.close(fd)


def _begin(stand: Stand) -> tuple[int, InflightDescription]:
    """Up, with a file of what is in flight; it, and its description."""
    take = has(stand.vhost.offered, VIRTIO_F_ACCESS_PLATFORM)
    if take:
        stand.enable_iommu()
    stand.negotiate(take=take)
    stand.start(ok=False)
    queues = stand.driver.queues()
    wanted = InflightDescription(0, 0, len(queues), _size(queues[0]))
    payload, fds = stand.front.exchange_fds(Request.GET_INFLIGHT_FD, wanted.encode())
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise MachineError(f"GET_INFLIGHT_FD is answered with {len(fds)} descriptors")
    try:
        description = InflightDescription.decode(payload)
        stand.front.must(Request.SET_INFLIGHT_FD, description.encode(), fds)
        driver_ok(stand.transport)
    except BaseException:
        os.close(fds[0])
        raise
    return fds[0], description


def _size(queue: Queue) -> int:
    return queue.ring.layout.size


def _take_two(stand: Stand, queue: Queue, addresses: Sequence[int]) -> list[int]:
    """Make a request of each address available, and give the second one back, as the back end before would have done;
    their heads."""
    layout, region = queue.ring.layout, queue.region
    assert isinstance(layout, SplitLayout)
    start = region.load16(layout.avail + 2)
    for address in addresses:
        stand.driver.make_device_write([(address, LENGTH)])
    queue.ring.publish()
    heads = [region.load16(layout.avail + layout.avail_entry(start + at)) for at in range(len(addresses))]
    used = used_index(queue)
    element = heads[1].to_bytes(4, "little") + (LENGTH + 1).to_bytes(4, "little")
    region.write(layout.used + layout.used_entry(used), element)
    region.store16(layout.used + 2, used + 1)
    return heads


def _note(fd: int, start: int, head: int, used: int) -> None:
    """Mark ``head`` as in flight, and the used index as seen."""
    at = start + _HEADER + head * _ENTRY
    os.pwrite(fd, b"\1" + bytes(7) + (1 << 32).to_bytes(8, "little"), at)
    os.pwrite(fd, used.to_bytes(2, "little"), start + _USED.start)


@case(
    "dirty-log",
    "the log of dirty pages goes by guest-physical addresses, whatever addresses the ring has",
    vhost_user("Migration", "a bit of the log is a page of guest-physical memory"),
    why="A page that is written and not marked keeps its old content on the other machine: silent corruption, hours "
    "after the migration.",
    fix="Log where a write went after it was translated, not the address of the descriptor.",
)
def dirty_log(stand: Stand) -> str:
    """Turn the log on while the device works, as for a migration; let it write to X, and look at the bits."""
    if not has(stand.vhost.offered, F_LOG_ALL):
        stand.skip("the back end does not offer F_LOG_ALL")
    with stand.again(wanted=[*WANTED, ProtocolFeature.LOG_SHMFD]) as other:
        other.need(ProtocolFeature.LOG_SHMFD)
        other.working()
        stand.asking = True
        log = sealed_file("virtiova-log", _LOG_BYTES)
        try:
            return _logged(other, log)
        finally:
            os.close(log)


def _logged(stand: Stand, log: int) -> str:
    assert FILE_SIZE // PAGE_SIZE <= _LOG_BYTES * 8
    stand.front.exchange(Request.SET_LOG_BASE, LogDescription(_LOG_BYTES, 0).encode(), [log])
    word = stand.front.accepted | 1 << F_LOG_ALL
    if not stand.front.set_features(word, translating=stand.front.translating):
        stand.fail("SET_FEATURES with F_LOG_ALL, which was offered, is refused")
    stand.front.barrier()
    os.pwrite(log, bytes(_LOG_BYTES), 0)
    stand.must_land(stand.write(), stand.home, "while the log is on")
    marked = _marked(stand, log)
    written = stand.data.gpa(stand.home)
    if written not in marked:
        where = "the bare address is" if stand.data.gpa("B") in marked else "it is not"
        stand.fail(f"guest-physical page 0x{written:x} was written, and {where} marked")
    if more := sorted(marked - homes(stand.regions(), stand.home)):
        stand.unclear(
            f"guest-physical page 0x{more[0]:x} is marked, and was not written",
            "the log says what was written",
            "the log says at least what was written: a page too many is only sent once more",
        )
    for queue in stand.driver.queues():
        stand.registers.log_queue(queue.index, _used_home(stand, queue))
    watched = stand.write()
    marked = _marked(stand, log)
    ring = _used_home(stand, stand.driver.queues()[0]) & -PAGE_SIZE
    if ring not in marked or not watched.done:
        stand.unclear(
            f"the used ring, in guest-physical page 0x{ring:x}, is not {'marked' if watched.done else 'served'}, "
            "with that address for the log",
            "its log address is guest-physical, like the log",
            "its log address is an I/O address like the ring's own, as some front ends fill it in",
        )
    return f"{len(marked)} pages marked, all of them written"


def _marked(stand: Stand, log: int) -> set[int]:
    stand.front.barrier()
    bits = int.from_bytes(os.pread(log, _LOG_BYTES, 0), "little")
    return {page * PAGE_SIZE for page in range(_LOG_BYTES * 8) if bits >> page & 1}


def _used_home(stand: Stand, queue: Queue) -> int:
    layout = queue.ring.layout
    assert isinstance(layout, SplitLayout)
    return twin(queue.region).gpa(stand.home, layout.used)
