# SPDX-License-Identifier: Apache-2.0
"""VFIO where something is missing, broken or somebody else's: said with what supplies it, and nothing is left."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from inside_kit import VFIO, run
from virtiova.cli import exits
from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.vfio import container
from virtiova.machine.vfio.container import Opened
from virtiova.wire import pci

_RNG = "virtio-rng-pci,disable-legacy=on"
_MORE = (
    # Two functions of one device, nothing between them that would keep them apart: one group.
    (f"{_RNG},iommu_platform=on,multifunction=on,addr=0.0", f"{_RNG},iommu_platform=on,addr=0.1"),
    (f"{_RNG},iommu_platform=on,vectors=0",),
    (f"{_RNG},vectors=0",),
    ("edu",),
    ("virtio-rng-pci,disable-modern=on,disable-legacy=off",),
)


def _port(number: int, devices: tuple[str, ...]) -> tuple[str, ...]:
    behind = (f"{device},bus=m{number}" for device in devices)
    port = f"pcie-root-port,id=m{number},chassis={number},addr={0x10 + number:x}"
    return tuple(word for device in (port, *behind) for word in ("-device", device))


IOMMU = ("-M", "q35,kernel-irqchip=split", "-cpu", "qemu64", "-device", "intel-iommu,intremap=on,caching-mode=on")
DEVICES = tuple(
    word
    for number, devices in enumerate(((f"{_RNG},iommu_platform=on",), (_RNG,), *_MORE), 1)
    for word in _port(number, devices)
)
SETTING = dataclasses.replace(VFIO, arguments=(*IOMMU, *DEVICES))
ON, OFF, ONE, OTHER = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0", "0000:03:00.1"
LINE, OFF_LINE, EDU, LEGACY = "0000:04:00.0", "0000:05:00.0", "0000:06:00.0", "0000:07:00.0"
PROBE = ("virtiova", "probe", "vfio")
SHORT = (*PROBE, ON, "-j", "--experiment", "device-writes")
STEPS: dict[str, tuple[str, ...]] = {
    **{f"bind {address}": ("bind", address) for address in (ON, OFF, ONE, LINE, OFF_LINE, LEGACY)},
    "works": SHORT,
    "edu": (*PROBE, EDU),
    "legacy": (*PROBE, LEGACY),
    "not viable": (*PROBE, ONE),
    "bind the other": ("bind", OTHER),
    "viable": (*PROBE, ONE, "-j", "--experiment", "device-writes"),
    "user": ("call", "vfio_inside:as_user", *PROBE, ON),
    "owner": ("call", "vfio_inside:as_owner", ON, *PROBE, ON),
    "memory": ("call", "vfio_inside:with_little_memory", *SHORT),
    "busy": ("call", "vfio_inside:while_had", ON, *PROBE, ON),
    "killed": ("call", "vfio_inside:killed", ON, *SHORT),
    "broken": ("call", "vfio_inside:broken", OFF),
    "message": ("call", "vfio_inside:signals", ON),
    "line": ("call", "vfio_inside:signals", LINE),
    "line, bit off": (*PROBE, OFF_LINE, "--i-know", "-j", "--experiment", "device-writes"),
    "ranges": ("call", "vfio_inside:ranges", ON),
    "left": ("call", "vfio_inside:left"),
    "no type 1": ("call", "vfio_inside:without_type1", *PROBE, ON),
}


@pytest.fixture(scope="module")
def done() -> dict[str, Mapping[str, Any]]:
    """What came of each step in one guest."""
    return dict(zip(STEPS, run(SETTING, list(STEPS.values())), strict=True))


def inner(answer: Mapping[str, Any]) -> Any:
    """What a function in the guest said."""
    assert answer["code"] == 0, answer
    return json.loads(answer["out"])


def observed(answer: Mapping[str, Any]) -> list[str]:
    assert answer["out"], answer
    return [cell["observed"] for cell in json.loads(answer["out"])["cells"]]


@pytest.mark.qemu
def test_what_else_there_is_works(done: dict[str, Mapping[str, Any]]) -> None:
    assert observed(done["works"]) == ["translated"]
    assert inner(done["left"]) == []


@pytest.mark.qemu
def test_a_group_of_which_the_kernel_has_a_part(done: dict[str, Mapping[str, Any]]) -> None:
    answer = done["not viable"]
    assert answer["code"] == exits.NOT_POSSIBLE
    assert "is not viable" in answer["err"]
    assert f"the kernel has {OTHER} (virtio-pci)" in answer["err"]
    assert f"echo {OTHER} > /sys/bus/pci/devices/{OTHER}/driver/unbind" in answer["err"]
    assert observed(done["viable"]) == ["translated"]


@pytest.mark.qemu
def test_what_is_not_to_be_driven(done: dict[str, Mapping[str, Any]]) -> None:
    assert {done[name]["code"] for name in ("edu", "legacy")} == {exits.USAGE}
    # It is not bound either; nobody is told to unbind what this program has no use for.
    assert f"{EDU} (1234:11e8) is no virtio device" in done["edu"]["err"]
    assert "has no modern interface: it cannot offer bit 33" in done["legacy"]["err"]


@pytest.mark.qemu
def test_who_is_not_root(done: dict[str, Mapping[str, Any]]) -> None:
    user, owner = inner(done["user"]), inner(done["owner"])
    assert user["code"] == owner["code"] == exits.NOT_POSSIBLE
    assert "Permission denied" in user["err"]
    assert "sudo" in user["err"]
    assert "physical addresses are not shown to this user" in owner["err"]
    assert "CAP_SYS_ADMIN" in owner["err"]


@pytest.mark.qemu
def test_a_limit_on_locked_memory(done: dict[str, Mapping[str, Any]]) -> None:
    said = inner(done["memory"])
    assert said["code"] == exits.NOT_POSSIBLE, said
    assert "the limit is 8 KiB" in said["err"]
    assert "ulimit -l unlimited" in said["err"]


@pytest.mark.qemu
def test_a_device_that_somebody_has(done: dict[str, Mapping[str, Any]]) -> None:
    said = inner(done["busy"])
    assert said["code"] == exits.NOT_POSSIBLE
    assert "somebody else has the device: fuser -v /dev/vfio/" in said["err"]


@pytest.mark.qemu
def test_after_a_probe_that_was_killed_the_next_one_works(done: dict[str, Mapping[str, Any]]) -> None:
    assert observed(inner(done["killed"])) == ["translated"]


@pytest.mark.qemu
def test_an_experiment_that_breaks_leaves_a_quiet_device(done: dict[str, Mapping[str, Any]]) -> None:
    said = inner(done["broken"])
    assert said["error"] == "broken on purpose"
    assert said["before"]["command"] & pci.COMMAND_BUS_MASTER
    assert said["before"]["status"]
    assert not said["after"]["command"] & pci.COMMAND_BUS_MASTER
    assert said["after"]["status"] == 0


@pytest.mark.qemu
def test_the_control_comes_of_the_devices_own_signal(done: dict[str, Mapping[str, Any]]) -> None:
    for name, kind in (("message", "msi-x"), ("line", "intx")):
        said = inner(done[name])
        assert set(said["signals"]) == {kind}, said
        assert (said["control"], said["pages"], said["observed"]) == ("call", ["A"], "translated")
    # Without a control what is seen in page B could not be told from a device with nothing in front.
    assert observed(done["line, bit off"]) == ["bypass"]


@pytest.mark.qemu
def test_the_window_of_the_messages_is_not_mapped(done: dict[str, Mapping[str, Any]]) -> None:
    said = inner(done["ranges"])
    assert [0, 0xFEDFFFFF] in said["ranges"]
    assert not any(first <= 0xFEEFFFFF and last >= 0xFEE00000 for first, last in said["ranges"])
    assert "the IOMMU maps no such IOVAs; it has 0x0-0xfedfffff" in said["ours"]
    assert said["kernel's"] == os.strerror(22)


@pytest.mark.qemu
def test_a_kernel_whose_iommu_module_is_gone(done: dict[str, Mapping[str, Any]]) -> None:
    said = inner(done["no type 1"])
    assert said["code"] == exits.NOT_POSSIBLE
    assert "modprobe vfio_iommu_type1" in said["err"]


@pytest.mark.qemu
@pytest.mark.sweep
def test_a_machine_without_an_iommu() -> None:
    """Binding would fail there (vfio-pci: probe failed with error -22), so nobody is told to."""
    plain = dataclasses.replace(VFIO, arguments=("-M", "q35", "-cpu", "qemu64", *_port(1, (_RNG,))), append="")
    off = dataclasses.replace(SETTING, append="intel_iommu=off")
    for setting, words in ((plain, "there is no IOMMU, or it is off"), (off, "switched off by intel_iommu=off")):
        (answer,) = run(setting, [(*PROBE, ON)])
        assert answer["code"] == exits.NOT_POSSIBLE
        assert "is in no IOMMU group" in answer["err"]
        assert words in answer["err"]
        assert "drivers_probe" not in answer["err"]


# -- without a guest ---------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's files with one virtio device at `ON`, as Linux 6.1 shows them."""
    at = tmp_path / "devices" / ON
    at.mkdir(parents=True)
    (at / "vendor").write_text("0x1af4\n")
    (at / "device").write_text("0x1044\n")
    (tmp_path / "groups").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "cmdline").write_text("console=ttyS0 quiet\n")
    for name, path in (("_DEVICES", "devices"), ("_GROUPS", "groups"), ("_CMDLINE", "cmdline"), ("_FILES", "dev")):
        monkeypatch.setattr(container, name, str(tmp_path / path))
    return tmp_path


