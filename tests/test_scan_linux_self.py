# SPDX-License-Identifier: Apache-2.0
"""The system that the tests run on, scanned, against its own files read by other tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from virtiova.collect import keys as k
from virtiova.collect import linux
from virtiova.collect.facts import Device, View
from virtiova.collect.tree import LiveTree
from virtiova.collect.types import TYPES

SHELL = r"""
for d in /sys/bus/virtio/devices/*; do
    [ -e "$d" ] || continue
    driver=$(basename "$(readlink "$d/driver")" 2>/dev/null)
    parent=$(basename "$(dirname "$(readlink -f "$d")")")
    printf '%s|%s|%s|%s|%s|%s\n' "$(basename "$d")" "$(cat "$d/device")" "$(cat "$d/status")" \
        "$(cut -c33 "$d/features")$(cut -c34 "$d/features")" "$driver" "$parent"
done
"""
SCAN = """
import json, os, sys
from virtiova.collect import linux
from virtiova.collect.tree import LiveTree
if sys.argv[1] == "nobody" and os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
view = linux.collect(LiveTree())
facts = {d.name: {f.key: str(f.value) for f in d.facts} for d in view.devices}
print(json.dumps({"problems": view.problems, "devices": facts, "machine": [f.key for f in view.machine]}))
"""


@pytest.fixture(scope="module")
def view() -> View:
    return linux.collect(LiveTree())


def shell() -> list[list[str]]:
    """Name, type, status, bits 32 and 33, driver and parent of each virtio device, by a shell."""
    said = subprocess.run(["sh", "-c", SHELL], capture_output=True, text=True, check=True, timeout=30).stdout
    return [line.split("|") for line in said.splitlines()]


def on_the_bus(view: View) -> dict[str, Device]:
    return {device.name: device for device in view.devices if k.STATUS in device.facts}


def test_every_device_of_the_bus_is_there(view: View) -> None:
    assert sorted(on_the_bus(view)) == sorted(row[0] for row in shell())


def test_what_a_shell_reads_is_what_is_collected(view: View) -> None:
    found = on_the_bus(view)
    for name, kind, status, bits, driver, parent in shell():
        facts = found[name].facts
        assert facts.get(k.TYPE) == TYPES.get(int(kind, 16), f"type {int(kind, 16)}")
        assert facts.get(k.STATUS) == int(status, 16)
        assert (facts.get(k.VERSION_1), facts.get(k.ACCEPTED)) == (bits[0] == "1", bits[1] == "1")
        assert facts.get(k.DRIVER) == driver
        assert facts.get(k.ADDRESS) == parent


def test_lspci_knows_the_same_functions(view: View) -> None:
    assert shutil.which("lspci"), "lspci is wanted (Debian: pciutils)"
    said = subprocess.run(["lspci", "-Dnm", "-d", "1af4:"], capture_output=True, text=True, check=True, timeout=30)
    rows = [line.replace('"', "").split() for line in said.stdout.splitlines()]
    known = {row[0]: f"{row[2]}:{row[3]}" for row in rows if 0x1000 <= int(row[3], 16) < 0x1080}
    found = {d.facts.get(k.ADDRESS): d.facts.get(k.PCI_ID) for d in view.devices if d.facts.get(k.TRANSPORT) == "pci"}
    assert found == known


def test_groups_and_units_are_those_of_the_system(view: View) -> None:
    assert view.machine.get(k.IOMMU_GROUPS) == len(os.listdir("/sys/kernel/iommu_groups"))
    assert view.machine.get(k.IOMMUS) == tuple(sorted(os.listdir("/sys/class/iommu")))
    uname = os.uname()
    assert (view.machine.get(k.KERNEL), view.machine.get(k.ARCH)) == (uname.release, uname.machine)


def test_who_is_not_root_is_told_nothing_wrong() -> None:
    """The same facts but for those that root alone may see: a fact may be missing, and none may be another."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    mine, theirs = (
        json.loads(subprocess.check_output([sys.executable, "-c", SCAN, who], timeout=60, env=env))
        for who in ("self", "nobody")
    )
    assert sorted(theirs["devices"]) == sorted(mine["devices"])
    for name, facts in theirs["devices"].items():
        assert facts.items() <= mine["devices"][name].items()
        # ATS is in a part of configuration space that only root may see.
        assert "ats" not in facts
    assert len(theirs["problems"]) <= 2
