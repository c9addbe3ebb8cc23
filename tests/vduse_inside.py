# SPDX-License-Identifier: Apache-2.0
"""What is done in a guest with its VDUSE devices besides commands: run there by `inside_kit`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from virtiova.cli.main import main
from virtiova.features import DeviceId, Feature
from virtiova.guest import disk_in_use
from virtiova.serve.neighbour import checksum
from virtiova.wire import vduse as wire

PIECE = 65536
PIECES = 120
FILES = 40
MOUNT = "/run/mount"
_DELETE_MODULE = 176
"""The number of that system call on x86-64, which is what these guests are."""


def without_bit_33() -> dict[str, str]:
    """What the kernel says to a device that does not offer it, and to the same one that does."""
    found = {}
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


def appears(path: str) -> str:
    """Whether there is such a file within some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if os.path.exists(path):
            return "yes"
        time.sleep(0.05)
    return "no"


def left() -> list[str]:
    """What there is of VDUSE devices: files, devices on the bus, notes, processes of ours."""
    found = [*Path("/dev/vduse").iterdir(), *Path("/sys/bus/vdpa/devices").iterdir()]
    with contextlib.suppress(FileNotFoundError):
        found += Path("/run/virtiova").iterdir()
    return sorted(str(each) for each in found if each.name != "control")


def accepted() -> list[str]:
    """The features that drivers of vDPA devices took, as the kernel shows them: a character a bit."""
    return [each.read_text().strip() for each in Path("/sys/bus/vdpa/devices").glob("*/virtio*/features")]


def ping(address: str) -> str:
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
                    return "answered"
    return "silent"


# -- how it ends


def mount_and_write(name: str) -> dict[str, str]:
    """Make a file system on the disk of a vDPA device, mount it at `MOUNT`, write files and leave them to the page
    cache; their checksums."""
    disk = disk_in_use.of_vdpa(name)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    os.makedirs(MOUNT, exist_ok=True)
    subprocess.run(["mount", disk, MOUNT], check=True)
    sums = {}
    for number in range(FILES):
        data = _piece(number)
        Path(f"{MOUNT}/file{number}").write_bytes(data)
        sums[f"file{number}"] = hashlib.sha256(data).hexdigest()
    return sums


def after_the_end() -> dict[str, object]:
    """What is left of the file system at `MOUNT` whose disk has gone: whether it can be read past the cache, or written
    to, and what its image holds."""
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    found: dict[str, object] = {}
    try:
        found["read"] = len(Path(f"{MOUNT}/file1").read_bytes())
    except OSError as error:
        found["read"] = errno.errorcode[error.errno or 0]
    try:
        fd = os.open(f"{MOUNT}/new", os.O_CREAT | os.O_WRONLY)
        os.fsync(fd)
        found["written"] = "yes"
    except OSError as error:
        found["written"] = errno.errorcode[error.errno or 0]
    subprocess.run(["umount", MOUNT], check=True)
    checked = subprocess.run(["e2fsck", "-fn", "/run/fs.img"], capture_output=True, text=True, check=False)
    found["e2fsck"] = checked.returncode, checked.stdout[-300:]
    return found


def read_again(name: str) -> dict[str, str]:
    """The files of `mount_and_write`, by another mount."""
    with disk_in_use.mounted(disk_in_use.of_vdpa(name), MOUNT):
        files = Path(MOUNT).glob("file*")
        return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def signal_server(name: str, number: int) -> int:
    """Send a signal to the process that has the device's file open; how many those are."""
    count = 0
    for each in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(each) == f"/dev/vduse/{name}":
                os.kill(int(each.parts[2]), number)
                count += 1
    return count


def load_a_file(seconds: int) -> dict[str, object]:
    """`disk_in_use.load` on a file of the file system at `MOUNT`."""
    path = f"{MOUNT}/load"
    Path(path).write_bytes(bytes(4 * 64 * disk_in_use.BLOCK))
    return disk_in_use.load(path, float(seconds))


def read_and_unmount() -> dict[str, str]:
    """The files of `mount_and_write`, past the page cache."""
    disk_in_use.forget()
    files = sorted(Path(MOUNT).glob("file*"))
    sums = {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
    subprocess.run(["umount", MOUNT], check=True)
    return sums


def checked_image() -> int:
    """What e2fsck says of the image."""
    return subprocess.run(["e2fsck", "-fn", "/run/fs.img"], capture_output=True, check=False).returncode


def hold(name: str) -> None:
    """Use a vDPA device by its file until somebody ends this."""
    path = _file_of(name)
    fd = os.open(path, os.O_RDWR)
    print(f"holding {path}", flush=True)
    time.sleep(60)
    os.close(fd)


def _file_of(name: str) -> str:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for each in Path(f"/sys/bus/vdpa/devices/{name}").glob("vhost-vdpa-*"):
            if os.path.exists(f"/dev/{each.name}"):
                return f"/dev/{each.name}"
        time.sleep(0.05)
    raise TimeoutError(f"{name} has no file")


def as_nobody(*words: str) -> list[object]:
    """A command line of ours, by somebody who is not root: its exit status, and what it says."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        code = 70
        try:
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            code = main(words)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text]


def without_module() -> str:
    """Take the module away, as ``rmmod vduse`` does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(_DELETE_MODULE), b"vduse", ctypes.c_uint(os.O_NONBLOCK)):
        return os.strerror(ctypes.get_errno())
    return "gone"


def do_as_told(name: str) -> str:
    """Run the command that whoever serves a device has printed for a device of vhost_vdpa's; whose it is then."""
    printed = Path(f"/run/{name}.log").read_text().partition("the kernel is to drive it: ")[2].partition("\n")[0]
    subprocess.run(["sh", "-ec", printed], check=True)
    return who(name)


def who(name: str) -> str:
    """The driver that has a vDPA device."""
    return os.path.basename(os.path.realpath(f"/sys/bus/vdpa/devices/{name}/driver"))


if __name__ == "__main__":
    write_all("/dev/vda")
