# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, as somebody else's suite sees it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vhost_user_kit import commands

SERVE = f"{sys.executable} -m virtiova serve"
PLUGIN = "virtiova.conformance.plugin"


def suite(folder: Path, *words: str) -> tuple[int, str]:
    """pytest in a folder of its own, with our plugin and no other; exit status and output."""
    argv = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", "-v", "-rs", *words]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr


def test_it_is_installed_as_a_plugin() -> None:
    found = importlib.metadata.entry_points(group="pytest11", name="virtiova")
    assert [each.value for each in found] == [PLUGIN]


def test_cases_are_tests_beside_ones_own(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    spawn = f"{SERVE} leaky {{image}} --socket-path {{socket}}"
    few = ["--virtiova-case", "bit33-offered", "--virtiova-case", "translate"]
    status, said = suite(tmp_path, "--virtiova-backend", spawn, "--virtiova-type", "blk", *few)
    assert status == 1, said
    assert "test_own.py::test_own PASSED" in said
    assert "virtiova::bit33-offered PASSED" in said
    assert "virtiova::translate FAILED" in said
    assert "wanted A" in said
    assert "rests on" in said
    assert not [line for line in commands() if "serve leaky" in line and "virtiova-" in line]


def test_selection_by_name_and_what_does_not_apply(tmp_path: Path) -> None:
    spawn = f"{SERVE} blk --memory 8M --read-only --socket-path {{socket}}"
    status, said = suite(tmp_path, "--virtiova-backend", spawn, "--virtiova-type", "blk", "-k", "translate")
    assert status == 0, said
    assert "1 passed" in said
    assert "deselected" in said


def test_without_a_back_end_nothing_is_added(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\ndef test_own(): assert not [name for name in sys.modules if name.startswith('virtiova.machine')]\n"
    )
    status, said = suite(tmp_path)
    assert status == 0, said
    assert "1 passed" in said


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--virtiova-case", "translate"], "which back end"),
        (["--virtiova-backend", "no-such-program {socket}", "--virtiova-type", "blk"], "no-such-program"),
        (["--virtiova-backend", f"{SERVE} blk", "--virtiova-type", "blk"], "{socket}"),
        (["--virtiova-backend", f"{SERVE} rng --socket-path {{socket}}", "--virtiova-type", "rmg"], "rng"),
        (
            [
                "--virtiova-backend",
                f"{SERVE} rng --socket-path {{socket}}",
                "--virtiova-type",
                "rng",
                "--virtiova-case",
                "translat",
            ],
            "translate",
        ),
    ],
)
def test_usage(tmp_path: Path, words: list[str], what: str) -> None:
    status, said = suite(tmp_path, *words)
    assert status == 4, said
    assert what in said
    assert "Traceback" not in said
