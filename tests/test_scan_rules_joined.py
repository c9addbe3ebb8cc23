# SPDX-License-Identifier: Apache-2.0
"""The rules on machines that were looked at from several sides: what only both together say, and once."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from scan_rule_kit import said
from sysfs_kit import BIT_33, VERSION_1, Box
from virtiova.collect import logs, qemu
from virtiova.collect.facts import View
from virtiova.report import scan_text
from virtiova.result.scan import Place
from virtiova.scan import scan_views

Q35 = "qemu-system-x86_64 -M q35 -nodefaults"
IOMMU = f"{Q35} -device intel-iommu"
DISK = "-drive if=none,id=x,file=d.img -device virtio-blk-pci,id=disk,drive=x,addr=3"
MODERN = "iommu_platform=on,disable-legacy=on"
ON = VERSION_1 | BIT_33
REFUSED = "virtio_blk virtio0: virtio: device refuses features: 3\n"
PROVIDE = "virtio_blk virtio0: device must provide VIRTIO_F_ACCESS_PLATFORM\n"


def guest(
    root: Path, word: int = VERSION_1, status: int = 0x0F, *, driver: str = "virtio-pci", group: str = "DMA"
) -> View:
    """A disk in slot 3 as its guest shows it; with ``vfio-pci`` there is no virtio device."""
    box = Box(root)
    function = box.function("/sys/devices/pci0000:00/0000:00:03.0", driver=driver)
    if driver == "virtio-pci":
        box.virtio(function, word=word, status=f"0x{status:08x}\n")
    if group:
        box.unit("dmar0", function)
        box.group(0, group, [function])
    return box.view()


def outside(words: str) -> View:
    return qemu.collect(shlex.split(words), Place("command line", "vm"), version="7.2.22")


def log(text: str) -> View:
    return logs.collect(text.encode(), "log")


def found(*views: View) -> set[str]:
    """What is said of them, of what is not worth a note."""
    return {each for each in said(scan_views(views)) if not each.startswith(("VA6", "VA4"))}


def test_all_is_well(tmp_path: Path) -> None:
    assert found(guest(tmp_path, ON), outside(f"{IOMMU} {DISK},{MODERN}")) == set()
    assert found(guest(tmp_path / "b", group=""), outside(f"{Q35} {DISK}")) == set()


def test_which_side_it_is(tmp_path: Path) -> None:
    """The guest shows that bit 33 is not on; the command line, that it was never offered."""
    assert found(guest(tmp_path), outside(f"{IOMMU} {DISK}")) == {"VA101 virtio0"}


def test_one_says_accepted_and_the_other_not_offered(tmp_path: Path) -> None:
    assert found(guest(tmp_path, ON), outside(f"{IOMMU} {DISK}")) == {"VA901 virtio0"}


@pytest.mark.parametrize(("options", "wanted"), [("", {"VA108 disk"}), (f",{MODERN}", set())])
def test_in_user_space(tmp_path: Path, options: str, wanted: set[str]) -> None:
    """With vfio-pci a guest does not see what is offered; its command line says it."""
    inside = guest(tmp_path, driver="vfio-pci")
    assert found(inside) == {"VA108? 0000:00:03.0"}
    both = found(inside, outside(f"{IOMMU} {DISK}{options}"))
    assert {each.partition(" ")[0] for each in both} == {each.partition(" ")[0] for each in wanted}


def test_refused(tmp_path: Path) -> None:
    """A refusal is one finding, whether the status, the log or both show it."""
    inside = guest(tmp_path, ON, status=0x83)
    assert found(inside, outside(f"{IOMMU} {DISK},{MODERN}")) == {"VA302 virtio0"}
    assert found(inside, log(REFUSED)) == {"VA302 virtio0"}
    assert found(inside, outside(f"{IOMMU} {DISK},{MODERN}"), log(REFUSED)) == {"VA302 virtio0"}


def test_masked(tmp_path: Path) -> None:
    """A driver that left the bit out, by what the guest shows of it; and one that was refused for another."""
    offers = outside(f"{IOMMU} {DISK},{MODERN}")
    assert found(guest(tmp_path, VERSION_1, status=0x83), offers) == {"VA305 virtio0"}
    assert found(guest(tmp_path / "b", ON, status=0x83), offers) == {"VA302 virtio0"}


def test_restricted(tmp_path: Path) -> None:
    """That the memory is kept from devices is known outside, what comes of it in the log: one finding."""
    sev = f"{Q35} -machine confidential-guest-support=s -object sev-guest,id=s,cbitpos=47,reduced-phys-bits=1"
    machine = outside(f"{sev} {DISK},iommu_platform=off")
    assert found(machine) == {"VA301 disk"}
    assert found(machine, log(PROVIDE)) == {"VA301 disk"}
    assert found(guest(tmp_path, status=0x83, group=""), machine, log(PROVIDE)) == {"VA301 virtio0"}


def test_two_logs() -> None:
    """Logs alone: of the guest's kernel and of QEMU, of two things that are wrong."""
    refused = "qemu: -device virtio-rng-pci,id=d: iommu_platform=true is not supported by the device\n"
    assert found(log(REFUSED), log(refused)) == {"VA302 virtio0", "VA203 d"}


@pytest.mark.parametrize("verbose", [False, True])
def test_the_text_of_a_log_alone(verbose: bool) -> None:
    """A fault without anything else given is a question about the function that it names."""
    fault = "DMAR: [DMA Write NO_PASID] Request device [00:03.0] fault addr 0x4f000 [fault reason 0x02] Present bit"
    text = scan_text.document(scan_views([log(fault)]), verbose=verbose)
    assert "VA103 00:03.0: a scan inside the guest" in text
