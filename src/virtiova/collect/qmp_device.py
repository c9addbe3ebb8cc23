# SPDX-License-Identifier: Apache-2.0
"""The virtio devices, as QEMU's monitor tells them: bit 33 on both sides, where they are, who serves them."""

from __future__ import annotations

import posixpath
import re
from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect.asked import Ask, human, mappings, whole, word
from virtiova.collect.facts import Certainty, Device, View
from virtiova.collect.monitor import CommandError
from virtiova.collect.monitor_words import dma_roots, netdevs
from virtiova.collect.qmp_rings import rings
from virtiova.collect.qmp_tree import Tree
from virtiova.collect.types import type_name
from virtiova.result.scan import Place
from virtiova.wire.vhost_user_names import ProtocolFeature

_DEVICES: Final = 1024
_BIT_33: Final = ("VIRTIO_F_IOMMU_PLATFORM", "VIRTIO_F_ACCESS_PLATFORM")
_STATUS: Final = {
    "ACKNOWLEDGE": 0x01, "DRIVER": 0x02, "DRIVER_OK": 0x04, "FEATURES_OK": 0x08, "NEEDS_RESET": 0x40, "FAILED": 0x80,
}  # fmt: skip
_PREFIX: Final = "VIRTIO_CONFIG_S_"
_PROTOCOL: Final = "VHOST_USER_PROTOCOL_F_"
_BACKEND: Final = "/virtio-backend"
_MODEL: Final = re.compile(r"(?:virtio|vhost-user|vhost)-(?P<kind>[a-z0-9-]+?)(?:-(?:pci|ccw|device).*)?")
# QEMU's names of devices that are not those of the specification's types.
_KINDS: Final = {
    "serial": "console",
    "rng": "rng",
    "vga": "gpu",
    "keyboard": "input",
    "mouse": "input",
    "tablet": "input",
}
_DEVNO: Final = re.compile(r"[0-9a-f]{1,2}\.[0-9a-f]\.[0-9a-f]{4}")
_OLD: Final = (
    "this QEMU does not tell of its virtio devices (x-query-virtio, since 7.2): what was offered and accepted, and "
    "where the rings are, is not known from here"
)


def collect(ask: Ask, view: View, tree: Tree, mtree: str) -> None:
    """Put a device for each that QEMU lists."""
    listed: list[tuple[str, str]] = []
    try:
        for entry in mappings(ask.ask("x-query-virtio"), _DEVICES + 1):
            listed.append((word(entry.get("path"), 1000), word(entry.get("name"), 80)))
    except CommandError as error:
        if error.kind == "CommandNotFound":
            view.problems.append(f"{view.source}: {_OLD}")
        listed = [(path, kind) for path, kind in tree.objects.items() if _is_virtio(path, kind)]
    if len(listed) > _DEVICES:
        view.problems.append(f"{view.source}: more than {_DEVICES} virtio devices; the rest was not looked at")
    listed = [each for each in listed[:_DEVICES] if each[0].startswith("/")]
    roots, nets = dma_roots(mtree), {}
    if any("net" in name for _, name in listed):
        try:
            nets = netdevs(human(ask, "info network"))
        except CommandError:
            nets = {}
    for path, name in sorted(
        listed, key=lambda each: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", each[0])]
    ):
        view.devices.append(_Look(ask, view, tree, path, name).device(roots, nets))
    if tree.roots:
        found = sorted(f"{name} (around the IOMMU)" if bypass else name for name, bypass in tree.roots.items())
        view.machine.put(k.ROOT_BUSES, tuple(found), Place("qmp", "qom-get bypass-iommu"))


def _is_virtio(path: str, kind: str) -> bool:
    return (
        kind.startswith(("virtio-", "vhost-")) and "bus" not in kind and not path.startswith("/machine/unattached/non")
    )


