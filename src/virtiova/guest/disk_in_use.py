# SPDX-License-Identifier: Apache-2.0
"""A disk of a system in real use: a file system on it, files, and whether what comes back is what was written.

For root of a guest, over `guest.inside`: the disk is overwritten. Nothing here knows what kind of disk it is; results
are plain values, for JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from virtiova.errors import MachineError, NotPossibleError

BLOCK: Final = 4096
"""Bytes of a request of `load`, and what they are a multiple of."""
_CHUNK: Final = 1 << 20
_MOUNT_SECONDS: Final = 60.0
_HEAD: Final = struct.Struct("<QQQ")
_DROP_CACHES: Final = "/proc/sys/vm/drop_caches"


def of_vdpa(name: str, seconds: float = 10.0) -> str:
    """The path of the disk that has become of the vDPA device ``name`` (driver: virtio_vdpa). `MachineError` if none
    has in time."""
    end = time.monotonic() + seconds
    pattern = f"/sys/bus/vdpa/devices/{glob.escape(name)}/virtio*/block/*"
    while not (found := glob.glob(pattern)) or not os.path.exists(f"/dev/{os.path.basename(found[0])}"):
        if time.monotonic() > end:
            raise MachineError(f"no disk has become of the vDPA device {name} in {seconds:.0f} s")
        time.sleep(0.02)
    return f"/dev/{os.path.basename(found[0])}"


def features(disk: str) -> dict[str, Any]:
    """What was negotiated for a disk: its virtio features as a word, bit 33, the driver below, queues."""
    at = os.path.realpath(f"/sys/block/{os.path.basename(disk)}/device")
    word = int(_word(f"{at}/features")[::-1], 2)
    below = os.path.realpath(f"{at}/../driver")
    return {
        "features": word,
        "bit-33": bool(word >> 33 & 1),
        "status": int(_word(f"{at}/status"), 16),
        "driver": os.path.basename(below),
        "queues": len(os.listdir(f"/sys/block/{os.path.basename(disk)}/mq")),
        "read-only": _word(f"/sys/block/{os.path.basename(disk)}/ro") == "1",
    }


def use(disk: str, files: int = 12, size: int = 1 << 18, seed: int = 1) -> dict[str, Any]:
    """Make ext4, mount, write ``files`` of up to ``size`` bytes, read them from the disk, unmount, mount, read again.

    Says how many files and bytes, which files were read ``wrong`` the first and ``changed`` the second time, and their
    checksums. `NotPossibleError` without mkfs.ext4, `MachineError` if a step fails.
    """
    maker = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if maker is None:
        raise NotPossibleError("mkfs.ext4 is not installed (Debian: apt-get install e2fsprogs)")
    _run(maker, "-q", "-F", disk)
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        with mounted(disk, folder):
            sums = _write(folder, files, size, seed)
            forget()
            first = _read(folder)
        with mounted(disk, folder, read_only=True):
            second = _read(folder)
    return {
        "files": len(sums),
        "bytes": sum(length for length, _ in sums.values()),
        "wrong": sorted(name for name in sums if first.get(name) != sums[name]),
        "changed": sorted(name for name in sums if second.get(name) != sums[name]),
        "sums": {name: digest for name, (_, digest) in sums.items()},
    }


def in_image(image: str, sums: dict[str, str]) -> dict[str, Any]:
    """The same files out of the image itself, by e2fsprogs' own reader: which are ``wrong``. The disk plays no part."""
    reader = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if reader is None:
        raise NotPossibleError("debugfs is not installed (Debian: apt-get install e2fsprogs)")
    wrong = []
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        script = f"{folder}/script"
        with open(script, "w", encoding="ascii") as file:
            file.writelines(f"dump /{name} {folder}/{name}\n" for name in sums)
        _run(reader, "-f", script, image)
        for name, digest in sums.items():
            with contextlib.suppress(FileNotFoundError):
                if _sum(f"{folder}/{name}")[1] == digest:
                    continue
            wrong.append(name)
    return {"files": len(sums), "wrong": wrong}


def whole(path: str) -> str:
    """SHA-256 of a whole disk, read past the page cache, or of an image."""
    digest = hashlib.sha256()
    direct = os.O_DIRECT if path.startswith("/dev/") else 0
    fd = os.open(path, os.O_RDONLY | direct | os.O_CLOEXEC)
    with contextlib.closing(mmap.mmap(-1, _CHUNK)) as buffer:
        try:
            while count := os.readv(fd, [buffer]):
                digest.update(memoryview(buffer)[:count])
        finally:
            os.close(fd)
    return digest.hexdigest()


def round_on(name: str, image: str, files: int = 12) -> dict[str, Any]:
    """All of it on the disk of the vDPA device ``name``, whose other side is the file ``image``: what was negotiated,
    `use`, and both sides compared, file by file and as a whole."""
    disk = of_vdpa(name)
    negotiated = features(disk)
    used = use(disk, files)
    forget()
    return {
        "disk": disk,
        "negotiated": negotiated,
        "use": used,
        "image": in_image(image, used["sums"]),
        "whole": {"disk": whole(disk), "image": whole(image)},
    }


