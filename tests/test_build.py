# SPDX-License-Identifier: Apache-2.0
"""What is built: one abi3 wheel without sources of the native half, and with everything else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import build_backend
import virtiova

ROOT = Path(__file__).resolve().parent.parent
NATIVE_SOURCES = {".pyx", ".c", ".h", ".so"}
NATIVE = ["virtiova/_core.abi3.so", "virtiova/_load.abi3.so"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    options = ["--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", str(out)]
    command = [sys.executable, "-m", "build", *options, str(ROOT)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.sweep
def test_wheel_is_abi3(wheel: Path) -> None:
    name, version, python, abi, _ = wheel.stem.split("-")
    assert (name, version, python, abi) == ("virtiova", virtiova.__version__, "cp311", "abi3")
    with zipfile.ZipFile(wheel) as archive:
        native = [name for name in archive.namelist() if name.endswith(".so")]
    assert sorted(native) == NATIVE


@pytest.mark.sweep
def test_wheel_holds_the_package_and_no_native_source(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry_points = archive.read(f"virtiova-{virtiova.__version__}.dist-info/entry_points.txt").decode()
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/virtiova").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and path.suffix not in NATIVE_SOURCES
    }
    package = {name for name in held if name.startswith("virtiova/")}
    assert package == wanted | set(NATIVE)
    assert any(name.endswith("LICENSE") for name in held)
    assert "virtiova.cli.main:entry" in entry_points.replace(" ", "")
    data = f"virtiova-{virtiova.__version__}.data/data/"
    assert {name.removeprefix(data) for name in held if name.startswith(data)} == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "share").rglob("*.json")
    }


def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("AR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_zig_only_where_no_compiler_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_compiler(monkeypatch, tmp_path)
    assert build_backend.extra_requires() == [build_backend.ZIG]
    # A name alone proves nothing.
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    assert build_backend.extra_requires() == [build_backend.ZIG]
    compiler.write_text("#!/bin/sh\nexit 0\n")
    assert build_backend.extra_requires() == []


def test_zig_is_told_which_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_compiler(monkeypatch, tmp_path)
    build_backend.choose_compiler()
    assert f"cc -target {build_backend.zig_target()}" in os.environ["CC"]
    assert os.environ["AR"].endswith("-m ziglang ar")


def test_a_chosen_compiler_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_compiler(monkeypatch, tmp_path)
    monkeypatch.setenv("CC", "my-cc")
    build_backend.choose_compiler()
    assert os.environ["CC"] == "my-cc"
    assert build_backend.extra_requires() == []


@pytest.mark.parametrize(
    ("system", "libc", "target"),
    [
        ("linux-x86_64", "glibc", "x86_64-linux-gnu.2.17"),
        ("linux-aarch64", "glibc", "aarch64-linux-gnu.2.17"),
        ("linux-riscv64", "glibc", "riscv64-linux-gnu.2.27"),
        ("linux-ppc64le", "glibc", "powerpc64le-linux-gnu.2.17"),
        ("linux-x86_64", "", "x86_64-linux-musl"),
    ],
)
def test_zig_targets(monkeypatch: pytest.MonkeyPatch, system: str, libc: str, target: str) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: system)
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, ""))
    assert build_backend.zig_target() == target
