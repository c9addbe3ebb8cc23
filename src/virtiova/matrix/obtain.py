# SPDX-License-Identifier: Apache-2.0
"""In a guest: how the devices of a `Handing` are had. They are bound here as their users would bind them, which nobody
else of us does: the guest is ours, and ends with us."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from virtiova.errors import MachineError, NotPossibleError
from virtiova.machine.handed import Handed
from virtiova.machine.image import IMAGE_SECTORS, disk_image
from virtiova.machine.vdpa.machine import VdpaDevice
from virtiova.machine.vfio.machine import VfioDevice
from virtiova.machine.vhost.machine import VhostDevice
from virtiova.matrix.backends import OURS
from virtiova.matrix.handed import SERVED, Given

_PCI: Final = Path("/sys/bus/pci")
_VDPA: Final = Path("/sys/bus/vdpa")
_SECONDS: Final = 30.0
_NAP: Final = 0.02
_IMAGE: Final = 24 << 20
"""Bytes of a disk: enough for a file system with a journal."""
_SAID: Final = 300


def obtained(given: Given, product: str) -> Handed:
    """The device of a row, as it is here. Raises `MachineError` or `NotPossibleError` where it does not come about."""
    if given.machine == VfioDevice.machine:
        address = behind(given.at)
        bind(address)
        return VfioDevice(address, write=True, i_know=True, product=product)
    if given.machine == VhostDevice.machine:
        return VhostDevice(given.at)
    serve(given.at)
    return VdpaDevice(handed_over(given.at), write=True)


def write(path: Path, word: str) -> None:
    """One word into a file of the kernel's. Raises `MachineError`."""
    try:
        path.write_text(word, encoding="ascii")
    except OSError as error:
        raise MachineError(f"{path} does not take {word}: {error.strerror}") from error


def until(path: Path, what: str) -> None:
    """Wait for a file to appear; `MachineError` if it does not."""
    end = time.monotonic() + _SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise MachineError(f"{what}: there is no {path} after {_SECONDS:.0f} s")
        time.sleep(_NAP)


# -- PCI ---------------------------------------------------------------------------------------------------------


def behind(port: str) -> str:
    """The address of the one device behind a root port."""
    found = [path.name for path in (_PCI / "devices" / port).glob("????:??:??.?")]
    if len(found) != 1:
        raise MachineError(f"behind {port} are {len(found)} devices")
    return found[0]


def bind(address: str) -> None:
    """Give a device to vfio-pci."""
    at = _PCI / "devices" / address
    write(at / "driver_override", "vfio-pci")
    if (at / "driver").exists():
        write(at / "driver" / "unbind", address)
    write(_PCI / "drivers_probe", address)


# -- vDPA --------------------------------------------------------------------------------------------------------


def image(label: str) -> Path:
    """The file behind the disk of that name."""
    return Path(f"/run/{label}.img")


def serve(label: str) -> None:
    """Start what serves a device, and put the device on the vDPA bus; nothing if it is there."""
    if (_VDPA / "devices" / label).exists():
        return
    image(label).write_bytes(disk_image(IMAGE_SECTORS))
    os.truncate(image(label), _IMAGE)
    start(label, [word.format(image=image(label), name=label) for word in SERVED[label]])
    until(Path(f"/dev/vduse/{label}"), f"{SERVED[label][0]} makes no device: {said(label)}")
    tool = shutil.which("vdpa")
    if tool is None:
        raise NotPossibleError("vdpa is not installed (Debian: apt-get install iproute2)")
    ended = subprocess.run(
        [tool, "dev", "add", "name", label, "mgmtdev", "vduse"],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if ended.returncode:
        raise MachineError(f"vdpa dev add: {ended.stderr.strip()[-_SAID:]}; {SERVED[label][0]}: {said(label)}")


def start(label: str, words: list[str]) -> None:
    """A program in the background. Ours is forked from here, where nearly all of it is imported already: under an
    emulated processor that takes seconds."""
    if os.fork():
        return
    try:
        log = os.open(f"/run/{label}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((null, 0), (log, 1), (log, 2)):
            os.dup2(old, new)
        os.setsid()
        if words[0] != OURS:
            os.execvp(words[0], words)
        sys.argv = words
        runpy.run_module(OURS, run_name="__main__", alter_sys=True)
    finally:
        os._exit(1)


def said(label: str) -> str:
    """The last words of a program."""
    path = Path(f"/run/{label}.log")
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split())[-_SAID:] if path.exists() else ""


def driven_by(label: str, driver: str) -> None:
    """Give a vDPA device to a driver; until then whichever was there first has it."""
    at = _VDPA / "devices" / label
    bound = (at / "driver").resolve().name if (at / "driver").exists() else ""
    if bound == driver:
        return
    if bound:
        write(at / "driver" / "unbind", label)
    write(at / "driver_override", driver)
    write(_VDPA / "drivers" / driver / "bind", label)


def handed_over(label: str) -> str:
    """The path under which vhost-vdpa hands a device over."""
    driven_by(label, "vhost_vdpa")
    files = sorted((_VDPA / "devices" / label).glob("vhost-vdpa-*"))
    if not files:
        raise MachineError(f"vhost_vdpa has made no file of {label}")
    path = Path("/dev") / files[0].name
    until(path, label)
    return str(path)
