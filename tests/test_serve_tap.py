# SPDX-License-Identifier: Apache-2.0
"""``serve net --tap``: the kernel is the neighbour. In a network namespace that is made for it, so that nothing of this
machine's own network is touched."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hostile_kit import LiveFrontEnd, Served
from serve_kit import PLAIN, WITH_BIT
from served_guest import CLOUD, Guest, assets, values
from served_guest import served as device
from virtiova.serve.neighbour import checksum

NAME = "vio0"
THEIRS, OURS = bytes([10, 0, 2, 2]), bytes([10, 0, 2, 15])
OUR_MAC, THEIR_MAC = bytes.fromhex("525400123456"), bytes.fromhex("020000000077")
NAMESPACE = ("unshare", "-rn")
ROOM = 2048
RX, TX = 0, 1
HEADER = 12


@cache
def why_not() -> str:
    """Why there can be no tap interface here; empty if there can."""
    for tool, package in (("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2")):
        if shutil.which(tool) is None:
            return f"n/a: {tool} is not installed (to have it: apt-get install {package})"
    tried = subprocess.run(
        [*NAMESPACE, "ip", "tuntap", "add", NAME, "mode", "tap"], capture_output=True, text=True, check=False
    )
    return f"n/a: no tap interface in a network namespace here: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Served]:
    """A server in a namespace of its own, and the kernel's side of its wire, with an address."""
    if why_not():
        pytest.skip(why_not())
    server = Served(tmp_path, "net", "--tap", NAME, prefix=NAMESPACE)
    try:
        inside(server, "ip", "link", "set", NAME, "address", THEIR_MAC.hex(":"), "up")
        inside(server, "ip", "address", "add", "10.0.2.2/24", "dev", NAME)
        yield server
        server.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait()


def inside(server: Served, *words: str) -> str:
    """What a command says in the server's namespace."""
    enter = ["nsenter", "-t", str(server.process.pid), "-U", "-n", "--preserve-credentials"]
    return subprocess.run([*enter, *words], capture_output=True, text=True, check=True, timeout=20).stdout


def arp() -> bytes:
    """Who has their address? (RFC 826)"""
    asked = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + OUR_MAC + OURS + bytes(6) + THEIRS
    return b"\xff" * 6 + OUR_MAC + b"\x08\x06" + asked


def echo(to: bytes, number: int, payload: bytes) -> bytes:
    """An echo request in its packet and frame (RFC 791, 792)."""
    message = struct.pack(">BBHHH", 8, 0, 0, 77, number) + payload
    message = message[:2] + struct.pack(">H", checksum(message)) + message[4:]
    packet = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(message), number, 0, 64, 1, 0, OURS, THEIRS)
    packet = packet[:10] + struct.pack(">H", checksum(packet)) + packet[12:]
    return to + OUR_MAC + b"\x08\x00" + packet + message


def exchange(end: LiveFrontEnd, frame: bytes, wanted: bytes) -> bytes:
    """Send a frame; the first that comes back with ``wanted`` after its addresses. The kernel has more to say."""
    end.put(0x20000, bytes(HEADER) + frame)
    end.offer((end.dma(0x20000), HEADER + len(frame), False), index=TX)
    for _ in range(20):
        used = end.used(RX)
        end.offer((end.dma(0x28000), ROOM, True), index=RX)
        end.wait_used((used + 1) & 0xFFFF, RX)
        came = end.get(0x28000 + HEADER, ROOM - HEADER)
        if came[12:].startswith(wanted):
            return came
    raise AssertionError("nothing but other frames")


@pytest.mark.parametrize("features", [PLAIN, WITH_BIT], ids=["without the bit", "with it"])
def test_the_kernel_answers_our_own_driver(tap: Served, features: int) -> None:
    with tap.front_end() as end:
        end.ready(features, rings=2)
        answer = exchange(end, arp(), b"\x08\x06")
        assert answer[:12] == OUR_MAC + THEIR_MAC
        assert answer[20:42] == b"\x00\x02" + THEIR_MAC + THEIRS + OUR_MAC + OURS
        for number in range(3):
            payload = f"ping {number} ".encode() * 100
            answer = exchange(end, echo(THEIR_MAC, number, payload), b"\x08\x00")
            assert (answer[:12], answer[26:34], answer[34]) == (OUR_MAC + THEIR_MAC, THEIRS + OURS, 0)
            assert answer[42 : 42 + len(payload)] == payload
        assert f"10.0.2.15 lladdr {OUR_MAC.hex(':')}" in inside(tap, "ip", "neighbour", "show", "dev", NAME)


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(300)
@pytest.mark.parametrize("bit", [True, False])
def test_the_kernel_answers_a_guest(tap: Served, bit: bool) -> None:
    with Guest(assets(CLOUD), device("net", str(tap.path), 0, bit=bit)) as guest:
        guest.booted()
        guest.do("net")
        assert guest.do("echoes 5 56") == ["echoes 5"]
        assert guest.do("echoes 3 1400") == ["echoes 3"]
        assert values(guest.do("devices"), "device")[0].split()[1] == str(int(bit))
