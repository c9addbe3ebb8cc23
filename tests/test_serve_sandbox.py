# SPDX-License-Identifier: Apache-2.0
"""What a serving process has given up, tried from inside of it; and that every device can do without."""

from __future__ import annotations

import ctypes.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hostile_kit import LiveFrontEnd, served
from serve_kit import PLAIN, WITH_BIT
from virtiova.cli import exits

pytestmark = pytest.mark.skipif(
    ctypes.util.find_library("seccomp") is None, reason="libseccomp.so.2 is not installed: there is nothing to test"
)

DENIED = {
    "a new program": "os.execv('/bin/true', ['true'])",
    "another process": "os.fork()",
    "a new socket": "socket.socket()",
    "a signal to others": "os.kill(os.getppid(), 0)",
    "executable memory": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "a terminal's input": "fcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "the owner of a descriptor, who gets its signals": "fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getppid())",
    "a signal of a descriptor": "fcntl.fcntl(pipe, 10, signal.SIGTERM)",  # F_SETSIG
    "signals of a descriptor": "fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)",
    "the same by ioctl": "fcntl.ioctl(pipe, termios.FIOASYNC, b'\\1\\0\\0\\0')",
    "its owner by ioctl": "fcntl.ioctl(pipe, 0x8901, os.getppid().to_bytes(4, 'little'))",  # FIOSETOWN
    "its owner by another": "fcntl.ioctl(pipe, 0x8902, os.getppid().to_bytes(4, 'little'))",  # SIOCSPGRP
    "signals of a folder": "fcntl.fcntl(pipe, fcntl.F_NOTIFY, fcntl.DN_CREATE)",
    "a lease": "fcntl.fcntl(pipe, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "a datagram by name": "datagrams.sendto(b'x', b'/dev/log')",
    "a new user": "os.setuid(0)",
    "debugging": "ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
    "a name": "os.rename('/nowhere', '/there')",
    "a mode": "os.chmod('/nowhere', 0o777)",
}


