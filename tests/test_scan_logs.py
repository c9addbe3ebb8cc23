# SPDX-License-Identifier: Apache-2.0
"""The collector of logs: what it keeps and what it states, on real messages, in every dress, and on hostile bytes."""

from __future__ import annotations

import gzip
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtiova.collect import keys as k
from virtiova.collect import logs
from virtiova.collect import messages as m
from virtiova.collect.facts import View, ViewKind
from virtiova.collect.messages import MESSAGES

REFUSED = "virtio_balloon virtio3: virtio: device refuses features: 3"
BOOT = """\
[    0.000000] Linux version 6.1.0-56-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0) #1 SMP
[    0.000000] Command line: BOOT_IMAGE=/vmlinuz root=/dev/vda1
[    0.000000] Hypervisor detected: KVM
[    0.012000] DMAR: DRHD base: 0x000000fed90000 flags: 0x1
[    0.012100] DMAR: dmar0: reg_base_addr fed90000 ver 1:0 cap d2008c22260286 ecap f00f5e
[    0.030000] Kernel command line: BOOT_IMAGE=/vmlinuz root=/dev/vda1 intel_iommu=on iommu=pt
[    0.200000] iommu: Default domain type: Passthrough (set via kernel command line)
[    0.300000] Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP
[    1.000000] usb 1-1: nothing that matters
[    1.100000] virtio_balloon virtio3: virtio: device refuses features: 3
"""


def collect(text: str | bytes) -> View:
    return logs.collect(text.encode() if isinstance(text, str) else text, "x.log")


def test_a_boot() -> None:
    view = collect(BOOT)
    said = {fact.key: (fact.value, fact.place.line) for fact in view.machine}
    assert view.kind is ViewKind.LOG
    assert not view.devices
    assert not view.problems
    assert not view.empty
    assert said["kernel"] == ("6.1.0-56-amd64", 1)
    assert said["os"] == ("linux", 1)
    assert said["hypervisor"] == ("kvm", 3)
    assert said["iommu-units"] == (1, 4)
    assert said["iommus"] == (("dmar0",), 5)
    assert said["kernel-options"] == ("BOOT_IMAGE=/vmlinuz root=/dev/vda1 intel_iommu=on iommu=pt", 6)
    assert said["iommu-bypass"] == ("pt", 7)
    assert said["restricted"] == ("sev-snp", 8)
    assert [line.place.line for line in view.log if REFUSED in line.text] == [10]
    assert not any("usb" in line.text for line in view.log)


@pytest.mark.parametrize(
    ("features", "kind"),
    [
        ("AMD SEV", "sev"), ("AMD SEV SEV-ES", "sev-es"), ("AMD SEV SEV-ES SEV-SNP", "sev-snp"), ("Intel TDX", "tdx"),
        # SME is memory encryption of a host: its devices reach all of memory.
        ("AMD SME", ""), ("", ""),
    ],
)  # fmt: skip
def test_restricted(features: str, kind: str) -> None:
    assert logs.restricted(features) == kind


@pytest.mark.parametrize(
    "dress",
    [
        "{}",
        "[    1.100000] {}",
        "[Mon Nov 23 20:00:01 2026] {}",
        "<6>[    1.1] {}",
        "Nov 23 20:00:01 vm kernel: {}",
        "2026-11-23T20:00:01,123456+00:00 vm kernel: {}",
        "\x1b[32m[1.1] \x1b[0m\x1b[33mvirtio_balloon virtio3: \x1b[0m\x1b[31mvirtio: device refuses features: 3\x1b[0m",
        "\x1b[2J\x1b[?7l\x1b]0;title\x07{}\r",
    ],
)
def test_every_dress(dress: str) -> None:
    """The same message, and the number of its line, however the log was taken."""
    view = collect("first\n" + dress.format(REFUSED) + "\nlast\n")
    (line,) = view.log
    assert "\x1b" not in line.text
    assert line.text.endswith(REFUSED)
    assert line.place.line == 2


@pytest.mark.parametrize(
    "dress", ["{}", "[    0.000000] {}", "Nov 23 20:00:01 vm kernel: {}", "2026-11-23T20:00:01+0000 vm kernel: {}"]
)
def test_the_last_start_counts(dress: str) -> None:
    banner = dress.format("Linux version {} (a@b) (gcc 12) #1 SMP")
    first, second = banner.format("5.10.0"), banner.format("6.1.0")
    view = collect(f"{first}\n{REFUSED}\n{second}\nvirtio_blk virtio0: 1/0/0 queues\n")
    assert view.machine.get(k.KERNEL) == "6.1.0"
    assert not any("refuses" in line.text for line in view.log)
    assert view.log[0].place.line == 3
    # Who quotes such a line starts nothing.
    quoted = collect(f"{second}\n{REFUSED}\nsudo: he ran: echo '{first}'\n")
    assert any("refuses" in line.text for line in quoted.log)


