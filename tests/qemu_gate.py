# SPDX-License-Identifier: Apache-2.0
"""What becomes of tests marked ``qemu`` where there is no QEMU: a pytest plugin.

Skipped with the reason, except on Debian: QEMU is one apt-get away there, so that its absence is a
broken set-up, and a run that never touched QEMU must not look like a good one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

BINARY = "qemu-system-x86_64"
MARK = "qemu"


class QemuGate:
    """``qemu``: the binary's path or None. ``full_run``: all tests were asked for, not a choice of them."""

    def __init__(self, *, qemu: str | None, debian: bool, full_run: bool) -> None:
        self.qemu = qemu
        self.debian = debian
        self.full_run = full_run
        self.ran = 0

    @classmethod
    def of_this_machine(cls, config: pytest.Config) -> QemuGate:
        """The gate for the machine that the tests run on."""
        option = config.option
        chosen = option.keyword or option.collectonly or config.args_source is config.ArgsSource.ARGS
        return cls(
            qemu=shutil.which(BINARY),
            debian=Path("/etc/debian_version").exists(),
            full_run=bool(option.full_run and not chosen),
        )

    @property
    def nothing_ran(self) -> bool:
        """Whether this was a full run, on Debian, in which no test reached QEMU."""
        return self.full_run and self.debian and self.ran == 0

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker(MARK) is None:
            return
        # Properties travel from a pytest-xdist worker to the controller with the report.
        if (MARK, True) not in item.user_properties:
            item.user_properties.append((MARK, True))
        if self.qemu is None:
            if self.debian:
                pytest.fail(f"{BINARY} is not installed: apt install qemu-system-x86", pytrace=False)
            pytest.skip(f"{BINARY} is not installed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        marked = (MARK, True) in [(name, value) for name, value in report.user_properties]
        if marked and report.when == "call" and not report.skipped:
            self.ran += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        on_worker = hasattr(session.config, "workerinput")
        calm = session.exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
        if self.nothing_ran and calm and not on_worker:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.nothing_ran:
            terminalreporter.write_line("ERROR: a full run on Debian in which no test reached QEMU", red=True)
