# SPDX-License-Identifier: Apache-2.0
"""An initramfs made by hand: a cpio archive in the form that kernels unpack (``newc``), the same bytes every time."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_FILE: Final = 0o100000
_FOLDER: Final = 0o040000
_DEVICE: Final = 0o020000
_CONSOLE: Final = (5, 1)
FOLDERS: Final = ("bin", "dev", "modules", "proc", "sys", "tmp")


def _entry(number: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One member: thirteen numbers of eight hex digits, the name, the data, each padded to four bytes."""
    encoded = name.encode() + b"\0"
    links = 2 if mode & _FOLDER else 1
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = _MAGIC + b"".join(b"%08x" % field for field in fields) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def cpio(files: Mapping[str, tuple[int, bytes]], folders: Iterable[str] = ()) -> bytes:
    """An archive of ``files`` (name: permissions, content) and empty ``folders``, with ``/dev/console``.

    The console is there because the kernel opens it before /init can mount anything.
    """
    parts = [_entry(1 + i, name, _FOLDER | 0o755) for i, name in enumerate(sorted(folders))]
    if "dev" in folders:
        parts.append(_entry(len(parts) + 1, "dev/console", _DEVICE | 0o600, device=_CONSOLE))
    for name in sorted(files):
        permissions, data = files[name]
        parts.append(_entry(len(parts) + 1, name, _FILE | permissions, data))
    archive = b"".join([*parts, _entry(0, _TRAILER, 0)])
    return archive + bytes(-len(archive) % 512)


def init_script() -> bytes:
    """/init, which prints what the guest knows."""
    return resources.files("virtiova.guest").joinpath("init.sh").read_bytes()


def build(busybox: bytes, modules: Mapping[str, bytes], order: Iterable[str], gather: bytes = b"") -> bytes:
    """The compressed initramfs: /init, busybox, and ``modules`` (by name), to be loaded in ``order``.

    ``gather`` is a script that /init runs, and whose archive it prints.
    """
    files = {
        "init": (0o755, init_script()),
        "bin/busybox": (0o755, busybox),
        "modules/order": (0o644, "".join(f"{name}\n" for name in order).encode()),
        **{f"modules/{name}.ko": (0o644, data) for name, data in modules.items()},
    }
    if gather:
        files["gather.sh"] = (0o755, gather)
    # A fixed time stamp and the fastest level: the same input gives the same bytes, and TCG has less to unpack.
    return gzip.compress(cpio(files, FOLDERS), compresslevel=1, mtime=0)
