# SPDX-License-Identifier: Apache-2.0
"""The bare command stays fast: by what it imports and reads, which do not depend on how busy a machine is."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

from sysfs_kit import Box, config_space
from virtiova.collect import linux
from virtiova.collect.tree import LIMIT, LiveTree

HEAVY = (
    "asyncio", "bz2", "concurrent", "ctypes", "difflib", "email", "html", "http", "jinja2", "json", "lzma", "msgspec",
    "multiprocessing", "pathlib", "qemu", "selectors", "socket", "ssl", "subprocess", "tarfile", "tempfile",
    "threading",
    "unittest", "urllib", "xml", "virtiova.conformance", "virtiova.device", "virtiova.dma",
    "virtiova.driver", "virtiova.machine", "virtiova.probe", "virtiova.result.cells", "virtiova.ring", "virtiova.serve",
    "virtiova.transport",
)  # fmt: skip
CODE = """
import sys
before = set(sys.modules)
from virtiova.cli.main import main
main([])
sys.stderr.write(" ".join(sorted(set(sys.modules) - before)))
"""
MODULES = 150
"""All that the bare command imports, the standard library's included; each costs about half a millisecond."""


def test_the_bare_command_imports_nothing_heavy() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    found = run.stderr.splitlines()[-1].split()
    # What this environment itself loads at start (a coverage tool, a path file of an installed package) is not ours.
    heavy = [name for name in found if any(name == each or name.startswith(f"{each}.") for each in HEAVY)]
    assert heavy == ["bz2", "lzma"], "argparse asks shutil for the terminal's width, which brings these two"
    assert len(found) <= MODULES, found


class Counting(LiveTree):
    """Counts what is read, by file."""

    def __init__(self, root: str) -> None:
        super().__init__(root, "box")
        self.reads: collections.Counter[str] = collections.Counter()

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        self.reads[path] += 1
        return super().read(path, limit)


def test_files_are_read_once_and_few_for_each_device(tmp_path: Path) -> None:
    counts = []
    for number in (1, 11):
        box = Box(tmp_path / str(number))
        for slot in range(number):
            function = box.function(f"/sys/devices/pci0000:00/0000:00:{slot:02x}.0")
            box.virtio(function, name=f"virtio{slot}")
            box.group(slot, "DMA", [function])
        tree = Counting(str(box.root))
        assert len(linux.collect(tree).devices) == number
        counts.append(tree.reads)
    one, eleven = counts
    # Type, status, features, three ids, configuration space, type and name of the group.
    assert (eleven.total() - one.total()) / 10 <= 10, eleven
    # What asks who runs a machine looks at a few files from several sides.
    assert {path for path, times in eleven.items() if times > 1} <= {path for path, times in one.items() if times > 1}
    assert one.total() < 60, one


def test_other_vendors_functions_cost_one_read_each(tmp_path: Path) -> None:
    """A physical machine has hundreds of them."""
    box = Box(tmp_path)
    for slot in range(32):
        box.file(f"/sys/devices/pci0000:00/0000:00:{slot:02x}.0/vendor", "0x8086\n")
        box.file(f"/sys/devices/pci0000:00/0000:00:{slot:02x}.0/config", config_space())
        box.link(f"/sys/bus/pci/devices/0000:00:{slot:02x}.0", f"/sys/devices/pci0000:00/0000:00:{slot:02x}.0")
    tree = Counting(str(box.root))
    linux.collect(tree)
    assert sum(times for path, times in tree.reads.items() if "/pci/devices/" in path) == 32


def test_configuration_space_of_this_machine_is_read_in_pieces() -> None:
    """All of it takes milliseconds for each device in a virtual machine."""
    tree = Counting("/")
    assert tree.live
    linux.collect(tree)
    assert not [path for path in tree.reads if os.path.basename(path) == "config"]
