# SPDX-License-Identifier: Apache-2.0
"""What is in front of a device, out of trees that have what the kernels of each platform were seen to show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sysfs_kit import BIT_33, VERSION_1, Box, acpi_table, dmar
from virtiova.collect import keys as k
from virtiova.collect.facts import Device, View, ViewKind
from virtiova.policy import Front
from virtiova.result.scan import Place
from virtiova.scan.front import hardware, in_front

PC = "/sys/devices/pci0000:00"
DT = "/sys/firmware/devicetree/base"
ON, OFF = VERSION_1 | BIT_33, VERSION_1


def two(box: Box, one: str, other: str) -> None:
    """Two disks: one took bit 33, one did not."""
    box.virtio(one, word=ON)
    box.virtio(other, word=OFF, name="virtio1")


def pc(box: Box, kind: str = "") -> None:
    """A PC in QEMU; with an IOMMU group of ``kind`` for each of its disks."""
    functions = [box.function(f"{PC}/0000:00:0{slot}.0") for slot in (1, 2)]
    two(box, *functions)
    box.file("/proc/sys/kernel/arch", "x86_64\n")
    box.file("/sys/class/dmi/id/sys_vendor", "QEMU\n")
    box.file("/sys/class/dmi/id/product_name", "Standard PC (Q35 + ICH9, 2009)\n")
    if kind:
        box.unit("dmar0", *functions)
        for number, function in enumerate(functions):
            box.group(number, kind, [function])


def x86(box: Box) -> None:
    pc(box)


def vtd(box: Box) -> None:
    pc(box, "DMA")
    box.file("/sys/firmware/acpi/tables/DMAR", dmar())


def lazy(box: Box) -> None:
    pc(box, "DMA-FQ")


def through(box: Box) -> None:
    pc(box, "identity")
    box.file("/proc/cmdline", "intel_iommu=on iommu=pt\n")


def told_off(box: Box) -> None:
    pc(box)
    box.file("/proc/cmdline", "quiet intel_iommu=off\n")
    box.file("/sys/firmware/acpi/tables/DMAR", dmar())


def no_driver(box: Box) -> None:
    pc(box)
    box.file("/sys/firmware/acpi/tables/VIOT", b"")


def arm(box: Box, kind: str = "") -> None:
    box.file("/proc/sys/kernel/arch", "aarch64\n")
    box.file(f"{DT}/compatible", "linux,dummy-virt\0")
    box.file(f"{DT}/fw-cfg@9020000/compatible", "qemu,fw-cfg-mmio\0")
    if kind:
        bridge = "/sys/devices/platform/4010000000.pcie"
        functions = [box.function(f"{bridge}/pci0000:00/0000:00:0{slot}.0") for slot in (1, 2)]
        two(box, *functions)
        box.unit("smmu3.0x0000000009050000", *functions)
        box.file(f"{DT}/smmuv3@9050000/compatible", "arm,smmu-v3\0")
        box.file(f"{DT}/pcie@10000000/dma-coherent")
        box.file(f"{DT}/pcie@10000000/iommu-map", bytes(16))
        box.link(f"{bridge}/of_node", f"{DT}/pcie@10000000")
        for number, function in enumerate(functions):
            box.group(number, kind, [function])


def smmu(box: Box) -> None:
    arm(box, "DMA")


def smmu_through(box: Box) -> None:
    arm(box, "identity")


def mmio(box: Box) -> None:
    arm(box)
    two(box, *(f"/sys/devices/platform/{name}.virtio_mmio" for name in ("a003c00", "a003e00")))
    for name in ("a003c00", "a003e00"):
        box.file(f"{DT}/virtio_mmio@{name}/dma-coherent")
        box.link(f"/sys/devices/platform/{name}.virtio_mmio/of_node", f"{DT}/virtio_mmio@{name}")


def power(box: Box, *names: str, window: str = "") -> None:
    functions = [box.function(f"{PC}/0000:00:0{slot}.0") for slot in (0, 1)]
    two(box, *functions)
    box.group(0, "unknown", functions)
    box.file("/proc/sys/kernel/arch", "ppc64le\n")
    box.file(f"{DT}/compatible", "\0".join(names) + "\0")
    for slot, function in enumerate(functions):
        box.file(f"{DT}/pci@800000020000000/scsi@{slot}/name", "scsi\0")
        box.link(f"{function}/of_node", f"{DT}/pci@800000020000000/scsi@{slot}")
    if window:
        box.file(f"{DT}/pci@800000020000000/{window}", bytes(20))


def pseries(box: Box) -> None:
    power(box, "qemu,pseries")


def ddw(box: Box) -> None:
    power(box, "qemu,pseries", window="linux,direct64-ddr-window-info")


def powernv(box: Box) -> None:
    power(box, "qemu,powernv9", "ibm,powernv")


def ccw(box: Box) -> None:
    box.file("/proc/sys/kernel/arch", "s390x\n")
    box.file("/proc/sysinfo", "Manufacturer: QEMU\nVM00 Control Program: KVM/Linux\n")
    two(box, *(f"/sys/devices/css0/0.0.000{n}/0.0.000{n}" for n in (0, 1)))


def zpci(box: Box) -> None:
    box.file("/proc/sys/kernel/arch", "s390x\n")
    functions = [box.function(f"/sys/devices/pci000{n}:00/000{n}:00:00.0") for n in (1, 2)]
    two(box, *functions)
    for number, function in enumerate(functions):
        box.unit(f"s390-iommu.0000000{number}", function)
        box.group(number, "unknown", [function])


def xen(box: Box) -> None:
    pc(box)
    box.file("/sys/hypervisor/type", "xen\n")


def xen_vtd(box: Box) -> None:
    xen(box)
    box.file("/sys/firmware/acpi/tables/RMAD", acpi_table("RMAD", bytes(12)))


ROWS: tuple[tuple[Callable[[Box], None], Front | None, str, tuple[str, str]], ...] = (
    (x86, Front.NONE, "", ("direct", "direct")),
    (vtd, Front.TRANSLATING, "intel", ("translated", "bypass")),
    (lazy, Front.TRANSLATING, "intel", ("translated", "bypass")),
    (through, Front.PASSTHROUGH, "intel", ("direct", "direct")),
    (told_off, Front.OFF, "intel", ("direct", "direct")),
    (no_driver, Front.OFF, "virtio", ("direct", "direct")),
    (smmu, Front.TRANSLATING, "smmuv3", ("translated", "bypass")),
    (smmu_through, Front.PASSTHROUGH, "smmuv3", ("direct", "direct")),
    (mmio, Front.NONE, "", ("direct", "direct")),
    (pseries, Front.TRANSLATING, "tce", ("translated", "bypass")),
    (ddw, Front.TRANSLATING, "tce", ("translated", "bypass")),
    (powernv, Front.TRANSLATING, "phb", ("translated", "bypass")),
    (ccw, Front.NONE, "", ("direct", "direct")),
    (zpci, Front.TRANSLATING, "zpci", ("translated", "bypass")),
    (xen, Front.NONE, "", ("direct", "direct")),
    (xen_vtd, None, "", ("unknown", "unknown")),
)


@pytest.mark.parametrize(("make", "front", "iommu", "verdicts"), ROWS, ids=lambda v: getattr(v, "__name__", None))
def test_front(make: Callable[[Box], None], front: Front | None, iommu: str, verdicts: object, tmp_path: Path) -> None:
    box = Box(tmp_path)
    make(box)
    view = box.view()
    assert view.problems == []
    for device in view.devices:
        found = in_front(view, device)
        assert (found.front, found.iommu) == (front, iommu)
        assert found.basis or found.why
        assert not hardware(view, device)
    rows = box.scan().devices
    assert tuple(row.verdict.value for row in rows) == verdicts
    assert [row.accepted for row in rows] == [True, False]


def test_addresses_of_a_xen_domain_are_the_machines(tmp_path: Path) -> None:
    box = Box(tmp_path)
    xen(box)
    assert [row.dma for row in box.scan().devices] == ["machine > ram", "machine > ram"]


def test_a_window_onto_all_memory_is_said(tmp_path: Path) -> None:
    box = Box(tmp_path)
    ddw(box)
    said = " ".join(str(seen) for row in box.scan().devices for seen in row.basis)
    assert "not kept out of anything (/sys/firmware/devicetree/base/pci@800000020000000/linux,direct64" in said


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (mmio, ["mmio:0xa003c00", "mmio:0xa003e00"]),
        (ccw, ["ccw:fe.0.0000", "ccw:fe.0.0001"]),
        (zpci, ["pci:0001:00:00.0", "pci:0002:00:00.0"]),
        (smmu, ["pci:00:01.0", "pci:00:02.0"]),
    ],
)
def test_places(make: Callable[[Box], None], places: list[str], tmp_path: Path) -> None:
    box = Box(tmp_path)
    make(box)
    assert [device.facts.get(k.PLACE) for device in box.view().devices] == places


@pytest.mark.parametrize("make", [smmu, mmio])
def test_coherent_is_what_the_node_or_one_above_says(make: Callable[[Box], None], tmp_path: Path) -> None:
    box = Box(tmp_path)
    make(box)
    assert [device.facts.get(k.DMA_COHERENT) for device in box.view().devices] == [True, True]
    for path in box.root.rglob("dma-coherent"):
        path.unlink()
    assert [device.facts.get(k.DMA_COHERENT) for device in box.view().devices] == [False, False]


def test_powerpc_is_coherent_without_a_word(tmp_path: Path) -> None:
    box = Box(tmp_path)
    pseries(box)
    assert [device.facts.get(k.DMA_COHERENT) for device in box.view().devices] == [None, None]


# -- bare metal --------------------------------------------------------------------------------------------------------


def physical(box: Box, kind: str) -> None:
    """A virtio function of a physical machine. Its processor has no flag of a hypervisor's."""
    function = box.function(f"{PC}/0000:00:01.0/0000:01:00.0", 0x1041)
    box.virtio(function, kind=1, word=OFF)
    box.file("/proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme sse2 vmx sev\n")
    box.file("/sys/class/dmi/id/board_vendor", "Some Maker\n")
    box.unit("dmar0", function)
    box.group(7, kind, [function])


