# SPDX-License-Identifier: Apache-2.0
"""Where the command line's output goes - terminals, colour, pipes, a full disk - and how soon it comes."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence

import pytest

from cli_kit import HONEST, LYING, SECONDS, environment, virtiova_run
from probe_kit import GENERAL
from virtiova.cli import exits

# -- terminals, colour, pipes ---------------------------------------------------------------------------------------


def on_terminal(columns: int, *args: str, **env: str) -> str:
    """What a terminal of so many columns gets to see."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "virtiova", *args], stdout=theirs, stderr=subprocess.PIPE, env=environment(**env)
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017 - the other end was closed
                break
            if not data:
                break
            seen += data
        process.wait(SECONDS)
    os.close(ours)
    return seen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [100, 120, 200])
def test_the_width_of_a_terminal_is_obeyed(columns: int) -> None:
    seen = on_terminal(columns, "probe", "--color", "never", "model", "lying")
    assert "NOT AS PREDICTED" in seen.replace("\n", " ")
    assert max(map(len, seen.splitlines())) <= columns


@pytest.mark.qemu
def test_the_default_table_fits_into_100_columns() -> None:
    seen = on_terminal(100, "probe", "--color", "never")
    assert [line for line in seen.splitlines() if len(line) > 100] == []


def test_no_width_is_forced_on_a_pipe() -> None:
    done = virtiova_run("probe", "model", "lying", COLUMNS="60")
    rows = [line for line in done.stdout.splitlines() if line.startswith("model")]
    assert len(rows) == len(GENERAL)
    assert all("  " in row and len(row) > 60 for row in rows)


def test_colour_is_for_terminals() -> None:
    args = LYING
    assert "\x1b[31m" in on_terminal(120, *args, NO_COLOR="")
    assert "\x1b" not in on_terminal(120, *args, NO_COLOR="1")
    assert "\x1b" not in virtiova_run(*args).stdout
    assert "\x1b[31m" in virtiova_run(*args, "--color", "always").stdout
    assert "\x1b[31m" in virtiova_run(*args, "--color", "always", NO_COLOR="1").stdout


@pytest.mark.parametrize("args", [("probe", "model", "honest"), ("probe", "-j", "model", "honest"), ("--help",)])
def test_a_broken_pipe_is_no_error(args: Sequence[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "virtiova", *args], stdout=writer, stderr=subprocess.PIPE, env=environment(), timeout=60,
        check=False, text=True,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (exits.OK, -13, 141)


def test_a_full_disk_is_an_error_but_no_bug() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "virtiova", *HONEST], stdout=full, stderr=subprocess.PIPE, env=environment(),
            timeout=60, check=False, text=True,
        )  # fmt: skip
    assert done.returncode == exits.COULD_NOT_LOOK
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


# -- start-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("probe", "--help"), ("probe", "qemu", "--help")])
def test_help_imports_nothing_heavy(args: Sequence[str]) -> None:
    program = (
        "import sys\nfrom virtiova.cli.main import main\n"
        f"try: main({list(args)!r})\nexcept SystemExit: pass\nprint('MODULES', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(done.stderr.split())
    assert "virtiova.cli.main" in modules
    heavy = {"msgspec", "asyncio", "dataclasses", "subprocess", "socket", "concurrent.futures", "qemu", "inspect"}
    assert heavy.isdisjoint(modules)
    ours = {name for name in modules if name.startswith("virtiova.") and not name.startswith("virtiova.cli")}
    assert ours <= {"virtiova.errors"}
