# SPDX-License-Identifier: Apache-2.0
"""Our back ends behind a real QEMU and its VT-d, and what the probe says of them; and of one that knows no IOMMU."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path as File

import pytest

from cli_kit import environment
from virtiova import probe
from virtiova.errors import MachineError, UsageError
from virtiova.machine.backend import PATH, BackEnd, listens, offers
from virtiova.machine.qemu.machine import QemuMachine
from virtiova.result import Cell, Path
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Framer, Message, Request

pytestmark = pytest.mark.qemu

OUR = f"{shlex.quote(sys.executable)} -m virtiova serve"
DISK = f"{OUR} blk {{image}} --socket-path {{socket}}"
RANDOM = f"{OUR} rng --socket-path {{socket}}"
PATHS = {
    "device-writes": Path.TRANSLATED,
    "device-reads": Path.TRANSLATED,
    "ring": Path.TRANSLATED,
    "remap": Path.TRANSLATED,
    "unmap": Path.BLOCKED,
    "unmapped": Path.BLOCKED,
}

# Offers no bit 33, and acknowledges whatever is said.
UNAWARE = """
import socket, struct, sys
protocol = int(sys.argv[2], 16)
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
while True:
    front, _ = listening.accept()
    try:
        while len(head := front.recv(12, socket.MSG_WAITALL)) == 12:
            request, flags, size = struct.unpack("<III", head)
            payload = front.recv(size, socket.MSG_WAITALL) if size else b""
            answers = {1: 1 << 32 | 1 << 30, 15: protocol, 17: 1}
            if request in answers:
                answer = struct.pack("<Q", answers[request])
            elif request == 24:
                answer = payload[:12] + struct.pack("<Q", 8) + bytes(len(payload) - 20)
            elif request == 11:
                answer = payload
            elif flags & 8:
                answer = bytes(8)
            else:
                continue
            front.sendall(struct.pack("<III", request, 5, len(answer)) + answer)
    except OSError:
        pass
    front.close()
"""


def cells(device: str, backend: str, experiments: list[str], iommu: str | None = None) -> dict[str, Cell]:
    found = probe.qemu(device, iommu, experiments, backend=backend)
    return {cell.experiment: cell for cell in found}


@pytest.mark.parametrize("iommu", [None, "virtio"])
def test_a_disk_of_ours_goes_through_the_iommu_with_the_bit(iommu: str | None) -> None:
    found = cells(
        "vhost-user-blk-pci,iommu_platform=on", DISK, list(PATHS if iommu is None else ("ring", "remap")), iommu
    )
    assert found
    assert {name: cell.observed for name, cell in found.items()} == {name: PATHS[name] for name in found}
    assert not any(cell.mismatch for cell in found.values())
    assert all(cell.offered and cell.accepted for cell in found.values())
    words = found["ring"].evidence.words
    assert words[0] == "back end: offers bit 33"
    assert any("IOVAs, through the IOTLB" in line for line in words)


def test_a_disk_of_ours_goes_around_without_it() -> None:
    found = cells("vhost-user-blk-pci", DISK, ["device-reads", "ring"])
    assert {cell.observed for cell in found.values()} == {Path.BYPASS}
    assert not any(cell.mismatch for cell in found.values())


@pytest.mark.parametrize(
    ("behaviour", "wrong"),
    [
        ("leaky", {"device-writes": Path.BYPASS, "ring": Path.BYPASS, "unmap": Path.BYPASS, "remap": Path.BYPASS}),
        ("stale", {"unmap": Path.STALE, "remap": Path.STALE}),
    ],
)
def test_a_disk_that_is_wrong_on_purpose_is_found(behaviour: str, wrong: dict[str, Path]) -> None:
    backend = f"{OUR} {behaviour} {{image}} --socket-path {{socket}}"
    found = cells("vhost-user-blk-pci,iommu_platform=on", backend, ["device-writes", "ring", "unmap", "remap"])
    assert {name: cell.observed for name, cell in found.items() if cell.mismatch} == wrong
    assert found["device-writes"].evidence.faults == [], "nothing but memory shows it"


@pytest.mark.parametrize(("kind", "backend"), [("blk", DISK), ("rng", RANDOM)])
def test_qemu_gives_iovas_to_a_driver_that_did_not_take_the_bit(kind: str, backend: str) -> None:
    cell = cells(f"vhost-user-{kind}-pci,iommu_platform=on", backend, ["no-version-1"])["no-version-1"]
    assert (cell.offered, cell.accepted, cell.observed) == (True, False, Path.BLOCKED)
    assert cell.explained == "QEMU-VHOST-DECIDES-AT-PLUG"
    assert "once the driver had taken the bit" in cell.evidence.live
    assert any("no memory of the front end at user address" in line for line in cell.evidence.words)


@pytest.mark.parametrize(("bit", "path"), [(",iommu_platform=on", Path.TRANSLATED), ("", Path.BYPASS)])
def test_random_bytes_of_ours(bit: str, path: Path) -> None:
    found = cells(f"vhost-user-rng-pci{bit}", RANDOM, ["ring"])
    assert {cell.observed for cell in found.values()} == {path}


@pytest.fixture
def unaware(tmp_path: File) -> str:
    script = tmp_path / "unaware.py"
    script.write_text(UNAWARE)
    return f"{shlex.quote(sys.executable)} {script} {{socket}}"


WITH_CONFIG, WITHOUT_CONFIG = "0x229", "0x29"


def test_a_disk_that_knows_no_iommu_is_refused(unaware: str) -> None:
    (cell,) = cells("vhost-user-blk-pci,iommu_platform=on", f"{unaware} {WITH_CONFIG}", ["device-writes"]).values()
    assert (cell.observed, cell.mismatch) == (Path.REFUSED, False)
    assert [reason.rule for reason in cell.reasons] == ["back-end-offers"]
    assert cell.evidence.words[:2] == [
        "back end: does not offer bit 33",
        "QEMU refused to start with this back end",
    ]


def test_random_bytes_that_know_no_iommu_are_taken_for_more(unaware: str) -> None:
    """QEMU 7.2 does not look at what a vhost-user-rng back end offers: the disagreement is the finding."""
    (cell,) = cells("vhost-user-rng-pci,iommu_platform=on", f"{unaware} {WITHOUT_CONFIG}", ["device-writes"]).values()
    assert (cell.offered, cell.accepted) == (True, True), cell.evidence
    assert cell.disagreements == ["QEMU offers bit 33 to the driver although the back end never offered it"]


# -- the command of a back end


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names its socket"),
        ("true", "names its socket"),
        ("true {fd}", "as {socket}$"),
        ("true {socket} {fd}", "names its socket"),
        ("'x {socket}", "closing quotation"),
        ("no-such-program {socket}", "no program 'no-such-program'"),
    ],
)
def test_a_command_that_cannot_work(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BackEnd(spawn=text).words((PATH,))


def test_a_back_end_that_ends_before_it_listens() -> None:
    with pytest.raises(MachineError, match="ended before it listened"):
        offers(BackEnd(spawn="false {socket}"))


def test_devices_and_back_ends_belong_together() -> None:
    for device, backend in (("vhost-user-blk-pci", None), ("virtio-blk-pci", BackEnd(spawn=DISK))):
        with pytest.raises(UsageError, match="back end"):
            QemuMachine(device, backend=backend)
    with pytest.raises(UsageError, match="needs a back end"):
        list(probe.qemu("vhost-user-blk-pci"))


# -- the server by itself


class Served:
    """``virtiova serve`` in a process of its own."""

    def __init__(self, folder: File, *arguments: str) -> None:
        self.path = str(folder / "s")
        command = [sys.executable, "-m", "virtiova", "serve", *arguments, "--socket-path", self.path]
        self.process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 20
        while not listens(self.path):
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def ask(self, message: Message) -> Message:
        """One question on a connection of its own."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(20)
            sock.connect(self.path)
            sock.sendall(message.encode())
            framer = Framer()
            while True:
                data = sock.recv(framer.wanted)
                assert data, "closed"
                if found := framer.feed(data):
                    return found[0]

    def end(self, signum: int = signal.SIGTERM) -> tuple[str, str]:
        self.process.send_signal(signum)
        return self.process.communicate(timeout=20)


