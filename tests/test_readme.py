# SPDX-License-Identifier: Apache-2.0
"""The README's promises: its Python runs, and its table consists of rows that are really printed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from doc_kit import README, Block, blocks

PYTHON = [block for block in blocks(README) if block.language == "python"]
TABLES = [block for block in blocks(README) if block.text.startswith("MACHINE ")]

pytestmark = pytest.mark.qemu


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def promised(block: Block) -> list[str]:
    """The comments behind ``print(...)``: what that line prints."""
    return re.findall(r"^ *print\(.*\)  +# (.+)$", block.text, re.MULTILINE)


def test_there_is_something_to_run() -> None:
    assert len(PYTHON) == 2
    assert len(TABLES) == 1


@pytest.mark.parametrize("block", [block for block in PYTHON if promised(block)], ids=str)
def test_python_prints_what_its_comments_say(block: Block) -> None:
    assert run("-c", block.text).splitlines() == promised(block)


@pytest.mark.parametrize("block", [block for block in PYTHON if not promised(block)], ids=str)
def test_python_shows_cells_and_their_witnesses(block: Block) -> None:
    lines = run("-c", block.text).splitlines()
    cells = [line for line in lines if not line.startswith(" ")]
    witnesses = [line for line in lines if line.startswith(" ")]
    assert cells == ["virtio-blk-pci True True translated translated"] * 2
    assert witnesses
    for line in witnesses:
        found = re.fullmatch(r"  (\S+) page A at 0x8\w{5}: ([0-9a-f]+) -> ([0-9a-f]+)", line)
        assert found, line
        assert found[2] != found[3]
    assert any(b"sector 00000001".hex() in line for line in witnesses)


def test_the_table_consists_of_real_rows() -> None:
    (table,) = TABLES
    printed = {tuple(re.split(r"  +", line)) for line in run("-m", "virtiova", "probe").splitlines()}
    for line in table.text.splitlines():
        assert tuple(re.split(r"  +", line.rstrip())) in printed, line
