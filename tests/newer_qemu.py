# SPDX-License-Identifier: Apache-2.0
"""A newer QEMU for tests: out of another suite of Debian, by the same way as ``--qemu bookworm-backports``."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

from virtiova.errors import NotPossibleError
from virtiova.machine.qemu.boards import RISCV_VIRT, VIRT
from virtiova.machine.qemu.installation import Installation
from virtiova.machine.qemu.suites import named

SUITE = "bookworm-backports"
BOARDS = (RISCV_VIRT, VIRT)
"""The boards of which there are tests: some 21 MB are fetched, once."""


@functools.cache
def _here() -> tuple[Installation, str]:
    installation = named(SUITE, BOARDS)
    try:
        for board in BOARDS:
            installation.binary(board)
    except NotPossibleError as error:
        return installation, str(error)
    return installation, ""


def newer_qemu(config: pytest.Config) -> Installation:
    """It is fetched on first use. Without it the test is skipped with the reason, or, where all tests of a Debian
    machine are asked for (``make test-all``), failed: it is one download away there."""
    installation, why = _here()
    if why:
        packages = ", ".join(dict.fromkeys(board.package for board in BOARDS))
        reason = f"no QEMU 10 here: {why} (to have it: 'virtiova matrix --qemu {SUITE}' fetches {packages})"
        if config.getoption("full_run") and not config.getoption("markexpr") and Path("/etc/debian_version").exists():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return installation


def run_qemu(installation: Installation, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask the riscv64 QEMU something that it answers at once."""
    argv = [installation.binary(RISCV_VIRT), *installation.arguments, *arguments]
    environment = installation.environment or dict(os.environ)
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False, env=environment)
