# SPDX-License-Identifier: Apache-2.0
"""Set-up of the test run: QEMU or not, and how Hypothesis looks for examples."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from qemu_gate import QemuGate
from qemu_kit import BLK
from virtiova.machine.qemu.machine import QemuMachine

# No deadline: cores are shared. In CI the same examples every time: a failure there is one of that change.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-run",
        action="store_true",
        help="all tests are wanted: on Debian fail if none of them reached QEMU",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(QemuGate.of_this_machine(config), "qemu-gate")


@pytest.fixture
def blk() -> Iterator[QemuMachine]:
    """A block device with bit 33, behind VT-d."""
    with QemuMachine(BLK) as machine:
        yield machine
