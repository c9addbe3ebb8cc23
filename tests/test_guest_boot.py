# SPDX-License-Identifier: Apache-2.0
"""Real kernels, booted: what their drivers do with the bit, and what becomes of a guest that will not."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

import virtiova
from leaks import descriptors
from test_guest_judge import EXPECTED
from virtiova.addr import AddressKind
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.collect.monitor import Monitor
from virtiova.errors import MachineError, NotPossibleError
from virtiova.guest.boot import Assets, Boot, Disk, assets
from virtiova.guest.outside import look
from virtiova.guest.platforms import PLATFORMS, Platform, find
from virtiova.guest.run import disks_for, judge_boot, look_at, run, run_all
from virtiova.packages.store import Store
from virtiova.policy import RULES
from virtiova.result import Cell, Path

pytestmark = pytest.mark.qemu

VTD = find("x86-vtd")


def available(platform: Platform, store: Store) -> Assets:
    """What a platform boots from; the test is skipped with the reason where it cannot be had."""
    try:
        return assets(platform, store)
    except NotPossibleError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def store() -> Store:
    """The user's own cache: fetched once for all runs of the tests."""
    return Store()


@pytest.fixture(scope="session")
def vtd(store: Store) -> Assets:
    return available(VTD, store)


def found(cell: Cell) -> str:
    return f"{cell.address} {cell.observed}"


def check(platform: Platform, cells: list[Cell]) -> None:
    """Both disks came to what a person wrote down for this platform, and nothing disagrees."""
    said = [cell.evidence.outside.get("seen", cell.evidence.note) for cell in cells]
    words = [line for cell in cells for line in cell.evidence.words]
    assert (found(cells[0]), found(cells[1])) == EXPECTED[platform.name], (said, words)
    assert [(c.offered, c.accepted) for c in cells] == [(True, True), (False, False)]
    assert not any(cell.mismatch for cell in cells), [cell.disagreements for cell in cells]


@pytest.mark.timeout(400)
def test_a_pc_with_vtd(store: Store, vtd: Assets) -> None:
    """The patch in one machine: one disk goes through the IOMMU, its neighbour around it."""
    cells = run(VTD, store=store, seconds=300)
    check(VTD, cells)
    on, off = cells
    assert on.evidence.outside["through"] == "yes", "what the IOMMU translated to holds the ring"
    assert int(on.evidence.inside["dma_map"]) > 0
    assert off.evidence.inside["dma_map"] == "0"
    assert off.evidence.inside["group_type"] == on.evidence.inside["group_type"], "a group says nothing of the path"


@pytest.mark.sweep
@pytest.mark.timeout(700)
def test_one_rule_the_other_way_round_does_not_fit_a_real_guest(vtd: Assets) -> None:
    """The same boot, judged by wrong rules: each is noticed."""
    with Boot(VTD, vtd, disks_for([True, False])) as boot:
        assert boot.run(600)
        looked = look_at(boot)
        for rule in (None, "no-quirk", "xen-domain", "device-uses-platform", "front-translates"):
            cells = judge_boot(boot, looked, RULES.inverted(rule) if rule else RULES).values()
            assert any(cell.mismatch for cell in cells) == (rule is not None), rule


@pytest.mark.sweep
@pytest.mark.timeout(700)
@pytest.mark.parametrize("bit", [True, False])
def test_one_bit_alone(bit: bool, store: Store, vtd: Assets) -> None:
    cell = run(VTD, [bit], store=store, seconds=600)[0]
    assert found(cell) == EXPECTED["x86-vtd"][not bit]


def test_whoever_does_not_want_the_rest_does_not_wait(vtd: Assets) -> None:
    stop = threading.Event()
    cells = run_all([replace(VTD, append="rdinit=/nothing")], store=Store(offline=True), seconds=100, stop=stop)
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    started = time.monotonic()
    assert next(cells).observed is Path.UNKNOWN
    assert time.monotonic() - started < 30
    timer.join()


@pytest.mark.sweep
@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", [name for name in PLATFORMS if name != "x86-vtd"])
def test_every_platform(name: str, store: Store) -> None:
    platform = find(name)
    available(platform, store)
    check(platform, run(platform, store=store, seconds=600))


def test_a_guest_that_hangs_is_unknown_with_its_last_words(store: Store, vtd: Assets) -> None:
    """Nobody waits for a disk that never comes longer than was asked for; what the console said is kept."""
    stuck = replace(VTD, append="console=ttyS0 ignore_loglevel earlyprintk=serial rdinit=/nothing")
    started = time.monotonic()
    cells = run(stuck, store=store, seconds=6)
    assert time.monotonic() - started < 40
    assert [cell.observed for cell in cells] == [Path.UNKNOWN, Path.UNKNOWN]
    assert "did not say all within 6 s" in cells[0].evidence.note
    assert cells[0].address is AddressKind.UNKNOWN
    assert not cells[0].mismatch
    assert cells[0].evidence.words, "the last lines of the console"


def test_a_guest_that_cannot_start_says_why(store: Store, vtd: Assets) -> None:
    wrong = replace(VTD, arguments=("-M", "q35", "-device", "no-such-iommu"))
    cell = run(wrong, [True], store=store)[0]
    assert cell.observed is Path.UNKNOWN
    assert "did not start" in cell.evidence.note
    assert "no-such-iommu" in " ".join(cell.evidence.words)


