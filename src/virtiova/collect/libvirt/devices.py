# SPDX-License-Identifier: Apache-2.0
"""The devices of a domain as libvirt's QEMU driver makes them: which model, on which bus, told what."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from virtiova.collect.libvirt.argv import Argv, Frontend
from virtiova.collect.libvirt.buses import Buses, alias, number
from virtiova.collect.libvirt.xml import Element

_SUFFIX: Final = {"virtio-transitional": "-transitional", "virtio-non-transitional": "-non-transitional"}
_MODELS: Final = frozenset({"virtio", *_SUFFIX})
_DISK: Final = re.compile(r"[a-z]{1,3}d([a-z]{1,4})", re.ASCII)
_OPTIONS: Final = {"iommu": "iommu_platform", "ats": "ats", "packed": "packed", "page_per_vq": "page-per-vq"}
_SWITCH: Final = {"on": True, "yes": True, "off": False, "no": False}
_TAPS: Final = frozenset({"network", "bridge", "ethernet", "direct"})
_VIRTIO_NETS: Final = frozenset({"s390x", "s390", "aarch64", "armv7l", "riscv64", "riscv32", "loongarch64"})
"""Where a network card, or a display that nobody asked for, is virtio if nothing is said."""
_VIRTIO_SCSI: Final = frozenset({"s390x", "s390", "ppc64", "ppc64le"})
_NO_VGA: Final = frozenset({"s390x", "s390", "aarch64", "armv7l"})
_NO_BALLOON: Final = frozenset({"alpha", "ppc", "ppcemb", "sh4", "sh4eb", "armv6l", "armv7l", "armv7b", "aarch64"})


@dataclass(slots=True)
class Domain:
    """What the makers of devices need to know of their domain."""

    argv: Argv
    buses: Buses
    arch: str
    accel: str
    counts: dict[str, int] = field(default_factory=dict)

    def next(self, kind: str) -> int:
        """The number of the next one of a kind: libvirt's aliases count."""
        found = self.counts.get(kind, 0)
        self.counts[kind] = found + 1
        return found

    def make(self, element: Element, stem: str, default_alias: str, *, model: str = "", what: str = "") -> Frontend:
        """A virtio device of one element, with its options and its place. ``model`` is the attribute's value that may
        say (non-)transitional, ``what`` the attribute's element."""
        address = element.find("address")
        kind = address.get("type") if address is not None else ""
        suffix = {"ccw": "ccw", "virtio-mmio": "device", "pci": "pci"}.get(kind) or self.transport
        driver = f"{stem}-{suffix}" + (_SUFFIX.get(model, "") if suffix == "pci" else "")
        made = Frontend(stem if stem.endswith("-vga") or "-vga-" in stem else driver, alias(element, default_alias),
                        element.line)  # fmt: skip
        if what:
            where = element if what == "." else element.find(what)
            made.lines["driver"] = where.line if where is not None else element.line
        if suffix == "pci":
            self.buses.put(made, element, conventional=model == "virtio-transitional")
        elif suffix == "ccw" and address is not None and kind == "ccw":
            self._channel(made, address)
        else:
            made.placed = False
        self.options(made, element)
        return made

    @property
    def transport(self) -> str:
        """Where libvirt puts a virtio device that has no address."""
        if self.arch in ("s390x", "s390"):
            return "ccw"
        return "pci" if self.buses.exists else "device"

    def _channel(self, made: Frontend, address: Element) -> None:
        numbers = [number(address.get(key, default)) for key, default in (("cssid", "0xfe"), ("ssid", "0"))]
        device = number(address.get("devno"))
        if device is None or numbers[0] is None or numbers[1] is None:
            self.argv.problem(address.line, "no address of a channel device")
            made.placed = False
            return
        made.set("devno", f"{numbers[0]:x}.{numbers[1]:x}.{device:04x}", address.line_of("devno"))

    def socket(self, made: Frontend, element: Element, attribute: str, *, linked: bool = False) -> None:
        """The socket of a vhost-user device, as far as the file names it. ``linked``: another option refers to it."""
        source = element.find("source")
        path = source.get(attribute) if source is not None else ""
        if source is not None and path:
            name = f"char-{made.id}"
            self.argv.keyed("chardev", "socket", source.line_of(attribute), id=name, path=path)
            if not linked:
                made.properties["chardev"] = name

    def options(self, made: Frontend, element: Element) -> None:
        """What ``<driver iommu= ats= .../>`` says."""
        driver = element.find("driver")
        for attribute, key in _OPTIONS.items():
            said = driver.get(attribute) if driver is not None else ""
            if driver is None or not said:
                continue
            value = _SWITCH.get(said)
            if value is None:
                words = f"{attribute}={said[:20]!r} is neither 'on' nor 'off'"
                self.argv.problem(driver.line_of(attribute), words)
            else:
                made.set(key, value, driver.line_of(attribute))


