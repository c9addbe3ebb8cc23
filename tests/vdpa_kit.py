# SPDX-License-Identifier: Apache-2.0
"""What tests of vDPA do in a guest: hold a device, resize its disk, serve a disk that is deaf, send frames back."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence

from virtiova.cli.main import main
from virtiova.driver.blk import BlkDriver
from virtiova.driver.open import open_device
from virtiova.machine.vdpa.machine import VdpaDevice
from virtiova.serve.events import Event
from virtiova.serve.vduse import server
from virtiova.serve.vduse.session import VduseSession
from virtiova.wire.vduse import Request, RequestKind

MEMORY = "virtiova-ram"
"""How the probe's memory is called in ``/proc/PID/maps``."""


def hold(path: str) -> None:
    """Have a device, use it once, and keep it."""
    machine = VdpaDevice(path).open()
    driver = open_device(machine)
    assert isinstance(driver, BlkDriver)
    driver.read(1)
    print("held", flush=True)
    time.sleep(600)


def resize(path: str, monitor: str, node: str) -> dict[str, int]:
    """Capacity in sectors before and after the disk is made larger behind its driver's back; was the driver told?"""
    with VdpaDevice(path).open() as machine:
        driver = open_device(machine)
        assert isinstance(driver, BlkDriver)
        before = driver.capacity()
        said = machine.registers.changes
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(monitor)
            lines = sock.makefile("rw")
            lines.readline()
            for command, arguments in (
                ("qmp_capabilities", {}),
                ("block_resize", {"node-name": node, "size": 2 * before * 512}),
            ):
                lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                lines.flush()
                assert "return" in lines.readline()
        came = machine.wait(lambda: machine.registers.changes > said, 5.0)
        return {"before": before, "after": driver.capacity(), "told": came}


def nobody(path: str) -> int:
    """A probe by a user who may not."""
    os.seteuid(65534)
    try:
        return main(["probe", "vdpa", path])
    finally:
        os.seteuid(0)


def deaf(image: str, name: str) -> int:
    """A disk that says yes when it is told that addresses changed, and goes on with the old ones: wrong on purpose."""

    class Deaf(VduseSession):
        def _take(self, request: Request) -> Sequence[Event]:
            return [] if request.kind is RequestKind.UPDATE_IOTLB else super()._take(request)

    server.VduseSession = Deaf  # type: ignore[attr-defined]
    return main(["serve", "blk", image, "--vduse", name])


def echo(ours: str, theirs: str) -> None:
    """A wire that sends every frame back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(theirs)
        print("echoing", flush=True)
        while True:
            frame = sock.recv(65536)
            if os.path.exists(ours):
                sock.sendto(frame, ours)
