# SPDX-License-Identifier: Apache-2.0
"""The vDPA bus as sysfs shows it: which device is behind a file, and what is missing where there is none. Nothing is
bound or unbound here: the commands that do are said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

BUS: Final = Path("/sys/bus/vdpa")
OURS: Final = "vhost_vdpa"
CHAR: Final = Path("/sys/dev/char")
_LISTED: Final = 8


def remedy(bus: Path = BUS) -> str:
    """The commands that make a file ``/dev/vhost-vdpa-N`` appear, as far as the bus shows what is missing."""
    if not (bus / "drivers" / OURS).is_dir():
        lines = [
            "modprobe vhost_vdpa    # a kernel with CONFIG_VHOST_VDPA: of Debian, from 6.12 on",
            "vdpa mgmtdev show",
            "vdpa dev add name NAME mgmtdev MGMTDEV",
        ]
    else:
        elsewhere = [(name, driver) for name, driver in devices(bus) if driver != OURS]
        lines = [line for name, driver in elsewhere[:_LISTED] for line in binding(name, driver)]
        lines = lines or ["vdpa mgmtdev show", "vdpa dev add name NAME mgmtdev MGMTDEV"]
    return "\n    ".join(lines)


def devices(bus: Path = BUS) -> list[tuple[str, str]]:
    """All vDPA devices and their drivers ('' for none)."""
    try:
        names = sorted(os.listdir(bus / "devices"))
    except OSError:
        return []
    return [(name, driver(bus / "devices" / name)) for name in names]


def driver(device: Path) -> str:
    """The driver of a device in sysfs; empty for none."""
    link = device / "driver"
    return link.resolve().name if link.exists() else ""


def binding(name: str, bound: str) -> list[str]:
    """The commands that give a vDPA device to vhost_vdpa."""
    away = [f"echo {name} > {BUS}/drivers/{bound}/unbind"] if bound else []
    return [*away, f"echo {name} > {BUS}/drivers/{OURS}/bind"]


def maker(fd: int, char: Path = CHAR) -> str:
    """Who made the device behind an open file: ``vduse``, the driver of the hardware, or nobody but the kernel
    (empty). ``?`` for what is not known."""
    try:
        status = os.fstat(fd)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        device = (char / number).resolve(strict=True).parent
    except OSError:
        return "?"
    # A device in user space hangs below one of its own name.
    parent = device.parent.parent if device.parent.name == device.name else device.parent
    return "" if parent.name == "devices" else driver(parent) or parent.name
