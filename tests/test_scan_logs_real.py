# SPDX-License-Identifier: Apache-2.0
"""The messages that the rules rest on, in what prints them: a real QEMU's program, a real kernel's log and modules."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scan_rule_kit import said
from served_guest import VTD, Guest, Kernel, assets
from virtiova.collect import keys as k
from virtiova.collect import logs
from virtiova.collect import messages as m
from virtiova.packages.store import Store, Wanted
from virtiova.scan.engine import scan_view


@dataclass(frozen=True)
class Logged(Kernel):
    """A kernel with its balloon, kept apart from those of other tests."""

    def wanted(self) -> Wanted:
        return replace(super().wanted(), name=f"{self.meta}-logged")


CLOUD = Logged(
    "linux-image-cloud-amd64",
    r"linux-image-[0-9].*-cloud-amd64",
    ("virtio_pci", "virtio_blk", "virtio_rng", "virtio_balloon"),
)


@pytest.mark.parametrize(
    "message",
    [
        m.STILL_LEGACY,
        m.NOT_BY_DEVICE,
        m.NO_REPLY_ACK,
        m.QEMU_NO_MAPPING,
        m.QEMU_NO_ENDPOINT,
        m.QEMU_VTD_FAULT,
        m.NOT_VIABLE,
    ],
    ids=str,
)
def test_in_qemu(message: m.Message) -> None:
    program = shutil.which("qemu-system-x86_64")
    assert program
    text = message.text.encode()
    found = Path(program).read_bytes()
    # What printf fills in is not there.
    assert text in found or text.replace(b"0x", b"0x%lx")[:-3] in found


def test_a_guest_that_is_refused() -> None:
    """Linux leaves bit 33 out for its balloon, QEMU refuses that, and the log says so: by name, status and all."""
    files = assets(CLOUD)
    devices = ["-device", "virtio-balloon-pci,disable-legacy=on,iommu_platform=on"]
    devices += ["-object", "rng-builtin,id=r", "-device", "virtio-rng-pci,rng=r,disable-legacy=on,iommu_platform=on"]
    with Guest(files, devices, iommu=VTD, append="intel_iommu=on") as guest:
        guest.booted()
        log = "\n".join(guest.do("dmesg | sed 's/^/@ /'"))
        one = "say $(cat $d/device) $(cat $d/status) $(cut -c33-34 $d/features)"
        status = guest.do(f"for d in /sys/bus/virtio/devices/*; do {one}; done")
        release = guest.do("say $(uname -r)")
    # Type, status, VERSION_1 and bit 33: the balloon's driver left that out, and still shows what it wrote.
    assert sorted(status) == ["0x0004 0x0000000f 11", "0x0005 0x00000083 10"]
    view = logs.collect(log.encode(), "dmesg")
    assert view.machine.get(k.KERNEL) == release[0]
    assert "intel_iommu=on" in (view.machine.get(k.KERNEL_OPTIONS) or "")
    assert (view.machine.get(k.IOMMU_UNITS), view.machine.get(k.IOMMUS)) == (1, ("dmar0",))
    assert said(scan_view(view)) in ({"VA303 virtio0"}, {"VA303 virtio1"})


@pytest.mark.sweep
def test_in_linux() -> None:
    """In Debian's kernel and its modules, as they are fetched for guests."""
    wanted = replace(CLOUD, meta="linux-image-amd64", pattern=r"linux-image-[0-9].*[0-9]-amd64").wanted()
    content = Store().get(wanted).content
    everything = b"".join(content.values())
    for message in m.MESSAGES:
        if message.who.startswith("Linux") and "arm" not in message.who and "virtio-iommu" not in message.who:
            assert message.text.encode() in everything, message
