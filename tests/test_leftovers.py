# SPDX-License-Identifier: Apache-2.0
"""However the prober ends - Ctrl-C, SIGTERM, kill -9 - no QEMU, no file and no shared memory stays behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import virtiova
from probe_kit import ON

pytestmark = pytest.mark.qemu

SOURCE = str(Path(virtiova.__file__).parent.parent)
MARK = "VIRTIOVA_TEST_RUN"
MANY = ["-m", "virtiova", "probe", "qemu", "--device", f"virtio-blk-pci{ON}"]
TABLE = ["-m", "virtiova", "probe"]
GONE_SECONDS = 3.0


class Run:
    """One prober in a process of its own, and a mark that all its children inherit."""

    def __init__(self, args: list[str], home: Path, **env: str) -> None:
        self.mark = f"{os.getpid()}-{random.getrandbits(64):x}"
        self.home = home
        path = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH", "")]))
        given = os.environ | {MARK: self.mark, "PYTHONPATH": path, "TMPDIR": str(home)} | env
        self.process = subprocess.Popen(
            [sys.executable, *args], env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def family(self) -> dict[int, str]:
        """All living processes with the mark but the prober itself: their ids and names."""
        wanted = f"{MARK}={self.mark}".encode()
        found = {}
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit() or int(entry.name) == self.process.pid:
                continue
            try:
                environ = Path(entry.path, "environ").read_bytes()
                name = Path(entry.path, "comm").read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if wanted in environ.split(b"\0"):
                found[int(entry.name)] = name
        return found

    def wait_for_qemu(self) -> None:
        """Until the first QEMU runs."""
        end = time.monotonic() + 20
        while not any(name.startswith("qemu-system") for name in self.family().values()):
            assert time.monotonic() < end, "no QEMU was ever started"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.002)

    def gone(self) -> bool:
        """Does the family end within its time?"""
        end = time.monotonic() + GONE_SECONDS
        while self.family():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def end(self) -> tuple[int, str, str]:
        """Exit status, standard output, standard error; it has little time."""
        out, err = self.process.communicate(timeout=GONE_SECONDS)
        return self.process.returncode, out, err

    def left(self) -> list[str]:
        """What lies in its temporary directory."""
        return sorted(os.listdir(self.home))


@contextmanager
def prober(args: list[str], **env: str) -> Iterator[Run]:
    """A prober that is gone at the end, whatever the test found, with all that it started."""
    with tempfile.TemporaryDirectory() as home:
        run = Run(args, Path(home), **env)
        try:
            yield run
        finally:
            run.process.kill()
            run.process.communicate()
            for pid in run.family():
                os.kill(pid, signal.SIGKILL)


def shared_memory() -> set[str]:
    """Names of shared memory that could be ours."""
    return {name for name in os.listdir("/dev/shm") if "virtiova" in name or "qemu" in name}


def moments(seed: int, count: int) -> list[float]:
    dice = random.Random(seed)
    return [round(dice.uniform(0.0, 0.7), 3) for _ in range(count)]


def expect_clean(run: Run, before: set[str]) -> None:
    assert run.gone(), f"still there: {run.family()}"
    assert run.left() == []
    assert shared_memory() <= before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("delay", moments(1, 3))
def test_a_signal_in_the_middle(signum: signal.Signals, delay: float) -> None:
    before = shared_memory()
    with prober(TABLE) as run:
        run.wait_for_qemu()
        time.sleep(delay)
        over = run.process.poll() is not None
        run.process.send_signal(signum)
        code, _, err = run.end()
        expect_clean(run, before)
    assert over or code == 128 + signum
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert over or len(err.splitlines()) <= 2, err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_workers_run_the_matrix(signum: signal.Signals) -> None:
    before = shared_memory()
    with prober(["-m", "virtiova", "matrix", "--only", "q35"]) as run:
        run.wait_for_qemu()
        run.process.send_signal(signum)
        code, _, err = run.end()
        expect_clean(run, before)
    assert (code, "Traceback" in err) == (128 + signum, False)


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.2])
def test_a_signal_while_it_starts(delay: float) -> None:
    """Before the handlers are there Python answers with a traceback of its own; but it ends, and nothing stays."""
    before = shared_memory()
    with prober(TABLE) as run:
        time.sleep(delay)
        run.process.send_signal(signal.SIGTERM)
        code, _, err = run.end()
        expect_clean(run, before)
    assert code != 0
    assert "Traceback" not in err


def test_a_second_signal_does_not_wait_for_the_first() -> None:
    before = shared_memory()
    with prober(TABLE) as run:
        run.wait_for_qemu()
        for _ in range(2):
            run.process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        code, _, _ = run.end()
        expect_clean(run, before)
    assert code != 0


def test_a_signal_while_qemu_hangs() -> None:
    """A stopped QEMU answers nobody; nobody may wait for it."""
    with prober(MANY) as run:
        run.wait_for_qemu()
        for pid, name in run.family().items():
            if name.startswith("qemu-system"):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        begun = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        code, _, err = run.end()
        assert time.monotonic() - begun < GONE_SECONDS
        assert run.gone()
    assert code != 0
    assert "Traceback" not in err


@pytest.mark.parametrize("delay", moments(2, 5))
def test_kill_nine(delay: float) -> None:
    """No handler runs. What goes through the kernel must be enough."""
    before = shared_memory()
    with prober(TABLE) as run:
        run.wait_for_qemu()
        time.sleep(delay)
        run.process.kill()
        run.process.wait()
        expect_clean(run, before)


def test_kill_nine_before_the_guard_is_up(tmp_path: Path) -> None:
    """Between its fork and the moment from which the kernel would kill it, a child is nobody's: it has to notice."""
    real = shutil.which("setpriv")
    if real is None:
        pytest.skip("setpriv is not installed")
    flag = tmp_path / "flag"
    slow = tmp_path / "setpriv"
    late = f'case "$*" in *qemu-system*) touch {flag}; sleep 0.3;; esac'
    slow.write_text(f'#!/bin/sh\n{late}\nexec {real} "$@"\n', encoding="utf-8")
    slow.chmod(0o755)
    with prober(TABLE, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}") as run:
        end = time.monotonic() + 20
        while not flag.exists():
            assert time.monotonic() < end, "no QEMU was ever started through setpriv"
            time.sleep(0.005)
        run.process.kill()
        run.process.wait()
        assert run.gone(), f"still there: {run.family()}"


