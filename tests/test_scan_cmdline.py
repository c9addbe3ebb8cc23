# SPDX-License-Identifier: Apache-2.0
"""What a QEMU command line says, against what a real QEMU makes of it: place, bit 33, legacy interface, refusal."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from newer_qemu import newer_qemu
from scan_qemu_kit import Refused, real, rows, said
from virtiova.guest import platforms
from virtiova.guest.boot import _emulator
from virtiova.machine.qemu.boards import RISCV_VIRT, VIRT
from virtiova.packages.store import Store
from virtiova.result import Path as DmaPath
from virtiova.scan import scan_view

Q35 = "qemu-system-x86_64 -M q35 "
PC = "qemu-system-x86_64 "
ARM = "qemu-system-aarch64 -M virt "
PPC = "qemu-system-ppc64 -M pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off "
RNG = "-device virtio-rng-pci"

LINES = {
    "pc, defaults": f"{PC} {RNG}",
    "pc, nothing by default": f"{PC} -nodefaults {RNG} {RNG},disable-legacy=on,iommu_platform=on",
    "pc, usb and a drive": f"{PC} -usb {RNG} -drive if=virtio,file=d.img,format=raw -device virtio-scsi",
    "pc, network and JSON last": f'{PC} -nic user,model=virtio -device \'{{"driver":"virtio-balloon-pci"}}\' {RNG}',
    "pc, JSON numbers": f'{PC} -device \'{{"driver":"virtio-rng-pci","addr":88,"iommu_platform":true,'
    '"disable-legacy":"on"}\'',
    "pc, own display": f"{PC} -device VGA,addr=7 {RNG} {RNG},addr=0xe.1,multifunction=on {RNG},addr=e,multifunction=on",
    "pc, no display": f"{PC} -vga none -net none {RNG}",
    "pc, virtio display": f"{PC} -vga virtio -nodefaults {RNG}",
    "pc, conventional bridge": f"{PC} -device pci-bridge,id=b,chassis_nr=1 {RNG},bus=b {RNG},bus=b {RNG}",
    "pc, sound": f"{PC} -nodefaults {RNG} -audio none,model=ac97",
    "q35, addresses in many forms": f"{Q35} -nodefaults {RNG},addr=0x1.0x2,multifunction=on "
    f"{RNG},addr=0x1,multifunction=on {RNG},addr=007 {RNG},addr=08.0,disable-legacy=on,iommu_platform=on,"
    "iommu_platform=off",
    "pc, old machine type": "qemu-system-x86_64 -M pc-i440fx-2.6 -nodefaults " + RNG,
    "q35, defaults": f"{Q35} {RNG}",
    "q35, root port": f"{Q35} -device pcie-root-port,id=rp {RNG},bus=rp,iommu_platform=on,ats=on {RNG}",
    "q35, bridges behind bridges": f"{Q35} -nodefaults -device pcie-root-port,id=rp,slot=1 -device "
    f"x3130-upstream,id=up,bus=rp -device xio3130-downstream,id=d0,bus=up,chassis=3 {RNG},bus=d0 -device "
    f"pcie-pci-bridge,id=c {RNG},bus=c {RNG},bus=c,addr=9",
    "q35, another root bus": f"{Q35} -nodefaults -device pxb-pcie,id=p,bus_nr=32 -device pcie-root-port,id=rp,bus=p "
    f"{RNG},bus=rp,iommu_platform=on {RNG},bus=pcie.0",
    "q35, globals": f"{Q35} -nodefaults -global virtio-device.iommu_platform=on -global virtio-pci.disable-legacy=on "
    f"{RNG} {RNG},iommu_platform=off -device virtio-net-pci",
    "q35, globals that differ": f"{Q35} -nodefaults -global virtio-rng-pci.iommu_platform=on -global "
    f"virtio-rng-device.iommu_platform=off -global driver=virtio-pci,property=disable-legacy,value=on {RNG}",
    "q35, the last global": f"{Q35} -nodefaults -global virtio-pci.disable-legacy=on -global "
    f"virtio-rng-pci.disable-legacy=off {RNG} -device virtio-balloon-pci",
    "q35, set": f"{Q35} -nodefaults {RNG},id=r,disable-legacy=on -set device.r.iommu_platform=on",
    "q35, names of interfaces": f"{Q35} -nodefaults {RNG}-transitional {RNG}-non-transitional,iommu_platform=on",
    "q35, always modern": f"{Q35} -nodefaults -device virtio-gpu-pci,iommu_platform=on -device virtio-keyboard-pci "
    "-device virtio-tablet-pci,disable-legacy=off,iommu_platform=on",
    "q35, intel": f"{Q35} -device intel-iommu {RNG},disable-legacy=on,iommu_platform=on",
    "q35, virtio-iommu": f"{Q35} -nodefaults -device virtio-iommu-pci {RNG}",
    "q35, values in many words": f"{Q35} -nodefaults {RNG},disable-legacy=on,iommu_platform=yes "
    f"{RNG},disable-legacy=on,iommu_platform {RNG},noiommu_platform",
    "q35, commas": f"{Q35} -nodefaults -fsdev local,id=f,path=.,security_model=none "
    f"-device virtio-9p-pci,fsdev=f,mount_tag=a,,iommu_platform=on {RNG}",
    "q35, virtfs": f"{Q35} -nodefaults -virtfs local,path=.,mount_tag=t,security_model=none {RNG}",
    "q35, config file": f"{Q35} -nodefaults -readconfig r.cfg {RNG}",
    "q35, several behind one port": f"{Q35} -nodefaults -device pcie-root-port,id=x {RNG},bus=x {RNG},bus=x "
    f"{RNG},bus=x,addr=3 -device i82801b11-bridge,id=br {RNG},bus=br",
    "q35, functions": f"{Q35} -nodefaults -device ich9-usb-ehci1,addr=6.7 {RNG},addr=6.1,multifunction=on {RNG}",
    "microvm, PCI Express": f"qemu-system-x86_64 -M microvm,pcie=on -device virtio-rng-device {RNG}",
    "microvm": "qemu-system-x86_64 -M microvm -device virtio-rng-device -device virtio-net-device",
    "microvm, few": "qemu-system-x86_64 -M microvm,ioapic2=off -device virtio-rng-device",
    "virt, defaults": f"{ARM} {RNG}",
    "virt, drives": f"{ARM} -nodefaults -drive file=d.img,format=raw {RNG}",
    "virt, mmio": f"{ARM} -nodefaults -device virtio-rng-device,iommu_platform=on -device "
    "virtio-rng-device,bus=virtio-mmio-bus.3 -device virtio-net-device",
    "virt, modern mmio": f"{ARM} -nodefaults -global virtio-mmio.force-legacy=false -device "
    "virtio-rng-device,iommu_platform=on -device virtio-balloon-device",
    "virt, aliases": f"{ARM} -device virtio-blk-device,drive=a -drive if=none,id=a,file=null-co://,format=raw -device "
    "virtio-rng -device virtio-scsi,bus=pcie.0,addr=1f.7",
    "virt, smmuv3": f"{ARM} -M iommu=smmuv3 -nodefaults -device pcie-root-port,id=rp {RNG},bus=rp,iommu_platform=on",
    "pseries": f"{PPC} -nodefaults {RNG} {RNG},disable-legacy=on,iommu_platform=on",
    "pseries, defaults": f"{PPC} {RNG}",
    "pseries, own display": f"{PPC} -device VGA {RNG}",
    "pseries, no display": f"{PPC} -vga none -device VGA {RNG}",
    "pseries, display and no more": f"{PPC} -nodefaults -vga std {RNG}",
    "pseries, network": f"{PPC} -nodefaults -nic user,model=virtio {RNG} -device pci-bridge,id=b,chassis_nr=1,addr=4 "
    f"{RNG},bus=b",
    "powernv": f"qemu-system-ppc64 -M powernv9 {RNG},iommu_platform=on -device virtio-balloon-pci,bus=pcie.2",
    "sun4u": f"qemu-system-sparc64 {RNG},bus=pciB -device virtio-balloon-pci,bus=pciB,disable-legacy=on,"
    "iommu_platform=on",
}

REFUSED = {
    "on a root bus": f"{Q35} -nodefaults {RNG},iommu_platform=on",
    "on a conventional bus": f"{PC} -nodefaults -device virtio-net,iommu_platform=on",
    "told to be legacy": f"{Q35} -nodefaults -device pcie-root-port,id=rp {RNG},bus=rp,iommu_platform=on,"
    "disable-legacy=off",
    "by a global": f"{Q35} -nodefaults -global virtio-device.iommu_platform=on {RNG}",
    "transitional": f"{Q35} -nodefaults {RNG}-transitional,iommu_platform=on",
    "behind a conventional bridge": f"{Q35} -nodefaults -device pcie-pci-bridge,id=c {RNG},bus=c,iommu_platform=on",
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "d.img").write_bytes(bytes(1 << 20))
    (tmp_path / "r.cfg").write_text(
        '# one device\n[device "r"]\n  driver = "virtio-rng-pci"\n  disable-legacy = "on"\n  iommu_platform = "on"\n'
        '[device]\n driver = "virtio-balloon-pci"\n addr = "9"\n'
    )
    return tmp_path


@pytest.mark.parametrize("name", LINES)
def test_says_what_qemu_makes(name: str, files: Path) -> None:
    words = shlex.split(LINES[name])
    view = said(words, read=lambda name: (files / name).read_bytes(), version="7.2")
    assert not view.problems
    assert rows(view) == real(words, files)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_qemu(name: str) -> None:
    words = shlex.split(REFUSED[name])
    with pytest.raises(Refused, match="VIRTIO_F_IOMMU_PLATFORM was supported by neither"):
        real(words)
    assert [each.verdict for each in scan_view(said(words)).devices] == [DmaPath.REFUSED]


S390 = "-nodefaults -L /usr/share/qemu "
BE = {
    "channels": "-L /usr/share/qemu -device virtio-rng-ccw -device virtio-rng,iommu_platform=on -drive "
    "if=virtio,file=d.img,format=raw -device virtio-balloon-ccw,devno=fe.1.0005",
    "functions": f"{S390} {RNG} -device zpci,uid=7,target=a {RNG},id=a,disable-legacy=on,iommu_platform=on",
    "without defaults": f"{S390} -global virtio-device.iommu_platform=on -device virtio-rng-ccw",
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", BE)
def test_says_what_qemu_makes_on_s390x(name: str, files: Path) -> None:
    binary, _ = _emulator(platforms.S390, Store(), None)
    words = [binary, "-M", "s390-ccw-virtio", *shlex.split(BE[name])]
    view = said(["qemu-system-s390x", *words[1:]])
    assert rows(view) == real(words, files)


@pytest.mark.sweep
def test_says_what_a_newer_qemu_makes(pytestconfig: pytest.Config, files: Path) -> None:
    installation = newer_qemu(pytestconfig)
    modules = installation.environment
    for board, line in (
        (RISCV_VIRT, f"-M virt {RNG} -device virtio-rng-device,iommu_platform=on"),
        (RISCV_VIRT, f"-M virt,iommu-sys=on,aia=aplic-imsic -nodefaults {RNG},disable-legacy=on,iommu_platform=on"),
        (RISCV_VIRT, f"-M virt -nodefaults -device riscv-iommu-pci {RNG} -drive file=d.img,format=raw"),
        (VIRT, f"-M virt,iommu=smmuv3 -device pcie-root-port,id=rp {RNG},bus=rp,iommu_platform=on {RNG}"),
    ):
        words = [installation.binary(board), *shlex.split(line)]
        view = said(words, version="10.0")
        assert not view.problems
        assert rows(view) == real([words[0], *installation.arguments, *words[1:]], files, modules)
