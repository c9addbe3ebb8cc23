# SPDX-License-Identifier: Apache-2.0
"""What is behind network and console devices: sockets, tap interfaces, pseudo-terminals; and the host that answers."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leaks import descriptors
from virtiova.device.base import Device
from virtiova.device.console import MAX_WAITING, Console
from virtiova.device.net import MAX_FRAME, Net
from virtiova.errors import NotPossibleError, UsageError
from virtiova.serve.neighbour import MAC, Neighbour, checksum
from virtiova.serve.terminals import MAX_OUTPUT, Pty, SocketTerminal, Stream
from virtiova.serve.wires import TURN, DatagramWire, Tap, between

SECONDS = 5.0


def pump(device: Device, done: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Do for the device what a host does: wait for its sources, and say when they are ready."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        with selectors.DefaultSelector() as selector:
            for source in device.sources:
                if source.events():
                    selector.register(source.fileno(), source.events(), source)
            if not selector.get_map():
                return done()
            for key, events in selector.select(0.05):
                key.data.ready(events)
    return True


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


# -- datagrams


@pytest.fixture
def pair() -> Iterator[tuple[Net, DatagramWire, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    wire = DatagramWire(ours)
    net = wire.connect(Net(wire, backlog=4))
    yield net, wire, theirs
    wire.close()
    theirs.close()


def test_frames_both_ways(pair: tuple[Net, DatagramWire, socket.socket]) -> None:
    net, wire, other = pair
    wire.send(b"out" * 20)
    assert other.recv(2000) == b"out" * 20
    other.send(b"in")
    assert pump(net, lambda: net.pending(0))
    assert net.room == 3


def test_a_flood_waits_in_the_kernel_and_not_in_memory(pair: tuple[Net, DatagramWire, socket.socket]) -> None:
    net, wire, other = pair
    other.setblocking(False)
    sent = 0
    try:
        while sent < 10_000:
            other.send(b"x" * 60)
            sent += 1
    except BlockingIOError:
        pass
    assert pump(net, lambda: net.room == 0)
    assert (wire.events(), net.dropped) == (0, 0)
    wire.ready(selectors.EVENT_READ)
    assert net.dropped == 0


def test_one_turn_is_bounded() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    wire = DatagramWire(ours)
    net = wire.connect(Net(wire, backlog=10 * TURN))
    theirs.setblocking(False)
    for _ in range(5):
        theirs.send(b"frame")
    wire.ready(selectors.EVENT_READ)
    assert net.room == 10 * TURN - 5
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    wire.close()
    theirs.close()


def test_a_frame_that_nobody_takes_is_lost_and_counted(pair: tuple[Net, DatagramWire, socket.socket]) -> None:
    _, wire, other = pair
    for _ in range(10_000):
        wire.send(b"x" * 60)
        if wire.lost:
            break
    assert wire.lost == 1
    other.close()
    wire.send(b"gone")
    assert wire.lost == 2


def test_a_neighbour_that_goes_is_no_busy_loop(pair: tuple[Net, DatagramWire, socket.socket]) -> None:
    net, wire, other = pair
    other.send(b"last words")
    other.close()
    assert pump(net, lambda: net.pending(0))
    with selectors.DefaultSelector() as selector:
        selector.register(wire.fileno(), wire.events())
        assert selector.select(0.05) == []
    wire.ready(selectors.EVENT_READ)
    wire.send(b"gone")
    assert wire.lost == 1


def test_frames_that_are_too_long_or_empty(pair: tuple[Net, DatagramWire, socket.socket]) -> None:
    net, _, other = pair
    other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    other.send(b"")
    other.send(b"x" * (MAX_FRAME + 1))
    other.send(b"x" * (MAX_FRAME + 1000))
    other.send(b"good")
    assert pump(net, lambda: net.pending(0))
    assert net.dropped == 2


def test_named_ends_come_and_go(tmp_path: Path) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    wire = between(here, there)
    net = wire.connect(Net(wire))
    wire.send(b"too early")
    assert wire.lost == 1
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(there)
            other.settimeout(SECONDS)
            wire.send(b"out")
            assert other.recv(100) == b"out"
            other.sendto(b"in", here)
            assert pump(net, lambda: net.pending(0))
            net.reset()
        os.unlink(there)
        wire.send(b"between")
    assert wire.lost == 3
    with pytest.raises(UsageError, match="here"):
        between(here, there)
    wire.close()
    wire.close()
    assert not os.path.exists(here)
    with pytest.raises(UsageError):
        between(str(tmp_path / ("x" * 200)), there)


def test_a_stream_is_no_wire() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(UsageError, match="datagram"):
        DatagramWire(ours)


# -- tap

IN_A_NAMESPACE = """
import selectors, socket, subprocess, sys
from virtiova.device.net import Net
from virtiova.serve.wires import Tap

