# SPDX-License-Identifier: Apache-2.0
"""A libvirt domain: its XML is read, and looked at as the QEMU command line that libvirt makes of it, line by line."""

from __future__ import annotations

from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect import qemu
from virtiova.collect.facts import Certainty, Device, Fact, Facts, Key, View, ViewKind, keys
from virtiova.collect.libvirt.argv import Argv, Frontend, passed_through
from virtiova.collect.libvirt.buses import SPARE, Buses
from virtiova.collect.libvirt.devices import Domain, make_devices
from virtiova.collect.libvirt.machine import binary_of, has_pci, is_express, machine_of, put_iommu, put_machine
from virtiova.collect.libvirt.xml import Element, parse
from virtiova.errors import ProtocolError, VirtiovaError
from virtiova.result.scan import Place

__all__ = ["collect"]

_QEMU: Final = frozenset({"qemu", "kvm", "hvf"})
_ROOTS: Final = ("domain", "domstatus")
_LINES: Final[dict[str, tuple[str, ...]]] = {
    k.CONFIGURED.name: ("iommu_platform",),
    k.OFFERED.name: ("iommu_platform",),
    k.ATS.name: ("ats",),
    k.PLACE.name: ("addr", "devno"),
    k.ADDRESS.name: ("addr", "devno"),
    k.BRIDGED.name: ("bus",),
    k.BEHIND_IOMMU.name: ("bus",),
    k.DISABLE_LEGACY.name: ("disable-legacy", "driver"),
    k.CAN_BE_LEGACY.name: ("disable-legacy", "driver"),
    k.MODEL.name: ("driver",),
    k.TYPE.name: ("driver",),
}
"""Which properties of a device a fact comes from: the first that has a line of its own."""
_UNPLACED: Final = frozenset({k.PLACE.name, k.ADDRESS.name})


def collect(data: bytes, name: str) -> View:
    """All that the XML of a domain says: as ``virsh dumpxml`` prints it, as it is in ``/etc/libvirt/qemu`` and in
    ``/run/libvirt/qemu``. ``name`` is the file's.

    Raises `ProtocolError`, with the line, for what is no well-formed XML, no domain, or has a document type.
    """
    root = parse(data, name, _wrong_root)
    domain = root if root.tag == "domain" else root.find("domain")
    if domain is None:
        return View(ViewKind.CONFIGURATION, "", name, problems=[f"{name}:{root.line}: no domain in it"], empty=True)
    return _view(domain, name)


def _wrong_root(root: Element) -> str | None:
    if root.tag in _ROOTS:
        return None
    tag = root.tag.rpartition(" ")[2]
    return f"not a domain of libvirt's: its root element is <{tag[:60]}>, and not <domain>"


def _view(domain: Element, name: str) -> View:
    kind = domain.get("type")
    if kind not in _QEMU:
        return _other(domain, kind, f"a domain of type {kind[:40]!r}" if kind else "a domain without a type", name)
    emulator = domain.words("devices/emulator").rpartition("/")[2]
    if emulator == "cloud-hypervisor":
        return _other(domain, emulator, "a domain that Cloud Hypervisor runs", name)
    argv = Argv(name)
    arch, machine = machine_of(domain)
    put_machine(argv, domain, machine)
    argv.option("nodefaults", "", domain.line)
    argv.option("accel", "kvm" if kind == "kvm" else "tcg", domain.line_of("type"))
    devices = domain.find("devices") or Element("devices", domain.line)
    chipset = arch in ("x86_64", "i686")
    buses = Buses(argv, express=is_express(machine), exists=has_pci(arch, machine), chipset=chipset)
    passed = passed_through(domain)
    buses.read(devices, passed)
    iommu = put_iommu(argv, buses, devices)
    make_devices(Domain(argv, buses, arch, kind), devices)
    words = argv.finish(domain, binary_of(arch))
    try:
        view = qemu.collect(words, Place("libvirt", name))
    except VirtiovaError as error:
        if not passed:
            raise ProtocolError(f"{name}:{domain.line}: {error}") from error
        # What is passed through is nobody's promise: the rest counts without it.
        argv.problem(passed[0].line, f"what is passed through to QEMU is not looked at: {error}")
        view = qemu.collect(words[: len(words) - len(passed)], Place("libvirt", name))
    _finish(view, argv, domain, iommu, name)
    return view


