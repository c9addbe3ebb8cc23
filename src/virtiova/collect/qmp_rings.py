# SPDX-License-Identifier: Apache-2.0
"""Where a device's rings are: at the addresses that it was given, or elsewhere. Seen from outside, by comparing."""

from __future__ import annotations

from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect.asked import Ask, human, whole
from virtiova.collect.facts import Device
from virtiova.collect.monitor import CommandError
from virtiova.collect.monitor_words import in_ram, xp_bytes
from virtiova.result.scan import Place

_QUEUES: Final = 6
"""Queues that are asked for one that was used: the first of a net device may have received nothing yet."""
_PACKED: Final = "VIRTIO_F_RING_PACKED"
_MASK: Final = 0xFFFF
_TRIES: Final = 3
_FEATURES_OK: Final = 8


def rings(ask: Ask, device: Device, path: str, status: dict[str, Any], ram: tuple[int, ...]) -> None:
    """Put what is seen of the first queue that was used. Nothing is put that was not seen to the end."""
    if not device.facts.get(k.STARTED):
        _set_up_too_early(ask, device, path, status)
        return
    pieces = list(zip(ram[::2], ram[1::2], strict=False))
    for queue in range(min(whole(status.get("num-vqs"), 1 << 16) or 0, _QUEUES)):
        seen = _Queue(ask, path, queue, status)
        if seen.addresses is None or not seen.progress():
            continue
        place = Place("qmp", f"x-query-virtio-queue-status {path} {queue}")
        device.facts.put(k.RING_ADDRESSES, seen.addresses, place)
        there = seen.is_there(pieces) if pieces else None
        if there is not None:
            device.facts.put(k.RINGS_IN_RAM, there, Place("qmp", f"xp, queue {queue} of {path}"))
        return


def _set_up_too_early(ask: Ask, device: Device, path: str, status: dict[str, Any]) -> None:
    """Rings that a driver set up although FEATURES_OK is clear: it must not come so far (virtio 1.4, 3.1.1)."""
    said = device.facts.get(k.STATUS)
    if said is None or said & _FEATURES_OK or not device.facts.get(k.VERSION_1):
        return
    queue = _Queue(ask, path, 0, status)
    if queue.addresses is not None:
        device.facts.put(k.RING_ADDRESSES, queue.addresses, Place("qmp", f"x-query-virtio-queue-status {path} 0"))


class _Queue:
    """One queue of a device that runs while it is looked at."""

    def __init__(self, ask: Ask, path: str, queue: int, status: dict[str, Any]) -> None:
        self._ask, self._path, self._queue = ask, path, queue
        self._vhost = bool(status.get("vhost-started"))
        features = status.get("guest-features")
        transports = features.get("transports") if isinstance(features, dict) else None
        names = [str(each)[:60] for each in transports[:100]] if isinstance(transports, list) else []
        self._packed = any(each.startswith(_PACKED) for each in names)
        modern = any(each.startswith("VIRTIO_F_VERSION_1") for each in names)
        self._big = not modern and status.get("device-endian") == "big"
        said = self._status()
        found = [whole(said.get(f"vring-{part}")) for part in ("desc", "avail", "used")]
        self._size = whole(said.get("vring-num"), 1 << 16) or 0
        # Address 0 is that of a queue which was never set up.
        usable = all(found) and self._size
        self.addresses: tuple[int, ...] | None = tuple(each for each in found if each) if usable else None

    def progress(self) -> bool:
        """The device has used it: only then its addresses are known to be good."""
        now = self._indices()
        return now is not None and now[1] != 0

    def is_there(self, ram: list[tuple[int, int]]) -> bool | None:
        """Read as physical addresses, do they hold this ring? None: it cannot be told."""
        assert self.addresses is not None
        if not all(in_ram(ram, address) for address in self.addresses):
            # Never read there: it may be a register, which reading could change.
            return False
        if self._packed:
            return None
        still = 0
        for _ in range(_TRIES):
            before = self._indices()
            avail, used = (self._index_at(address) for address in self.addresses[1:])
            after = self._indices()
            if None in (before, after, avail, used) or not before or not after or avail is None or used is None:
                return None
            moved = after[1] - before[1] & _MASK
            used_fits = (used - before[1] & _MASK) <= moved
            # The driver may be ahead of the device by as many as the queue holds.
            avail_fits = (avail - before[0] & _MASK) <= (after[0] - before[0] & _MASK) + self._size
            if used_fits and avail_fits and used:
                return True
            still += not moved
        # What was compared while the device worked may have been missed.
        return False if still == _TRIES else None

    def _indices(self) -> tuple[int, int] | None:
        """What the device has of avail and used."""
        if self._vhost:
            # While vhost runs, QEMU has no indices of its own; it reads those in the rings, as the device would.
            said = self._say("x-query-virtio-queue-element", index=0)
            avail, used = said.get("avail"), said.get("used")
            found = [whole(each.get("idx"), 1 << 16) if isinstance(each, dict) else None for each in (avail, used)]
        else:
            said = self._status()
            found = [whole(said.get(each), 1 << 32) for each in ("last-avail-idx", "used-idx")]
        if found[0] is None or found[1] is None:
            return None
        return found[0] & _MASK, found[1] & _MASK

    def _index_at(self, ring: int) -> int | None:
        try:
            found = xp_bytes(human(self._ask, f"xp /4xb 0x{ring:x}"))
        except CommandError:
            return None
        if found is None or len(found) < 4:
            return None
        return int.from_bytes(found[2:4], "big" if self._big else "little")

    def _status(self) -> dict[str, Any]:
        return self._say("x-query-virtio-queue-status")

    def _say(self, command: str, **arguments: int) -> dict[str, Any]:
        try:
            said = self._ask.ask(command, path=self._path, queue=self._queue, **arguments)
        except CommandError:
            return {}
        return said if isinstance(said, dict) else {}
