# SPDX-License-Identifier: Apache-2.0
"""libvirt domains: what is read of them, and on which line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from virtiova.collect import keys as k
from virtiova.collect import libvirt
from virtiova.collect.facts import Certainty, Device, Key, View
from virtiova.errors import ProtocolError
from virtiova.scan import scan_views

DATA = Path(__file__).parent / "data/libvirt"


def domain(name: str) -> View:
    """One of the domains in ``tests/data/libvirt``."""
    return libvirt.collect((DATA / f"{name}.xml").read_bytes(), f"{name}.xml")


def line_with(name: str, words: str, number: int = 1) -> int:
    """The line of such a file that holds ``words``, the ``number``-th time."""
    found = [at for at, line in enumerate((DATA / f"{name}.xml").read_text().splitlines(), 1) if words in line]
    return found[number - 1]


def device(view: View, name: str) -> Device:
    return next(each for each in view.devices if each.name == name)


def fact(view: View, name: str, key: Key[Any]) -> tuple[object, int, Certainty]:
    """Value, line and certainty of a fact."""
    found = (device(view, name).facts if name else view.machine).fact(key)
    assert found is not None, (name, key)
    assert found.place.source == "libvirt"
    return found.value, found.place.line, found.certainty


def made(devices: str, *, machine: str = "q35", arch: str = "x86_64", kind: str = "qemu", more: str = "") -> View:
    """A domain with these devices."""
    text = (
        f"<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>vm</name>"
        f"<os><type arch='{arch}' machine='{machine}'>hvm</type></os>{more}\n<devices>{devices}</devices></domain>"
    )
    return libvirt.collect(text.encode(), "vm.xml")


def test_each_fact_has_the_line_of_what_says_it() -> None:
    name = "q35-intel"
    view = domain(name)
    assert fact(view, "", k.NAME) == ("q35-intel", line_with(name, "<name>"), Certainty.SAID)
    assert fact(view, "", k.UUID)[1] == line_with(name, "<uuid>")
    assert fact(view, "", k.VMM)[1] == line_with(name, "<domain ")
    assert fact(view, "", k.MACHINE_TYPE) == ("q35", line_with(name, "machine="), Certainty.SAID)
    assert fact(view, "", k.IOMMU) == ("intel", line_with(name, "<iommu "), Certainty.SAID)
    options, line, _ = fact(view, "", k.IOMMU_OPTIONS)
    assert options == ("intremap=on", "caching-mode=on", "device-iotlb=on", "aw-bits=48")
    assert line == line_with(name, "caching_mode")
    said = line_with(name, "iommu='on' ats='on'")
    assert fact(view, "virtio-disk0", k.CONFIGURED) == (True, said, Certainty.SAID)
    assert fact(view, "virtio-disk0", k.OFFERED) == (True, said, Certainty.SAID)
    assert fact(view, "virtio-disk0", k.ATS) == (True, said, Certainty.SAID)
    assert fact(view, "virtio-disk1", k.OFFERED) == (False, line_with(name, "iommu='off'"), Certainty.SAID)
    # Nothing is written: the line is that of the device.
    silent = line_with(name, "model='virtio-non-transitional'")
    assert fact(view, "virtio-disk26", k.OFFERED) == (False, silent, Certainty.DEFAULT)
    # An attribute on a line of its own.
    assert fact(view, "net0", k.OFFERED)[1] == line_with(name, "              iommu='on'")
    assert fact(view, "net0", k.ATS)[1] == line_with(name, "              ats='on'")


def test_what_libvirt_adds_is_there_and_is_no_more_than_a_default() -> None:
    view = domain("q35-intel")
    assert fact(view, "balloon0", k.TYPE) == ("balloon", line_with("q35-intel", "<devices>"), Certainty.DEFAULT)
    assert fact(view, "virtio-serial0", k.TYPE) == ("console", line_with("q35-intel", "<channel"), Certainty.DEFAULT)
    assert "balloon0" not in [each.name for each in domain("pc").devices]


def test_an_ordinary_domain_has_no_findings() -> None:
    scan = scan_views([domain("pc")])
    assert {str(row.verdict) for row in scan.devices} == {"direct"}
    assert not scan.findings
    assert not scan.machines[0].problems


def test_a_finding_names_file_and_line() -> None:
    scan = scan_views([domain("q35-intel")])
    found = next(each for each in scan.findings if each.device == "virtio-disk1")
    line = line_with("q35-intel", "iommu='off'")
    assert f"q35-intel.xml:{line}" in [str(seen.place) for seen in found.seen]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<domainsnapshot><name>x</name></domainsnapshot>", "vm.xml:1: not a domain.*<domainsnapshot>"),
        (b"<?xml version='1.0'?>\n\n<network><name>default</name></network>", "vm.xml:3: not a domain.*<network>"),
        (b"<html><body>404</body></html>", "vm.xml:1: not a domain.*<html>"),
        (b"<!DOCTYPE html>\n<html></html>", "vm.xml:1: a document type"),
        (b"", "vm.xml:1: no XML"),
        (b"\x7fELF\x02\x01", "vm.xml:1: no XML"),
    ],
)
def test_what_is_no_domain_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        libvirt.collect(data, "vm.xml")
