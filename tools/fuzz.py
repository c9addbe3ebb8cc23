# SPDX-License-Identifier: Apache-2.0
"""Fuzz the native half, guided by coverage, under the address and undefined-behaviour sanitizers.

Usage: fuzz.py TARGET [--seconds N] [--seed N] [--into DIR] [--plant FROM TO] [--coverage]. Targets are the files
``native/fuzz_TARGET.c``. Built by clang, with its libFuzzer. What was found worth keeping stays in DIR/corpus (default:
``build/fuzz/TARGET``), and the next run goes on from there; the first begins with a few inputs that are made here.
``--plant`` replaces a text of the native sources before, in the copy that is built: to see that a mistake is found.
``--coverage`` says afterwards which part of each header the corpus gets to (with gcc and gcov).

Status: 0 nothing found, 1 found (the input stays in DIR, and the last lines say how to run it again), 77 not possible.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tools" / "native"
HEADERS = ROOT / "src" / "virtiova"
WARN: Final = ("-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unused-parameter")
CLANG: Final = (
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-g",
    "-O1",
    "-fsanitize=fuzzer,address,undefined",
    "-fno-sanitize-recover=all",
    *WARN,
)
NAMES: Final = ("clang", *(f"clang-{version}" for version in range(22, 13, -1)))


@dataclass(frozen=True)
class Target:
    """What a target's inputs are like."""

    longest: int
    headers: tuple[str, ...]
    """What is fuzzed: coverage is said of these."""
    options: tuple[str, ...] = ()
    lines: int = 85
    """Percent of the headers' lines that it has to get to within minutes."""


