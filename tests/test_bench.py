# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and say all that they promise. Their figures are nobody's test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def measured(name: str, *arguments: str) -> Any:
    """One round of a benchmark, as JSON."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / name), "--rounds", "1", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.qemu
def test_what_a_cell_costs() -> None:
    figures = {figure["name"]: figure for figure in measured("run.py")["figures"]}
    goals = {name for name, figure in figures.items() if figure["goal"]}
    assert {name.split(",")[0].split(" /")[0] for name in goals} >= {"default table", "virtiova --help", "cell ring"}
    assert all(figure["samples"] for figure in figures.values())
    assert "MMIO read, pipelined" in figures


def test_what_a_front_end_s_answers_cost() -> None:
    samples = measured("iotlb.py")["samples"]
    assert set(samples) == {"pair", "lookup", "read_intervals", "read_native"}
    assert all(set(each) == {"1", "2000", "60000"} for each in samples.values())


def test_what_bit_33_costs_a_back_end() -> None:
    samples = measured("serve.py", "--beside", str(ROOT / "src"))["samples"]
    rows = {"bit on", "bit off", "beside, bit on", "beside, bit off"}
    assert set(samples) == rows | {f"{row}, processor" for row in rows}
    assert all(each[0] > 0 for each in samples.values())


def test_how_long_an_acknowledgement_takes_under_load() -> None:
    rows = measured("invalidate.py")
    assert [row["load"].split(",")[0] for row in rows] == ["blk", "blk", "blk", "net"]
    assert all(row["largest ms"] > 0 for row in rows)