def test_a_guest_that_ends_in_the_middle(vtd: Assets) -> None:
    with Boot(VTD, vtd, [Disk(bit=True)]) as boot:
        os.kill(boot.pid, signal.SIGKILL)
        with pytest.raises(MachineError):
            boot.run(30)


def test_nothing_is_left_behind(vtd: Assets, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = descriptors()
    with Boot(VTD, vtd, [Disk(bit=True), Disk(bit=False)]) as boot:
        pid = boot.pid
        boot.pump(0.5)
    assert not FilePath(f"/proc/{pid}").exists()
    assert descriptors() == before
    assert list(tmp_path.iterdir()) == []


_STARTS: str = """
import sys
from virtiova.guest.boot import Boot, Disk, assets
from virtiova.packages.store import Store
from virtiova.guest.platforms import find
platform = find("x86-vtd")
boot = Boot(platform, assets(platform, Store(offline=True)), [Disk(bit=True)])
print(boot.pid, flush=True)
boot.run(300)
"""


def test_a_killed_process_takes_its_guest_along(vtd: Assets) -> None:
    env = {**os.environ, "PYTHONPATH": str(FilePath(virtiova.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", _STARTS], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 20
    while FilePath(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not FilePath(f"/proc/{pid}").exists()


def test_the_monitor_is_bounded_and_typed(vtd: Assets) -> None:
    """A disk that no driver has taken yet: all zero, and nothing made up."""
    with Boot(VTD, vtd, [Disk(bit=True)]) as boot, Monitor(boot.monitor) as monitor:
        outside = look(monitor, "bit-on", boot.translations, pci=True)
        assert outside.offered
        assert not outside.driver_ok
        assert not outside.visible
        with pytest.raises(MachineError, match="monitor"):
            monitor.execute("no-such-command")


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_a_real_package_is_fetched_and_mended(tmp_path: FilePath) -> None:
    """From the machine's own mirror, for another architecture; the system's package state is left alone."""
    busybox = find("aarch64-mmio").kernel.wanted()[1]
    status = FilePath("/var/lib/dpkg/status")
    before = status.stat().st_mtime_ns if status.exists() else None
    try:
        first = Store(tmp_path).get(busybox)
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    assert first.content["busybox"][:20].endswith(b"\x02\0\xb7\0"), "an ELF program for aarch64"
    path = tmp_path / "guest" / busybox.folder / "busybox"
    path.write_bytes(first.content["busybox"][:-1] + b"!")
    with pytest.raises(NotPossibleError, match="does not have its checksum"):
        Store(tmp_path, offline=True).get(busybox)
    assert Store(tmp_path).get(busybox) == first
    assert (status.stat().st_mtime_ns if status.exists() else None) == before


# -- what cannot be had ----------------------------------------------------------------------------------------------


def test_offline_without_a_cache_is_not_applicable(tmp_path: FilePath) -> None:
    cells = run(VTD, store=Store(tmp_path, offline=True))
    assert [cell.observed for cell in cells] == [Path.NOT_APPLICABLE] * 2
    assert cells[0].evidence.note == "offline, and linux-image-cloud-amd64 (amd64): not in the cache"
    assert cells[0].predicted == []


def test_a_missing_emulator_names_its_package(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    cell = run(find("s390x-ccw"), [True], store=Store(tmp_path, offline=True))[0]
    assert cell.observed is Path.NOT_APPLICABLE
    assert "apt-get install qemu-system-misc" in cell.evidence.note


def test_the_command_says_so(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["guest", "run", "x86-vtd", "--offline", "--bit", "on"]) == exits.NOT_POSSIBLE
    assert "not in the cache" in capsys.readouterr().out
    assert main(["guest", "run", "x86-vtx"]) == exits.USAGE
    assert "did you mean" in capsys.readouterr().err
    assert main(["guest", "list"]) == exits.OK
    listed = capsys.readouterr().out
    assert all(name in listed for name in PLATFORMS)
    assert main(["guest", "run", "all", "--console", "--offline"]) == exits.USAGE
    assert main(["explain", "guest-driver"]) == exits.OK
    assert "vring_use_dma_api" in capsys.readouterr().out


@pytest.mark.sweep
@pytest.mark.timeout(400)
def test_a_person_at_the_console(vtd: Assets, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """What is typed reaches a shell in the guest, and the guest's own end ends the command."""
    reading, writing = os.pipe()
    saved = os.dup(0)
    os.dup2(reading, 0)
    os.close(reading)
    typist = threading.Timer(0.2, lambda: os.write(writing, b"echo $((6 * 7))-from-inside\npoweroff -f\n"))
    typist.start()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(os.fdopen(os.dup(0), "rb", buffering=0))
    try:
        assert main(["guest", "run", "x86-vtd", "--offline", "--console"]) == exits.OK
    finally:
        typist.join()
        sys.stdin.close()
        sys.stdin = stdin
        os.dup2(saved, 0)
        os.close(saved)
        os.close(writing)
    assert b"42-from-inside" in capfdbinary.readouterr().out