run = lambda *words: subprocess.run(words, check=True, timeout=20)
wire = Tap("vio0")
net = wire.connect(Net(wire))
run("ip", "link", "set", "vio0", "address", "02:00:00:00:00:77", "up")
run("ip", "address", "add", "192.0.2.1/24", "dev", "vio0")
run("ip", "neighbour", "add", "192.0.2.2", "lladdr", "02:00:00:00:00:02", "dev", "vio0")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
    here.bind(("192.0.2.1", 7))
    here.settimeout(5)
    here.sendto(b"out of the kernel", ("192.0.2.2", 9))
    frame = b""
    while b"out of the kernel" not in frame:
        with selectors.DefaultSelector() as selector:
            selector.register(wire.fileno(), wire.events())
            assert selector.select(5)
        wire.ready(selectors.EVENT_READ)
        while net._waiting:
            frame = net._waiting.popleft()
            if b"out of the kernel" in frame:
                break
    assert frame[:12] == bytes.fromhex("020000000002020000000077"), frame.hex()
    ip, udp = bytearray(frame[14:34]), frame[34:]
    ip[12:16], ip[16:20] = ip[16:20], ip[12:16]
    udp = udp[2:4] + udp[0:2] + udp[4:6] + bytes(2) + b"back to the kernel"[:len(udp) - 8]
    wire.send(frame[6:12] + frame[:6] + frame[12:14] + bytes(ip) + udp)
    print(here.recv(100).decode(), wire.lost)
