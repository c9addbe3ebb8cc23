# SPDX-License-Identifier: Apache-2.0
"""A host of one address at the other end of the wire, inside of this process: it answers ARP and ping, no more.

For trying a network device out where there is no network, and for tests. Frames are the driver's: whatever is in them
is looked at within their own length, and what is not understood is not answered.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

from virtiova.device.net import Net
from virtiova.errors import UsageError

MAC: Final = bytes.fromhex("020000766971")
"""A locally administered address."""
_ETHERNET: Final = 14
_ARP: Final = 0x0806
_IPV4: Final = 0x0800
_ARP_ETHERNET_IPV4: Final = bytes.fromhex("0001080006040001")
"""Hardware and protocol types, lengths, and the operation: who has (RFC 826)."""
_ICMP: Final = 1
_ECHO: Final = 8
_MOST: Final = 1500


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Neighbour:
    """Answers for the IPv4 address ``address``. Raises `UsageError` if that is none."""

    def __init__(self, address: str = "10.0.2.2") -> None:
        try:
            self._address = ipaddress.IPv4Address(address).packed
        except ValueError as error:
            raise UsageError(f"{address!r} is no IPv4 address") from error
        self._net: Net | None = None
        self.pings = 0
        """Echo requests that were answered."""

    def connect(self, net: Net) -> Net:
        """Let ``net`` hear the answers; returns it."""
        self._net = net
        return net

    def send(self, frame: bytes, /) -> None:
        """The driver sent a frame: answer it if it asks for this host."""
        answer = self.answer(frame)
        if answer and self._net is not None:
            self._net.deliver(answer)

    def answer(self, frame: bytes) -> bytes:
        """The frame that answers ``frame``; empty for none."""
        if len(frame) < _ETHERNET:
            return b""
        sender, kind, payload = frame[6:12], int.from_bytes(frame[12:14]), frame[_ETHERNET:]
        body = b""
        if kind == _ARP:
            body = self._who_has(payload)
        elif kind == _IPV4 and frame[:6] == MAC:
            body = self._ping(payload)
        return sender + MAC + frame[12:14] + body if body else b""

    def _who_has(self, arp: bytes) -> bytes:
        if arp[:8] != _ARP_ETHERNET_IPV4 or arp[24:28] != self._address:
            return b""
        return arp[:7] + b"\x02" + MAC + self._address + arp[8:18]

    def _ping(self, packet: bytes) -> bytes:
        """Whole packets only: no options, no fragments."""
        if len(packet) < 28 or packet[0] != 0x45 or packet[9] != _ICMP or packet[16:20] != self._address:
            return b""
        length = int.from_bytes(packet[2:4])
        fragment = int.from_bytes(packet[6:8]) & 0x3FFF
        icmp = packet[20:length]
        if not 28 <= length <= min(len(packet), _MOST) or fragment or icmp[0] != _ECHO or checksum(icmp):
            return b""
        self.pings += 1
        answer = b"\0\0\0\0" + icmp[4:]
        answer = answer[:2] + checksum(answer).to_bytes(2) + answer[4:]
        header = packet[:8] + b"\x40\x01\0\0" + packet[16:20] + packet[12:16]
        return header[:10] + checksum(header).to_bytes(2) + header[12:] + answer
