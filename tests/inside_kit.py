# SPDX-License-Identifier: Apache-2.0
"""A Debian guest in which this checkout's own Python runs: what it did there, command by command."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from virtiova.cli.main import main
from virtiova.errors import NotPossibleError
from virtiova.guest.inside import Inside, Setting, files
from virtiova.packages.store import Store

VFIO = Setting(
    "vfio",
    "linux-image-amd64",
    r"linux-image-[0-9].*-amd64",
    ("vfio_iommu_type1", "vfio_pci"),
    (
        *("-M", "q35,kernel-irqchip=split", "-cpu", "qemu64"),
        *("-device", "intel-iommu,intremap=on,caching-mode=on"),
        *("-device", "pcie-root-port,id=r1,chassis=1,addr=10"),
        *("-device", "virtio-rng-pci,bus=r1,iommu_platform=on,disable-legacy=on"),
        *("-device", "pcie-root-port,id=r2,chassis=2,addr=11"),
        *("-device", "virtio-rng-pci,bus=r2,disable-legacy=on"),
    ),
    append="intel_iommu=on",
)
ON, OFF = "0000:01:00.0", "0000:02:00.0"
_PLAIN = ("-M", "q35", "-cpu", "qemu64")
VHOST = Setting(
    "vhost",
    "linux-image-amd64",
    r"linux-image-[0-9].*-amd64",
    ("vhost_net", "vhost_vsock", "tun", "af_packet"),
    _PLAIN,
)
VDUSE = Setting(
    "vduse",
    "linux-image-amd64",
    r"linux-image-[0-9].*-amd64",
    ("vduse", "vhost_vdpa", "virtio_vdpa", "virtio_blk", "virtio_net", "virtio_rng", "ext4"),
    _PLAIN,
    suite="bookworm-backports",
)
"""Linux 6.12: ``/dev/vduse/control`` and ``/dev/vhost-vdpa-N``."""


def run(setting: Setting, steps: Sequence[Sequence[str]]) -> list[Mapping[str, Any]]:
    """Boot, do the steps, and what came of each: ``virtiova ...``, ``bind ADDRESS``, or ``run COMMAND``. The test is
    skipped, with the reason, where there is no such kernel to be had."""
    try:
        boot = files(setting, Store())
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    with Inside(setting, boot, "inside_kit") as guest:
        assert guest.hear() == {"ready": True}
        answers: list[Mapping[str, Any]] = []
        for step in steps:
            guest.tell(list(step))
            answers.append(guest.hear())
        return answers


# -- in the guest ------------------------------------------------------------------------------------------------


def bind(address: str) -> None:
    """Give a device to vfio-pci: what `virtiova` leaves to its user."""
    at = f"/sys/bus/pci/devices/{address}"
    steps = [(f"{at}/driver_override", "vfio-pci"), (f"{at}/driver/unbind", address)]
    for path, word in [*steps, ("/sys/bus/pci/drivers_probe", address)]:
        if os.path.exists(path):
            with open(path, "w", encoding="ascii") as file:
                file.write(word)


def do(words: Sequence[str]) -> dict[str, Any]:
    """One step, in the guest."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    started = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if words[0] == "bind":
                bind(words[1])
            elif words[0] == "run":
                ended = subprocess.run(words[1:], capture_output=True, text=True, timeout=60, check=False)
                code = ended.returncode
                out.write(ended.stdout)
                err.write(ended.stderr)
            else:
                code = main(words[1:])
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = traceback.format_exc()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    with open("/proc/sys/kernel/printk", "w", encoding="ascii") as quiet:
        quiet.write("3")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), flush=True)
