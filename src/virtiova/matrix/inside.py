# SPDX-License-Identifier: Apache-2.0
"""``python -m virtiova.matrix.inside NAME``, in a guest: the cells of a `Handing`, as lines of JSON.

It is told what its devices are, since no register of theirs says so, and which rules are inverted. Devices are bound
as their users would bind them: the guest is ours, and ends with us.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from virtiova.errors import MachineError, NotPossibleError, ProtocolError, UsageError
from virtiova.guest import disk_in_use
from virtiova.guest.boot import READ_SIZE
from virtiova.guest.facts import MARK
from virtiova.machine.handed import Handed
from virtiova.matrix import obtain
from virtiova.matrix.handed import BY_NAME, Given
from virtiova.policy import RULES
from virtiova.probe.plan import Runner

_FILES: Final = 4
ERRORS: Final = (MachineError, NotPossibleError, ProtocolError, UsageError, OSError, subprocess.SubprocessError)
_TRACING: Final = "/sys/kernel/tracing"


def say(value: object) -> None:
    """A line for whoever started us."""
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


# -- what this guest's own kernel drives -----------------------------------------------------------------------------


def count_calls() -> bool:
    """Count calls of the DMA API for each device: a device's name is the first word of its first member. False: this
    kernel does not let us."""
    for argument in ("$arg1", "%di"):
        with contextlib.suppress(OSError):
            probe = f"p:v/map dma_map_page_attrs dev=+0(+0({argument})):string\n"
            Path(f"{_TRACING}/kprobe_events").write_text(probe, encoding="ascii")
            Path(f"{_TRACING}/events/v/enable").write_text("1", encoding="ascii")
            return True
    return False


def fact(*words: str) -> None:
    """One fact on the console, as /init of the other guests says them."""
    sys.stderr.write(f"{MARK}{' '.join(words)}\n")


def disk_facts(block: Path, *, counting: bool) -> None:
    """What the kernel says of a disk, and what it reads from it."""
    name, virtio = (block / "serial").read_text().strip(), (block / "device").resolve()
    device = virtio.parent
    with open(f"/dev/{block.name}", "rb") as file:
        said = {"sha256": hashlib.sha256(file.read(READ_SIZE)).hexdigest(), "dev": device.name}
    said |= {key: (virtio / key).read_text().strip() for key in ("features", "status")}
    if (device / "iommu_group").exists():
        group = (device / "iommu_group").resolve()
        said |= {"group": group.name, "group_type": (group / "type").read_text().strip()}
    if counting:
        said["dma_map"] = str(calls_for(device.name))
    for key, value in said.items():
        fact("disk", name, f"{key}={value}")


def calls_for(name: str) -> int:
    """How often the DMA API was called for a device."""
    lines = Path(f"{_TRACING}/trace").read_text(encoding="utf-8", errors="replace").splitlines()
    return sum(f'dev="{name}"' in line for line in lines)


def in_use(label: str) -> dict[str, object]:
    """A vDPA disk with the kernel's own driver: a file system on it, and what came of that."""
    try:
        obtain.serve(label)
        obtain.driven_by(label, "virtio_vdpa")
        done = disk_in_use.round_on(label, str(obtain.image(label)), _FILES)
        return {"used": {**done, "dma_map": calls_for(label), "said": obtain.said(label)}}
    except ERRORS as error:
        return {"lost": str(error)}


def facts(*, counting: bool) -> None:
    """All of them, on the console; what is said there is out when this returns."""
    for block in sorted(Path("/sys/block").glob("vd*")):
        disk_facts(block, counting=counting)
    fact("kernel", os.uname().release)
    fact("end", "1")
    sys.stderr.flush()
    termios.tcdrain(sys.stderr.fileno())


def main(name: str) -> None:
    """All cells, one after the other."""
    handing = BY_NAME[name]
    Path("/proc/sys/kernel/printk").write_text("3", encoding="ascii")
    say({"kernel": os.uname().release})
    told = json.loads(sys.stdin.readline())
    rules = RULES
    for rule in told["inverted"]:
        rules = rules.inverted(rule)
    runner = Runner(jobs=1, rules=rules)
    counting = count_calls()
    devices: dict[Given, Handed] = {}
    for number, (given, task) in enumerate(handing.asked()):
        if number not in told["wanted"]:
            continue
        try:
            if given not in devices:
                devices[given] = obtain.obtained(given, told["product"])
            cell = runner.run_one(replace(task, handed=devices[given]))
        except ERRORS as error:
            say({"n": number, "lost": str(error)})
            continue
        say({"n": number, "cell": cell})
    for place, (label, _) in enumerate(handing.uses(), sum(1 for _ in handing.asked())):
        if place in told["wanted"]:
            say({"n": place} | in_use(label))
    if handing.judged is not None:
        facts(counting=counting)
    say({"end": True})


if __name__ == "__main__":
    main(sys.argv[1])
    # This is process 1, with which the guest would end before all is out.
    signal.pause()