TARGETS: Final = {
    # No file that is truncated, none on a slow disk: those ways out need another process, or luck.
    "blk": Target(1024, ("blk.h",), ("-use_value_profile=1",), lines=65),
    # Nor what a wire does with a frame: that is the kernel's.
    "net": Target(1024, ("net.h", "burst.h"), ("-use_value_profile=1",)),
    "radix": Target(512, ("radix.h",)),
    "ring": Target(
        1024,
        ("ring.h", "chain.h", "notes.h", "notes_packed.h", "packed.h", "ring_state.h", "split.h", "radix.h"),
        ("-use_value_profile=1",),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run. ``edges``: of the program's, how many were gone through by the end."""

    runs: int
    edges: int
    corpus: int
    crash: Path | None
    said: str


class MissingError(Exception):
    """What fuzzing needs is not here."""


def clang() -> str:
    """A clang that has libFuzzer. Raises `MissingError`."""
    for name in NAMES:
        found = shutil.which(name)
        if found is not None:
            runtime = subprocess.run([found, "-print-runtime-dir"], check=False, capture_output=True, text=True)
            old = subprocess.run([found, "-print-resource-dir"], check=False, capture_output=True, text=True)
            folders = [Path(runtime.stdout.strip()), Path(old.stdout.strip()) / "lib" / "linux"]
            if any(any(folder.glob("libclang_rt.fuzzer*.a")) for folder in folders):
                return found
    raise MissingError("no clang with libFuzzer (to have it: apt install clang libclang-rt-dev)")


def sources(into: Path, plant: tuple[str, str] | None) -> Path:
    """A copy of all native sources, perhaps with a mistake in it."""
    folder = into / "sources"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (*HEADERS.glob("*.h"), *NATIVE.glob("*.[ch]")):
        shutil.copy(path, folder)
    if plant is not None:
        found = [path for path in folder.iterdir() if plant[0] in path.read_text()]
        if len(found) != 1:
            raise SystemExit(f"{plant[0]!r} is in {len(found)} native sources, wanted one")
        found[0].write_text(found[0].read_text().replace(*plant))
    return folder


def build(target: str, into: Path, plant: tuple[str, str] | None = None) -> Path:
    """The fuzzer as a program."""
    folder = sources(into, plant)
    program = into / f"fuzz_{target}"
    _compile([clang(), *CLANG, str(folder / f"fuzz_{target}.c"), "-o", str(program)])
    return program


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")


def run(target: str, into: Path, seconds: int, plant: tuple[str, str] | None = None, seed: int = 0) -> Outcome:
    """Build, and fuzz for so long; ends with the first finding. Raises `MissingError`."""
    this = TARGETS[target]
    program = build(target, into, plant)
    corpus = into / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number, data in enumerate(SEEDS[target]()):
            (corpus / f"seed-{number}").write_bytes(data)
    limits = [f"-max_total_time={seconds}", f"-max_len={this.longest}", "-timeout=10", "-rss_limit_mb=2048"]
    options = [*limits, f"-seed={seed}", f"-artifact_prefix={into}/", "-print_final_stats=1", *this.options]
    # Another process's malloc is not looked after: ours is, and all that is left over at the end of an input.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(program), *options, str(corpus)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", env=environment, timeout=seconds + 120
    )
    crash = re.search(r"Test unit written to (\S+)", done.stderr)
    if done.returncode and not crash:
        raise SystemExit(f"{program.name}: status {done.returncode}\n{done.stderr[-3000:]}")
    return Outcome(
        _last(r"number_of_executed_units: (\d+)", done.stderr),
        _last(r"cov: (\d+)", done.stderr),
        sum(1 for _ in corpus.iterdir()),
        Path(crash[1]) if crash else None,
        done.stderr,
    )


def _last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


# -- what a corpus gets to ---------------------------------------------------------------------------------------


def coverage(target: str, into: Path) -> dict[str, float]:
    """Lines of each header that the corpus goes through, in percent. Raises `MissingError`."""
    for name in ("gcc", "gcov"):
        if shutil.which(name) is None:
            raise MissingError(f"{name} is missing (to have it: apt install gcc)")
    folder = sources(into, None)
    program = folder / "replay"
    files = [str(folder / "replay.c"), str(folder / f"fuzz_{target}.c")]
    _compile(["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O0", "--coverage", *WARN, *files, "-o", str(program)])
    inputs = sorted(map(str, (into / "corpus").iterdir()))
    done = subprocess.run([str(program)], check=False, input="\n".join(inputs), text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"the corpus ends the program that replays it, status {done.returncode}")
    (notes,) = folder.glob(f"*fuzz_{target}.gcda")
    said = subprocess.run(["gcov", "-n", str(notes)], check=True, capture_output=True, text=True, cwd=folder).stdout
    found = re.findall(r"File '([^']+)'\nLines executed:([\d.]+)%", said)
    return {Path(name).name: float(percent) for name, percent in found if Path(name).name in TARGETS[target].headers}


# -- where a corpus begins ---------------------------------------------------------------------------------------


def radix_seeds() -> Iterator[bytes]:
    """Leaves of each size, looked for, and taken out in part."""
    for size in range(4):
        leaf = bytes([0, size, 8, 1, 2, 0, 0, 0, 1])
        yield leaf * 3 + bytes([4, 8, 1, 0]) + bytes([2, 8, 1, 0, 0, 0, 0, 0, 9])


def ring_seeds() -> Iterator[bytes]:
    """A ring of eight that works, of each kind: two buffers are offered, taken, given back and shown, three times. Its
    used ring lies within a page, or its first element in two. And one of which the head is no descriptor of the ring,
    while somebody writes to where it was looked for."""
    for kind in range(16):
        marks = 0x10 if kind & 1 else 0
        data = b""
        for turn in range(3):
            first = 2 * turn
            data += _descriptor(first, 4, 16, turn if marks else 1, 1 | marks if marks else first + 1)
            data += _descriptor(first + 1, 5, 512, turn if marks else 2, 2 | marks)
            data += bytes([3, 0, first, 5, 8, 0, 0, 0, 0, 16, 9, 10, 11, 12])
        for used in (0x2000, 0x2FF8):
            yield _ring(kind, 0x81, used) + data
    for loads in range(6):
        chain = _descriptor(8, 4, 16, 1, 9) + _descriptor(9, 5, 512, 2, 0)
        yield _ring(0, 1, 0x2000) + chain + bytes([14, 0x80, *bytes(10), loads, 3, 0, 8, 5])


def blk_seeds() -> Iterator[bytes]:
    """A sector read and a sector written, of a disk of each kind: header, data, status."""
    for kind in range(0, 64, 2):
        data = b""
        for turn in range(2):
            first, data_flags = 3 * turn, 2 * (1 - turn)
            data += bytes([3, 4, 0, 8 * first, turn, 1 + turn])
            data += _descriptor(first, 4, 16, 1, first + 1)
            data += _descriptor(first + 1, 5, 512, 1 | data_flags, first + 2)
            data += _descriptor(first + 2, 6, 1, 2, 0) + bytes([2, 0, first, 4, 9])
        yield struct.pack(">IBBBHH", 0, kind, 3, 0, 0, 0) + data


def net_seeds() -> Iterator[bytes]:
    """A ring of 64, of frames of one buffer each, or of buffers for three that came; one at a time, and many."""
    for kind in range(0, 128, 2):
        receives = kind >> 3 & 1
        data = bytes([4, 4, 4, 6, 4, 10]) if receives else b""
        for turn in range(2):
            data += bytes([3, 8]) + struct.pack(">H", 16 * turn) + bytes([8 - 2 * turn, 2 * receives, 16, 5, 70])
        for turn in range(3):
            data += _descriptor(turn, 6, 64, 2 * receives | (turn == 0), turn + 1) + bytes([2, 0, turn, 6, 9])
        yield struct.pack(">IBBHBHH", 0, kind, 6, 0, 0, 0, 0) + data


def _ring(kind: int, how: int, used: int) -> bytes:
    return struct.pack(">IBBBHHHH", 0, kind, how, 3, 0, 0x1000, used, 0)


def _descriptor(index: int, page: int, length: int, third: int, fourth: int) -> bytes:
    usual = [0, 1, 16, 32, 48, 64, 512]
    return bytes([0, index, page]) + struct.pack(">H", 8 * index) + bytes([usual.index(length), third, fourth])


SEEDS: Final = {"blk": blk_seeds, "net": net_seeds, "radix": radix_seeds, "ring": ring_seeds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--plant", nargs=2, metavar=("FROM", "TO"))
    parser.add_argument("--coverage", action="store_true")
    options = parser.parse_args()
    into = (options.into or ROOT / "build" / "fuzz" / options.target).resolve()
    try:
        outcome = run(options.target, into, options.seconds, options.plant and tuple(options.plant), options.seed)
        print(f"{options.target}: {outcome.runs} inputs, {outcome.edges} edges, {outcome.corpus} inputs kept")
        if options.coverage:
            for name, percent in coverage(options.target, into).items():
                print(f"{name}: {percent} % of lines")
    except MissingError as missing:
        print(missing, file=sys.stderr)
        return 77
    if outcome.crash is None:
        return 0
    print(outcome.said[-20000:], file=sys.stderr)
    print(f"again: {into}/fuzz_{options.target} {outcome.crash}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
