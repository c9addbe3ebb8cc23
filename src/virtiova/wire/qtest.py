# SPDX-License-Identifier: Apache-2.0
"""The qtest protocol: text lines, one answer a line. Commands to bytes, bytes to answers; no I/O.

Only ``read`` and ``write`` with a size of 1, 2, 4 or 8 are used for registers: each is one access of that
size with its bytes in bus order, while ``readl`` and its family swap to the target's byte order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from virtiova.errors import ProtocolError

MAX_LINE: Final = 1 << 20
"""Longest answer that is accepted: far above a 4 KiB read in hex."""
_HEX: Final = re.compile(r"0x([0-9a-fA-F]*)")


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of the machine: ``OK`` with a value, or a failure."""

    ok: bool
    text: str

    def data(self, length: int) -> bytes:
        """The bytes of a ``read``."""
        data = bytes.fromhex(self._hex("data"))
        if len(data) != length:
            raise ProtocolError(f"qtest: asked for {length} bytes, got {len(data)}")
        return data

    def number(self) -> int:
        """The value of a port read."""
        return int(self._hex("a number"), 16)

    def _hex(self, wanted: str) -> str:
        """The hex digits of the answer, without prefix."""
        match = _HEX.fullmatch(self.text) if self.ok else None
        odd = len(self.text) % 2 if wanted == "data" else len(self.text) < 3
        if match is None or odd:
            raise ProtocolError(f"qtest: expected {wanted}, got {self.text[:80]!r}")
        return match.group(1)


def read(address: int, length: int) -> bytes:
    """``length`` bytes at ``address``; 1, 2, 4 or 8 of them are one access."""
    return b"read 0x%x 0x%x\n" % (address, length)


def write(address: int, data: bytes) -> bytes:
    """Bytes to ``address``; 1, 2, 4 or 8 of them are one access."""
    return b"write 0x%x 0x%x 0x%s\n" % (address, len(data), data.hex().encode())


def fill(address: int, length: int, value: int) -> bytes:
    """``length`` bytes of ``value`` at ``address``."""
    return b"memset 0x%x 0x%x 0x%x\n" % (address, length, value)


def rtas(name: str, arguments: int, count: int, results: int, wanted: int) -> bytes:
    """A run-time abstraction call of a pseries machine (LoPAR, chapter 7): ``count`` big-endian words at address
    ``arguments``, ``wanted`` at ``results``. Answered with OK once the call was made, whatever came of it."""
    if not name.isascii() or not name.isprintable() or not name or " " in name:
        raise ProtocolError(f"no name of an RTAS call: {name[:60]!r}")
    return b"rtas %s %d 0x%x %d 0x%x\n" % (name.encode(), count, arguments, wanted, results)


def port_in(port: int, size: int) -> bytes:
    """Read an x86 I/O port of 1, 2 or 4 bytes."""
    return b"in%c 0x%x\n" % (b"bwl"[size >> 1], port)


def port_out(port: int, size: int, value: int) -> bytes:
    """Write an x86 I/O port of 1, 2 or 4 bytes."""
    return b"out%c 0x%x 0x%x\n" % (b"bwl"[size >> 1], port, value)


ENDIANNESS: Final = b"endianness\n"


class Answers:
    """Cuts a byte stream into answers. Interrupt notices are dropped, endless lines refused."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[Answer]:
        """The answers that ``data`` completes."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        if max(map(len, (*lines, self._tail))) > MAX_LINE:
            raise ProtocolError(f"qtest: a line of more than {MAX_LINE} bytes")
        return [answer for line in lines if (answer := _parse(line)) is not None]


def _parse(line: bytes) -> Answer | None:
    text = line.decode("ascii", "replace").strip()
    if not text or text.startswith("IRQ "):
        return None
    word, _, rest = text.partition(" ")
    if word == "OK":
        return Answer(True, rest)
    if word in ("FAIL", "ERR"):
        return Answer(False, text)
    raise ProtocolError(f"qtest: neither OK nor FAIL: {text[:80]!r}")
