# SPDX-License-Identifier: Apache-2.0
"""Devices on Linux' virtio bus, on every transport: what they are, what was negotiated, who drives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device
from virtiova.collect.linux import config, group, seat
from virtiova.collect.linux.read import SHORT, natural, number, place, quoted, say
from virtiova.collect.tree import Tree, base, text
from virtiova.collect.types import type_name
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, Status

DEVICES: Final = "/sys/bus/virtio/devices"
_NARROW: Final = 64
_MAX_BITS: Final = 1024
"""Linux prints 64 bits, since 6.17 128."""


def devices(tree: Tree, *, arm: bool) -> Iterator[tuple[Device, seat.Seat | None]]:
    """All of them, each with what it sits on."""
    for name in sorted(tree.names(DEVICES), key=natural):
        yield _device(tree, name, arm=arm)


def _device(tree: Tree, name: str, *, arm: bool) -> tuple[Device, seat.Seat | None]:
    device = Device(name)
    at = f"{DEVICES}/{name}"
    put = device.facts.put
    kind = number(tree, f"{at}/device")
    if kind is not None:
        put(k.TYPE, type_name(kind), place(f"{at}/device"))
    driver = base(tree.link(f"{at}/driver"))
    put(k.DRIVER, driver, place(f"{at}/driver"))
    sits = seat.find(tree, at)
    if sits is not None:
        seat.put(sits, device)
        group.put(tree, sits, device, arm=arm)
        if sits.transport == "pci":
            config.put(tree, sits.address, device)
    negotiated(tree, at, device)
    return device, sits


def negotiated(tree: Tree, at: str, device: Device) -> None:
    """Status and features. The features are the driver's choice; they are taken once the device let them stand."""
    put = device.facts.put
    status = number(tree, f"{at}/status")
    if status is not None and status <= 0xFF:
        put(k.STATUS, status, place(f"{at}/status"))
        put(k.STARTED, bool(status & Status.DRIVER_OK), place(f"{at}/status"))
    elif status is not None:
        say(tree, f"{at}/status", f"0x{status:x} is no device status")
        status = None
    string = features(tree, f"{at}/features")
    if string is None:
        return
    where, word = place(f"{at}/features"), int(string[::-1], 2)
    put(k.WIDE_FEATURES, len(string) > _NARROW, where)
    put(k.FEATURES, word, where)
    modern, taken = bool(word >> VIRTIO_F_VERSION_1 & 1), bool(word >> VIRTIO_F_ACCESS_PLATFORM & 1)
    put(k.VERSION_1, modern, where)
    if status is None or not status & (Status.FEATURES_OK | Status.DRIVER_OK):
        return
    put(k.ACCEPTED, taken, where)
    if taken:
        put(k.OFFERED, True, where, Certainty.INFERRED)
    elif not modern and not status & Status.FEATURES_OK:
        # A driver of the legacy interface never sets FEATURES_OK (virtio 1.4, 3.1.2). There are 32 bits there.
        put(k.OFFERED, False, where, Certainty.INFERRED)


def features(tree: Tree, path: str) -> str | None:
    """The negotiated features: 0 and 1, from bit 0 on (Linux, ``features_show()``)."""
    found = text(tree, path, SHORT)
    if found is None:
        return None
    if not VIRTIO_F_ACCESS_PLATFORM < len(found) <= _MAX_BITS or not set(found) <= {"0", "1"}:
        say(tree, path, f"{quoted(found)} are no features: {len(found)} characters, wanted 64 or 128 of 0 and 1")
        return None
    return found