class _Look:
    """One device that is looked at. ``path`` is that of the virtio device itself, ``proxy`` that of what it is on."""

    def __init__(self, ask: Ask, view: View, tree: Tree, path: str, name: str) -> None:
        self._ask, self._view, self._tree = ask, view, tree
        self.path, self.name = path, name
        self.proxy = path.removesuffix(_BACKEND)
        found = Device(posixpath.basename(self.proxy))
        self._device, self._put = found, found.facts.put
        self._model = tree.objects.get(self.proxy) or word(tree.get(self.proxy, "type"), 80)

    def device(self, roots: dict[int, list[str]], nets: dict[str, str]) -> Device:
        """All of it."""
        if self._model:
            self._put(k.MODEL, self._model, Place("qmp", self.proxy))
        devfn = self._where()
        self._options()
        status = self._state()
        self._backend(status, nets)
        for root in roots.get(devfn, []) if devfn is not None else []:
            self._put(k.DMA_ROOT, root, Place("qmp", "info mtree -f"))
        if status:
            ram = self._view.machine.get(k.RAM) or ()
            rings(self._ask, self._device, self.path, status, ram)
        return self._device

    # -- where it is --

    def _where(self) -> int | None:
        """Put transport, address and place; its slot << 3 | function if it is on PCI."""
        tree = self._tree
        spot = tree.spot(self.proxy)
        if spot is not None:
            place = Place("qmp", f"{self.proxy} parent_bus")
            self._put(k.TRANSPORT, "pci", place)
            self._put(k.PLACE, spot.place, place)
            self._put(k.BRIDGED, len(spot.chain) > 1, place)
            if self._model.startswith("virtio-iommu"):
                self._behind(False, Place("qmp", self.proxy))  # it is in front of others
            elif spot.bypass is not None:
                self._behind(not spot.bypass, Place("qmp", f"{posixpath.dirname(spot.bus)} bypass-iommu"))
            address = tree.address(spot)
            if address:
                self._put(k.ADDRESS, address, Place("qmp", "query-pci"))
            else:
                self._put(k.ADDRESS, spot.place.removeprefix("pci:"), place, Certainty.INFERRED)
            slot, _, function = spot.chain[-1].partition(".")
            return int(slot, 16) << 3 | int(function)
        number = word(tree.get(self.proxy, "dev_id"), 20)
        if _DEVNO.fullmatch(number):
            # QEMU's fe.0.0001 is 0.0.0001 inside: css fe is the one that guests see as number 0.
            place = Place("qmp", f"{self.proxy} dev_id")
            self._put(k.TRANSPORT, "ccw", place)
            self._put(k.ADDRESS, number, place)
            self._put(k.PLACE, f"ccw:{number}", place)
            self._behind(False, place)
            return None
        bus = posixpath.dirname(tree.link(self.path, "parent_bus"))
        base = whole(tree.get(f"{bus}/virtio-mmio[0]", "addr")) if bus and bus != "/" else None
        if base is not None:
            place = Place("qmp", f"{bus} addr")
            self._put(k.TRANSPORT, "mmio", place)
            self._put(k.ADDRESS, f"{base:x}.virtio_mmio", place)
            self._put(k.PLACE, f"mmio:0x{base:x}", place)
            self._behind(False, place)
            self._put(k.CAN_BE_LEGACY, tree.get(bus, "force-legacy") is True, Place("qmp", f"{bus} force-legacy"))
        return None

    def _behind(self, behind: bool, place: Place) -> None:
        if self._view.machine.get(k.IOMMU) not in (None, "none"):
            self._put(k.BEHIND_IOMMU, behind, place)

    # -- what it was told --

    def _options(self) -> None:
        tree, put = self._tree, self._put
        configured = tree.get(self.proxy, "iommu_platform")
        if isinstance(configured, bool):
            put(k.CONFIGURED, configured, Place("qmp", f"{self.proxy} iommu_platform"))
        if self._device.facts.get(k.TRANSPORT) == "pci":
            ats = tree.get(self.proxy, "ats")
            if isinstance(ats, bool):
                put(k.ATS, ats, Place("qmp", f"{self.proxy} ats"))
            legacy = word(tree.get(self.proxy, "disable-legacy"), 8)
            if legacy in ("on", "off", "auto"):
                # As resolved: behind a root port "auto" has become "on".
                put(k.DISABLE_LEGACY, legacy, Place("qmp", f"{self.proxy} disable-legacy"))
                put(k.CAN_BE_LEGACY, legacy == "off", Place("qmp", f"{self.proxy} disable-legacy"))

    # -- what is said between it and its driver --

    def _state(self) -> dict[str, Any]:
        """Put its type and state; QEMU's answer, empty if there is none."""
        put = self._put
        try:
            said = self._ask.ask("x-query-virtio-status", path=self.path)
        except CommandError:
            said = None
        status: dict[str, Any] = said if isinstance(said, dict) else {}
        place = Place("qmp", f"x-query-virtio-status {self.path}")
        number = whole(status.get("device-id"), 1 << 16)
        match = _MODEL.fullmatch(self.name or self._model) or _MODEL.fullmatch(self._model)
        if number is not None:
            put(k.TYPE, type_name(number), place)
        elif match:
            kind = match["kind"].removesuffix("-host").removesuffix("-pci")
            put(k.TYPE, _KINDS.get(kind, kind), Place("qmp", self.path), Certainty.INFERRED)
        offer, taken = _words_of(status.get("host-features")), _words_of(status.get("guest-features"))
        steps = _words_of(status.get("status"), "statuses")
        configured, facts = self._device.facts.get(k.CONFIGURED), self._device.facts
        if offer is not None:
            # The registers of the legacy interface have no room for it (virtio 1.4, 4.2.4).
            hidden = facts.get(k.TRANSPORT) == "mmio" and bool(facts.get(k.CAN_BE_LEGACY))
            put(k.OFFERED, not hidden and any(bit in offer for bit in _BIT_33), place)
        elif configured is not None:
            put(k.OFFERED, configured, Place("qmp", f"{self.proxy} iommu_platform"), Certainty.INFERRED)
        if steps is None:
            return status
        bits = [bit for name, bit in _STATUS.items() if f"{_PREFIX}{name}" in steps]
        put(k.STATUS, sum(bits), place)
        started = f"{_PREFIX}DRIVER_OK" in steps
        put(k.STARTED, started, place)
        if taken is not None and (started or f"{_PREFIX}FEATURES_OK" in steps):
            put(k.VERSION_1, "VIRTIO_F_VERSION_1" in taken, place)
            # Without FEATURES_OK it is a legacy driver that runs: it never saw bit 33.
            kept = f"{_PREFIX}FEATURES_OK" in steps
            put(k.ACCEPTED, kept and any(bit in taken for bit in _BIT_33), place)
        elif taken and f"{_PREFIX}FAILED" in steps and "VIRTIO_F_VERSION_1" in taken:
            # The driver wrote these, was refused, and gave up. That it wrote bit 33 is not that it was accepted.
            put(k.VERSION_1, True, place)
            put(k.ACCEPTED, False, place)
            put(k.WROTE, any(bit in taken for bit in _BIT_33), place)
        elif taken is not None and "VIRTIO_F_VERSION_1" in taken:
            # It was written, whatever came of it: no legacy driver writes so far up.
            put(k.VERSION_1, True, place)
        return status

    # -- who serves it --

    def _backend(self, status: dict[str, Any], nets: dict[str, str]) -> None:
        place = Place("qmp", f"x-query-virtio-status {self.path}")
        vhost = status.get("vhost-dev")
        kind = ""
        if self._model.startswith("vhost-user-"):
            kind = "vhost-user"
        elif self._model.startswith("vhost-vdpa"):
            kind = "vdpa"
        elif self._model.startswith("vhost-"):
            kind = "vhost"
        elif "net" in self._model:
            kind = {"vhost-user": "vhost-user", "vhost-vdpa": "vdpa"}.get(self._netdev(nets), "")
        told = vhost.get("protocol-features") if isinstance(vhost, dict) else None
        protocols = _words_of(told, "protocols") or set()
        if not kind and isinstance(vhost, dict):
            kind = "vhost-user" if protocols else "vhost"
        if kind or "net" not in self._model:
            # Of a tap it is not told whether vhost serves it, until it does.
            self._put(k.BACKEND, kind, Place("qmp", self.proxy))
        if not isinstance(vhost, dict):
            return
        offer, taken = _words_of(vhost.get("features")), _words_of(vhost.get("acked-features"))
        if offer is not None:
            self._put(k.BACKEND_OFFERED, any(bit in offer for bit in _BIT_33), place)
        if taken is not None:
            # QEMU says it also of machines without an IOMMU, where it does not send it to the back end.
            self._put(k.BACKEND_ACCEPTED, any(bit in taken for bit in _BIT_33), place, Certainty.INFERRED)
        unknown = whole(told.get("unknown-protocols")) or 0 if isinstance(told, dict) else 0
        if protocols or unknown:
            bits = {bit.value for bit in ProtocolFeature if f"{_PROTOCOL}{bit.name}" in protocols}
            self._put(k.BACKEND_PROTOCOL, sum(1 << bit for bit in bits) | unknown, place)

    def _netdev(self, nets: dict[str, str]) -> str:
        return nets.get(word(self._tree.get(self.proxy, "netdev"), 80), "")


def _words_of(value: object, part: str = "transports") -> set[str] | None:
    """The names in a list of QEMU's such as ``VIRTIO_F_VERSION_1: Device compliant``; None if there is no list."""
    held = value.get(part) if isinstance(value, dict) else None
    if not isinstance(held, list):
        return None
    return {word(each).split(":")[0] for each in held[:200]}