def _disk(domain: Domain, element: Element) -> None:
    target = element.find("target")
    dev = target.get("dev") if target is not None else ""
    bus = target.get("bus") if target is not None else ""
    if bus != "virtio" and (bus or not dev.startswith("vd")):
        return
    match = _DISK.fullmatch(dev)
    index = 0
    for char in match[1] if match else "":
        index = index * 26 + ord(char) - ord("a") + 1
    stem = "vhost-user-blk" if element.get("type") == "vhostuser" else "virtio-blk"
    made = domain.make(element, stem, f"virtio-disk{max(index - 1, 0)}", model=element.get("model"), what="target")
    if element.get("type") == "vhostuser":
        domain.socket(made, element, "path")
    domain.argv.device(made)


def _interface(domain: Domain, element: Element) -> None:
    index = domain.next("net")
    # What a network turned out to be, in the file of a domain that runs.
    kind = element.said("actual", "type") or element.get("type")
    if kind == "hostdev":
        return
    model = element.said("model", "type")
    if not model and domain.arch in _VIRTIO_NETS:
        model = "virtio"
    if model not in _MODELS:
        return
    made = domain.make(element, "virtio-net", f"net{index}", model=model, what="model")
    netdev = f"host{made.id}"
    made.properties["netdev"] = netdev
    driver = element.find("driver")
    said = driver.get("name") if driver is not None else ""
    line = driver.line_of("name") if driver is not None and said else element.line
    if kind == "vhostuser" or (kind == "user" and element.said("backend", "type") == "vhostuser"):
        domain.argv.keyed("netdev", "vhost-user", element.line_of("type"), id=netdev, chardev=f"char-{made.id}")
        domain.socket(made, element, "path", linked=True)
    elif kind == "vdpa":
        domain.argv.keyed("netdev", "vhost-vdpa", element.line_of("type"), id=netdev)
    elif kind in _TAPS:
        vhost = said == "vhost" or (not said and domain.accel == "kvm")
        made.backend_implied, made.backend_line = not said, line
        domain.argv.keyed("netdev", "tap", line, id=netdev, vhost="on" if vhost else "off")
    else:
        domain.argv.keyed("netdev", "user", element.line_of("type"), id=netdev)
    domain.argv.device(made)


def _controller(domain: Domain, element: Element) -> None:
    kind, model, index = element.get("type"), element.get("model"), number(element.get("index", "0")) or 0
    if kind == "scsi":
        if model not in {"virtio-scsi", *_MODELS} and (model or domain.arch not in _VIRTIO_SCSI):
            return
        domain.argv.device(domain.make(element, "virtio-scsi", f"scsi{index}", model=model, what="."))
    elif kind == "virtio-serial":
        domain.argv.device(domain.make(element, "virtio-serial", f"virtio-serial{index}", model=model))


def _input(domain: Domain, element: Element) -> None:
    index = domain.next("input")
    stem = {"keyboard": "virtio-keyboard", "mouse": "virtio-mouse", "tablet": "virtio-tablet",
            "passthrough": "virtio-input-host", "multitouch": "virtio-multitouch"}.get(element.get("type"))  # fmt: skip
    if element.get("bus") == "virtio" and stem:
        domain.argv.device(domain.make(element, stem, f"input{index}", model=element.get("model")))


def _video(domain: Domain, element: Element) -> None:
    index = domain.next("video")
    model = element.find("model")
    if model is None or model.get("type") != "virtio":
        return
    primary = model.get("primary") == "yes" or index == 0
    vga = primary and domain.arch not in _NO_VGA
    if element.said("driver", "name") == "vhostuser":
        stem = "vhost-user-vga" if vga else "vhost-user-gpu"
    else:
        stem = ("virtio-vga" if vga else "virtio-gpu") + (
            "-gl" if model.said("acceleration", "accel3d") == "yes" else ""
        )
    domain.argv.device(domain.make(element, stem, f"video{index}", what="model"))


