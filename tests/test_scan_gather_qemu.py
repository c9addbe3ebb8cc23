# SPDX-License-Identifier: Apache-2.0
"""A host with a QEMU that runs: asked there, judged here, and the same as if it were asked now."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.collect import keys as k
from virtiova.collect import qmp
from virtiova.collect.facts import Device, View, ViewKind
from virtiova.collect.gather import write
from virtiova.collect.gathered import views
from virtiova.scan import scan_views
from virtiova.scan.join import join

pytestmark = pytest.mark.qemu
UUID = "7c6b9bd2-6f0b-4c8e-9b1c-2f6d6a0f1c55"
QEMU = "qemu-system-x86_64"


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The monitor of a QEMU with a device behind VT-d."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"no {QEMU}")
    path = tmp_path_factory.mktemp("vm") / "vm.sock"
    words = [QEMU, "-M", "q35,kernel-irqchip=split", "-accel", "tcg", "-S", "-nodefaults", "-display", "none"]
    words += [
        "-name",
        "vm",
        "-uuid",
        UUID,
        "-device",
        "intel-iommu,intremap=off",
        "-qmp",
        f"unix:{path},server=on,wait=off",
    ]
    words += [
        "-device",
        "virtio-rng-pci,id=here,iommu_platform=on,disable-legacy=on",
        "-object",
        "secret,id=s,data=hush",
    ]
    with subprocess.Popen(words) as process:
        try:
            deadline = time.monotonic() + 30
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            yield path
        finally:
            process.kill()


def told(view: View) -> list[tuple[str, object]]:
    return [(fact.key, fact.value) for fact in [*view.machine, *(f for d in view.devices for f in d.facts)]]


def test_what_a_monitor_said_there_is_what_it_says_here(socket: Path, tmp_path: Path) -> None:
    box = tmp_path / "box.tar.gz"
    assert main(["gather", "-q", "-o", str(box), "--qmp", str(socket)]) == exits.OK
    found = {view.source.removeprefix(f"{box}: "): view for view in views(str(box))}
    there, here = found["qmp/vm.sock.json"], qmp.collect(str(socket))
    assert [(key, value) for key, value in told(there) if key != "runs-on"] == told(here)
    machines = [machine for machine in scan_views(found.values()).machines if machine.platform.get("uuid") == UUID]
    assert len(machines) == 1, "its command line and its monitor are of one machine"
    assert any(source.endswith(".cmdline") for source in machines[0].sources)
    assert any(source.endswith("vm.sock.json") for source in machines[0].sources)


def test_a_monitor_that_is_not_there_is_said_and_the_rest_gathered(tmp_path: Path) -> None:
    box = tmp_path / "box.tar.gz"
    assert main(["gather", "-q", "-o", str(box), "--qmp", str(tmp_path / "no.sock")]) == exits.COULD_NOT_LOOK
    found = views(str(box))
    assert found[0].kind is ViewKind.GUEST
    assert any("no.sock" in problem for problem in found[0].problems)


def test_a_machine_is_not_the_system_that_it_runs_on(tmp_path: Path) -> None:
    """Though both have a device of one type at one place, and nobody says who he is."""
    made = {
        "virtiova-gather.json": b'{"schema": "virtiova/gather/1"}',
        "links": b"/sys/bus/virtio/devices/virtio0\t../../../devices/pci0000:00/0000:00:02.0/virtio0\n",
        "tree/sys/devices/pci0000:00/0000:00:02.0/virtio0/device": b"0x4\n",
        "qemu/1.cmdline": b"qemu-system-x86_64\0-M\0q35\0-nodefaults\0-device\0virtio-rng-pci,addr=2\0",
    }
    with (tmp_path / "box").open("wb") as file:
        write(file, made)
    found = views(str(tmp_path / "box"))
    assert len({place(view.devices[0]) for view in found}) == 1
    assert [view.kind for view in join(found)] == [ViewKind.GUEST, ViewKind.CONFIGURATION]
    # The same two of different boxes may be one machine's two sides.
    for view in found:
        view.source = f"other-{view.source}"
    assert [view.kind for view in join(found)] == [ViewKind.JOINED]


def place(device: Device) -> str | None:
    return device.facts.get(k.PLACE)