def test_hardware_is_behind_its_iommu_whatever_it_says(tmp_path: Path) -> None:
    box = Box(tmp_path)
    physical(box, "DMA")
    view, device = box.one()
    assert view.machine.get(k.HYPERVISOR) == "none"
    # A host that has confidential guests is none.
    assert view.machine.get(k.RESTRICTED) is None
    assert hardware(view, device)
    row = box.row()
    assert (row.verdict.value, row.findings) == ("translated", [])


def test_the_same_in_a_guest_goes_around(tmp_path: Path) -> None:
    box = Box(tmp_path)
    physical(box, "DMA")
    box.file("/proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme sse2 hypervisor\n")
    assert box.row().verdict.value == "bypass"


# -- devices and states that are not a whole platform's ----------------------------------------------------------------


def test_in_no_group_although_others_are(tmp_path: Path) -> None:
    box = Box(tmp_path)
    vtd(box)
    box.at(f"{PC}/0000:00:02.0/iommu_group").unlink()
    box.at(f"{PC}/0000:00:02.0/iommu").unlink()
    assert [row.verdict.value for row in box.scan().devices] == ["translated", "direct"]


def test_a_virtio_iommu_is_not_behind_itself(tmp_path: Path) -> None:
    box = Box(tmp_path)
    disk = box.function(f"{PC}/0000:00:02.0")
    unit = box.function(f"{PC}/0000:00:01.0", 0x1057)
    box.virtio(unit, kind=23, word=OFF)
    box.virtio(disk, word=ON, name="virtio1")
    box.unit("0000:00:01.0", disk)
    box.group(0, "DMA", [disk])
    rows = box.scan().devices
    assert [(row.type, row.iommu, row.verdict.value) for row in rows] == [
        ("iommu", "", "direct"),
        ("blk", "virtio", "translated"),
    ]


