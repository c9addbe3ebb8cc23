# SPDX-License-Identifier: Apache-2.0
"""What was gathered, as files by name: out of an archive or an unpacked folder, which anybody may have made.

An archive is a tar, plain or packed with gzip, xz or zstd. It is never unpacked to disk. It holds regular files and
folders only, and names that stay inside; anything else is refused with its name. All sizes are bounded.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtiova.errors import NotPossibleError, ProtocolError

SCHEMA: Final = "virtiova/gather/1"
HEADER: Final = "virtiova-gather.json"
TOTAL: Final = 64 << 20
"""Bytes of a whole archive, unpacked."""
FILE: Final = 16 << 20
MEMBERS: Final = 1 << 16
_RATIO: Final = 300
_SMALL: Final = 8 << 20
"""Below this nobody asks how well it was packed."""
_NAME: Final = 1024
_DEPTH: Final = 64
_QUOTED: Final = 80
_BLOCK: Final = 512
_CHUNK: Final = 1 << 16
_END: Final = bytes(_BLOCK)
_KINDS: Final = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file",
}  # fmt: skip


@dataclass(slots=True)
class Box:
    """What was gathered of one machine. Names are relative, without ``.`` and ``..``; ``header`` is checked."""

    source: str
    header: dict[str, Any]
    files: dict[str, bytes]
    folders: set[str]


def read_box(path: str, name: str = "") -> Box:
    """The archive or folder at ``path``, which is called ``name`` if that is another name. Raises `ProtocolError` if it
    is none of ours, or hostile."""
    name = name or path
    try:
        members = _Members(name)
        if os.path.isdir(path):
            _walk(members, path)
        else:
            _untar(members, _plain(path, name))
    except OSError as error:
        raise ProtocolError(f"{name}: {error.strerror}") from error
    return Box(name, _header(name, members.files), members.files, members.folders)


def check_name(where: str, name: str) -> str:
    """``name`` without a leading ``./`` and a trailing ``/``; refused if it is not one that stays inside."""
    if not name.isprintable() or len(name) > _NAME or "\\" in name:
        raise ProtocolError(f"{where}: a member's name is too long, or holds odd characters: {name[:_QUOTED]!r}")
    if name.startswith("/"):
        raise ProtocolError(f"{where}: {name!r} is an absolute path")
    plain = name.removeprefix("./").removesuffix("/")
    parts = plain.split("/")
    if plain in ("", "."):
        return ""
    if len(parts) > _DEPTH or ".." in parts or "." in parts or "" in parts:
        raise ProtocolError(f"{where}: {name!r} is no path inside of an archive")
    return plain


class _Members:
    """Names and contents as they come, checked."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.files: dict[str, bytes] = {}
        self.folders: set[str] = set()
        self._total = 0

    def folder(self, name: str) -> None:
        plain = check_name(self.where, name)
        if plain in self.files:
            raise ProtocolError(f"{self.where}: {name!r} is there twice")
        self.folders.add(plain)
        self._count(name)

    def room(self, name: str, size: int) -> str:
        """May there be a file of that name and size? Its plain name."""
        plain = check_name(self.where, name)
        if plain in self.files or plain in self.folders or not plain:
            raise ProtocolError(f"{self.where}: {name!r} is there twice")
        self._total += size
        if size > FILE or self._total > TOTAL:
            raise ProtocolError(f"{self.where}: {name!r} is too large, 0x{size:x} bytes")
        self._count(name)
        return plain

    def _count(self, name: str) -> None:
        if len(self.files) + len(self.folders) > MEMBERS:
            raise ProtocolError(f"{self.where}: more than {MEMBERS} members; {name!r} is one too many")


# -- an archive ------------------------------------------------------------------------------------------------------


def _untar(members: _Members, data: bytes) -> None:
    """All members of a tar: POSIX's form, with the long names of GNU's and of pax."""
    where, at, last, longer = members.where, 0, "", None
    take, files = members.room, members.files
    while True:
        head = data[at : at + _BLOCK]
        if head == _END:
            return
        if len(head) < _BLOCK:
            raise ProtocolError(f"{where}: cut off" + (f" after {last!r}" if last else ", or no archive"))
        size = _size(where, head, last)
        name = _name(where, head, longer)
        start, at = at + _BLOCK, at + _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if at > len(data):
            raise ProtocolError(f"{where}: cut off in {name!r}")
        kind = head[156:157]
        if kind in b"0\0" and not name.endswith("/"):
            files[take(name, size)] = data[start : start + size]
        elif kind in (b"5", b"0", b"\0"):
            members.folder(name)
        elif kind in (b"L", b"x"):
            if size > 4 * _NAME or longer is not None:
                raise ProtocolError(f"{where}: {name!r} is followed by too long a name")
            longer = _longer(where, kind, data[start : start + size]) or None
            continue
        elif kind != b"g":
            raise ProtocolError(f"{where}: {name!r} is {_KINDS.get(kind, 'no regular file')}")
        last, longer = name, None


