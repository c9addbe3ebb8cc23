# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's command lines and Kata's configuration: what they say of devices and of the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scan_rule_kit import said
from virtiova.collect import cloud_hypervisor, commands, kata
from virtiova.collect import keys as k
from virtiova.collect.facts import View
from virtiova.result import Path
from virtiova.result.scan import Place
from virtiova.scan import scan_views

AT = Place("command line", "ch.txt")
# As its documentation has it (docs/iommu.md, docs/vdpa.md, docs/vfio-user.md, docs/fs.md).
FOCAL = (
    "./cloud-hypervisor --cpus boot=1 --memory size=512M --disk path=focal-server-cloudimg-amd64.raw,iommu=on "
    '--kernel custom-vmlinux --cmdline "console=ttyS0 console=hvc0 root=/dev/vda1 rw"'
)


def view(line: str) -> View:
    found = commands.of_file(line.encode(), "ch.txt")
    assert found.machine.get(k.VMM) == "cloud-hypervisor"
    return found


def bits(found: View) -> dict[str, bool | None]:
    return {device.name: device.facts.get(k.OFFERED) for device in found.devices}


def test_the_line_of_its_documentation() -> None:
    found = view(FOCAL.replace(" --", " \\\n    --"))
    assert found.machine.get(k.IOMMU) == "virtio"
    assert found.machine.get(k.FIRMWARE) == "direct"
    assert bits(found) == {"__console": False, "_disk0": True, "__rng": False}
    rows = {row.name: row.verdict for row in scan_views([found]).devices}
    assert rows == {"__console": Path.DIRECT, "_disk0": Path.TRANSLATED, "__rng": Path.DIRECT}


def test_without_an_iommu_there_is_nothing_to_say() -> None:
    found = view(FOCAL.replace(",iommu=on", ""))
    scan = scan_views([found])
    assert found.machine.get(k.IOMMU) == "none"
    assert not scan.findings
    assert not scan.undecided
    assert {row.verdict for row in scan.devices} == {Path.DIRECT}


LINES: dict[str, dict[str, bool | None]] = {
    "cloud-hypervisor --console off --rng src=/dev/random,iommu=on": {"__rng": True},
    "cloud-hypervisor --console=null --disk path=a path=b,iommu=on --disk path=c": {
        "_disk0": False, "_disk1": True, "_disk2": False, "__rng": False,
    },
    "cloud-hypervisor --console off --net tap=,fd=[3,4],iommu=on,id=n --balloon size=1G --watchdog": {
        "n": True, "__rng": False, "__balloon": False, "__watchdog": False,
    },
    "cloud-hypervisor --console off --vdpa path=/dev/vhost-vdpa-0,num_queues=2": {"__rng": False, "_vdpa0": True},
    "cloud-hypervisor --console off --platform sev_snp=on --disk vhost_user=on,socket=/s --fs tag=t,socket=/f": {
        "_disk0": True, "__rng": True, "_fs0": True,
    },
    "cloud-hypervisor --console off --disk vhost_user=on,socket=/run/s,iommu=on": {"_disk0": False, "__rng": False},
    "cloud-hypervisor --console off --pmem file=p,iommu=on --vsock cid=3,socket=/run/v,iommu=on": {
        "__rng": False, "_pmem0": True, "_vsock0": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_devices(line: str) -> None:
    assert bits(view(line)) == LINES[line]


def test_what_else_is_said() -> None:
    found = view(
        "sudo cloud-hypervisor-static --firmware ./CLOUDHV.fd "
        "--platform tdx=on,system_uuid=0AE9B9C1-0000-4000-8000-000000000001 "
        "--console off --user-device socket=/run/u --generic-vhost-user device_type=16,socket=/run/g "
        "--disk path=d,pci_segment=1,pci_device_id=9"
    )
    assert found.machine.get(k.RESTRICTED) == "tdx"
    assert found.machine.get(k.FIRMWARE) == "edk2"
    assert found.machine.get(k.UUID) == "0ae9b9c1-0000-4000-8000-000000000001"
    assert found.machine.get(k.VFIO_USER) == ("/run/u",)
    disk, _, other = found.devices
    assert disk.facts.get(k.PLACE) == "pci:0001:00:09.0"
    assert (other.facts.get(k.TYPE), other.facts.get(k.BACKEND)) == ("gpu", "vhost-user")
    assert other.facts.get(k.BACKEND_SOCKET) == "/run/g"


def test_an_iommu_that_is_refused_is_a_problem() -> None:
    found = view("cloud-hypervisor --fs tag=t,socket=/run/f,iommu=on")
    assert "iommu=on is refused" in found.problems[0]
    assert found.machine.get(k.IOMMU) == "none"


def test_findings() -> None:
    assert said(scan_views([view(f"{FOCAL} --user-device socket=/run/u")])) == {"VA106"}
    assert said(scan_views([view("cloud-hypervisor --user-device socket=/run/u")])) == set()


@given(
    st.lists(
        st.text(max_size=30) | st.sampled_from(["--disk", "--net", "--vdpa", "--platform", "a=[", 'a="']), max_size=9
    )
)
def test_no_words_are_a_traceback(words: list[str]) -> None:
    found = cloud_hypervisor.collect(["cloud-hypervisor", *words], AT)
    scan_views([found])


# -- Kata

# The part of its configuration-qemu.toml that matters, as it is installed.
TOML = """\
[hypervisor.qemu]
path = "/opt/kata/bin/qemu-system-x86_64"
machine_type = "q35"

# Enable vIOMMU, default false
enable_iommu = {iommu}

# Enable IOMMU_PLATFORM, default false
enable_iommu_platform = {bit}
{more}
[runtime]
enable_debug = false
"""


def sandbox(iommu: str = "false", bit: str = "false", more: str = "", machine: str = "q35") -> View:
    text = TOML.format(iommu=iommu, bit=bit, more=more).replace('"q35"', f'"{machine}"')
    assert kata.is_configuration(text.encode())
    return kata.collect(text.encode(), "configuration.toml")


def test_what_a_configuration_says() -> None:
    found = sandbox("true")
    assert found.machine.get(k.KATA) is True
    assert found.machine.get(k.VMM) == "qemu"
    assert found.machine.get(k.IOMMU) == "intel"
    fact = found.machine.fact(k.KATA_IOMMU_PLATFORM)
    assert fact is not None
    assert (fact.value, fact.place.line) == (False, 9)
    assert sandbox(more="confidential_guest = true", machine="s390-ccw-virtio").machine.get(k.RESTRICTED) == "s390-pv"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (sandbox(), set()),
        (sandbox("true"), {"VA309"}),
        (sandbox("true", "true"), set()),
        # QEMU turns the bit on for a guest that it protects.
        (sandbox(more="confidential_guest = true"), set()),
    ],
)
def test_what_is_found_in_it(found: View, wanted: set[str]) -> None:
    assert said(scan_views([found])) == wanted


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[hypervisor", b"[hypervisor]\nqemu = 1\n", b"a = " + b"[" * 5000])
def test_bad_configurations(data: bytes) -> None:
    found = kata.collect(data, "x.toml")
    assert found.empty
    assert found.problems


@given(st.binary(max_size=200))
def test_no_bytes_are_a_traceback(data: bytes) -> None:
    kata.collect(data, "x.toml")
    kata.collect(b"[hypervisor.qemu]\nenable_iommu = true\n" + data, "x.toml")