def test_vfio_has_a_table_of_its_own(tmp_path: Path) -> None:
    box = Box(tmp_path)
    function = box.function(f"{PC}/0000:00:02.0", driver="vfio-pci")
    box.unit("dmar0", function)
    box.group(3, "identity", [function])
    view, device = box.one()
    assert in_front(view, device).front is Front.TRANSLATING
    box.at(f"{function}/driver").unlink()
    box.link(f"{function}/driver", "/sys/bus/pci/drivers/uio_pci_generic")
    view, device = box.one()
    assert in_front(view, device).front is Front.PASSTHROUGH


def test_the_drivers_of_a_group(tmp_path: Path) -> None:
    box = Box(tmp_path)
    one = box.function(f"{PC}/0000:00:02.0", driver="vfio-pci")
    other = box.function(f"{PC}/0000:00:02.1", driver="igb_uio")
    third = box.function(f"{PC}/0000:00:02.2", driver="")
    box.group(3, "DMA", [one, other, third])
    assert [device.facts.get(k.GROUP_DRIVERS) for device in box.view().devices] == [("igb_uio", "vfio-pci")] * 3


def test_a_vdpa_device_is_where_its_parent_is(tmp_path: Path) -> None:
    box = Box(tmp_path)
    function = box.function(f"{PC}/0000:00:02.0", driver="vp-vdpa")
    box.virtio(f"{function}/vdpa0", kind=1, word=ON)
    box.unit("dmar0", function)
    box.group(3, "DMA", [function])
    view = box.view()
    device = view.devices[0]
    assert (device.facts.get(k.TRANSPORT), device.facts.get(k.ADDRESS)) == ("vdpa", "vdpa0")
    assert (device.facts.get(k.GROUP), in_front(view, device).front) == ("3", Front.TRANSLATING)


