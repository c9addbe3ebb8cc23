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


def test_addresses_are_chains_of_bridges() -> None:
    view = domain("expander")
    name = "expander"
    # Root port, upstream and downstream port below a root bus of its own.
    line = line_with(name, "bus='0x04'")
    assert fact(view, "ua-system", k.PLACE) == ("pci:fe:00.0/00.0/07.0/00.0", line, Certainty.INFERRED)
    assert fact(view, "ua-data", k.PLACE)[0] == "pci:00:0a.1"
    # The bridges above it have no addresses yet.
    assert k.PLACE not in device(view, "rng0").facts
    assert fact(view, "rng0", k.BRIDGED)[0] is True
    assert fact(view, "rng0", k.CAN_BE_LEGACY)[0] is True


def test_what_is_passed_through_counts_and_has_its_line() -> None:
    view = domain("expander")
    line = line_with("expander", "virtio-rng-pci,id=passed")
    assert fact(view, "passed", k.OFFERED) == (True, line, Certainty.SAID)
    assert fact(view, "passed", k.PLACE)[0] == "pci:00:1c.0"
    assert fact(view, "balloon0", k.ATS)[1] == line_with("expander", "virtio-balloon-pci.ats=on")
    # <qemu:override>
    assert fact(view, "ua-data", k.OFFERED) == (True, line_with("expander", "name='iommu_platform'"), Certainty.SAID)
    assert fact(view, "ua-data", k.CAN_BE_LEGACY)[0] is False


def test_a_property_can_be_taken_away() -> None:
    more = (
        "<qemu:override><qemu:device alias='rng0'><qemu:frontend><qemu:property name='iommu_platform' type='remove'/>"
        "</qemu:frontend></qemu:device><qemu:device alias='nobody'/></qemu:override>"
    )
    view = made("\n<rng model='virtio'><driver iommu='on'/></rng>", more=more)
    assert fact(view, "rng0", k.OFFERED)[::2] == (False, Certainty.DEFAULT)


def test_other_words_that_are_passed_through_do_not_spoil_the_rest() -> None:
    more = (
        "\n<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='{'/></qemu:commandline>"
        "<qemu:commandline><qemu:arg value='-no-such-option'/></qemu:commandline>"
    )
    view = made("<rng model='virtio'/>", more=more)
    assert [each.name for each in view.devices] == ["rng0", "balloon0"]
    assert any("vm.xml:2: what is passed through to QEMU is not looked at" in each for each in view.problems)


def test_a_confidential_guest_offers_bit_33_unless_told_not_to() -> None:
    view = domain("sev")
    line = line_with("sev", "<launchSecurity")
    assert fact(view, "", k.RESTRICTED) == ("sev-es", line, Certainty.SAID)
    assert fact(view, "", k.FIRMWARE) == ("edk2", line_with("sev", "firmware="), Certainty.SAID)
    assert fact(view, "virtio-disk0", k.OFFERED) == (True, line_with("sev", "iommu='on'"), Certainty.SAID)
    assert fact(view, "net0", k.OFFERED) == (True, line, Certainty.DEFAULT)
    assert fact(view, "rng0", k.OFFERED) == (False, line_with("sev", "iommu='off'"), Certainty.SAID)


@pytest.mark.parametrize(
    ("kind", "restricted"), [("sev-snp", "sev-snp"), ("tdx", "tdx"), ("s390-pv", "s390-pv"), ("new", "new")]
)
def test_kinds_of_confidential_guests(kind: str, restricted: str) -> None:
    view = made("<rng model='virtio'/>", more=f"<launchSecurity type='{kind}'/>")
    assert fact(view, "", k.RESTRICTED)[0] == restricted
    assert fact(view, "rng0", k.OFFERED)[0] is True


def test_channel_devices_have_no_iommu_in_front() -> None:
    view = domain("s390x")
    line = line_with("s390x", "devno='0x0a01'")
    assert fact(view, "virtio-disk0", k.PLACE) == ("ccw:fe.0.0a01", line, Certainty.INFERRED)
    assert fact(view, "virtio-disk0", k.TRANSPORT)[0] == "ccw"
    assert fact(view, "scsi0", k.TYPE) == ("scsi", line_with("s390x", "<disk", 2), Certainty.DEFAULT)
    assert fact(view, "video0", k.MODEL)[0] == "virtio-gpu-ccw"
    assert fact(view, "rng0", k.TRANSPORT)[0] == "pci"
    assert fact(view, "rng0", k.ADDRESS)[0] == "0007:00:00.0"
    rows = {row.name: str(row.verdict) for row in scan_views([view]).devices}
    assert rows["virtio-disk0"] == "direct"