def _name(where: str, head: bytes, longer: bytes | None) -> str:
    raw = longer
    if raw is None:
        raw = head[:100].split(b"\0", 1)[0]
        if head[257:263] == b"ustar\0" and head[345]:
            raw = head[345:500].split(b"\0", 1)[0] + b"/" + raw
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{where}: a member's name is no text: {raw[:_QUOTED]!r}") from error


def _size(where: str, head: bytes, last: str) -> int:
    """The size of a member whose head's checksum is right."""
    try:
        told = int(head[148:156].strip(b" \0"), 8)
        size = int(head[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        told = size = -1
    if size < 0 or sum(head) - sum(head[148:156]) + 8 * 0x20 != told:
        raise ProtocolError(f"{where}: " + (f"damaged after {last!r}" if last else "no archive"))
    return size


def _longer(where: str, kind: bytes, data: bytes) -> bytes:
    """The name that the next member really has; empty if this says something else of it."""
    if kind == b"L":
        return data.rstrip(b"\0")
    at, name = 0, b""
    while at < len(data):
        count, _, _ = data[at : at + 8].partition(b" ")
        length = int(count) if count.isdigit() else 0
        record = data[at : at + length]
        key, equals, value = record[len(count) + 1 :].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise ProtocolError(f"{where}: damaged pax header {data[:_BLOCK]!r}")
        if key == b"path":
            name = value[:-1]
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            raise ProtocolError(f"{where}: a member's pax header says {record[:_BLOCK]!r}")
        at += length
    return name


class _Zlib:
    """zlib's object with the manners of the others: what it has no room for is kept."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._object.decompress(self._object.unconsumed_tail + data, max_length)


def _unpacker(where: str, magic: bytes) -> Any:
    """By the first bytes; None: it is not packed."""
    if magic.startswith(b"\x1f\x8b"):
        return _Zlib()
    if magic.startswith(b"\xfd7zXZ\0"):
        import lzma

        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=TOTAL)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            from compression.zstd import ZstdDecompressor  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise NotPossibleError(
                f"{where}: this Python has no Zstandard (from 3.14 on); unpack it: zstd -d"
            ) from error
        return ZstdDecompressor()
    return None


def _plain(path: str, name: str) -> bytes:
    """The archive's bytes, unpacked, as far as the bounds allow."""
    # What is no file (a pipe, a device) may block for ever, or never end.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb", buffering=0) as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ProtocolError(f"{name}: neither a file nor a folder")
        if found.st_size > TOTAL:
            raise ProtocolError(f"{name}: too large, 0x{found.st_size:x} bytes")
        packed = file.read(TOTAL + 1)
    unpacker = _unpacker(name, packed[:8])
    return packed if unpacker is None else _unpacked(name, unpacker, packed)


def _unpacked(path: str, unpacker: Any, packed: bytes) -> bytes:
    pieces, total, fed = [], 0, 0
    try:
        while True:
            chunk = packed[fed : fed + _CHUNK]
            fed += len(chunk)
            # 1 more than there is room for shows that there is more.
            piece = unpacker.decompress(chunk, TOTAL + 1 - total)
            if not chunk and not piece and not unpacker.eof:
                raise ProtocolError(f"{path}: cut off, or damaged")
            pieces.append(piece)
            total += len(piece)
            if total > TOTAL or (total > _SMALL and total > fed * _RATIO):
                raise ProtocolError(f"{path}: 0x{fed:x} bytes unpack to 0x{total:x} and more: a bomb")
            if unpacker.eof:
                fed -= len(unpacker.unused_data)
                again = _unpacker(path, packed[fed : fed + 8])
                if again is None:
                    return b"".join(pieces)
                unpacker = again
    except (zlib.error, ValueError, EOFError, MemoryError) as error:
        raise ProtocolError(f"{path}: damaged: {error}") from error
    except Exception as error:
        # LZMAError and ZstdError: their modules are imported only where they are needed.
        if isinstance(error, ProtocolError) or type(error).__name__ not in ("LZMAError", "ZstdError"):
            raise
        raise ProtocolError(f"{path}: damaged: {error}") from error


# -- a folder --------------------------------------------------------------------------------------------------------


def _walk(members: _Members, root: str) -> None:
    """The same of an unpacked archive. Links are not followed: there are none in what is ours."""
    pending = [""]
    while pending:
        inside = pending.pop()
        with os.scandir(Path(root, inside)) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir(follow_symlinks=False):
                    members.folder(name)
                    pending.append(name)
                elif entry.is_file(follow_symlinks=False):
                    members.files[members.room(name, entry.stat().st_size)] = _content(entry.path, members.where, name)
                else:
                    raise ProtocolError(f"{members.where}: {name!r} is no regular file")


def _content(path: str, where: str, name: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProtocolError(f"{where}: {name!r} is no regular file")
        return file.read(FILE)


# -- the header ------------------------------------------------------------------------------------------------------


def _header(where: str, files: dict[str, bytes]) -> dict[str, Any]:
    data = files.get(HEADER)
    if data is None:
        raise ProtocolError(f"{where}: no {HEADER} in it: not made by 'virtiova gather'")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{where}: {HEADER!r} is no JSON: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ProtocolError(f"{where}: {HEADER!r} has the schema {schema!r}; {SCHEMA!r} is known here")
    assert isinstance(found, dict)
    return found