def _filesystem(domain: Domain, element: Element) -> None:
    index = domain.next("fs")
    kind = element.said("driver", "type")
    stem = {"virtiofs": "vhost-user-fs", "mtp": ""}.get(kind, "virtio-9p")
    if stem:
        made = domain.make(element, stem, f"fs{index}", model=element.get("model"), what="driver")
        if kind == "virtiofs":
            # Of a virtiofsd that libvirt starts the socket is nowhere in the file.
            domain.socket(made, element, "socket")
        domain.argv.device(made)


def _memory(domain: Domain, element: Element) -> None:
    kind = {"virtio-mem": "virtiomem", "virtio-pmem": "virtiopmem"}.get(element.get("model"))
    if kind:
        domain.argv.device(domain.make(element, element.get("model"), f"{kind}{domain.next(kind)}"))


def _hostdev(domain: Domain, element: Element) -> None:
    index = domain.next("hostdev")
    source = element.find("source")
    if element.get("type") == "scsi_host" and source is not None and source.get("protocol") == "vhost":
        domain.argv.device(domain.make(element, "vhost-scsi", f"hostdev{index}", model=element.get("model")))


def _plain(stem: str, prefix: str) -> Callable[[Domain, Element], None]:
    """A device whose ``model`` says that it is virtio."""

    def make(domain: Domain, element: Element) -> None:
        index = domain.next(prefix)
        if element.get("model") in _MODELS:
            domain.argv.device(domain.make(element, stem, f"{prefix}{index}", model=element.get("model")))

    return make


def _vsock(domain: Domain, element: Element) -> None:
    if element.get("model", "virtio") in _MODELS:
        domain.argv.device(domain.make(element, "vhost-vsock", "vsock0", model=element.get("model")))


_MAKERS: Final[dict[str, Callable[[Domain, Element], None]]] = {
    "disk": _disk,
    "interface": _interface,
    "controller": _controller,
    "input": _input,
    "video": _video,
    "filesystem": _filesystem,
    "memory": _memory,
    "hostdev": _hostdev,
    "vsock": _vsock,
    "rng": _plain("virtio-rng", "rng"),
    "memballoon": _plain("virtio-balloon", "balloon"),
    "crypto": _plain("virtio-crypto", "crypto"),
    "sound": _plain("virtio-sound", "sound"),
}


def make_devices(domain: Domain, devices: Element) -> None:
    """All virtio devices of a domain, then those that libvirt adds by itself."""
    for element in devices:
        maker = _MAKERS.get(element.tag)
        if maker is not None:
            maker(domain, element)
    _implied(domain, devices)


def _implied(domain: Domain, devices: Element) -> None:
    if devices.find("memballoon") is None and domain.arch not in _NO_BALLOON:
        _add(domain, devices, "virtio-balloon", "balloon0")
    there = [e for e in devices.all("controller") if e.get("type") == "virtio-serial"]
    indexes = {number(e.get("index", "0")) for e in there}
    for user in (*devices.all("channel"), *devices.all("console")):
        address = user.find("address")
        wanted = number(address.get("controller", "0")) if address is not None else 0
        if user.said("target", "type") == "virtio" and wanted is not None and wanted not in indexes and wanted < 64:
            indexes.add(wanted)
            _add(domain, user, "virtio-serial", f"virtio-serial{wanted}")
    scsi = {number(e.get("index", "0")) for e in devices.all("controller") if e.get("type") == "scsi"}
    for disk in devices.all("disk"):
        address = disk.find("address")
        wanted = number(address.get("controller", "0")) if address is not None else 0
        on_scsi = disk.said("target", "bus") == "scsi" and wanted is not None and wanted not in scsi
        if on_scsi and wanted is not None and wanted < 64 and domain.arch in _VIRTIO_SCSI:
            scsi.add(wanted)
            _add(domain, disk, "virtio-scsi", f"scsi{wanted}")
    if devices.find("graphics") is not None and devices.find("video") is None and domain.arch in _VIRTIO_NETS:
        _add(domain, devices, "virtio-gpu" if domain.arch in _NO_VGA else "virtio-vga", "video0")


def _add(domain: Domain, because: Element, stem: str, name: str) -> None:
    """A device that has no element of its own; ``because`` is where it comes from."""
    made = domain.make(Element(because.tag, because.line), stem, name)
    made.implied = True
    domain.argv.device(made)
