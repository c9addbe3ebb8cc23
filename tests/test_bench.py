# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and say all that they promise. Their figures are nobody's test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.qemu
def test_what_a_cell_costs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "run.py"), "--rounds", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)["figures"]}
    goals = {name for name, figure in figures.items() if figure["goal"]}
    assert {name.split(",")[0].split(" /")[0] for name in goals} >= {"default table", "virtiova --help", "cell ring"}
    assert all(figure["samples"] for figure in figures.values())
    assert "MMIO read, pipelined" in figures


def test_what_a_front_end_s_answers_cost() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "iotlb.py"), "--rounds", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)["samples"]
    assert set(samples) == {"pair", "lookup", "read_intervals", "read_native"}
    assert all(set(each) == {"1", "2000", "60000"} for each in samples.values())