def test_who_serves_a_network_card() -> None:
    view = domain("vdpa")
    assert fact(view, "net0", k.BACKEND) == ("vdpa", line_with("vdpa", "type='vdpa'"), Certainty.SAID)
    # With KVM, libvirt takes vhost if there is one.
    assert fact(view, "net1", k.BACKEND) == ("vhost", line_with("vdpa", "type='bridge'"), Certainty.DEFAULT)
    assert fact(view, "net2", k.BACKEND) == ("", line_with("vdpa", "name='qemu'"), Certainty.SAID)
    users = made("<interface type='bridge'><model type='virtio'/></interface>")
    assert fact(users, "net0", k.BACKEND)[0] == ""
    said = domain("vhost-user")
    assert fact(said, "net0", k.BACKEND)[:2] == ("vhost-user", line_with("vhost-user", "type='vhostuser'", 2))
    assert fact(said, "net0", k.BACKEND_SOCKET)[:2] == ("@dir@/net.sock", line_with("vhost-user", "net.sock"))


def test_an_iommu_for_some_buses_only() -> None:
    bus = "<controller type='pci' index='%d' model='pcie-expander-bus'><target busNr='%d'/></controller>"
    port = (
        "<controller type='pci' index='%d' model='pcie-root-port'><address type='pci' bus='%d' slot='0'/></controller>"
    )
    rng = "<rng model='virtio'><address type='pci' bus='%d' slot='0'/></rng>"
    smmu = "<iommu model='smmuv3'><driver pciBus='1' accel='on'/></iommu>"
    ports = port % (3, 1) + port % (4, 2)
    view = made(smmu + bus % (1, 64) + bus % (2, 128) + ports + rng % 3 + rng % 4, machine="virt", arch="aarch64")
    assert view.problems == []
    assert fact(view, "", k.IOMMU)[0] == "smmuv3"
    assert fact(view, "rng0", k.BEHIND_IOMMU)[0] is True
    assert fact(view, "rng1", k.BEHIND_IOMMU)[0] is False


def test_options_of_other_iommus() -> None:
    view = made("<iommu model='amd'>\n<driver passthrough='on' intremap='on' xtsup='on'/></iommu>")
    options, line, _ = fact(view, "", k.IOMMU_OPTIONS)
    assert fact(view, "", k.IOMMU)[0] == "amd"
    assert options == ("intremap=on", "pt=on", "xtsup=on")
    assert line == 3
    view = made("\n<iommu model='quantum'/>")
    assert fact(view, "", k.IOMMU)[0] == "none"
    assert view.problems == ["vm.xml:3: an IOMMU of the model 'quantum' is not known here"]


@pytest.mark.parametrize(
    ("element", "name", "model", "type_"),
    [
        ("<crypto model='virtio' type='qemu'/>", "crypto0", "virtio-crypto-pci", "crypto"),
        ("<sound model='virtio'/>", "sound0", "virtio-sound-pci", "sound"),
        ("<vsock/>", "vsock0", "vhost-vsock-pci", "vsock"),
        ("<filesystem><driver type='path'/></filesystem>", "fs0", "virtio-9p-pci", "9p"),
        ("<input type='passthrough' bus='virtio'/>", "input0", "virtio-input-host-pci", "input"),
        (
            "<hostdev mode='subsystem' type='scsi_host'><source protocol='vhost'/></hostdev>",
            "hostdev0",
            "vhost-scsi-pci",
            "scsi",
        ),
        ("<video><driver name='vhostuser'/><model type='virtio'/></video>", "video0", "vhost-user-vga", "gpu"),
        (
            "<video><model type='virtio'><acceleration accel3d='yes'/></model></video>",
            "video0",
            "virtio-vga-gl",
            "gpu",
        ),
        ("<interface type='user'><model type='virtio-transitional'/></interface>", "net0",
         "virtio-net-pci-transitional", "net"),
        ("<disk><target dev='vdc' bus='virtio'/></disk>", "virtio-disk2", "virtio-blk-pci", "blk"),
    ],
)  # fmt: skip
def test_other_devices(element: str, name: str, model: str, type_: str) -> None:
    view = made(element)
    assert fact(view, name, k.MODEL)[0] == model
    assert fact(view, name, k.TYPE)[0] == type_


def test_what_is_no_virtio_device_is_no_device() -> None:
    view = made(
        "<disk><target dev='sda' bus='sata'/></disk><interface type='user'><model type='e1000e'/></interface>"
        "<video><model type='qxl'/></video><input type='tablet' bus='usb'/><shmem name='x'/><memballoon model='none'/>"
        "<interface type='hostdev'><model type='virtio'/></interface><memory model='dimm'/><rng model='other'/>"
    )
    assert view.devices == []
    assert view.problems == []


def test_a_domain_that_qemu_does_not_run() -> None:
    view = made("<rng model='virtio'/>", kind="xen")
    assert fact(view, "", k.VMM)[0] == "xen"
    assert view.problems == ["vm.xml:1: a domain of type 'xen': what its devices are told is not known here"]
    view = made("<emulator>/usr/bin/cloud-hypervisor</emulator><rng model='virtio'/>", kind="kvm")
    assert fact(view, "", k.VMM)[0] == "cloud-hypervisor"


def test_values_that_mean_nothing_are_problems() -> None:
    view = made("\n<rng model='virtio'><driver iommu='maybe'/>\n<address type='pci' bus='x'/></rng>")
    assert view.problems == ["vm.xml:4: no PCI address", "vm.xml:3: iommu='maybe' is neither 'on' nor 'off'"]
    assert fact(view, "rng0", k.OFFERED) == (False, 3, Certainty.DEFAULT)