def test_an_unknown_transport_is_shown(tmp_path: Path) -> None:
    box = Box(tmp_path)
    parent = "/sys/devices/platform/remoteproc/remoteproc0/rproc-virtio.0"
    box.virtio(parent)
    box.link(f"{parent}/subsystem", "/sys/bus/novel")
    _, device = box.one()
    assert (device.facts.get(k.TRANSPORT), device.facts.get(k.ADDRESS)) == ("novel", "rproc-virtio.0")
    assert k.PLACE not in device.facts


def test_mmio_by_the_kernels_option_and_by_iomem(tmp_path: Path) -> None:
    box = Box(tmp_path)
    two(box, "/sys/devices/platform/virtio-mmio.0", "/sys/devices/platform/LNRO0005:01")
    box.file("/proc/cmdline", "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6\n")
    box.file("/proc/iomem", "0a003e00-0a003fff : LNRO0005:01\n  0a003e00-0a003fff : LNRO0005:01 LNRO0005:01\n")
    facts = [device.facts.get(k.PLACE) for device in box.view().devices]
    assert facts == ["mmio:0xd0000000", "mmio:0xa003e00"]
    # Who may not know addresses is told zeros.
    box.file("/proc/iomem", "00000000-00000000 : LNRO0005:01\n")
    assert [device.facts.get(k.PLACE) for device in box.view().devices] == ["mmio:0xd0000000", None]


@pytest.mark.parametrize(
    ("options", "kind", "bypass"),
    [
        ("intel_iommu=off", "DMAR", "off"),
        ("intel_iommu=off intel_iommu=on", "DMAR", ""),
        ("intel_iommu=on,sm_on", "DMAR", ""),
        ("amd_iommu=off", "DMAR", ""),
        ("iommu=pt iommu.passthrough=0", "DMAR", ""),
        ("iommu.passthrough=1", "DMAR", "pt"),
        ("iommu=off", "DMAR", "off"),
        ("myintel_iommu=off", "DMAR", ""),
    ],
)
def test_the_kernels_options_are_taken_by_word(options: str, kind: str, bypass: str, tmp_path: Path) -> None:
    box = Box(tmp_path)
    pc(box, "DMA")
    box.file(f"/sys/firmware/acpi/tables/{kind}", dmar())
    box.file("/proc/cmdline", options + "\n")
    assert (box.view().machine.get(k.IOMMU_BYPASS) or "") == bypass


@pytest.mark.parametrize(
    ("root", "front"),
    [
        ("vtd-nodmar", Front.OFF),
        ("vtd-02.0-dmar", Front.TRANSLATING),
        ("system", Front.NONE),
        ("smmuv3-iommu-memory-region-16-1", Front.TRANSLATING),
    ],
)
def test_what_runs_counts_more_than_what_is_written(root: str, front: Front) -> None:
    view, device = View(ViewKind.HOST, "vm", "vm"), Device("d")
    view.machine.put(k.IOMMU, "smmuv3" if root.startswith("smmu") else "intel", Place("qmp", "vm"))
    device.facts.put(k.TRANSPORT, "pci", Place("qmp", "vm"))
    device.facts.put(k.DMA_ROOT, root, Place("qmp", "vm"))
    assert in_front(view, device).front is front


def test_confidential_marks(tmp_path: Path) -> None:
    marks = {
        "/sys/class/misc/sev-guest/dev": "sev-snp",
        "/sys/class/misc/tdx_guest/dev": "tdx",
        "/sys/devices/platform/arm-cca-dev/modalias": "arm-cca",
    }
    for number, (path, kind) in enumerate(marks.items()):
        box = Box(tmp_path / str(number))
        box.file(path)
        assert box.view().machine.get(k.RESTRICTED) == kind
    box = Box(tmp_path / "pv")
    box.file("/sys/firmware/uv/prot_virt_guest", "1\n")
    assert box.view().machine.get(k.RESTRICTED) == "s390-pv"
    box.file("/sys/firmware/uv/prot_virt_guest", "0\n")
    assert box.view().machine.get(k.RESTRICTED) is None


def test_a_restricted_pool_is_found_by_its_handle(tmp_path: Path) -> None:
    box = Box(tmp_path)
    mmio(box)
    node = f"{DT}/reserved-memory/bounce@70000000"
    box.file(f"{node}/compatible", "restricted-dma-pool\0")
    box.file(f"{node}/phandle", b"\0\0\x80\x01")
    box.file(f"{DT}/virtio_mmio@a003c00/memory-region", b"\0\0\x80\x01")
    box.file(f"{DT}/virtio_mmio@a003e00/memory-region", b"\0\0\x80\x02")
    pools = [device.facts.get(k.RESTRICTED_POOL) for device in box.view().devices]
    assert pools == ["bounce@70000000", None]
