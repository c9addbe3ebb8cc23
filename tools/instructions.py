# SPDX-License-Identifier: Apache-2.0
"""Count the instructions of what the data plane does, and compare them with what is recorded.

Usage: instructions.py [--part native|python] [--record]. Time on shared machines is noisy, instructions are not:
callgrind (a part of valgrind) counts those of known pieces of work, in C (``native/instructions.c``) and of requests
that a device in Python handles (``tests/python_requests.py``). The counts for one look-up, chain or request are in
``instructions.json``, with the compiler and the interpreter that they are of; ``--record`` writes them anew. Status 1:
more or fewer than recorded by more than the tolerance, or something is not recorded; 77: not possible here.

Another compiler or interpreter makes other instructions. Then the counts are not compared, which is said, but ratios of
two of them (`RATIOS`): those say that 65,536 mappings cost what one costs, and the like.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tools" / "native"
INCLUDE = ROOT / "src" / "virtiova"
RECORD = ROOT / "tools" / "instructions.json"
SCHEMA: Final = "virtiova/instructions/1"
PARTS: Final = ("native", "python")
TOLERANCE: Final = 0.10
RATIO_TOLERANCE: Final = 0.35
SOURCES: Final = ("instructions.c", "instructions_blk.c", "instructions_net.c", "copy.c")
FLAGS: Final = ("-std=gnu11", "-O3", "-g", "-D_GNU_SOURCE")
"""As the native half is built (meson.build)."""
PLAIN_MEMCPY: Final = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX2,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM"
"""glibc's choice of a memcpy depends on the processor: of these, Python is to use the same everywhere. The native part
has its own (``native/copy.c``)."""

RATIOS: Final = (
    ("radix: look-up, 65536 pages", "radix: look-up, 1 page"),
    ("split: chain of 2, batch of 1", "split: chain of 2, batch of 64"),
    ("split: indirect table of 2, batch of 64", "split: chain of 2, batch of 64"),
    ("blk: 4 KiB read from memory, batch of 1", "blk: 4 KiB read from memory, batch of 64"),
    ("net: 64 bytes transmitted, batch of 1", "net: 64 bytes transmitted, batch of 64"),
    ("python: a request handled, 1 at a time", "python: a request handled, 32 at a time"),
)


class MissingError(Exception):
    """What counting needs is not here."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison came to. ``made_by``: who made what was counted, if not who made what is recorded."""

    lines: list[str]
    wrong: list[str]
    made_by: str = ""


def need(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingError(f"{name} is missing (to have it: apt install {name})")
    return found


def made_by(part: str) -> str:
    """Machine, compiler, and for Python the interpreter: other ones make other instructions."""
    said = subprocess.run([need("gcc"), "-dumpfullversion"], check=True, capture_output=True, text=True).stdout.strip()
    words = [platform.machine(), f"gcc {said}"]
    if part == "python":
        words.append(f"{platform.python_implementation()} {platform.python_version()} ({platform.python_compiler()})")
        words.append(f"Cython {_cython()}")
    return ", ".join(words)


def _cython() -> str:
    from importlib.metadata import version

    return version("cython")


def measure(part: str) -> dict[str, float]:
    """Instructions of each piece of work, for one. Raises `MissingError`."""
    valgrind = [need("valgrind"), "--tool=callgrind", "--collect-atstart=no"]
    with tempfile.TemporaryDirectory() as name:
        into = Path(name)
        environment = {**os.environ, "GLIBC_TUNABLES": PLAIN_MEMCPY, "PYTHONHASHSEED": "0"}
        if part == "native":
            run = [str(compiled(into / "work", *SOURCES))]
        else:
            marks = compiled(into / "marks.so", "marks.c", "-shared", "-fPIC")
            valgrind.append("--instr-atstart=no")
            run = [sys.executable, str(ROOT / "tests" / "python_requests.py"), str(marks)]
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
        command = [*valgrind, f"--callgrind-out-file={into / 'out'}", *run]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{run[0]} under callgrind: status {done.returncode}\n{done.stderr[-3000:]}")
        return counts(into)


def compiled(into: Path, *words: str) -> Path:
    """A program or library, of sources and options."""
    warn = ["-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unused-parameter"]
    given = [str(NATIVE / word) if word.endswith(".c") else word for word in words]
    command = [need("gcc"), *FLAGS, *warn, "-I", str(INCLUDE), *given, "-pthread", "-o", str(into)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        hint = "\n(valgrind's headers: apt install valgrind)" if "valgrind/" in done.stderr else ""
        raise RuntimeError(f"{words}: {done.stderr[-3000:]}{hint}")
    return into


def counts(folder: Path) -> dict[str, float]:
    """What callgrind dumped: each file has one piece of work, its name and how often it was done."""
    found: dict[str, float] = {}
    for path in folder.glob("out.*"):
        text = path.read_text(errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (.+)/(\d+)$", text, re.M)
        total = re.search(r"^(?:totals|summary): (\d+)$", text, re.M)
        if name and total:
            found[name[1]] = int(total[1]) / int(name[2])
    nothing = found.pop("nothing", 0.0)
    return {name: round(count - nothing, 1) for name, count in sorted(found.items())}


# -- what is recorded --------------------------------------------------------------------------------------------


def recorded() -> dict[str, Any]:
    said: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"schema": SCHEMA}
    return said


def record(part: str, found: dict[str, float]) -> None:
    said = recorded()
    said[part] = {"made by": made_by(part), "counts": found}
    RECORD.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")


def compare(found: dict[str, float], kept: dict[str, Any], by: str) -> Verdict:
    """``found`` against what is ``kept`` of the same part; ``by`` is who made it."""
    before: dict[str, float] = kept.get("counts", {})
    if kept.get("made by") != by:
        lines = [f"recorded of {kept.get('made by', 'nobody')}; this is {by}: ratios are compared instead"]
        return _judged(lines, _ratios(before), _ratios(found), RATIO_TOLERANCE, by)
    return _judged([], before, found, TOLERANCE, "")


def _judged(lines: list[str], before: dict[str, float], found: dict[str, float], tolerance: float, by: str) -> Verdict:
    wrong = []
    for name in sorted({*before, *found}):
        was, now = before.get(name), found.get(name)
        line = f"{name:55} {_number(was)} {_number(now)}"
        if was is None or now is None:
            wrong.append(f"{line}: {'not recorded' if was is None else 'not counted'}")
        elif abs(now - was) > tolerance * was:
            wrong.append(f"{line}: {now / was - 1:+.0%}, wanted within {tolerance:.0%}")
        lines.append(line)
    return Verdict(lines, wrong, by)


def _number(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.1f}':>10}"


def _ratios(counts: dict[str, float]) -> dict[str, float]:
    return {
        f"{above} / {below}": counts[above] / counts[below]
        for above, below in RATIOS
        if above in counts and below in counts
    }


def check(part: str) -> Verdict:
    """Count, and compare with what is recorded."""
    return compare(measure(part), recorded().get(part, {}), made_by(part))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--record", action="store_true", help="what is counted is what is right from now on")
    options = parser.parse_args()
    wrong = 0
    for part in options.part or PARTS:
        try:
            if options.record:
                record(part, measure(part))
            verdict = check(part)
        except MissingError as missing:
            print(missing, file=sys.stderr)
            return 77
        print("\n".join(verdict.lines))
        for line in verdict.wrong:
            print(f"wrong: {line}", file=sys.stderr)
        wrong += len(verdict.wrong)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
