# SPDX-License-Identifier: Apache-2.0
"""The PEP 517 backend: meson-python, with two things of our own.

* Where no C compiler answers, ``ziglang`` (a wheel with a whole compiler in it) becomes a build requirement
  and is used. Only then: it is a download of 100 MB.
* An editable install is a path file, and the native module is put into the source tree. Its Python files
  are live and start-up costs nothing; after a change of a native source the install has to be repeated.

``python tools/build_backend.py`` prints what a build without isolation needs, or what the extras named as
arguments need: one requirement a line.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ZIG = "ziglang>=0.13"
# The oldest C library that each machine's symbols are bound to; 2.17 is what manylinux2014 promises.
GLIBC = {"riscv64": "2.27", "loongarch64": "2.36"}
ZIG_MACHINE = {"ppc64le": "powerpc64le", "ppc64": "powerpc64", "i686": "x86", "i386": "x86"}

Settings = dict[str, Any] | None


def has_compiler() -> bool:
    """Whether a C compiler answers. A name on the path proves nothing, so it is asked for its version."""
    if os.environ.get("CC"):
        return True
    try:
        subprocess.run(
            ["cc", "--version"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def zig_target() -> str:
    """This machine's own target. Without one, zig compiles for exactly this CPU and this C library."""
    machine = sysconfig.get_platform().removeprefix("linux-")
    name = ZIG_MACHINE.get(machine, machine)
    if machine.startswith("armv"):
        return "arm-linux-gnueabihf.2.17"
    if platform.libc_ver()[0] != "glibc":
        return f"{name}-linux-musl"
    return f"{name}-linux-gnu.{GLIBC.get(machine, '2.17')}"


def choose_compiler() -> None:
    """Point meson at zig where there is nothing else."""
    if has_compiler():
        return
    zig = f"{shlex.quote(sys.executable)} -m ziglang"
    # With a target zig looks into its own headers only, but Debian's Python.h includes a file by its path
    # below /usr/include. Last in the search, so that no other header comes from there.
    headers = shlex.quote(os.path.dirname(sysconfig.get_path("include")))
    os.environ["CC"] = f"{zig} cc -target {zig_target()} -idirafter {headers}"
    os.environ.setdefault("AR", f"{zig} ar")


def extra_requires() -> list[str]:
    """What the build needs beyond meson-python's own list."""
    return [] if has_compiler() else [ZIG]


def get_requires_for_build_sdist(settings: Settings = None) -> list[str]:
    """PEP 517. `meson dist` configures the project first, so a compiler is needed here too."""
    import mesonpy

    return [*mesonpy.get_requires_for_build_sdist(settings), *extra_requires()]


def get_requires_for_build_wheel(settings: Settings = None) -> list[str]:
    """PEP 517."""
    import mesonpy

    return [*mesonpy.get_requires_for_build_wheel(settings), *extra_requires()]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_sdist(directory: str, settings: Settings = None) -> str:
    """PEP 517."""
    import mesonpy

    choose_compiler()
    name: str = mesonpy.build_sdist(directory, settings)
    return name


def build_wheel(directory: str, settings: Settings = None, metadata: str | None = None) -> str:
    """PEP 517."""
    import mesonpy

    choose_compiler()
    name: str = mesonpy.build_wheel(directory, settings, metadata)
    return name


def build_editable(directory: str, settings: Settings = None, metadata: str | None = None) -> str:
    """PEP 660: the ordinary wheel, with the package replaced by the path to it."""
    settings = dict(settings or {})
    # Kept between calls, so that the next one compiles only what changed.
    settings.setdefault("build-dir", str(ROOT / "build" / f"editable-{sysconfig.get_platform()}"))
    with tempfile.TemporaryDirectory() as scratch:
        name = build_wheel(scratch, settings, metadata)
        with (
            zipfile.ZipFile(Path(scratch, name)) as wheel,
            zipfile.ZipFile(Path(directory, name), "w", zipfile.ZIP_DEFLATED) as editable,
        ):
            repack(wheel, editable)
    return name


def repack(wheel: zipfile.ZipFile, editable: zipfile.ZipFile) -> None:
    """Put native modules into the source tree and everything that describes the package into ``editable``."""
    record: list[str] = []
    record_name = ""

    def add(name: str, data: bytes) -> None:
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(data)}")
        editable.writestr(name, data)

    for name in wheel.namelist():
        if name.endswith(".dist-info/RECORD"):
            record_name = name
        elif ".dist-info/" in name:
            add(name, wheel.read(name))
        elif name.endswith(".so"):
            place = ROOT / "src" / name
            # Renamed into place: a process that has the old one mapped keeps it.
            fresh = place.with_name(f".{place.name}.{os.getpid()}")
            fresh.write_bytes(wheel.read(name))
            fresh.chmod(0o755)
            fresh.replace(place)
    add("__editable__virtiova.pth", f"{ROOT / 'src'}\n".encode())
    editable.writestr(record_name, "\n".join([*record, f"{record_name},,", ""]))


if __name__ == "__main__":
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if extras := sys.argv[1:]:
        wanted = [line for extra in extras for line in pyproject["project"]["optional-dependencies"][extra]]
    else:
        wanted = [*pyproject["build-system"]["requires"], "ninja>=1.11", *extra_requires()]
    print(*wanted, sep="\n")
