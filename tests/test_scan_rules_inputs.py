# SPDX-License-Identifier: Apache-2.0
"""The rules on real input: command lines, trees of files, and what a real QEMU, SeaBIOS and virtiofsd do and print."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from scan_rule_kit import said
from sysfs_kit import BIT_33, VERSION_1, Box, dmar
from virtiova.collect import libvirt, logs, qemu
from virtiova.collect import messages as m
from virtiova.collect.facts import View
from virtiova.result.scan import Place
from virtiova.scan.engine import scan_view

Q35 = "qemu-system-x86_64 -M q35 -nodefaults"
PC = "qemu-system-x86_64 -M pc -nodefaults"
VIRT = "qemu-system-aarch64 -nodefaults -M virt"
RP = "-device pcie-root-port,id=rp"
RNG = "-device virtio-rng-pci,id=d"
DISK = "-drive if=none,id=x,file=d.img -device virtio-blk-pci,id=d,drive=x"
BIT = "iommu_platform=on"
MODERN = f"{BIT},disable-legacy=on"
SEV = "-object sev-guest,id=s,cbitpos=47,reduced-phys-bits=1"
SOCKET = "-chardev socket,id=c,path=c.sock"
FS = f"{SOCKET} -device vhost-user-fs-pci,id=d,chardev=c,tag=t"
BLK = f"{SOCKET} -device vhost-user-blk-pci,id=d,chardev=c"

LINES: dict[str, set[str]] = {
    # Ordinary machines, and such as are all right.
    f"qemu-system-x86_64 -M q35 -nic user,model=virtio -drive if=virtio,file=d.img {RNG} -device virtio-balloon": set(),
    f"qemu-system-x86_64 -m 1G -nic user,model=virtio -drive if=virtio,file=d.img {RNG}": set(),
    f"qemu-system-aarch64 -M virt -nic user,model=virtio -drive if=virtio,file=d.img {RNG} {FS}": set(),
    f"{Q35} -device intel-iommu,caching-mode=on {RP} {RNG},bus=rp,{BIT}": set(),
    f"{Q35} -device intel-iommu,device-iotlb=on -netdev user,id=n -device virtio-net-pci,id=d,netdev=n,{MODERN}": set(),
    f"{Q35} -device virtio-iommu-pci {DISK},{MODERN}": set(),
    f"{VIRT},iommu=smmuv3 {RNG},{MODERN}": set(),
    f"qemu-system-s390x -M s390-ccw-virtio -device virtio-rng-ccw,id=d,{BIT}": set(),
    f"{Q35} -device intel-iommu -device pxb-pcie,id=b,bus_nr=32,bypass_iommu=on {RP},bus=b {RNG},bus=rp": set(),
    # One thing wrong with each.
    f"{Q35} -device intel-iommu {RP} {RNG},bus=rp": {"VA101 d"},
    f"{Q35} -device virtio-iommu-pci {RNG}": {"VA101 d"},
    f"{VIRT},iommu=smmuv3 {RNG} -device virtio-rng-pci,id=e,{MODERN}": {"VA101 d"},
    f"{Q35} -device intel-iommu -device vfio-user-pci,id=v": {"VA106"},
    f"{Q35} -device vfio-user-pci,id=v": set(),
    f"{Q35} {RNG},{BIT}": {"VA201 d"},
    f"{PC} {RNG},{BIT}": {"VA201 d"},
    f"{PC} {RNG},{MODERN}": set(),
    f"{Q35} {RP} {RNG},bus=rp,{BIT},disable-legacy=off": {"VA201 d"},
    f"{Q35} -device virtio-rng-pci-transitional,id=d,{BIT}": {"VA201 d"},
    f"{Q35} -device virtio-rng-pci-non-transitional,id=d,{BIT}": set(),
    f"{PC} -machine confidential-guest-support=s {SEV} {RNG}": set(),
    f"{PC} -machine confidential-guest-support=s {SEV} {RNG},disable-legacy=off": {"VA202"},
    f"{PC} -machine confidential-guest-support=s {SEV} {RNG},iommu_platform=off": {"VA202"},
    f"{Q35} -machine confidential-guest-support=s {SEV} {RNG},iommu_platform=off": {"VA301 d"},
    f"{Q35} -machine confidential-guest-support=s {SEV} {RNG}": set(),
    f"{Q35} -device intel-iommu {FS},{BIT}": {"VA203 d"},
    f"{Q35} {FS},{BIT}": {"VA203 d"},
    f"{Q35} {FS}": set(),
    f"{Q35} -device intel-iommu {BLK},{MODERN}": {"VA203? d"},
    f"{Q35} -machine confidential-guest-support=s {SEV} {FS}": {"VA204 d"},
    f"{Q35} -device intel-iommu -device vhost-scsi-pci,id=d,wwpn=naa.5001405aebc9cb5f,{MODERN}": {"VA203 d"},
    f"{Q35} -device intel-iommu -device vhost-vsock-pci,id=d,guest-cid=3,{MODERN}": set(),
    f"{VIRT} -global virtio-mmio.force-legacy=off {FS.replace('-pci', '-device')},{BIT}": set(),
    f"{Q35} -device intel-iommu -device virtio-balloon-pci,id=d,{MODERN}": {"VA303 d"},
    f"{Q35} -device intel-iommu -device virtio-balloon-pci,id=d": {"VA303 d"},
    f"{Q35} -device virtio-iommu-pci,boot-bypass=off {DISK},{MODERN}": {"VA308 d"},
    f"{Q35} -device virtio-iommu-pci,boot-bypass=off -kernel vmlinuz {DISK},{MODERN}": set(),
    f"{Q35} -device virtio-iommu-pci,boot-bypass=off {RNG},{MODERN}": set(),
    f"{Q35} -device amd-iommu {RP} {RNG},bus=rp,{BIT}": {"VA903 d"},
    f"{Q35} -device amd-iommu {RNG},{MODERN}": set(),
}  # fmt: skip
OURS = ("VA10", "VA20", "VA301", "VA302", "VA303", "VA305", "VA308", "VA90")
THEIRS = ("VA107", "VA205")


def line(words: str) -> View:
    return qemu.collect(shlex.split(words), Place("command line", "vm"), version="7.2.22")


def ours(found: set[str]) -> set[str]:
    return {each for each in found if each.startswith(OURS) and not each.startswith(THEIRS)}


@pytest.mark.parametrize("words", LINES)
def test_command_lines(words: str) -> None:
    assert ours(said(scan_view(line(words)))) == LINES[words]


# -- trees of files

PCI = "/sys/devices/pci0000:00"
ON = VERSION_1 | BIT_33


def bypass(box: Box) -> None:
    function = box.function(f"{PCI}/0000:00:03.0")
    box.virtio(function)
    box.unit("dmar0", function)
    box.group(0, "DMA-FQ", [function])


def translated(box: Box) -> None:
    function = box.function(f"{PCI}/0000:00:03.0")
    box.virtio(function, word=ON)
    box.unit("dmar0", function)
    box.group(0, "DMA-FQ", [function])


def two_units(box: Box) -> None:
    translated(box)
    box.virtio(box.function(f"{PCI}/0000:00:04.0"), word=ON, name="virtio1")
    box.file("/sys/firmware/acpi/tables/DMAR", dmar(2))


def two_units_used(box: Box) -> None:
    two_units(box)
    box.unit("dmar1")


def user_space(box: Box) -> None:
    function = box.function(f"{PCI}/0000:00:03.0", driver="vfio-pci")
    box.unit("dmar0", function)
    box.group(0, "DMA", [function])


def gave_up(box: Box) -> None:
    box.virtio(box.function(f"{PCI}/0000:00:03.0"), status="0x00000083\n")


def gave_up_late(box: Box) -> None:
    box.virtio(box.function(f"{PCI}/0000:00:03.0"), status="0x0000008b\n")


def wants_reset(box: Box) -> None:
    box.virtio(box.function(f"{PCI}/0000:00:03.0"), status="0x0000004f\n")


def balloon(box: Box) -> None:
    box.virtio(box.function(f"{PCI}/0000:00:03.0"), kind=5, status="0x00000083\n")


def ordinary(box: Box) -> None:
    box.virtio(box.function(f"{PCI}/0000:00:03.0"))


TREES: list[tuple[Callable[[Box], None], set[str]]] = [
    (ordinary, set()),
    (translated, set()),
    (bypass, {"VA101 virtio0"}),
    (two_units, {"VA104"}),
    (two_units_used, set()),
    (user_space, {"VA108? 0000:00:03.0"}),
    (gave_up, {"VA302 virtio0"}),
    (gave_up_late, {"VA902 virtio0"}),
    (wants_reset, {"VA902 virtio0"}),
    (balloon, {"VA303 virtio0"}),
]


@pytest.mark.parametrize(("make", "wanted"), TREES, ids=lambda each: getattr(each, "__name__", ""))
def test_trees(tmp_path: Path, make: Callable[[Box], None], wanted: set[str]) -> None:
    box = Box(tmp_path)
    make(box)
    assert ours(said(box.scan())) == wanted


def test_faults_of_a_device_in_a_tree(tmp_path: Path) -> None:
    """Faults of a function that a device sits on, and of one that it does not."""
    box = Box(tmp_path)
    ordinary(box)
    fault = "DMAR: [DMA Read NO_PASID] Request device [00:0{}.0] fault addr 0x4f000 [fault reason 0x06] PTE Read access"
    for slot, wanted in ((3, {"VA103 virtio0"}), (4, set())):
        view = box.view()
        view.log += logs.collect(fault.format(slot).encode(), "dmesg").log
        assert ours(said(scan_view(view))) == wanted


# -- what real ones do


def stopped(words: str, tmp_path: Path, seconds: float = 20) -> str:
    """What a QEMU prints that does not start; it is ended if it does."""
    argv = [*shlex.split(words), "-display", "none", "-S", "-accel", "tcg"]
    started = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    try:
        return started.communicate(timeout=seconds)[1]
    finally:
        started.kill()
        started.wait()


@pytest.mark.parametrize("words", [words for words, wanted in LINES.items() if wanted == {"VA201 d"}])
def test_qemu_does_not_start(words: str, tmp_path: Path) -> None:
    """What the command line says beforehand, QEMU says when it is started, of the same device."""
    printed = stopped(words, tmp_path)
    assert m.STILL_LEGACY.text in printed
    log = logs.collect(printed.encode(), "stderr")
    assert said(scan_view(log)) == {"VA201 d"}
    both = line(words)
    both.log += log.log
    assert ours(said(scan_view(both))) == {"VA201 d"}


def serving(tmp_path: Path) -> subprocess.Popen[bytes]:
    """The virtiofsd that comes with QEMU, as a process."""
    program = Path("/usr/lib/qemu/virtiofsd")
    if not program.exists():
        pytest.skip("no virtiofsd of QEMU's here (Debian 12: qemu-system-common)")
    (tmp_path / "shared").mkdir()
    argv = [str(program), "--socket-path=c.sock", "-o", f"source={tmp_path}/shared", "-o", "sandbox=chroot"]
    process = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
    for _ in range(100):
        if (tmp_path / "c.sock").exists():
            return process
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    pytest.skip(f"virtiofsd does not run here: {process.communicate()[1].decode()[-200:]}")


@pytest.mark.parametrize("iommu", ["", "-device intel-iommu"])
def test_a_back_end_without_the_bit(iommu: str, tmp_path: Path) -> None:
    """A real virtiofsd has no bit 33, and on PCI QEMU insists on it, with and without an IOMMU."""
    words = f"{Q35} -m 64 {iommu} {FS},{BIT} -object memory-backend-memfd,id=r,size=64M,share=on -numa node,memdev=r"
    served = serving(tmp_path)
    try:
        printed = stopped(words, tmp_path)
    finally:
        os.killpg(served.pid, signal.SIGKILL)
        served.communicate()
    assert m.NOT_BY_DEVICE.text in printed
    assert said(scan_view(logs.collect(printed.encode(), "stderr"))) == {"VA203 d"}
    assert ours(said(scan_view(line(words)))) == {"VA203 d"}


# A boot sector that says so and ends QEMU: out 0x3f8, "K"; out 0xf4, 0x10; hlt.
SECTOR = bytes.fromhex("ba f803 b04b ee ba f400 b010 ee fa f4".replace(" ", "")).ljust(510, b"\0") + b"\x55\xaa"
BOOTED = 0x10 << 1 | 1


def boots(options: Sequence[str], tmp_path: Path) -> tuple[bool, str]:
    """Does SeaBIOS boot this disk? And what QEMU printed. It hangs on a disk that does not answer."""
    (tmp_path / "d.img").write_bytes(SECTOR.ljust(1 << 20, b"\0"))
    bios = tmp_path / "bios.log"
    argv = [*shlex.split(Q35.replace("q35", "q35,sata=off")), "-display", "none", "-accel", "tcg", "-m", "64"]
    argv += ["-device", "isa-debug-exit,iobase=0xf4", "-serial", f"file:{tmp_path}/serial"]
    argv += ["-chardev", f"file,id=b,path={bios}", "-device", "isa-debugcon,iobase=0x402,chardev=b", *options]
    with (tmp_path / "stderr").open("wb") as errors:
        started = subprocess.Popen(argv, cwd=tmp_path, stderr=errors, stdin=subprocess.DEVNULL)
        try:
            for _ in range(400):
                time.sleep(0.05)
                tried = bios.exists() and b"Booting from" in bios.read_bytes()
                if started.poll() is not None or (tried and b"not known" in (tmp_path / "stderr").read_bytes()):
                    break
            time.sleep(0.2)
            return started.poll() == BOOTED, (tmp_path / "stderr").read_text()
        finally:
            started.kill()
            started.wait()


@pytest.mark.parametrize(
    ("iommu", "bit", "wanted"),
    [
        ("boot-bypass=on", MODERN, True),
        ("boot-bypass=off", "disable-legacy=on", True),
        ("boot-bypass=off", MODERN, False),
    ],
)
def test_firmware(iommu: str, bit: str, wanted: bool, tmp_path: Path) -> None:
    """SeaBIOS takes bit 33 and has no driver for virtio-iommu: with bypass off at boot it does not get at its disk."""
    options = f"-device virtio-iommu-pci,{iommu} {DISK},bootindex=0,{bit}"
    booted, printed = boots(shlex.split(options.replace("file=d.img", "format=raw,file=d.img")), tmp_path)
    assert booted is wanted, printed
    view = line(f"{Q35} {options}")
    view.log += logs.collect(printed.encode() or b"\n", "stderr").log
    scan = scan_view(view)
    assert (said(scan) & {"VA308 d"} == set()) is wanted
    if not wanted:
        (found,) = [each for each in scan.findings if each.id == "VA308"]
        assert any(m.QEMU_NO_ENDPOINT.text in each.text for each in found.seen)


# -- libvirt's domains

DOMAIN = """<domain type='qemu'>
  <name>vm</name>
  <memory unit='MiB'>512</memory>
  <os><type arch='x86_64' machine='{machine}'>hvm</type></os>
  {launch}
  <devices>
    <memballoon model='none'/>
{devices}
  </devices>
