# SPDX-License-Identifier: Apache-2.0
"""The tutorial of the kit: its examples are run, in order, and what it shows is what they print or raise."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from typing import Any

import pytest

from doc_kit import ROOT, Block, blocks, pattern
from virtiova import testing
from virtiova.testing import CheckFailed

PAGE = ROOT / "docs" / "testing.md"


def steps() -> list[tuple[Block, Block | None]]:
    """Each example, with what is shown below it, if anything."""
    found = [block for block in blocks(PAGE) if block.language in {"python", "text"}]
    pairs: list[tuple[Block, Block | None]] = []
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language == "python":
            pairs.append((block, after if after is not None and after.language == "text" else None))
    return pairs


def test_the_examples_do_what_is_shown() -> None:
    # One after the other, as a reader types them.
    names: dict[str, Any] = {"__name__": "tutorial"}
    shown = 0
    for block, output in steps():
        printed = io.StringIO()
        code = compile("\n" * block.line + block.text, str(PAGE), "exec")
        with contextlib.redirect_stdout(printed):
            try:
                exec(code, names)
            except CheckFailed as failed:
                print(f"{type(failed).__module__}.{type(failed).__qualname__}: {failed}")
        text = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
        if output is not None:
            shown += 1
            if not pattern(output.text).fullmatch(text):
                pytest.fail(f"{output}: it is\n{text}", pytrace=False)
        else:
            assert not text, f"{block} prints something that is not shown"
    assert shown >= 1


def test_without_hypothesis_it_says_what_to_install() -> None:
    program = """
import sys
sys.modules["hypothesis"] = None
import virtiova.testing
try:
    from virtiova.testing import check_ring
except ModuleNotFoundError as missing:
    print(missing)
from virtiova.testing import Memory
print(len(Memory().blocks))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    wanted = "virtiova.testing makes its histories with Hypothesis: pip install 'virtiova[testing]'\n2\n"
    assert done.stdout == wanted


def test_a_name_that_there_is_not() -> None:
    assert not hasattr(testing, "check_everything")
    assert all(hasattr(testing, name) for name in testing.__all__)
    assert dir(testing) == sorted(testing.__all__)


def test_all_that_is_public_is_named_there() -> None:
    text = PAGE.read_text()
    assert [name for name in testing.__all__ if f"`{name}" not in text] == []
