# SPDX-License-Identifier: Apache-2.0
"""What every host of a device does with a queue, whatever brought the kick."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from virtiova._core import Drain, Request, faults
from virtiova.device.base import Device
from virtiova.errors import AccessError, ProtocolError
from virtiova.ring.chain import Chain
from virtiova.ring.ends import DeviceRing

MAX_WALKED: Final = 4096
"""Buffers after which a piece of work takes no further chain. A frame of 64 KiB has room in fewer of 17 bytes each."""


@dataclass(frozen=True, slots=True)
class Served:
    """What one look at a queue came to."""

    chains: int
    """How many chains were handled and pushed back."""
    drained: bool
    """The driver has no more, and was asked for a kick. Else buffers may be left that wait for the device."""


def serve_queue(device: Device, index: int, ring: DeviceRing) -> Served:
    """Let ``device`` handle all that it can of queue ``index``, and leave the driver knowing whether to kick.

    A buffer that the device may not touch is no reason to stop: its chain is pushed back with what was
    written, if the device itself did not answer it. Raises `ProtocolError` when ring or request have no
    meaning, or the ring cannot be reached: the host then sets DEVICE_NEEDS_RESET (virtio 1.4, 2.1.2).
    """
    ring.disable_notify()
    count = 0
    while device.pending(index):
        chains = take(device, index, ring)
        if chains is None:
            continue
        if not chains:
            if ring.enable_notify(waiting=device.wanted(index) > 0):
                continue
            return Served(count, drained=True)
        give(device, index, ring, chains)
        count += len(chains)
    return Served(count, drained=False)


def take(device: Device, index: int, ring: DeviceRing) -> Sequence[Chain] | None:
    """The chains that the next piece of work of queue ``index`` takes: usually one; none if there are not enough yet.

    None if the ring never has the room for it, or not in `MAX_WALKED` buffers: that piece of work was given up.
    Raises what `DeviceRing.pop` raises, and `ProtocolError` for a chain without any room where room is wanted.
    """
    wanted = device.wanted(index)
    chains: list[Chain] = []
    room = walked = 0
    while not chains or room < wanted:
        if len(chains) == ring.size or walked >= MAX_WALKED:
            ring.put_back(len(chains))
            device.give_up(index)
            return None
        chain = ring.pop()
        if chain is None:
            ring.put_back(len(chains))
            return ()
        chains.append(chain)
        if wanted and not chain.writable:
            raise ProtocolError(f"the chain of descriptor {chain.head} has no room, where the device is to write")
        room += chain.writable
        walked += chain.length
    return chains


def give(device: Device, index: int, ring: DeviceRing, chains: Sequence[Chain]) -> None:
    """Let ``device`` handle what `take` took, and push it back.

    The address space has recorded a miss if there was one; the driver sees a chain that is shorter than it asked for.
    """
    together = device.wanted(index) > 0
    told = True
    try:
        if together:
            device.handle_together(index, chains)
        else:
            device.handle_batch(index, chains)
    except AccessError:
        # Half a piece of work in several chains would be taken for a whole one.
        told = not together
    ring.push_all([(chain, chain.written if told else 0) for chain in chains])


def answer_with(device: Device, index: int, ring: DeviceRing, chain: Chain, found: bytes) -> None:
    """Give back a chain that an engine of the device has done: `Device.finish`."""
    with contextlib.suppress(AccessError):
        device.finish(index, chain, found)
    ring.push_all([(chain, chain.written)])


@dataclass(slots=True)
class Drained:
    """What was served natively, in all."""

    chains: int = 0
    bytes: int = 0


def drain_queue(
    device: Device,
    index: int,
    drain: Drain,
    limit: int,
    late: Callable[[], bool],
    total: Drained,
    *,
    arm: bool = True,
) -> bool | None:
    """Let ``device`` handle up to ``limit`` requests of queue ``index`` out of ``drain``, and count them in ``total``.

    True: the driver has no more, and was asked for a kick, if ``arm``. False: there may be more, as the limit is
    reached, it is ``late``, the device has nothing to do with more, or memory was shortened under us. None:
    `Drain.needs_help`.
    Raises `ProtocolError` when a request has no meaning, and its like; those behind it were not taken then.
    """
    drain.disable_notify()
    end = total.chains + limit
    serve = _together if _in_batches(device) else _one_by_one
    while total.chains < end:
        requests = drain.pop(end - total.chains)
        if not requests:
            if drain.needs_help:
                return None
            if not arm or not drain.enable_notify():
                return True
            if drain.needs_help:
                return None
        elif not serve(device, index, drain, requests, late, total):
            return False
        if late() or not device.pending(index):
            return False
    return False


def _in_batches(device: Device) -> bool:
    """Whether it has a way of its own to handle many at a time."""
    kind = type(device)
    return kind.handle_batch is not Device.handle_batch and kind.pending is Device.pending


def _together(
    device: Device, index: int, drain: Drain, requests: list[Request], late: Callable[[], bool], total: Drained
) -> bool:
    device.handle_batch(index, cast("Sequence[Chain]", requests))
    drain.push_all([(request, request.written) for request in requests])
    total.chains += len(requests)
    total.bytes += sum(request.moved for request in requests)
    return True


def _one_by_one(
    device: Device, index: int, drain: Drain, requests: list[Request], late: Callable[[], bool], total: Drained
) -> bool:
    """Each is given back as soon as it is done: the driver need not wait for those behind it. False: not all of them.

    Each page of a file that was shortened costs us one of our own: not a whole batch of them.
    """
    # Looked up once: the interpreter's own time is most of what is spent here.
    handle, give_back = device.handle, drain.give
    pending = None if type(device).pending is Device.pending else device.pending
    damage = faults()
    done = moved = 0
    try:
        for request in requests:
            if done and (late() or (pending is not None and not pending(index)) or faults() != damage):
                return False
            done += 1
            try:  # noqa: SIM105 - a context would cost as much as the rest of this loop
                handle(index, request)  # type: ignore[arg-type] # a Chain in all but name
            except AccessError:
                # The device's own doing: all of the request is within reach.
                pass
            moved += give_back(request)
            total.chains += 1
    finally:
        total.bytes += moved
        if done < len(requests):
            drain.put_back(requests[done:])
    return faults() == damage
