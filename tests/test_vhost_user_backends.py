# SPDX-License-Identifier: Apache-2.0
"""Real back ends over our own front end: QEMU's storage daemon, DPDK's test program, and our own."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from probe_kit import GENERAL
from vhost_user_kit import (
    STORAGE_DAEMON,
    TESTPMD,
    VIRTIOFSD,
    commands,
    installed,
    listening,
)
from virtiova import probe
from virtiova.cli import main
from virtiova.driver.open import open_device
from virtiova.errors import UsageError
from virtiova.machine.backend import BackEnd
from virtiova.machine.image import disk_image
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.result import Cell
from virtiova.result import Path as Way

NO_DAEMON = "n/a: no qemu-storage-daemon (apt install qemu-system-common)"
NO_TESTPMD = "n/a: no dpdk-testpmd (apt install dpdk-dev)"
needs_daemon = pytest.mark.skipif(not installed("qemu-storage-daemon"), reason=NO_DAEMON)
needs_testpmd = pytest.mark.skipif(not installed("dpdk-testpmd"), reason=NO_TESTPMD)


# -- real back ends ----------------------------------------------------------------------------------------------


def _answers(cells: Iterator[Cell]) -> dict[str, Cell]:
    return {cell.experiment: cell for cell in cells}


def _of_testpmd(ask: Callable[[], Iterator[Cell]]) -> dict[str, Cell]:
    """Answers of a program that polls and gives up on frames while others have its processor.

    Where none came it is asked again, twice at most; an answer is one, right or wrong, and is never asked for again.
    """
    for _ in range(2):
        cells = _answers(ask())
        if all(cell.observed is not Way.UNKNOWN for cell in cells.values()):
            return cells
    return _answers(ask())


@needs_daemon
def test_virtiofsd_goes_around_in_every_experiment() -> None:
    """QEMU 7.2's, as Debian has it, offers no bit 33. The file that it shares is ours."""
    cells = _answers(probe.vhost_user(spawn=VIRTIOFSD, kind="fs"))
    not_asked = {"not-taken", "carry-on", "no-version-1", "bus-master-off"}
    assert {name for name, cell in cells.items() if cell.observed is Way.NOT_APPLICABLE} == not_asked
    assert not [name for name, cell in cells.items() if cell.mismatch or cell.observed is Way.UNKNOWN]
    assert {cell.offered for name, cell in cells.items() if name not in not_asked} == {False}
    assert cells["device-reads"].observed is Way.BYPASS
    assert not [line for line in commands(os.getpid()) if "virtiofsd" in line]