def test_the_log_of_libvirt() -> None:
    start = (
        "2026-11-23 20:00:00.000+0000: starting up libvirt version: 9.0.0, package: 4+deb12u2 (Debian), qemu version: "
    )
    text = f"{start}7.0.0Debian 1:7.0, kernel: 6.1.0, hostname: h\nqemu-system-x86_64: -device x: {m.NOT_BY_DEVICE}\n"
    text += f"{start}7.2.22Debian 1:7.2+dfsg-7, hostname: h\nqemu-system-x86_64: -device x: {m.STILL_LEGACY}\n"
    view = collect(text)
    assert (view.machine.get(k.VMM), view.machine.get(k.VMM_VERSION)) == ("qemu", "7.2.22")
    assert [line.place.line for line in view.log] == [3, 4]


def test_back_ends() -> None:
    assert collect("EAL: RTE Version: 'DPDK 22.11.11'\n").machine.get(k.BACKEND_PRODUCT) == "dpdk 22.11.11"
    spdk = "[2026-06-05 21:36:51.963149] Starting SPDK v26.05-pre git sha1 4dc62ec60 / DPDK 25.11.0 initialization...\n"
    assert collect(spdk).machine.get(k.BACKEND_PRODUCT) == "spdk 26.05-pre"


def test_units_of_amd() -> None:
    view = collect("pci 0000:00:00.2: AMD-Vi: Found IOMMU cap 0x40\npci 0000:20:00.2: AMD-Vi: Found IOMMU cap 0x40\n")
    assert view.machine.get(k.IOMMUS) == ("ivhd0", "ivhd1")


def test_every_message_is_kept() -> None:
    for message in MESSAGES:
        assert [line.text for line in collect(f"a\nb {message.text} c\nd\n").log] == [f"b {message.text} c"], message


def test_a_flood_is_bounded() -> None:
    view = collect("virtio_blk virtio0: device refuses features: 3\n" * 5000 + f"x {m.BOUNCE_FULL} (sz: 4096 bytes)\n")
    assert len(view.log) == logs.EACH + 1
    assert view.log[-1].place.line == 5001
    assert all(len(line.text) < 600 for line in collect("device refuses features: " * 100000).log)


@pytest.mark.parametrize("data", [b"", gzip.compress(b"x" * 100, mtime=0), b"\xfd7zXZ\x00rest", b"LPKSHHRH...."])
def test_no_log_at_all(data: bytes) -> None:
    view = collect(data)
    assert view.empty
    assert len(view.problems) == 1
    assert "x.log" in view.problems[0]


@given(st.binary(max_size=4096) | st.lists(st.sampled_from([m_.text.encode() for m_ in MESSAGES] + [b"\n", b"\x1b[", b"\0", b"virtio1", b"\xff", b"[", b"("]), max_size=60).map(b"".join))  # fmt: skip # noqa: E501
@settings(max_examples=150, deadline=None)
def test_any_bytes(data: bytes) -> None:
    view = collect(data)
    for line in view.log:
        assert line.text.isprintable()
        assert 1 <= line.place.line <= data.count(b"\n") + 1


def test_large_logs_are_quick() -> None:
    """64 MB in less than 2 s; here a quarter of that, of the kinds that are slowest."""
    size = logs.BYTES // 4
    for piece in (b"[   12.3] virtio_blk virtio0: nothing to see\n", b"a Linux version 6\n", b"d", b"\x1b"):
        begin = time.perf_counter()
        collect((piece * (size // len(piece) + 1))[:size])
        assert time.perf_counter() - begin < 1.0, piece


def test_of_more_than_is_read_the_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "BYTES", 1000)
    view = collect("x\n" * 1000 + REFUSED + "\n")
    assert view.log[-1].place.line == 1001
    assert "only the last 1000" in view.problems[0]


def test_this_machines_own() -> None:
    """The kernel's release is what uname says, in both dresses that dmesg has."""
    found = subprocess.run(["dmesg"], capture_output=True, timeout=20, check=False)
    if found.returncode or b"Linux version" not in found.stdout:
        pytest.skip(f"dmesg says nothing here: {found.stderr.decode()[:80] or 'the first lines are gone'}")
    plain = collect(found.stdout)
    coloured = collect(subprocess.run(["dmesg", "--color=always"], capture_output=True, timeout=20, check=True).stdout)
    release = subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout.strip()
    assert plain.machine.get(k.KERNEL) == coloured.machine.get(k.KERNEL) == release
    assert [line.text for line in plain.log] == [line.text for line in coloured.log]
