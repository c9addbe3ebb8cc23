# SPDX-License-Identifier: Apache-2.0
"""VFIO: structures, the kernel's words on faults, and in a real guest a device behind VT-d that VFIO hands over."""

from __future__ import annotations

import json
import shlex
import struct
from collections.abc import Mapping
from typing import Any

import pytest

from inside_kit import OFF, ON, VFIO, run
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.errors import NotPossibleError, ProtocolError, UsageError
from virtiova.machine.vfio.container import Opened, full_address
from virtiova.machine.vfio.faults import parse
from virtiova.wire import vfio

EXPERIMENTS = ("device-writes", "unmapped", "ring", "unmap")
COMMAND = shlex.join(["qemu-system-x86_64", "-nodefaults", "-m", VFIO.memory, *VFIO.arguments])
"""What started the guest, as far as it is about devices: its own kernel does not tell what a device offers that nobody
drives."""
STEPS = (
    ("virtiova", "probe", "vfio", ON),
    ("bind", ON),
    ("bind", OFF),
    ("virtiova", "probe", "vfio", ON, "-j", *(word for name in EXPERIMENTS for word in ("--experiment", name))),
    ("virtiova", "probe", "vfio", OFF, "-j"),
    ("virtiova", "probe", "vfio", OFF, "--i-know", "-j", "--experiment", "unmapped", "--experiment", "ring"),
    ("virtiova", "probe", "vfio", "0000:00:1f.0"),
    ("virtiova", "probe", "vfio", "0000:77:00.0"),
    ("virtiova", "scan", "-j"),
    ("run", "sh", "-c", 'printf "%s\\n" "$1" >/run/command', "sh", COMMAND),
    ("virtiova", "gather", "-o", "/run/box.tar.gz"),
    ("virtiova", "scan", "-j", "/run/box.tar.gz", "--cmdline", "/run/command"),
    ("virtiova", "bench", "vfio", ON, "--quick", "-j", "--only", "VFIO"),
)


@pytest.fixture(scope="module")
def done() -> dict[tuple[str, ...], Mapping[str, Any]]:
    """What came of each step in one guest."""
    return dict(zip(STEPS, run(VFIO, STEPS), strict=True))


def cells(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    assert answer["out"], answer
    return {cell["experiment"]: cell for cell in json.loads(answer["out"])["cells"]}


@pytest.mark.qemu
def test_a_device_that_is_not_bound_says_how_to_bind_it(done: dict[tuple[str, ...], Mapping[str, Any]]) -> None:
    answer = done[STEPS[0]]
    assert answer["code"] == exits.NOT_POSSIBLE
    assert f"{ON} is bound to virtio-pci, not to vfio-pci" in answer["err"]
    assert f"echo {ON} > /sys/bus/pci/devices/{ON}/driver/unbind" in answer["err"]


@pytest.mark.qemu
def test_with_the_bit_what_is_mapped_is_translated_and_all_else_is_stopped(
    done: dict[tuple[str, ...], Mapping[str, Any]],
) -> None:
    answer = done[STEPS[3]]
    assert answer["code"] == exits.OK, answer
    found = cells(answer)
    observed = {name: cell["observed"] for name, cell in found.items()}
    assert observed == {
        "device-writes": "translated",
        "unmapped": "blocked",
        "ring": "translated",
        "unmap": "blocked",
    }
    evidence = found["unmapped"]["evidence"]
    assert evidence["faults"][0]["source"] == 0x100
    assert any(word.startswith("DMAR: [DMA Write") and "[01:00.0]" in word for word in evidence["words"])


@pytest.mark.qemu
def test_a_quirky_device_is_not_let_loose(done: dict[tuple[str, ...], Mapping[str, Any]]) -> None:
    answer = done[STEPS[4]]
    assert answer["code"] == exits.USAGE
    assert answer["out"] == ""
    assert "does not offer bit 33" in answer["err"]
    assert "--i-know" in answer["err"]


@pytest.mark.qemu
def test_a_quirky_device_reaches_memory_with_no_mapping_at_all(
    done: dict[tuple[str, ...], Mapping[str, Any]],
) -> None:
    found = cells(done[STEPS[5]])
    assert {name: cell["observed"] for name, cell in found.items()} == {"unmapped": "bypass", "ring": "bypass"}
    assert found["unmapped"]["evidence"]["faults"] == []


@pytest.mark.qemu
def test_what_is_no_such_device(done: dict[tuple[str, ...], Mapping[str, Any]]) -> None:
    assert done[STEPS[6]]["code"] == exits.USAGE
    assert "0000:00:1f.0 (8086:2918) is no virtio device" in done[STEPS[6]]["err"]
    assert done[STEPS[7]]["code"] == exits.USAGE
    assert "there is no PCI device 0000:77:00.0" in done[STEPS[7]]["err"]


@pytest.mark.qemu
def test_a_scan_in_that_guest_sees_both_devices_in_user_space(done: dict[tuple[str, ...], Mapping[str, Any]]) -> None:
    answer = done[STEPS[8]]
    rows = {row["address"]: row for row in json.loads(answer["out"])["devices"]}
    assert {rows[ON]["driver"], rows[OFF]["driver"]} == {"vfio-pci"}


@pytest.mark.qemu
def test_a_scan_inside_alone_does_not_know_which_of_them_is_the_hazard(
    done: dict[tuple[str, ...], Mapping[str, Any]],
) -> None:
    said = json.loads(done[STEPS[8]]["out"])
    assert {row["device"] for row in said["undecided"] if row["id"] == "VA108"} == {ON, OFF}
    assert not [row for row in said["findings"] if row["id"] == "VA108"]


@pytest.mark.qemu
def test_scan_and_probe_agree_on_which_device_is_not_to_be_let_loose(
    done: dict[tuple[str, ...], Mapping[str, Any]],
) -> None:
    said = json.loads(done[STEPS[11]]["out"])
    rows = {row["address"]: row for row in said["devices"]}
    assert "VA108" in rows[OFF]["findings"]
    assert "VA108" not in rows[ON]["findings"]
    assert all(each["id"] != "VA108" for each in said["undecided"])
    probed = {ON: cells(done[STEPS[3]])["device-writes"], OFF: cells(done[STEPS[5]])["unmapped"]}
    assert {address: rows[address]["verdict"] for address in probed} == {ON: "translated", OFF: "bypass"}
    assert {address: cell["observed"] for address, cell in probed.items()} == {ON: "translated", OFF: "bypass"}
    assert {address: cell["offered"] for address, cell in probed.items()} == {
        address: rows[address]["offered"] for address in probed
    }


@pytest.mark.qemu
def test_what_mappings_cost(done: dict[tuple[str, ...], Mapping[str, Any]]) -> None:
    answer = done[STEPS[12]]
    assert answer["code"] == exits.OK, answer
    said = json.loads(answer["out"])
    assert "this is a virtual machine: its program plays the IOMMU, so that only ratios say anything" in said["about"]
    found = {(row["setting"]["pages"], row["setting"]["depth"], row["figure"]): row for row in said["results"]}
    for pages in (1, 512):
        for batch in (1, 64):
            figures = [found[pages, batch, figure] for figure in ("pages mapped/s", "pages unmapped/s", "pair")]
            assert all(row["rounds"] == 3 and 0 < row["min"] <= row["median"] <= row["max"] for row in figures)
    # 512 pages by one call are cheaper than one page by each of 512.
    assert found[512, 1, "pair"]["median"] < 512 * found[1, 1, "pair"]["median"] / 2


# -- without a guest ---------------------------------------------------------------------------------------------


def test_a_bench_of_nothing_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "vfio", "ffff:00:00.0", "--only", "neither"]) == exits.USAGE
    assert "no subject of bench vfio has neither in its name" in capsys.readouterr().err
    assert main(["bench", "vfio", "ffff:00:00.0", "--list", "--quick", "--only", "VFIO"]) == exits.OK
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_here_nothing_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "vfio", "ffff:00:00.0"]) == exits.USAGE
    with pytest.raises((UsageError, NotPossibleError)):
        Opened("ffff:00:00.0")