def run(code: str, mode: str = "on", options: str = "") -> subprocess.CompletedProcess[str]:
    program = f"""
        import ctypes, fcntl, mmap, os, signal, socket, termios
        from virtiova.serve import sandbox
        ctypes.CDLL(None)
        pipe, _ = os.pipe()
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        print(sandbox.enter({mode!r}, 1{options}), flush=True)
        {code}
        print('still there', flush=True)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("what", DENIED)
def test_what_is_denied_ends_the_process_and_says_where(what: str) -> None:
    done = run(DENIED[what])
    assert done.returncode == -signal.SIGSYS, done
    assert "system calls are allowed" in done.stdout
    assert "still there" not in done.stdout
    assert 'File "<string>"' in done.stderr


def test_messages_are_denied_where_no_descriptors_are_sent() -> None:
    code = "datagrams.sendmsg([b'x'], [], 0, b'/nowhere/log')"
    done = run(code, options=", descriptors=False")
    assert done.returncode == -signal.SIGSYS, done
    # Else they are not: nobody looks at an address in memory.
    assert "FileNotFoundError" in run(code).stderr
    assert "FileNotFoundError" in run("datagrams.sendto(b'x', b'/nowhere/log')", options=", addresses=True").stderr


def test_files_cannot_be_opened_and_a_traceback_is_still_one() -> None:
    done = run("open('/etc/passwd')")
    assert done.returncode == 1
    assert "PermissionError" in done.stderr


def test_what_is_left_goes() -> None:
    done = run("mmap.mmap(-1, 1 << 24).close(); os.memfd_create('x'); os.urandom(9); bytearray(1 << 26); os.getpid()")
    assert done.stdout.endswith("still there\n"), done
    assert done.returncode == 0


def test_off_is_off() -> None:
    done = run("socket.socket()", "off")
    assert done.stdout == "sandbox: off, as asked for\nstill there\n"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "\nfrom virtiova.cli import main\n"
    program = (
        "import ctypes, sys\nreal = ctypes.CDLL\n"
        "def missing(name, *args, **more):\n"
        "    if name and 'seccomp' in name: raise OSError('none')\n"
        "    return real(name, *args, **more)\n"
        "ctypes.CDLL = missing\n" + code + "main.entry()\n"
    )
    command = [sys.executable, "-c", program, "serve", "rng", "--socket-path", str(tmp_path / "s"), "--sandbox", "on"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == exits.NOT_POSSIBLE
    assert "libseccomp.so.2 is not installed" in done.stderr
    assert not (tmp_path / "s").exists()


def test_limits_of_a_server(tmp_path: Path) -> None:
    with served(tmp_path, "rng", sandbox="auto") as server:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        for line in ("NoNewPrivs:\t1", "Seccomp:\t2"):
            assert line in status
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
        files = next(line for line in limits.splitlines() if line.startswith("Max open files"))
        assert int(files.split()[3]) < 2048


# -- every device, on everything that it does, inside of it


def test_a_disk_in_a_file(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with served(tmp_path, "blk", str(image)) as server, server.front_end() as good:
        good.ready()
        assert good.read_sector() == 0
        for kind, data in ((4, b""), (1, bytes(512)), (11, RANGE), (13, RANGE), (8, b""), (99, b"")):
            assert good.request(kind, data) in (0, 2), kind
        server.process.send_signal(signal.SIGUSR1)
        server.said('"requests": 7')


RANGE = bytes(8) + (8).to_bytes(4, "little") + bytes(4)


@pytest.mark.parametrize("features", [PLAIN, WITH_BIT], ids=["without the bit", "with it"])
def test_random_bytes(tmp_path: Path, features: int) -> None:
    with served(tmp_path, "rng") as server, server.front_end() as good:
        good.ready(features)
        good.offer((good.dma(0x9000), 64, True))
        good.wait_used(1)
        assert good.get(0x9000, 64) != bytes(64)


def test_a_network_of_datagrams(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "other"))
        other.settimeout(10)
        with (
            served(tmp_path, "net", "--datagram", str(tmp_path / "ours"), str(tmp_path / "other")) as server,
            server.front_end() as good,
        ):
            good.ready(PLAIN, rings=2)
            good.offer((good.dma(0x9000), 2048, True), index=0)
            good.put(0xA000, bytes(12) + b"from the driver")
            good.offer((good.dma(0xA000), 27, False), index=1)
            assert other.recv(100) == b"from the driver"
            other.sendto(b"to the driver", str(tmp_path / "ours"))
            good.wait_used(1, 0)
            assert good.get(0x9000 + 12, 13) == b"to the driver"


def test_a_neighbour(tmp_path: Path) -> None:
    with served(tmp_path, "net", "--neighbour", "10.0.2.2") as server, server.front_end() as good:
        good.ready(PLAIN, rings=2)
        good.offer((good.dma(0x9000), 2048, True), index=0)
        arp = bytes.fromhex("ffffffffffff52540012345608060001080006040001525400123456") + bytes.fromhex(
            "0a00020f0000000000000a000202"
        )
        good.put(0xA000, bytes(12) + arp)
        good.offer((good.dma(0xA000), 12 + len(arp), False), index=1)
        good.wait_used(1, 0)
        assert good.get(0x9000 + 12 + 12, 2) == b"\x08\x06"


def test_a_wire_with_nobody_on_it(tmp_path: Path) -> None:
    with served(tmp_path, "net", "--discard") as server, server.front_end() as good:
        good.ready(PLAIN, rings=2)
        good.put(0xA000, bytes(12) + bytes(range(60)))
        for number in range(1, 4):
            good.offer((good.dma(0xA000), 12 + 20 * number, False), index=1)
            good.wait_used(number, 1)
    assert "discarded: 3 frames, 120 bytes" in server.log


def test_a_console_on_a_socket(tmp_path: Path) -> None:
    with served(tmp_path, "console", "--terminal", str(tmp_path / "tty")) as server, server.front_end() as good:
        good.ready(PLAIN, rings=2)
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as user:
                user.settimeout(10)
                user.connect(str(tmp_path / "tty"))
                good.offer((good.dma(0x9000), 64, True), index=0)
                used = good.used(0)
                user.sendall(b"in")
                good.wait_used(used + 1, 0)
                assert good.get(0x9000, 2) == b"in"
                good.put(0xA000, b"out")
                good.offer((good.dma(0xA000), 3, False), index=1)
                assert user.recv(10) == b"out"
            time.sleep(0.05)


def test_a_console_on_a_pseudo_terminal(tmp_path: Path) -> None:
    with served(tmp_path, "console", "--pty") as server, server.front_end() as good:
        server.said("the console is at /dev/pts/")
        name = server.log.split("the console is at ")[1].split()[0]
        good.ready(PLAIN, rings=2)
        fd = os.open(name, os.O_RDWR | os.O_NOCTTY)
        try:
            good.put(0xA000, b"out")
            good.offer((good.dma(0xA000), 3, False), index=1)
            good.wait_used(1, 1)
            assert os.read(fd, 10) == b"out"
        finally:
            os.close(fd)


STUCK = """
import os, sys
from virtiova.device.rng import Rng
from virtiova.serve.server import Server, signals

class Stuck(Rng):
    def handle(self, queue, chain):
        print("stuck", flush=True)
        os.read(os.pipe()[0], 1)

with Server(Stuck(), sys.argv[1]) as server, signals(server):
    print("ready", flush=True)
    server.run()
"""


def test_a_second_signal_ends_what_the_first_did_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-c", STUCK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with LiveFrontEnd(path) as front_end:
                front_end.ready(PLAIN)
                front_end.offer((front_end.dma(0x9000), 64, True))
                assert process.stdout.readline() == "stuck\n"
                process.terminate()
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.3)
                process.terminate()
                assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()