wire.close()
"""


@pytest.mark.skipif(shutil.which("unshare") is None or shutil.which("ip") is None, reason="needs unshare and ip")
def test_a_tap_interface_of_the_kernel() -> None:
    """A network namespace of its own: a packet that the kernel sends arrives, and one that is made up comes back."""
    command = ["unshare", "-rn", sys.executable, "-c", IN_A_NAMESPACE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert (done.stdout, done.stderr) == ("back to the kerne 0\n", "")


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", "tap%d", "a\nb"])
def test_no_interface_has_such_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="no name of an interface"):
        Tap(name)


def test_a_tap_that_cannot_be_had() -> None:
    """The loopback interface is there, and is no tap interface."""
    with pytest.raises(NotPossibleError, match=r"tap interface lo|/dev/net/tun"):
        Tap("lo")


# -- the host that answers

US = bytes.fromhex("525400123456")
OUR_IP, ITS_IP = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])


def arp(target: bytes = ITS_IP, operation: int = 1) -> bytes:
    fields = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, US, OUR_IP, bytes(6), target)
    return b"\xff" * 6 + US + b"\x08\x06" + fields


def ping(payload: bytes = b"abcdefgh", target: bytes = ITS_IP, kind: int = 8, total: int | None = None) -> bytes:
    icmp = struct.pack(">BBHHH", kind, 0, 0, 0x77, 1) + payload
    icmp = icmp[:2] + checksum(icmp).to_bytes(2) + icmp[4:]
    length = 20 + len(icmp) if total is None else total
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, 1, 0, 64, 1, 0, OUR_IP, target)
    header = header[:10] + checksum(header).to_bytes(2) + header[12:]
    return MAC + US + b"\x08\x00" + header + icmp


def test_who_has_is_answered() -> None:
    answer = Neighbour().answer(arp())
    assert answer[:14] == US + MAC + b"\x08\x06"
    assert struct.unpack(">HHBBH6s4s6s4s", answer[14:]) == (1, 0x0800, 6, 4, 2, MAC, ITS_IP, US, OUR_IP)


@pytest.mark.parametrize("payload", [b"", b"odd", b"x" * 1400])
def test_ping_is_answered(payload: bytes) -> None:
    neighbour = Neighbour()
    answer = neighbour.answer(ping(payload) + b"trailing bytes")
    assert answer[:14] == US + MAC + b"\x08\x00"
    header, icmp = answer[14:34], answer[34:]
    assert (checksum(header), checksum(icmp)) == (0, 0)
    assert (header[12:16], header[16:20]) == (ITS_IP, OUR_IP)
    assert int.from_bytes(header[2:4]) == len(answer) - 14
    assert (icmp[0], icmp[4:]) == (0, b"\x00\x77\x00\x01" + payload)
    assert neighbour.pings == 1


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        arp()[:41],
        arp(target=OUR_IP),
        arp(operation=2),
        ping(target=OUR_IP),
        ping(kind=0),
        ping(total=2000),
        ping(total=27),
        ping()[:-1],
        ping()[:-1] + b"X",
        b"\xff" * 6 + ping()[6:],
        ping()[:12] + b"\x86\xdd" + ping()[14:],
        ping()[:14] + b"\x46" + ping()[15:],
        ping()[:20] + b"\x20\x01" + ping()[22:],
    ],
)
def test_nothing_else_is(frame: bytes) -> None:
    neighbour = Neighbour()
    for cut in range(len(frame), max(-1, len(frame) - 30), -1):
        assert neighbour.answer(frame[:cut]) == b""
    assert neighbour.pings == 0


def test_answers_go_to_the_device() -> None:
    neighbour = Neighbour()
    neighbour.send(arp())
    net = neighbour.connect(Net(neighbour))
    assert not net.pending(0)
    neighbour.send(arp())
    assert net.pending(0)
    with pytest.raises(UsageError, match="IPv4"):
        Neighbour("10.0.2")


# -- terminals


def test_pty() -> None:
    terminal = Pty()
    console = terminal.connect(Console(terminal))
    user = os.open(terminal.path, os.O_RDWR | os.O_NOCTTY)
    terminal.send(b"login: ")
    assert os.read(user, 100) == b"login: "
    os.write(user, b"root\n")
    assert pump(console, lambda: console.pending(0))
    assert console.room == MAX_WAITING - 5
    os.close(user)
    assert not pump(console, lambda: False, 0.1)
    user = os.open(terminal.path, os.O_RDWR | os.O_NOCTTY)
    terminal.send(b"again")
    assert os.read(user, 100) == b"again"
    os.close(user)
    terminal.close()
    terminal.close()


def test_output_that_nobody_reads_stops_the_device_and_goes_on() -> None:
    ours, theirs = socket.socketpair()
    fd = ours.detach()
    terminal = Stream(fd, fd)
    console = terminal.connect(Console(terminal))
    sent = 0
    while console.pending(1):
        terminal.send(b"x" * 1000)
        sent += 1000
    assert terminal.full()
    assert len(terminal._output) < MAX_OUTPUT + 1000
    got = 0
    theirs.setblocking(False)

    def drained() -> bool:
        nonlocal got
        try:
            while data := theirs.recv(1 << 16):
                got += len(data)
        except BlockingIOError:
            pass
        return got == sent

    assert pump(console, drained)
    assert console.pending(1)
    assert terminal._out.events() == 0
    theirs.close()
    terminal.close()


def test_input_waits_where_it_is_until_there_is_room() -> None:
    ours, theirs = socket.socketpair()
    fd = ours.detach()
    terminal = Stream(fd, fd)
    console = terminal.connect(Console(terminal))
    theirs.setblocking(False)
    sent = 0
    while console.room or pump(console, lambda: False, 0.0):
        with contextlib.suppress(BlockingIOError):
            sent += theirs.send(b"x" * 4096)
        pump(console, lambda: False, 0.01)
    assert (console.room, console.lost) == (0, 0)
    assert terminal._in.events() == 0
    theirs.close()
    terminal.close()


def test_the_end_of_input_ends_it() -> None:
    ours, theirs = socket.socketpair()
    fd = ours.detach()
    terminal = Stream(fd, fd)
    console = terminal.connect(Console(terminal))
    theirs.send(b"last words")
    theirs.close()
    assert pump(console, lambda: console.pending(0))
    pump(console, lambda: False, 0.1)
    assert all(source.events() == 0 for source in console.sources)
    terminal.send(b"thrown away")
    assert console.pending(1)


def test_socket_terminal_takes_one_after_another(tmp_path: Path) -> None:
    path = str(tmp_path / "console")
    terminal = SocketTerminal(path)
    console = terminal.connect(Console(terminal))
    terminal.send(b"nobody is there")
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as user:
            user.settimeout(SECONDS)
            user.connect(path)
            user.send(b"hello")
            assert pump(console, lambda: console.pending(0))
            console.reset()
            terminal.send(b"welcome")
            assert user.recv(100) == b"welcome"
        assert pump(console, lambda: terminal._in.fd < 0)
    with pytest.raises(UsageError, match="console"):
        SocketTerminal(path)
    terminal.close()
    assert not os.path.exists(path)