@pytest.mark.parametrize(("text", "full"), [("03:00.0", "0000:03:00.0"), ("0001:0A:1f.7", "0001:0a:1f.7")])
def test_an_address_with_and_without_its_domain(text: str, full: str) -> None:
    assert full_address(text) == full


@pytest.mark.parametrize("text", ["", "hello", "03:00", "03:00.8", "../../etc", "0000:03:00.0\n", "3:0.0"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        full_address(text)


@pytest.mark.parametrize(
    ("line", "address", "write", "source"),
    [
        (
            "DMAR: [DMA Read NO_PASID] Request device [01:00.0] fault addr 0x7909000 [fault reason 0x06] PTE Read",
            0x7909000,
            False,
            0x100,
        ),
        ("DMAR: [DMA Write] Request device [00:1f.2] fault addr abc000 [fault reason 05] x", 0xABC000, True, 0xFA),
        (
            "vfio-pci 0000:41:00.1: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0011 address=0xfffff000 flags=0x0020]",
            0xFFFFF000,
            True,
            0x4101,
        ),
    ],
)
def test_what_the_kernel_says_of_a_fault(line: str, address: int, write: bool, source: int) -> None:
    fault = parse(line)
    assert fault is not None
    assert (fault.address, fault.write, fault.source) == (address, write, source)


@pytest.mark.parametrize("line", ["", "DMAR: Host address width 39", "DMAR: [DMA Write] Request device [zz] fault"])
def test_what_is_no_fault(line: str) -> None:
    assert parse(line) is None


def test_ranges_of_addresses() -> None:
    cap = struct.pack("<HHIII", 1, 1, 0, 2, 0) + struct.pack("<QQQQ", 0, 0xFEDFFFFF, 0xFEF00000, (1 << 39) - 1)
    info = struct.pack("<IIQII", 24 + len(cap), 3, 4096, 24, 0) + cap
    assert vfio.iova_ranges(info) == [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)]
    assert vfio.page_sizes(info) == 4096
    assert vfio.iova_ranges(vfio.iommu_info(64)) == []


@pytest.mark.parametrize(
    "chain",
    [
        struct.pack("<HHIII", 1, 1, 0, 1000, 0),
        struct.pack("<HHI", 7, 1, 24),
        struct.pack("<HHI", 7, 1, 4000),
    ],
)
def test_capabilities_that_lead_nowhere(chain: bytes) -> None:
    info = struct.pack("<IIQII", 24 + len(chain), 3, 4096, 24, 0) + chain + bytes(8)
    with pytest.raises(ProtocolError):
        vfio.iova_ranges(info)