</domain>
"""
NET = "<interface type='user'><model type='virtio'/>{}</interface>"
NET_ON = NET.format("<driver iommu='on'/>")
LAUNCH = "<launchSecurity type='sev'><cbitpos>47</cbitpos><reducedPhysBits>1</reducedPhysBits></launchSecurity>"
DOMAINS: list[tuple[str, str, list[str], dict[str, int]]] = [
    ("ordinary", "q35", [NET.format("")], {}),
    ("ordinary, conventional", "pc", [NET.format("")], {}),
    ("on", "q35", ["<iommu model='intel'/>", NET_ON], {}),
    ("bypass", "q35", ["<iommu model='intel'/>", NET.format("")], {"VA101": 9}),
    ("bypass, virtio-iommu", "q35", [NET_ON, "<iommu model='virtio'/>", NET.format("")], {"VA101": 10}),
    ("asked, legacy", "pc", [NET_ON], {"VA201": 8}),
    ("asked, non-transitional", "pc", [NET_ON.replace("'virtio'", "'virtio-non-transitional'")], {}),
    ("balloon", "q35", ["<iommu model='intel'/>", "<memballoon model='virtio'/>"], {"VA303": 9}),
    ("sev", "q35", [NET_ON], {}),
    ("sev, pc", "pc", [NET.format("").replace("'virtio'", "'virtio-transitional'")], {"VA202": 4}),
]


@pytest.mark.parametrize(
    ("name", "kind", "devices", "wanted"), DOMAINS, ids=lambda each: each if isinstance(each, str) else ""
)
def test_domains(name: str, kind: str, devices: list[str], wanted: dict[str, int]) -> None:
    """What is found of a domain, and a line of the file that shows it."""
    if any("memballoon" in each for each in devices):
        text = DOMAIN.replace("    <memballoon model='none'/>\n", "    <!-- -->\n")
    else:
        text = DOMAIN
    launch = LAUNCH if name.startswith("sev") else ""
    text = text.format(machine=kind, launch=launch, devices="\n".join(f"    {each}" for each in devices))
    scan = scan_view(libvirt.collect(text.encode(), "vm.xml"))
    found = {each.id: each for each in scan.findings if ours({f"{each.id} {each.device}"})}
    assert found.keys() == wanted.keys()
    for rule, number in wanted.items():
        lines = text.splitlines()
        seen = {each.place.line for each in found[rule].seen if each.place.name == "vm.xml"}
        assert number in seen, (lines[number - 1], found[rule].seen)
