# SPDX-License-Identifier: Apache-2.0
"""A scan inside of a real guest, as root: what is offered is read off the registers, and QEMU sees only those loads."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import select
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import virtiova
from virtiova.collect.monitor import Monitor
from virtiova.errors import NotPossibleError
from virtiova.guest import boot, initramfs
from virtiova.guest.platforms import PLATFORMS
from virtiova.packages.store import Store

SECONDS = 120.0
INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
dmesg -n 1
while read -r m; do insmod "/modules/$m.ko"; done </modules/order
while [ ! -e /sys/block/vdb/serial ]; do sleep 0.1; done
for d in /sys/bus/pci/devices/*; do
    grep -q 1af4 $d/vendor && echo "@bar $(basename $d) $(head -5 $d/resource | tail -1)"
done
echo @ready
read -r go
PYTHONPATH=@PATH@ @PYTHON@ -S -B /scan.py
echo @end
read -r go
"""
SCAN = """
import json
from virtiova.collect import linux
from virtiova.collect.tree import LiveTree
view = linux.collect(LiveTree())
facts = {d.name: {f.key: [str(f.value), f.certainty.name, str(f.place)] for f in d.facts} for d in view.devices}
print("@scan " + json.dumps({"devices": facts, "problems": view.problems}), flush=True)
"""
LOADED = (
    SCAN
    + """
import virtiova._core, sys, re
files = {m.__spec__.origin for m in sys.modules.values() if getattr(m, "__spec__", None) and m.__spec__.origin}
files |= set(re.findall(r"(/\\S+\\.so[.0-9]*)$", open("/proc/self/maps").read(), re.M))
print("@files " + json.dumps(sorted(f for f in files if f.startswith("/"))))
"""
)


def python_files() -> dict[str, tuple[int, bytes]]:
    """This Python and what a scan loads, as members of an archive. As it is where it is."""
    source = str(Path(virtiova.__file__).parent.parent)
    interpreter = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    command = [str(interpreter), "-S", "-B", "-c", LOADED]
    said = subprocess.check_output(command, text=True, timeout=60, env={"PYTHONPATH": source})
    (listed,) = (line for line in said.splitlines() if line.startswith("@files "))
    names = {Path(name) for name in json.loads(listed.removeprefix("@files "))}
    loader = re.search(r"(/\S*ld-linux\S*)", subprocess.check_output(["ldd", str(interpreter)], text=True))
    assert loader is not None
    names |= {interpreter, Path(loader[1]), Path(sysconfig.get_path("stdlib"), "os.py")}
    found = {str(name).lstrip("/"): (0o755, name.read_bytes()) for name in names if name.is_file()}
    assert any("_core" in name for name in found)
    return found | {"scan.py": (0o644, SCAN.encode())}


def archive(store: Store) -> bytes:
    """The initramfs: kernel modules, busybox, Python."""
    platform = PLATFORMS["x86-vtd"]
    kernel, busybox = (store.get(wanted).content for wanted in platform.wanted()[:2])
    order = kernel["order"].decode().split()
    python = python_files()
    interpreter = next("/" + name for name in python if re.search(r"bin/python3\.\d+$", name))
    source = str(Path(virtiova.__file__).parent.parent)
    content = {
        "init": (0o755, INIT.replace("@PYTHON@", interpreter).replace("@PATH@", source).encode()),
        "bin/busybox": (0o755, busybox["busybox"]),
        "modules/order": (0o644, "".join(f"{name}\n" for name in order).encode()),
        **{f"modules/{name}.ko": (0o644, kernel[f"modules/{name}.ko"]) for name in order},
        **python,
    }
    parents = {str(parent) for name in content for parent in Path(name).parents if str(parent) != "."}
    return gzip.compress(initramfs.cpio(content, sorted({*initramfs.FOLDERS, *parents})), 1, mtime=0)


class Ends:
    """What comes out of a guest's console, and of the trace log: read together, as either could hold up the other."""

    def __init__(self, guest: boot.Boot) -> None:
        self.guest = guest
        self.said = ""
        self.trace = ""

    def until(self, mark: str) -> None:
        """Read on until a line of the console begins with ``mark``, and what the log has by then."""
        deadline = time.monotonic() + SECONDS
        while not re.search(rf"(?m)^{mark}.*\n", self.said):
            assert time.monotonic() < deadline, self.said[-1000:]
            self._take(1.0)
        while self._take(0.3):
            pass

    def _take(self, seconds: float) -> bool:
        tty, pipe = self.guest.tty.fileno(), self.guest._trace
        ready = select.select([tty, pipe], [], [], seconds)[0]
        if tty in ready:
            self.said += os.read(tty, 1 << 16).decode("utf-8", "replace").replace("\r", "")
        if pipe in ready:
            self.trace += os.read(pipe, 1 << 16).decode("utf-8", "replace")
        return bool(ready)


ACCESS = re.compile(
    r"memory_region_ops_(read|write) .* addr 0x([0-9a-f]+) value \S+ size (\d+) name '(virtio-pci[^']*)'"
)


@pytest.mark.sweep
@pytest.mark.parametrize("permitted", [True, False])
def test_registers_say_what_is_offered_and_feel_nothing_but_loads(permitted: bool) -> None:
    row = PLATFORMS["x86-vtd"]
    # Debian's kernels (CONFIG_IO_STRICT_DEVMEM) let nobody map the registers of a device that has a driver.
    append = f"{row.append} iomem={'relaxed' if permitted else 'strict'}"
    platform = dataclasses.replace(row, trace="virtio_set_status", append=append)
    store = Store()
    try:
        files = boot.assets(platform, store)
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    files = dataclasses.replace(files, initramfs=archive(store))
    with boot.Boot(platform, files, [boot.Disk(True), boot.Disk(False)]) as guest, Monitor(guest.monitor) as monitor:
        ends = Ends(guest)
        ends.until("@ready")
        bars = {int(line.split()[2], 16) for line in ends.said.splitlines() if line.startswith("@bar ")}
        monitor.execute("trace-event-set-state", name="memory_region_ops_*", enable=True)
        ends.trace = ""
        guest.tty.sendall(b"go\n")
        ends.until("@end")
    (line,) = re.findall(r"(?m)^@scan (.*)$", ends.said) or [ends.said]
    scan = json.loads(line)
    assert scan["problems"] == []
    accepted = {name: facts["accepted"][0] for name, facts in scan["devices"].items()}
    assert sorted(accepted.values()) == ["False", "True"]
    offered = {name: facts.get("offered", [""])[0] for name, facts in scan["devices"].items()}
    assert offered == {name: taken if permitted or taken == "True" else "" for name, taken in accepted.items()}
    # Seen by QEMU: of the device that did not take the bit three loads of 32 bits, from the first two registers; the
    # kernel's own of each device's status, for sysfs. Nothing else, and nothing is ever stored.
    seen = [(how, int(at, 16), int(size)) for how, at, size, _ in ACCESS.findall(ends.trace)]
    assert len(bars) == 2
    found = sorted(
        (max(bar for bar in bars if bar <= at), at - max(b for b in bars if b <= at), how, size)
        for how, at, size in seen
    )
    with_bit, without = sorted(bars)
    status, ours = (20, "read", 1), [(0, "read", 4), (0, "read", 4), (4, "read", 4)] if permitted else []
    assert found == [(with_bit, *status), *((without, *access) for access in (*ours, status))], seen