def grouped(tree: Path, driver: str, name: str = "") -> None:
    """Put the device into group 9, under a driver."""
    group = tree / "groups" / "9"
    (group / "devices").mkdir(parents=True)
    (group / "devices" / ON).symlink_to(tree / "devices" / ON)
    if name:
        (group / "name").write_text(f"{name}\n")
    (tree / "devices" / ON / "iommu_group").symlink_to(group)
    if driver:
        (tree / "drivers" / driver).mkdir(parents=True)
        (tree / "devices" / ON / "driver").symlink_to(tree / "drivers" / driver)


def refusal(kind: type[Exception] = NotPossibleError) -> str:
    with pytest.raises(kind) as caught:
        Opened(ON)
    return str(caught.value)


def test_no_iommu_comes_before_the_advice_to_bind(tree: Path) -> None:
    said = refusal()
    assert "there is no IOMMU, or it is off" in said
    assert "intel_iommu=on" in said
    assert "drivers_probe" not in said
    (tree / "cmdline").write_text("root=/dev/vda iommu=pt intel_iommu=off\n")
    assert refusal().endswith("switched off by intel_iommu=off on the kernel's command line")
    (tree / "groups" / "0").mkdir()
    assert "groups for other devices only" in refusal()


def test_a_group_without_an_iommu_is_refused(tree: Path) -> None:
    """enable_unsafe_noiommu_mode: the kernel makes a group when vfio-pci is bound, and names it."""
    grouped(tree, "vfio-pci", "vfio-noiommu")
    said = refusal()
    assert "without an IOMMU" in said
    assert "echo N > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode" in said


@pytest.mark.parametrize(("driver", "now"), [("", "bound to no driver"), ("virtio-pci", "bound to virtio-pci")])
def test_a_device_of_somebody_elses(tree: Path, driver: str, now: str) -> None:
    grouped(tree, driver)
    said = refusal()
    assert f"{ON} is {now}, not to vfio-pci" in said
    assert ("driver/unbind" in said) == bool(driver)


def test_another_makers_device_is_never_to_be_unbound(tree: Path) -> None:
    (tree / "devices" / ON / "vendor").write_text("0x8086\n")
    grouped(tree, "nvme")
    assert "no virtio device" in refusal(UsageError)


def test_a_file_that_is_not_there(tree: Path) -> None:
    grouped(tree, "vfio-pci")
    assert f"{tree}/dev/vfio: No such file or directory: modprobe vfio-pci" in refusal()
