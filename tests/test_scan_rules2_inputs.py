# SPDX-License-Identifier: Apache-2.0
"""The rules about back ends, guests and memory on real input: command lines, domains, trees of files, logs, and what a
real QEMU's monitor says."""

from __future__ import annotations

import copy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scan_rule_kit import said
from sysfs_kit import BIT_33, VERSION_1, Box
from virtiova.collect import commands, libvirt, logs, qemu, qmp
from virtiova.collect import keys as k
from virtiova.collect.facts import View
from virtiova.result.scan import Place
from virtiova.scan import scan_view, scan_views

IDS = ("VA107", "VA205", "VA304", "VA306", "VA307", "VA309", "VA4", "VA5", "VA6")
Q35 = "qemu-system-x86_64 -M q35,kernel-irqchip=split -accel kvm -nodefaults"
VTD = "-device intel-iommu,intremap=on,device-iotlb=on"
RP = "-device pcie-root-port,id=rp"
BIT = "iommu_platform=on"
TAP = f"-netdev tap,id=n,vhost=on {RP} -device virtio-net-pci,id=d,netdev=n,bus=rp"
FS = "-chardev socket,id=c,path=/run/v -device vhost-user-fs-pci,id=d,chardev=c,tag=t"
RNG = "-chardev socket,id=c,path=/run/v -device vhost-user-rng-pci,id=d,chardev=c"
BLK = f"-chardev socket,id=c,path=/run/v {RP} -device vhost-user-blk-pci,id=d,chardev=c,bus=rp"
SANDBOX = "-name sandbox-" + "0123456789abcdef" * 4 + ",debug-threads=on"
HYPERV = "-cpu host,hv-relaxed,hv-vapic,hv-time"
QUIET = "VA602 d"

LINES: dict[tuple[str, str], set[str]] = {
    (f"{Q35} {FS},{BIT}", "5.0.0"): {"VA401 d"},
    (f"{Q35} {FS}", "5.0.0"): set(),
    (f"{Q35} {FS},{BIT}", "7.2.22"): set(),
    (f"{Q35} {VTD} {TAP},{BIT},ats=on", "7.2.4"): {"VA402? d", QUIET},
    (f"{Q35} {VTD} {TAP},{BIT}", "7.2.4"): {"VA402 d", QUIET},
    (f"{Q35} {VTD} {TAP},{BIT}", "7.2.22"): {QUIET},
    (f"{Q35} {VTD} {TAP.replace('vhost=on', 'vhost=off')},{BIT}", "7.2.4"): set(),
    (f"{Q35} {VTD.replace('iotlb=on', 'iotlb=off')} {TAP},{BIT}", "7.2.4"): {QUIET},
    (f"{Q35} {TAP},{BIT}", "7.2.4"): set(),
    (f"{Q35} {VTD} {TAP},{BIT} {HYPERV}", "7.2.4"): {"VA406 d", "VA304? d", QUIET},
    (f"{Q35} {VTD} {TAP},{BIT} {HYPERV}", "8.1.0"): {"VA304? d", QUIET},
    (f"{Q35} {VTD} {TAP},{BIT} {HYPERV}", ""): {"VA406? d", "VA304? d", QUIET},
    (f"{Q35} {TAP},{BIT} {HYPERV}", "7.2.4"): set(),
    (f"{Q35} -device virtio-iommu-pci {TAP},{BIT} -incoming defer", "7.2.0"): {"VA403 d", QUIET},
    (f"{Q35} -device virtio-iommu-pci {TAP},{BIT} -incoming defer", "7.2.1"): {QUIET},
    (f"{Q35} -device virtio-iommu-pci {TAP},{BIT}", "7.2.0"): {QUIET},
    (f"{Q35} {TAP},{BIT} -incoming defer", "7.2.0"): set(),
    (f"{Q35} {SANDBOX} -machine confidential-guest-support=t -object tdx-guest,id=t {TAP},iommu_platform=off", ""): {
        "VA309"
    },
    (f"{Q35} {SANDBOX} -machine confidential-guest-support=t -object tdx-guest,id=t {TAP}", ""): set(),
    (f"{Q35} {SANDBOX} {TAP}", ""): set(),
    (f"{Q35} -machine confidential-guest-support=t -object tdx-guest,id=t {TAP},iommu_platform=off", ""): set(),
}


def ours(found: set[str]) -> set[str]:
    return {each for each in found if each.startswith(IDS)}