def load(disk: str, seconds: float, workers: int = 4, blocks: int = 64, seed: int = 1) -> dict[str, Any]:
    """Random blocks written and read back past the page cache, by ``workers`` processes, each on ``blocks`` of its own.

    Every block that is read must hold what was written there last, and at the end all are read. Says how many requests
    there were, how many were ``wrong`` or ``failed``, and the longest one in ``slowest`` seconds.
    """
    pipes = []
    for worker in range(workers):
        reader, writer = os.pipe()
        if os.fork() == 0:
            code = 1
            try:
                os.close(reader)
                found = _worker(disk, seconds, worker, blocks, seed)
                os.write(writer, json.dumps(found).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        pipes.append(reader)
    results = [_all(reader) for reader in pipes]
    for _ in range(workers):
        os.wait()
    return {
        "requests": sum(each["requests"] for each in results),
        "wrong": sum(each["wrong"] for each in results),
        "failed": sum(each["failed"] for each in results),
        "slowest": round(max(each["slowest"] for each in results), 3),
    }


def _worker(disk: str, seconds: float, worker: int, blocks: int, seed: int) -> dict[str, Any]:
    """One process of `load`. A block says which it is and its turn, and is filled by both."""
    chance = random.Random(seed << 8 | worker)
    turns = [0] * blocks
    count = wrong = failed = 0
    slowest = 0.0
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    end = time.monotonic() + seconds
    with contextlib.closing(mmap.mmap(-1, BLOCK)) as buffer:
        for block in _picks(chance, blocks, end):
            place = (worker * blocks + abs(block)) * BLOCK
            began = time.monotonic()
            try:
                if block >= 0 and (not turns[block] or chance.random() < 0.5):
                    turns[block] += 1
                    buffer[:] = _content(worker, block, turns[block])
                    os.pwritev(fd, [buffer], place)
                elif turns[abs(block)]:
                    os.preadv(fd, [buffer], place)
                    wrong += buffer[:] != _content(worker, abs(block), turns[abs(block)])
            except OSError:
                failed += 1
            count += 1
            slowest = max(slowest, time.monotonic() - began)
    os.close(fd)
    return {"requests": count, "wrong": wrong, "failed": failed, "slowest": slowest}


def _picks(chance: random.Random, blocks: int, end: float) -> Iterator[int]:
    """Blocks at random until the time is over; then all once to be read, as negative numbers (none is block 0)."""
    while time.monotonic() < end:
        yield chance.randrange(1, blocks)
    yield from range(-1, -blocks, -1)


def _content(worker: int, block: int, turn: int) -> bytes:
    return (_HEAD.pack(worker, block, turn) * (BLOCK // _HEAD.size + 1))[:BLOCK]


def _all(fd: int) -> dict[str, Any]:
    with os.fdopen(fd, "rb") as file:
        said = file.read()
    if not said:
        raise MachineError("a process of the load ended without a result")
    found: dict[str, Any] = json.loads(said)
    return found


# -- files


def _write(folder: str, files: int, size: int, seed: int) -> dict[str, tuple[int, str]]:
    """Length and checksum of each file."""
    chance = random.Random(seed)
    sums = {}
    for index in range(files):
        data = chance.randbytes(chance.randrange(1, size))
        name = f"file{index}"
        with open(f"{folder}/{name}", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sums[name] = (len(data), hashlib.sha256(data).hexdigest())
    return sums


def _read(folder: str) -> dict[str, tuple[int, str]]:
    return {name: _sum(f"{folder}/{name}") for name in os.listdir(folder) if name != "lost+found"}


def _sum(path: str) -> tuple[int, str]:
    with open(path, "rb") as file:
        data = file.read()
    return len(data), hashlib.sha256(data).hexdigest()


def forget() -> None:
    """What is in the page cache is written, and forgotten: the next read is the disk's."""
    os.sync()
    with open(_DROP_CACHES, "w", encoding="ascii") as file:
        file.write("3")


@contextlib.contextmanager
def mounted(disk: str, folder: str, *, read_only: bool = False) -> Iterator[None]:
    """An ext4 file system at ``folder``, with C's ``mount()``: no program is needed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(disk.encode(), folder.encode(), b"ext4", int(read_only), None):
        raise MachineError(f"{disk} cannot be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        if libc.umount2(folder.encode(), 0):
            raise MachineError(f"{folder} cannot be unmounted: {os.strerror(ctypes.get_errno())}")


def _word(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def _run(*words: str) -> None:
    ended = subprocess.run(words, capture_output=True, text=True, timeout=_MOUNT_SECONDS, check=False)
    if ended.returncode:
        raise MachineError(f"{' '.join(words)} failed with {ended.returncode}: {ended.stderr.strip()[-300:]}")


def main(words: Sequence[str]) -> None:
    """``FUNCTION ARGUMENT...``, and its result as a line of JSON."""
    verbs: dict[str, Callable[..., Any]] = {
        each.__name__: each for each in (of_vdpa, features, use, round_on, whole, load, in_image)
    }
    arguments = [json.loads(word) if word.isdigit() or word.startswith("{") else word for word in words[1:]]
    print(json.dumps(verbs[words[0]](*arguments)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