@needs_daemon
def test_the_storage_daemon_goes_around_in_every_experiment() -> None:
    """It offers no bit 33, so that it takes bare addresses wherever it is asked."""
    cells = _answers(probe.vhost_user(spawn=STORAGE_DAEMON))
    not_asked = {"not-taken", "carry-on", "no-version-1", "bus-master-off"}
    assert {name for name, cell in cells.items() if cell.observed is Way.NOT_APPLICABLE} == not_asked
    assert not [name for name, cell in cells.items() if cell.mismatch or cell.observed is Way.UNKNOWN]
    assert cells["msi"].observed is Way.TRANSLATED
    assert cells["translation-off"].observed is Way.DIRECT
    others = set(cells) - not_asked - {"msi", "translation-off"}
    assert {cells[name].observed for name in others} == {Way.BYPASS}
    assert {cell.offered for name, cell in cells.items() if name not in not_asked} == {False}
    assert {cell.device for cell in cells.values()} == {"vhost-user-blk?"}
    assert any("a guess" in word for word in cells["ring"].evidence.words)
    assert cells["ring"].evidence.features_ok is None
    assert not [line for line in commands(os.getpid()) if "qemu-storage-daemon" in line]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A storage daemon of somebody else's: its disk, and its socket."""
    disk, path = tmp_path / "disk.img", tmp_path / "daemon.sock"
    disk.write_bytes(os.urandom(1 << 20))
    command = STORAGE_DAEMON.replace("{image}", str(disk)).replace("{socket}", str(path))
    with subprocess.Popen(command.split(), stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(path, process)
            yield disk, str(path)
        finally:
            process.kill()


@needs_daemon
def test_somebody_elses_disk_is_not_changed_without_permission(
    daemon: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    disk, path = daemon
    before = hashlib.sha256(disk.read_bytes()).digest()
    command = ["probe", "vhost-user", path, "--experiment", "device-reads", "--experiment", "device-writes"]
    assert main.main(command) == 0
    said = capsys.readouterr().out
    assert "--write allows that" in said
    assert "Nothing was written to its disk" in said
    assert hashlib.sha256(disk.read_bytes()).digest() == before
    with VhostUserMachine(BackEnd(path, kind="blk")) as machine, pytest.raises(UsageError, match="--write"):
        open_device(machine).make_device_read([(0x200000, 512)])


@needs_daemon
def test_with_permission_it_is_read_back_and_put_back(daemon: tuple[Path, str]) -> None:
    disk, path = daemon
    before = hashlib.sha256(disk.read_bytes()).digest()
    cells = _answers(probe.vhost_user(path, ["device-reads", "write-only"], kind="blk", write=True))
    assert {cell.observed for cell in cells.values()} == {Way.BYPASS}
    assert cells["device-reads"].evidence.deliveries[0].arrived.startswith(b"page B 00400000.".hex())
    assert hashlib.sha256(disk.read_bytes()).digest() == before


NOT_ASKED = {"carry-on", "never-offered", "bus-master-off"}
"""Of a back end that offers the bit and refuses nobody."""
THROUGH = set(GENERAL) - NOT_ASKED - {"not-taken", "no-version-1", "renegotiate", "msi", "translation-off"}
"""What is decided by whether the bit is honoured."""


@pytest.mark.parametrize(
    ("device", "wrong"), [("blk", set()), ("leaky", THROUGH), ("stale", {"unmap", "remap"}), ("rng", set())]
)
def test_our_own_back_ends_do_what_their_names_say(device: str, wrong: set[str], tmp_path: Path) -> None:
    """One process for all cells, so that each also follows another one's connection."""
    path, disk = tmp_path / "own.sock", tmp_path / "own.img"
    disk.write_bytes(disk_image(64))
    words = ["serve", device, *([] if device == "rng" else [str(disk)]), "--socket-path", str(path), "-q"]
    with subprocess.Popen([sys.executable, "-m", "virtiova", *words], stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(path, process)
            cells = _answers(probe.vhost_user(str(path), write=True))
        finally:
            process.terminate()
    assert {cell.device for cell in cells.values()} == {"vhost-user-rng?" if device == "rng" else "vhost-user-blk?"}
    assert {name for name, cell in cells.items() if cell.mismatch} == wrong
    assert not [name for name, cell in cells.items() if cell.observed is Way.UNKNOWN]
    silent = {"device-reads", "write-only"} if device == "rng" else set()
    assert {name for name, cell in cells.items() if cell.observed is Way.NOT_APPLICABLE} == NOT_ASKED | silent
    assert cells["unmap-stale"].observed is (Way.BYPASS if device == "leaky" else Way.STALE)
    # Whatever the device made of it, the disk is as it was.
    assert disk.read_bytes() == disk_image(64)


def test_a_network_whose_other_side_is_ours(tmp_path: Path) -> None:
    """The shortest back end that there is: a network device on the datagram socket that it inherits."""
    program = tmp_path / "net.py"
    program.write_text(
        "import sys\n"
        "from virtiova.device.net import Net\n"
        "from virtiova.serve import serve\n"
        "from virtiova.serve.wires import FrameWire\n"
        "wire = FrameWire(int(sys.argv[1]))\n"
        "serve(wire.connect(Net(wire)), sys.argv[2])\n"
    )
    asked = ["device-writes", "device-reads", "split-buffer", "write-only", "remap"]
    spawn = f"{sys.executable} {program} {{net}} {{socket}}"
    cells = _answers(probe.vhost_user(spawn=spawn, kind="net", experiments=asked))
    ways = [Way.TRANSLATED, Way.TRANSLATED, Way.TRANSLATED, Way.BLOCKED, Way.TRANSLATED]
    assert {name: cell.observed for name, cell in cells.items()} == dict(zip(asked, ways, strict=True))


def test_a_wire_that_is_its_own_other_end() -> None:
    """Datagrams by name: nobody else has to be there for a verdict."""
    asked = ["device-writes", "device-reads", "ring", "unmapped", "remap"]
    words = "-m virtiova serve net --datagram {socket}.wire {socket}.wire --socket-path {socket}"
    cells = _answers(probe.vhost_user(spawn=f"{sys.executable} {words}", kind="net", echo=True, experiments=asked))
    ways = [Way.TRANSLATED, Way.TRANSLATED, Way.TRANSLATED, Way.BLOCKED, Way.TRANSLATED]
    assert {name: cell.observed for name, cell in cells.items()} == dict(zip(asked, ways, strict=True))


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not listening(path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@needs_daemon
def test_a_write_that_nobody_looked_at_is_put_back_by_the_next(daemon: tuple[Path, str]) -> None:
    disk, path = daemon
    before = disk.read_bytes()
    with VhostUserMachine(BackEnd(path, kind="blk", write=True)) as machine:
        for last in (False, True):
            driver = open_device(machine)
            region = driver.ops.alloc(512)  # type: ignore[attr-defined]
            region.write(0, b"late" * 128)
            request = driver.make_device_read([(region.addr, 512)])
            request.go()
            assert machine.wait(request.done, 2)
            assert (disk.read_bytes() == before) is False
            if last:
                assert request.arrived() is None  # as before the second write, and yet not as it was
            assert machine.transport is not None
            machine.transport.reset()
    assert disk.read_bytes() == before


@pytest.fixture(scope="module")
def testpmd() -> Iterator[str]:
    """DPDK's test program as a network that returns every frame; it offers bit 33 and asks for translations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "testpmd.sock"
        command = TESTPMD.replace("{socket}", str(path)).replace("{prefix}", f"virtiova-{os.getpid()}")
        with subprocess.Popen(
            command.split(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                _wait_for(path, process)
                yield str(path)
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()


TESTPMD_WAYS = {
    "device-writes": Way.TRANSLATED,
    "device-reads": Way.TRANSLATED,
    "ring": Way.TRANSLATED,
    "unmapped": Way.BLOCKED,
    "read-only": Way.BLOCKED,
    "unmap": Way.BLOCKED,
    "remap": Way.TRANSLATED,
    "not-taken": Way.BYPASS,
    "renegotiate": Way.BYPASS,
    "translation-off": Way.DIRECT,
}


@needs_testpmd
@pytest.mark.parametrize("experiment", TESTPMD_WAYS)
def test_testpmd_goes_through_where_the_bit_is_taken(testpmd: str, experiment: str) -> None:
    cell = _of_testpmd(lambda: probe.vhost_user(testpmd, [experiment], kind="net", echo=True))[experiment]
    assert cell.observed is TESTPMD_WAYS[experiment], cell
    assert not cell.mismatch
    assert cell.offered is True
    # It has a status, so that FEATURES_OK is its own answer.
    assert cell.evidence.features_ok is True


@needs_testpmd
def test_testpmd_refuses_a_bit_that_it_does_not_offer() -> None:
    """Without IOMMU support it goes around, and its FEATURES_OK says no to a driver that takes the bit."""
    command = TESTPMD.replace(",iommu-support=1", "").replace("{prefix}", f"virtiova-without-{os.getpid()}")
    asked = ["never-offered", "ring"]
    cells = _of_testpmd(lambda: probe.vhost_user(spawn=command, kind="net", echo=True, experiments=asked, jobs=1))
    assert cells["ring"].observed is Way.BYPASS
    assert cells["never-offered"].observed is Way.REFUSED
    assert cells["never-offered"].evidence.features_ok is False
    assert not any(cell.mismatch for cell in cells.values())
    assert not [line for line in commands(os.getpid()) if "virtiova-without" in line]