def line(words: str, version: str = "") -> View:
    return qemu.collect(shlex.split(words), Place("command line", "vm"), version=version)


@pytest.mark.parametrize(("words", "version"), LINES)
def test_command_lines(words: str, version: str) -> None:
    assert ours(said(scan_view(line(words, version)))) == LINES[words, version]


BACKENDS: dict[tuple[str, str], set[str]] = {
    (f"{Q35} {RNG},{BIT}", "vhost-device-rng --socket-path /run/v"): {"VA401 d"},
    (f"{Q35} {RNG},{BIT}", "virtiova serve rng --socket-path /run/v"): set(),
    (f"{Q35} {RNG}", "vhost-device-rng --socket-path /run/v"): set(),
    (f"{Q35} {BLK},{BIT}", "qemu-storage-daemon --export type=vhost-user-blk,addr.path=/run/v"): set(),
}


@pytest.mark.parametrize(("words", "backend"), BACKENDS)
def test_command_lines_of_both_sides(words: str, backend: str) -> None:
    other = commands.collect(backend.split(), Place("command line", "b"))
    assert ours(said(scan_views([other, line(words, "7.2.22")]))) == BACKENDS[words, backend]


DOMAIN = """<domain type='kvm'><name>w</name>
<metadata><libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
<libosinfo:os id="http://microsoft.com/win/11"/></libosinfo:libosinfo></metadata>
<memory unit='MiB'>512</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
<features><ioapic driver='qemu'/></features>
<devices><filesystem type='mount'><driver type='virtiofs' iommu='on'/><source dir='/srv'/><target dir='x'/></filesystem>
<iommu model='intel'><driver intremap='on'/></iommu></devices></domain>
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (DOMAIN, {"VA304 fs0"}),
        (DOMAIN.replace("microsoft.com/win/11", "debian.org/debian/12"), set()),
        (DOMAIN.replace(" iommu='on'", ""), set()),
    ],
)
def test_domains(text: str, wanted: set[str]) -> None:
    found = libvirt.collect(text.encode(), "vm.xml")
    assert {each for each in ours(said(scan_view(found))) if each[:5] == "VA304"} == wanted


# -- trees of files

PCI = "/sys/devices/pci0000:00"
ON = VERSION_1 | BIT_33
DT = "/sys/firmware/devicetree/base"
MMIO = "/sys/devices/platform/a003e00.virtio_mmio"


def user_space(box: Box, driver: str, *, kind: str = "", beside: str = "") -> None:
    function = box.function(f"{PCI}/0000:00:03.0", driver=driver)
    members = [function]
    if beside:
        members.append(box.function(f"{PCI}/0000:00:03.1", 0x10D3, driver=beside))
    if kind:
        box.unit("dmar0", *members)
        box.group(0, kind, members)


def uio(box: Box) -> None:
    user_space(box, "uio_pci_generic")


def noiommu(box: Box) -> None:
    user_space(box, "vfio-pci")
    box.file("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")


def noiommu_off(box: Box) -> None:
    user_space(box, "vfio-pci")
    box.file("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "N\n")


def mixed(box: Box) -> None:
    user_space(box, "vfio-pci", kind="DMA", beside="e1000e")


def together(box: Box) -> None:
    user_space(box, "vfio-pci", kind="DMA", beside="vfio-pci")


def status(word: str, features: int) -> Callable[[Box], None]:
    def make(box: Box) -> None:
        box.virtio(box.function(f"{PCI}/0000:00:03.0"), status=f"0x000000{word}\n", word=features)

    return make


def vdpa(word: str, features: int) -> Callable[[Box], None]:
    def make(box: Box) -> None:
        at = "/sys/devices/vdpa0"
        box.file(f"{at}/uevent", "")
        box.link("/sys/bus/vdpa/devices/vdpa0", at)
        box.link(f"{at}/subsystem", "/sys/bus/vdpa")
        box.virtio(at, status=f"0x000000{word}\n", word=features, kind=1)

    return make


def arm(*, coherent: bool, features: int = ON) -> Callable[[Box], None]:
    def make(box: Box) -> None:
        box.file("/proc/sys/kernel/arch", "aarch64\n")
        box.virtio(MMIO, word=features)
        box.file(f"{DT}/virtio_mmio@a003e00/compatible", "virtio,mmio\0")
        if coherent:
            box.file(f"{DT}/virtio_mmio@a003e00/dma-coherent", "")
        box.link(f"{MMIO}/of_node", f"{DT}/virtio_mmio@a003e00")
        box.link(f"{MMIO}/subsystem", "/sys/bus/platform")

    return make


def net(kernel: str) -> Callable[[Box], None]:
    def make(box: Box) -> None:
        at = box.virtio(box.function(f"{PCI}/0000:00:03.0", 0x1041), kind=1)
        box.at(f"{at}/driver").unlink()
        box.at("/sys/bus/virtio/drivers/virtio_net").mkdir(parents=True)
        box.link(f"{at}/driver", "/sys/bus/virtio/drivers/virtio_net")
        box.file("/proc/sys/kernel/osrelease", f"{kernel}\n")

    return make


def bounce(slots: int, used: int) -> Callable[[Box], None]:
    def make(box: Box) -> None:
        box.file("/sys/kernel/debug/swiotlb/io_tlb_nslabs", f"{slots}\n")
        box.file("/sys/kernel/debug/swiotlb/io_tlb_used", f"{used}\n")

    return make


TREES: dict[str, tuple[Callable[[Box], None], set[str]]] = {
    "uio": (uio, {"VA107"}),
    "noiommu": (noiommu, {"VA107"}),
    "noiommu off": (noiommu_off, set()),
    "mixed": (mixed, {"VA107"}),
    "together": (together, set()),
    "goes on": (status("07", ON), {"VA306"}),
    "legacy": (status("07", 1 << 29), set()),
    "works": (status("0f", ON), set()),
    "vdpa, refused": (vdpa("83", VERSION_1), {"VA307"}),
    "vdpa, flat": (vdpa("0f", VERSION_1), {"VA307"}),
    "vdpa, on": (vdpa("0f", ON), set()),
    "incoherent": (arm(coherent=False), {"VA501"}),
    "coherent": (arm(coherent=True), set()),
    "incoherent, flat": (arm(coherent=False, features=VERSION_1), set()),
    "6.10": (net("6.10.11-amd64"), {"VA502"}),
    "6.11": (net("6.11.2-amd64"), set()),
    "full": (bounce(32768, 32700), {"VA601"}),
    "half full": (bounce(32768, 16000), set()),
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name: str, tmp_path: Path) -> None:
    box = Box(tmp_path)
    make, wanted = TREES[name]
    make(box)
    assert {each.partition(" ")[0] for each in ours(said(box.scan()))} == wanted


# -- logs, as kernels print them

SIZES = "(sz: 262144 bytes), total 32768 (slots), used 28911 (slots)"
FULL = f"[   12.345678] virtio_blk virtio1: swiotlb buffer is full {SIZES}"
LOGS: dict[str, set[str]] = {
    FULL: {"VA601"},
    "[    0.1] software IO TLB: mapped [mem 0x00000000b7e00000-0x00000000bbe00000] (64MB)": set(),
}


@pytest.mark.parametrize("text", LOGS)
def test_logs(text: str) -> None:
    assert ours(said(scan_view(logs.collect(f"{text}\n".encode(), "dmesg.txt")))) == LOGS[text]


def test_a_message_about_rings_asks_for_the_guest(tmp_path: Path) -> None:
    """Without the device tree it cannot be said: what was read of an Arm machine, and its log."""
    box = Box(tmp_path)
    box.file("/proc/sys/kernel/arch", "aarch64\n")
    box.virtio(MMIO, word=ON)
    box.link(f"{MMIO}/subsystem", "/sys/bus/platform")
    view = box.view()
    view.log = logs.collect(b"[ 1.0] virtio_blk virtio0: req.0:id 0 is not a head!\n", "dmesg.txt").log
    assert "VA501? virtio0" in said(scan_view(view))


# -- a monitor: a real QEMU before a real back end


@pytest.fixture(scope="module")
def transcript(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All that QEMU says of a disk that our own back end serves behind VT-d, before its driver has started."""
    folder = tmp_path_factory.mktemp("monitor")
    disk, back, monitor = folder / "disk", folder / "b.sock", folder / "q.sock"
    disk.write_bytes(bytes(1 << 20))
    serve = [sys.executable, "-m", "virtiova", "serve", "blk", str(disk), "--socket-path", str(back), "-q"]
    machine = (
        "qemu-system-x86_64 -M q35,kernel-irqchip=off -accel tcg -m 64 -nodefaults -display none -S "
        "-object memory-backend-memfd,id=m,size=64M,share=on -numa node,memdev=m "
        "-device intel-iommu,intremap=off,caching-mode=on,device-iotlb=on "
        f"-chardev socket,id=c,path={back} -qmp unix:{monitor},server=on,wait=off "
        "-device vhost-user-blk-pci,id=d,chardev=c,disable-legacy=on,iommu_platform=on"
    ).split()
    started: list[subprocess.Popen[bytes]] = []
    try:
        for words, socket in ((serve, back), (machine, monitor)):
            started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL))
            end = time.monotonic() + 30
            while not socket.exists():
                assert started[-1].poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
        yield qmp.transcript(str(monitor))
    finally:
        for child in reversed(started):
            child.terminate()
            child.wait(20)


