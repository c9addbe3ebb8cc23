# SPDX-License-Identifier: Apache-2.0
"""What is done in a guest with its VDUSE devices besides commands: run there by `inside_kit`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

from virtiova.features import DeviceId, Feature
from virtiova.serve.neighbour import checksum
from virtiova.wire import vduse as wire

PIECE = 65536
PIECES = 120


def without_bit_33() -> dict[str, str]:
    """What the kernel says to a device that does not offer it, and to the same one that does."""
    found: dict[str, str] = {}
    with open("/dev/vduse/control", "r+b", buffering=0) as control:
        fcntl.ioctl(control, wire.SET_API_VERSION, struct.pack("=Q", wire.API_VERSION))
        for word, features in (("off", 1 << Feature.VERSION_1), ("on", 1 << Feature.VERSION_1 | 1 << 33)):
            config = wire.DeviceConfig("bit33", DeviceId.BLOCK, features, 1, bytes(60))
            try:
                fcntl.ioctl(control, wire.CREATE_DEV, config.encode())
                found[word] = "made"
                fcntl.ioctl(control, wire.DESTROY_DEV, wire.name_bytes("bit33"))
            except OSError as error:
                found[word] = errno.errorcode[error.errno or 0]
    return found


def _piece(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (PIECE // 32)


def write_all(disk: str) -> None:
    """Write all pieces, one after the other, past all caches, and say how far it is."""
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, PIECE)
    for number in range(PIECES):
        buffer[:] = _piece(number)
        assert os.pwrite(fd, buffer, number * PIECE) == PIECE
        print(f"piece {number}", flush=True)
    os.fsync(fd)
    print("all written", flush=True)


def wrong(path: str) -> list[int]:
    """The pieces that are not as they were written."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if path.startswith("/dev") else 0))
    buffer = mmap.mmap(-1, PIECE)
    bad = []
    for number in range(PIECES):
        assert os.preadv(fd, [buffer], number * PIECE) == PIECE
        if buffer[:] != _piece(number):
            bad.append(number)
    os.close(fd)
    return bad


def appears(path: str) -> bool:
    """Whether there is such a file within some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if os.path.exists(path):
            return True
        time.sleep(0.05)
    return False


def left() -> list[str]:
    """What there is of VDUSE devices: files, devices on the bus, notes."""
    found = [*Path("/dev/vduse").iterdir(), *Path("/sys/bus/vdpa/devices").iterdir()]
    with contextlib.suppress(FileNotFoundError):
        found += Path("/run/virtiova").iterdir()
    return sorted(str(each) for each in found if each.name != "control")


def accepted() -> list[str]:
    """The features that drivers of vDPA devices took, as the kernel shows them: a character a bit."""
    return [each.read_text().strip() for each in Path("/sys/bus/vdpa/devices").glob("*/virtio*/features")]


def ping(address: str) -> bool:
    """Bring the vDPA network card up, and ask who is at ``address`` for an echo."""
    (interface,) = [each.name for each in Path("/sys/bus/vdpa/devices").glob("*/virtio*/net/*")]
    ours = address.rpartition(".")[0] + ".77/24"
    for words in (("addr", "add", ours, "dev", interface), ("link", "set", interface, "up")):
        subprocess.run(["ip", *words], check=True)
    echo = struct.pack(">BBHHH", 8, 0, 0, 7, 1) + b"virtiova"
    echo = echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(1.0)
        for _ in range(20):
            sock.sendto(echo, (address, 0))
            with contextlib.suppress(TimeoutError):
                if sock.recv(2048)[20:].endswith(b"virtiova"):
                    return True
    return False
