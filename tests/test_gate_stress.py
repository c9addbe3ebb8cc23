# SPDX-License-Identifier: Apache-2.0
"""Real workers, a gate, and pages that are taken away under it: with a stated schedule, and under ThreadSanitizer."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fuzz import sources

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc (to have it: apt install gcc libc6-dev)")

QUIET = ["-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-tsan"]
THREADS = ["-O1", "-g", "-fsanitize=thread"]
PLAIN = ["-O2", "-g"]

PLANTED = {
    "nobody is waited for": (PLAIN, "while (__atomic_load_n(busy, __ATOMIC_SEQ_CST)) {", "while (0) {"),
    "nobody says that he is busy": (PLAIN, "__atomic_store_n(busy, 1, __ATOMIC_SEQ_CST);", ""),
    "what was looked up is kept": (
        PLAIN,
        "ring->desc_leaf.size = ring->avail_leaf.size = ring->used_leaf.size = 0;",
        "",
    ),
    "nobody is woken": (PLAIN, "__ATOMIC_RELEASE);\n    vv_futex_wake(&gate->stop);", "__ATOMIC_RELEASE);"),
    "an order too weak": (
        THREADS,
        "__atomic_store_n(busy, 0, __ATOMIC_SEQ_CST);",
        "__atomic_store_n(busy, 0, __ATOMIC_RELAXED);",
    ),
}


def built(into: Path, flags: list[str], plant: tuple[str, str] | None = None) -> Path:
    program = into / "stress"
    source = str(sources(into, plant) / "gate_stress.c")
    command = ["gcc", "-std=gnu11", *flags, *QUIET, source, "-pthread", "-o", str(program)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert not done.returncode, done.stderr
    return program


def run(program: Path, seed: int, milliseconds: int, workers: int) -> subprocess.CompletedProcess[str]:
    """Addresses as they are linked: ThreadSanitizer has no room for the more random ones of newer kernels."""
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    command = [*fixed, str(program), str(seed), str(milliseconds), str(workers)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=milliseconds / 1000 + 100)


def fine(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    assert done.returncode == 0, done.stderr[-6000:]
    came: dict[str, int] = json.loads(done.stdout)
    assert came["pages"] > came["gates"] > 10
    assert came["requests"] > 0
    return came


@pytest.mark.parametrize("flags", [PLAIN, THREADS], ids=["plain", "threads"])
def test_no_byte_changes_once_a_page_is_taken_away(tmp_path: Path, flags: list[str]) -> None:
    program = built(tmp_path, flags)
    for seed, workers in ((1, 2), (2, 3)):
        fine(run(program, seed, 700, workers))


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [PLAIN, THREADS], ids=["plain", "threads"])
def test_no_byte_changes_with_many_schedules(tmp_path: Path, flags: list[str]) -> None:
    program = built(tmp_path, flags)
    for seed in range(3, 27):
        fine(run(program, seed, 6000, 1 + seed % 4))


FAST = "nobody says that he is busy"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "name", [FAST, *(pytest.param(name, marks=pytest.mark.sweep) for name in PLANTED if name != FAST)]
)
def test_a_planted_mistake_is_found(tmp_path: Path, name: str) -> None:
    flags, right, wrong = PLANTED[name]
    program = built(tmp_path, [*flags, "-DGIVE_UP=3u"], (right, wrong))
    for seed in range(1, 6):
        done = run(program, seed, 5000, 2)
        if done.returncode:
            said = ("has changed", "does nothing", "jumps", "data race")
            assert any(words in done.stderr for words in said), done.stderr[-3000:]
            return
    pytest.fail("nothing was found")
