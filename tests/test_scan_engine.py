# SPDX-License-Identifier: Apache-2.0
"""The engine of a scan: which fixes are of use."""

from __future__ import annotations

import pytest

from virtiova.collect import keys as k
from virtiova.collect.facts import Device, View, ViewKind
from virtiova.result.scan import Place
from virtiova.scan import scan_view

HERE = Place("sysfs", "here")


def around(vmm: str) -> View:
    """A device that goes around the IOMMU of a machine that ``vmm`` runs."""
    view = View(ViewKind.CONFIGURATION, "vm", "vm")
    view.machine.put(k.IOMMU, "intel", HERE)
    if vmm:
        view.machine.put(k.VMM, vmm, HERE)
    device = Device("net0")
    device.facts.put(k.TYPE, "net", HERE)
    device.facts.put(k.OFFERED, False, HERE)
    device.facts.put(k.BEHIND_IOMMU, True, HERE)
    view.devices.append(device)
    return view


@pytest.mark.parametrize(
    ("vmm", "products"),
    [
        ("qemu", {"QEMU", "libvirt"}),
        ("cloud-hypervisor", {"Cloud Hypervisor"}),
        ("", {"QEMU", "libvirt", "Cloud Hypervisor"}),
        ("somebody-elses", {"QEMU", "libvirt", "Cloud Hypervisor"}),
    ],
)
def test_a_fix_for_another_product_is_of_no_use(vmm: str, products: set[str]) -> None:
    (finding,) = scan_view(around(vmm)).findings
    assert finding.id == "VA101"
    assert set(finding.fix) == products