@pytest.fixture
def served(tmp_path: File) -> Iterator[Served]:
    server = Served(tmp_path, "rng", "-j")
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def test_one_front_end_after_the_other_and_a_clean_end(served: Served) -> None:
    assert os.stat(served.path).st_mode & 0o777 == 0o600
    for _ in range(3):
        assert wire.u64_of(served.ask(Message(Request.GET_FEATURES)).payload) >> 33 & 1
    served.process.send_signal(signal.SIGUSR1)
    out, err = served.end()
    assert served.process.returncode == 0
    assert not os.path.exists(served.path)
    assert json.loads(out) | {"schema": "virtiova/serve/1", "connections": 3, "requests": 0} == json.loads(out)
    assert err.count("a front end has connected") == 3
    assert "connections 3, requests 0" in err


def test_nonsense_ends_a_connection_and_not_the_server(served: Served) -> None:
    for noise in (b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\x01"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(20)
            sock.connect(served.path)
            sock.sendall(noise)
            sock.shutdown(socket.SHUT_WR)
            # What was not read any more makes the end of a connection a reset.
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""
    assert served.ask(Message(Request.GET_FEATURES)).reply
    _, err = served.end()
    assert "connection closed: vhost-user: flags" in err
    assert "Traceback" not in err


def test_a_socket_in_use_is_not_taken_and_a_dead_one_is(served: Served, tmp_path: File) -> None:
    command = [sys.executable, "-m", "virtiova", "serve", "rng", "--socket-path", served.path]
    second = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert (second.returncode, "somebody is serving there" in second.stderr) == (77, True)
    served.process.kill()
    served.process.communicate()
    assert os.path.exists(served.path)
    third = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert third.stderr is not None
        assert "sandbox: " in third.stderr.readline()
        assert "serving rng" in third.stderr.readline()
    finally:
        third.terminate()
        third.communicate(timeout=20)


@pytest.mark.parametrize("connected", [False, True])
def test_a_socket_that_somebody_opened(connected: bool, tmp_path: File) -> None:
    if connected:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        ours, theirs = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
        theirs.bind(str(tmp_path / "s"))
        theirs.listen()
    command = [sys.executable, "-m", "virtiova", "serve", "rng", "--fd", str(theirs.fileno())]
    with subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()]
    ) as server:
        theirs.close()
        ours.settimeout(20)
        if not connected:
            ours.connect(str(tmp_path / "s"))
        ours.sendall(Message(Request.GET_QUEUE_NUM).encode())
        assert ours.recv(20) == Message(Request.GET_QUEUE_NUM, wire.u64(1), reply=True).encode()
        ours.close()
        if not connected:
            server.terminate()
        server.communicate(timeout=20)
    assert server.returncode == 0