def answer(transcript: dict[str, Any], command: str) -> Any:
    return next(each["answer"] for each in transcript["asked"] if each["command"] == command)


def told(transcript: dict[str, Any], **changes: Any) -> View:
    """The transcript with another version of QEMU, or with another state of the device."""
    other = copy.deepcopy(transcript)
    answer(other, "x-query-virtio-status").update(changes.pop("status", {}))
    version = changes.pop("version", None)
    if version:
        answer(other, "query-version")["qemu"] = dict(zip(("major", "minor", "micro"), version, strict=True))
    other["asked"] += changes.pop("asked", [])
    return qmp.view(other, "vm.qmp")


def test_a_monitor_and_the_version_of_qemu(transcript: dict[str, Any]) -> None:
    assert ours(said(scan_view(told(transcript)))) == {QUIET}
    assert ours(said(scan_view(told(transcript, version=(7, 2, 4))))) == {"VA402 d", QUIET}
    assert ours(said(scan_view(told(transcript, version=(8, 0, 4))))) == {QUIET}


def vhost(protocols: list[str], unknown: int = 0) -> dict[str, Any]:
    """The part of the answer that is there while vhost runs, in the words of QEMU 7.2 (``unknown-protocols``)."""
    bit = ["VIRTIO_F_IOMMU_PLATFORM: Device can be used on IOMMU platform"]
    told: dict[str, Any] = {"protocols": protocols}
    if unknown:
        told["unknown-protocols"] = unknown
    return {
        "vhost-dev": {"features": {"transports": bit}, "acked-features": {"transports": bit}, "protocol-features": told}
    }