def _other(domain: Element, kind: str, said: str, name: str) -> View:
    """A domain that QEMU does not run."""
    view = View(ViewKind.CONFIGURATION, domain.words("name")[:200] or name, name)
    view.machine.put(k.VMM, kind[:40] or "unknown", Place("libvirt", name, domain.line_of("type")), Certainty.SAID)
    view.problems.append(f"{name}:{domain.line_of('type')}: {said}: what its devices are told is not known here")
    return view


def _finish(view: View, argv: Argv, domain: Element, iommu: Element | None, name: str) -> None:
    """From what was said of a command line to what was said of the file: places, and how sure it is."""
    view.source = name
    stand_ins = [words for words in view.problems if SPARE in words]
    view.problems = argv.problems + [words for words in view.problems if SPARE not in words]
    if stand_ins:
        view.problems.append(
            f"{name}: devices without addresses: this machine has no place for them that is known here"
        )
    lines = _machine_lines(domain, iommu)
    moved = Facts()
    known = keys()
    for fact in view.machine:
        _put(moved, known[fact.key], fact, lines.get(fact.key, 0), name, fact.certainty)
    view.machine = moved
    _guest_os(view, domain, name)
    boot = domain.find("os")
    if (
        boot is not None
        and boot.get("firmware") == "efi"
        and boot.find("loader") is None
        and boot.find("kernel") is None
    ):
        view.machine.put(k.FIRMWARE, "edk2", Place("libvirt", name, boot.line_of("firmware")), Certainty.SAID)
    for device in view.devices:
        _move(device, argv.frontends.get(device.name), name)


def _guest_os(view: View, domain: Element, name: str) -> None:
    """Windows, if the file says so: by what libosinfo calls it, or by what Hyper-V would offer it."""
    said = [each for held in domain.all("metadata") for info in held for each in info if each.tag.endswith(" os")]
    windows = next((each for each in said if "microsoft.com/win" in each.get("id")), None)
    if windows is not None:
        view.machine.put(k.OS, "windows", Place("libvirt", name, windows.line_of("id")), Certainty.SAID)
    hyperv = domain.find("features/hyperv")
    if hyperv is not None and not said:
        view.machine.put(k.OS, "windows", Place("libvirt", name, hyperv.line), Certainty.INFERRED)


def _move(device: Device, made: Frontend | None, name: str) -> None:
    """The facts of one device, on the lines of the attributes that they come from."""
    moved = Facts()
    known = keys()
    for fact in device.facts:
        certainty, line = fact.certainty, 0
        if made is not None:
            if not made.placed and fact.key in _UNPLACED:
                continue
            if made.implied:
                certainty = max(certainty, Certainty.DEFAULT)
            if fact.key == k.BACKEND.name and made.backend_line:
                line = made.backend_line
                if made.backend_implied:
                    certainty = Certainty.DEFAULT
            elif fact.place.line == made.line:
                line = next((made.lines[each] for each in _LINES.get(fact.key, ()) if each in made.lines), 0)
        _put(moved, known[fact.key], fact, line, name, certainty)
    device.facts = moved


def _put(facts: Facts, key: Key[Any], fact: Fact[Any], line: int, name: str, certainty: Certainty) -> None:
    facts.put(key, fact.value, Place("libvirt", name, line or fact.place.line), certainty)


def _machine_lines(domain: Element, iommu: Element | None) -> dict[str, int]:
    """The lines of facts that no word of the command line is alone for."""
    lines = {k.VMM.name: domain.line_of("type")}
    os_type = domain.find("os/type")
    if os_type is not None:
        lines[k.ARCH.name] = os_type.line_of("arch")
    if iommu is not None:
        lines[k.IOMMU.name] = iommu.line_of("model")
        driver = iommu.find("driver")
        lines[k.IOMMU_OPTIONS.name] = driver.line if driver is not None else iommu.line
    return lines
