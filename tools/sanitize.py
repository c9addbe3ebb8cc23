# SPDX-License-Identifier: Apache-2.0
"""Run Python with the native half under the address and undefined-behaviour sanitizers.

Usage: sanitize.py [--into DIR] [--plant FROM TO]... -- ARGUMENTS OF PYTHON...

Builds `_core` once more with gcc into DIR (default: build/sanitize), where the rest of the package is linked to, and
runs ``python ARGUMENTS`` with it; the exit status is that of Python. ``--plant`` replaces a text of the native
sources before, in the copy that is built: to see that a mistake is found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "virtiova"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
LIMITED = ["-DPy_LIMITED_API=0x030B0000", "-DCYTHON_LIMITED_API=1"]
QUIET = ["-Wno-unused-parameter", "-Wno-unused-function"]


def runtime(name: str) -> str:
    """Where gcc keeps a library of its own."""
    done = subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        raise SystemExit(f"gcc has no {name}: the sanitizers cannot run")
    return str(path.resolve())


def build(into: Path, plants: Sequence[tuple[str, str]]) -> Path:
    """A folder for PYTHONPATH with the package in it."""
    if shutil.which("gcc") is None:
        raise SystemExit("the sanitizers need gcc (to have it: apt install gcc libc6-dev)")
    package, sources = into / "virtiova", into / "native"
    shutil.rmtree(into, ignore_errors=True)
    package.mkdir(parents=True)
    sources.mkdir()
    for path in PACKAGE.iterdir():
        if path.suffix in {".pyx", ".pxi", ".h"}:
            shutil.copy(path, sources)
        elif path.name != "__pycache__" and path.suffix != ".so":
            (package / path.name).symlink_to(path)
    for plant in plants:
        found = [path for path in sources.iterdir() if plant[0] in path.read_text()]
        if len(found) != 1:
            raise SystemExit(f"{plant[0]!r} is in {len(found)} native sources, wanted one")
        found[0].write_text(found[0].read_text().replace(*plant))
    cython = [sys.executable, "-m", "cython", "-3", str(sources / "_core.pyx"), "-o", str(sources / "_core.c")]
    include = ["-I", sysconfig.get_path("include"), "-I", str(sources)]
    flags = ["-shared", "-fPIC", "-std=gnu11", "-O1", "-g", *SANITIZE, *LIMITED, *QUIET, *include]
    gcc = ["gcc", *flags, str(sources / "_core.c"), "-o", str(package / "_core.abi3.so")]
    for command in (cython, gcc):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return into


def main() -> int:
    """Build and run; a negative status of Python is that of a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "sanitize")
    parser.add_argument("--plant", nargs=2, action="append", default=[], metavar=("FROM", "TO"))
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:cut])
    path = build(options.into.resolve(), [(wrong, planted) for wrong, planted in options.plant])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(path), str(ROOT / "tests")]),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # What Python itself keeps until the end is no leak of ours; its objects come from malloc, to be looked after.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run([sys.executable, *sys.argv[cut + 1 :]], check=False, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