def test_a_monitor_and_protocol_features(transcript: dict[str, Any]) -> None:
    known = ["VHOST_USER_PROTOCOL_F_REPLY_ACK: REPLY_ACK supported"]
    plain = told(transcript, status=vhost(known))
    assert plain.devices[0].facts.get(k.BACKEND_PROTOCOL) == 1 << 3
    assert ours(said(scan_view(plain))) == {QUIET}
    strange = told(transcript, status=vhost(known, 1 << 21))
    assert strange.devices[0].facts.get(k.BACKEND_PROTOCOL) == 1 << 3 | 1 << 21
    assert ours(said(scan_view(strange))) == {QUIET, "VA405? d"}
    strange.devices[0].facts.put(k.BACKEND_SOCKET, "/run/v", Place("x", "x"))
    rust = commands.collect(["vhost-device-scsi", "--socket-path", "/run/v"], Place("command line", "b"))
    assert "VA405 d" in said(scan_views([strange, rust]))


def test_a_monitor_and_a_driver_that_goes_on(transcript: dict[str, Any]) -> None:
    """QEMU drops a refused status whole, so that it stays at 3; the rings that it is given all the same are seen."""
    path = "/machine/peripheral/d/virtio-backend"
    refused = {
        "status": {"statuses": [f"VIRTIO_CONFIG_S_{each}: x" for each in ("ACKNOWLEDGE", "DRIVER")]},
        "guest-features": {"transports": ["VIRTIO_F_VERSION_1: Device compliant for v1 spec"]},
    }
    rings = {"vring-desc": 0x1000, "vring-avail": 0x2000, "vring-used": 0x3000, "vring-num": 128}
    asked = [{"command": "x-query-virtio-queue-status", "arguments": {"path": path, "queue": 0}, "answer": rings}]
    assert "VA306 d" in said(scan_view(told(transcript, status=refused, asked=asked)))
    assert "VA306 d" not in said(scan_view(told(transcript, status=refused)))
    fine = {**refused, "status": {"statuses": [*refused["status"]["statuses"], "VIRTIO_CONFIG_S_FEATURES_OK: x"]}}
    assert "VA306 d" not in said(scan_view(told(transcript, status=fine, asked=asked)))
