# SPDX-License-Identifier: Apache-2.0
"""Looking at a guest's disks from outside, through QEMU's monitor: the guest has no part in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from virtiova.collect.monitor import Monitor
from virtiova.collect.monitor_words import in_ram, ram_map, region_of, xp_bytes
from virtiova.errors import MachineError, NotPossibleError, ProtocolError
from virtiova.guest.facts import Translations

_BIT_33: Final = "VIRTIO_F_IOMMU_PLATFORM"


@dataclass(frozen=True, slots=True)
class Outside:
    """What QEMU says of one disk. Addresses are those that the device was given.

    ``ram``: there is RAM at the addresses of both rings. ``visible``: read there as physical memory, the rings hold
    the indices that the device has. ``translated``: how often the IOMMU translated one of the rings' addresses for
    this device; ``through``: at what it translated to, the ring holds the device's index. ``let_through``: how often
    it said that it lets this device's addresses through as they are. ``region``: what VT-d has put in front of the
    device (`monitor_words.region_of`).
    """

    offered: bool
    accepted: bool
    features_ok: bool
    driver_ok: bool
    desc: int
    avail: int
    used: int
    avail_index: int
    used_index: int
    ram: bool
    visible: bool
    translated: int
    through: bool
    let_through: int
    region: str = ""


def look(monitor: Monitor, name: str, translations: Translations, *, pci: bool) -> Outside:
    """All that QEMU knows of the disk of that name and of its first queue."""
    path = f"/machine/peripheral/{name}"
    try:
        status = monitor.execute("x-query-virtio-status", path=_backend(monitor, path))
    except MachineError as error:
        if "has not been found" in str(error) or "CommandNotFound" in str(error):
            raise NotPossibleError(f"this QEMU does not tell of its virtio devices: {error}") from error
        raise
    queue = monitor.execute("x-query-virtio-queue-status", path=_backend(monitor, path), queue=0)
    try:
        offered, accepted = _has_33(status["host-features"]), _has_33(status["guest-features"])
        statuses = " ".join(map(str, status["status"]["statuses"]))
        desc, avail, used = (_address(queue[key]) for key in ("vring-desc", "vring-avail", "vring-used"))
        avail_index, used_index = int(queue["last-avail-idx"]) & 0xFFFF, int(queue["used-idx"]) & 0xFFFF
        source = _source(monitor, name) if pci else None
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"QEMU's answer on {name} has another form: {error!r}") from error
    mtree = monitor.human("info mtree -f")
    ram = ram_map(mtree)
    count, through = 0, bool(avail_index and used_index)
    for address, index in ((avail, avail_index), (used, used_index)):
        times, target = translations.of(source, address)
        count += times
        through = through and target is not None and _index_at(monitor, target) == index
    here = [in_ram(ram, address) for address in (desc, avail, used)]
    seen = [_index_at(monitor, at) == index and index != 0 for at, index in ((avail, avail_index), (used, used_index))]
    return Outside(
        offered=offered,
        accepted=accepted,
        features_ok="FEATURES_OK" in statuses,
        driver_ok="DRIVER_OK" in statuses,
        desc=desc,
        avail=avail,
        used=used,
        avail_index=avail_index,
        used_index=used_index,
        ram=all(here),
        visible=all(here) and all(seen),
        translated=count,
        through=through,
        let_through=translations.let_through.get(source, 0) if source is not None else 0,
        region=region_of(mtree, source) if source is not None else "",
    )


def _backend(monitor: Monitor, path: str) -> str:
    """QEMU's path of the virtio device itself: behind a PCI or ccw proxy, or the object of that name."""
    listed = monitor.execute("x-query-virtio")
    paths = {str(entry.get("path")) for entry in listed if isinstance(entry, dict)} if isinstance(listed, list) else ()
    for candidate in (f"{path}/virtio-backend", path):
        if candidate in paths:
            return candidate
    raise ProtocolError(f"QEMU lists no virtio device {path}")


def _has_33(features: Any) -> bool:
    return any(str(item).split(":")[0] == _BIT_33 for item in features["transports"])


def _address(value: object) -> int:
    number = int(str(value))
    if not 0 <= number < 1 << 64:
        raise ValueError(f"no address: {number}")
    return number


def _index_at(monitor: Monitor, ring: int) -> int | None:
    """The index of a ring that is read as physical memory: little-endian, two bytes in."""
    found = xp_bytes(monitor.human(f"xp /4xb 0x{ring:x}"))
    return int.from_bytes(found[2:4], "little") if found is not None and len(found) >= 4 else None


def _source(monitor: Monitor, name: str) -> int | None:
    """The requester id of a PCI device of QEMU's; None if there is no such device on PCI."""
    pending = [d for bus in _list(monitor.execute("query-pci")) for d in _list(bus.get("devices"))]
    for device in pending:  # grows while it is walked: devices behind bridges
        if device.get("qdev_id") == name:
            bus, slot, function = (int(device.get(key, 0)) for key in ("bus", "slot", "function"))
            return bus << 8 | slot << 3 | function
        bridge = device.get("pci_bridge")
        pending += _list(bridge.get("devices")) if isinstance(bridge, dict) else []
    return None


def _list(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
