# SPDX-License-Identifier: Apache-2.0
"""The remote serial protocol of debuggers, as much as driving one processor takes. Bytes to values; no I/O.

A packet is ``$payload#checksum`` and is answered with ``+``. Source: GDB manual, appendix E (E.1 overview, E.2
packets, E.3 stop replies).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from virtiova.errors import ProtocolError

MAX_PAYLOAD: Final = 1 << 16
"""Longest payload that is accepted, run lengths expanded: far above a description of a processor."""
ACK: Final = b"+"
INTERRUPT: Final = b"\x03"
"""Stops a running machine; sent bare, not as a packet."""

_START: Final = ord("$")
_END: Final = ord("#")
_ESCAPE: Final = ord("}")
_REPEAT: Final = ord("*")
_NOTICE: Final = ord("%")
_HEX: Final = frozenset(b"0123456789abcdefABCDEF")


def packet(payload: bytes) -> bytes:
    """A packet with its checksum. The payload must need no escape: all that is sent here is plain text."""
    if set(payload) & {_START, _END, _ESCAPE, _REPEAT} or len(payload) > MAX_PAYLOAD:
        raise ProtocolError(f"gdb: no payload that can be sent as it is: {payload[:60]!r}")
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


def write_register(number: int, value: int) -> bytes:
    """Set a 64-bit big-endian register."""
    return packet(b"P%x=%016x" % (number, value & (1 << 64) - 1))


def read_register(number: int) -> bytes:
    """Ask for a register."""
    return packet(b"p%x" % number)


STEP: Final = packet(b"s")
CONTINUE: Final = packet(b"c")


class Packets:
    """Cuts a byte stream into payloads. Acknowledgements are dropped, as are asynchronous notices."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that ``data`` completes; `ProtocolError` for anything that is none."""
        self._tail += data
        found: list[bytes] = []
        while True:
            self._tail = self._tail.lstrip(ACK)
            if not self._tail:
                return found
            if self._tail[0] not in (_START, _NOTICE):
                what = "a packet was refused" if self._tail[:1] == b"-" else f"no packet: {self._tail[:40]!r}"
                raise ProtocolError(f"gdb: {what}")
            end = self._tail.find(b"#")
            if end < 0 or len(self._tail) < end + 3:
                if len(self._tail) > MAX_PAYLOAD + 4:
                    raise ProtocolError(f"gdb: a packet of more than {MAX_PAYLOAD} bytes")
                return found
            kind, body, digits = self._tail[0], self._tail[1:end], self._tail[end + 1 : end + 3]
            self._tail = self._tail[end + 3 :]
            if digits.lower() != b"%02x" % (sum(body) & 0xFF):
                raise ProtocolError(f"gdb: wrong checksum {digits!r} of {body[:40]!r}")
            if kind == _START:
                found.append(_expand(body))


def _expand(body: bytes) -> bytes:
    """A payload without its escapes (``}`` and the byte xor 0x20) and run lengths (``*`` and the count plus 29)."""
    if len(body) > MAX_PAYLOAD:
        raise ProtocolError(f"gdb: a packet of more than {MAX_PAYLOAD} bytes")
    if _ESCAPE not in body and _REPEAT not in body:
        return body
    out = bytearray()
    rest = iter(body)
    for byte in rest:
        if byte == _ESCAPE:
            out.append(_next(rest, body) ^ 0x20)
        elif byte == _REPEAT:
            count = _next(rest, body) - 29
            if count < 3 or not out:
                raise ProtocolError(f"gdb: a run length of {count} in {body[:40]!r}")
            out += out[-1:] * count
        else:
            out.append(byte)
        if len(out) > MAX_PAYLOAD:
            raise ProtocolError(f"gdb: a packet of more than {MAX_PAYLOAD} bytes")
    return bytes(out)


def _next(rest: Iterator[int], body: bytes) -> int:
    value = next(rest, -1)
    if value < 0:
        raise ProtocolError(f"gdb: {body[:40]!r} ends in the middle of an escape")
    return value


def expect_ok(payload: bytes) -> None:
    """`ProtocolError` unless the stub did as it was told."""
    if payload != b"OK":
        raise ProtocolError(f"gdb: expected OK, got {payload[:40]!r}")


def register_value(payload: bytes) -> int:
    """The value of a 64-bit big-endian register; an error reply, or an unavailable one, is a `ProtocolError`."""
    # Neither int() nor fromhex() alone would do: they take signs, underscores and blanks.
    if len(payload) != 16 or not set(payload) <= _HEX:
        raise ProtocolError(f"gdb: expected a register of 8 bytes, got {payload[:40]!r}")
    return int(payload, 16)


def stop_signal(payload: bytes) -> int:
    """Why the machine stopped: a signal number, 5 after a step, 2 after an interrupt."""
    if payload[:1] not in (b"S", b"T") or len(payload) < 3 or not set(payload[1:3]) <= _HEX:
        raise ProtocolError(f"gdb: expected a stop, got {payload[:40]!r}")
    return int(payload[1:3], 16)