def test_a_good_end_leaves_nothing_either() -> None:
    before = shared_memory()
    with prober([*MANY, "--experiment", "device-writes", "--experiment", "unmapped"]) as run:
        out, err = run.process.communicate(timeout=30)
        assert run.process.returncode == 0, err
        assert "2 cells: 2 as predicted" in out
        expect_clean(run, before)


@pytest.mark.parametrize(
    "trouble",
    [
        ["--device", f"virtio-blk-pci{ON},addr=4"],  # QEMU refuses the device
        ["--device", "virtio-blk-pci,no-such-option=1"],  # QEMU knows no such option
        ["--device", "virtio-blk-pci", "--iommu", "intel,aw-bits=7"],
    ],
)
def test_errors_leave_nothing(trouble: list[str]) -> None:
    before = shared_memory()
    with prober(["-m", "virtiova", "probe", "qemu", *trouble]) as run:
        _, err = run.process.communicate(timeout=30)
        assert "Traceback" not in err
        expect_clean(run, before)


LIBRARY = """
import sys
from virtiova import probe
cells = probe.qemu("virtio-blk-pci,iommu_platform=on")
next(cells)
{what}
"""


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("sys.exit(5)", 5),
        ("raise ValueError('the caller gave up')", 1),
        ("import os; os._exit(6)", 6),
        ("cells.close(); print('closed'); sys.exit(7)", 7),
    ],
)
def test_a_library_user_that_gives_up_half_way(what: str, code: int) -> None:
    before = shared_memory()
    with prober(["-c", LIBRARY.format(what=what)]) as run:
        _, err = run.process.communicate(timeout=20)
        assert run.process.returncode == code, err
        assert "Exception ignored" not in err
        expect_clean(run, before)


def test_a_machine_that_is_never_closed() -> None:
    program = "from virtiova.machine.qemu.machine import QemuMachine\nm = QemuMachine('virtio-rng-pci')\nprint(m.pid)\n"
    with prober(["-c", program]) as run:
        out, err = run.process.communicate(timeout=20)
        assert run.process.returncode == 0, err
        assert int(out) > 0
        assert run.gone()


HANDLER = """
import os, signal
from virtiova.cli import main
from virtiova.machine.qemu import process
signal.signal(signal.SIGTERM, main._terminated)
with process._lock:
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(1000))
"""


def test_a_signal_while_the_first_one_is_handled() -> None:
    """A handler runs in the main thread, whatever that holds: it must not wait for itself."""
    with prober(["-c", HANDLER]) as run:
        code, _, err = run.end()
    assert code != 0
    assert "KeyboardInterrupt" in err
