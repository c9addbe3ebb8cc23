# SPDX-License-Identifier: Apache-2.0
"""What the data plane costs, in instructions, against what is recorded; and that a difference is noticed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import instructions
from instructions import NATIVE, PARTS, RATIOS, check, compare, counts, made_by, recorded

HERE = [name for name in ("gcc", "valgrind") if shutil.which(name) is None]
needs_tools = pytest.mark.skipif(bool(HERE), reason=f"missing: {HERE} (to have them: apt install gcc valgrind)")


@needs_tools
@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", PARTS)
def test_as_many_as_recorded(part: str) -> None:
    verdict = check(part)
    assert not verdict.wrong, "\n".join(
        [*verdict.wrong, "meant to be so? .venv/bin/python tools/instructions.py --record"]
    )
    if verdict.made_by:
        # The ratios are right, which says something; the counts say nothing here, which is to be seen.
        pytest.skip(verdict.lines[0])


def test_everything_that_is_counted_is_recorded() -> None:
    kept = {name for part in PARTS for name in recorded()[part]["counts"]}
    assert {name for pair in RATIOS for name in pair} <= kept
    source = "".join(path.read_text() for path in sorted(NATIVE.glob("instructions*.c")))
    named = set(re.findall(r'"((?:radix|split|packed|blk|net): [^"]+)"', source))
    assert named == {name for name in recorded()["native"]["counts"]}


COUNTS = {"radix: look-up, 1 page": 50.0, "radix: look-up, 65536 pages": 50.0, "other": 100.0}
KEPT = {"made by": "me", "counts": COUNTS}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"other": 111.0}, "+11%"),
        ({"other": 89.0}, "-11%"),
        ({"new": 1.0}, "not recorded"),
        ({"other": None}, "not counted"),
    ],
)
def test_a_difference_is_found(change: dict[str, float | None], said: str) -> None:
    found = {name: count for name, count in {**COUNTS, **change}.items() if count is not None}
    (wrong,) = compare(found, KEPT, "me").wrong
    assert said in wrong
    assert not compare({**COUNTS, "other": 109.0}, KEPT, "me").wrong


def test_another_compiler_is_said_and_held_to_ratios() -> None:
    twice = {name: 2 * count for name, count in COUNTS.items()}
    verdict = compare(twice, KEPT, "you")
    assert verdict.made_by == "you"
    assert not verdict.wrong
    assert "recorded of me; this is you" in verdict.lines[0]
    slower = compare({**twice, "radix: look-up, 65536 pages": 150.0}, KEPT, "you")
    assert "+50%" in slower.wrong[0]


@needs_tools
@pytest.mark.timeout(300)
def test_a_slower_look_up_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter itself: a hundred more instructions in a header are seen in what uses it."""
    for path in (instructions.ROOT / "src" / "virtiova").glob("*.h"):
        text = path.read_text()
        if path.name == "radix.h":
            slow = "for (volatile int slow = 0; slow < 20; slow++);\n    if (!table || iova"
            assert text.count("if (!table || iova") == 1
            text = text.replace("if (!table || iova", slow)
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(instructions, "INCLUDE", tmp_path)
    wrong = check("native").wrong
    assert any(line.startswith("radix: look-up, 1 page") for line in wrong)


def test_what_counting_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(instructions.MissingError, match="apt install gcc"):
        made_by("native")


def test_dumps_of_callgrind(tmp_path: Path) -> None:
    for number, (name, total) in enumerate({"nothing/4": 40, "work/10": 1100, "no name": 7}.items(), 1):
        text = f"version: 1\ndesc: Trigger: Client Request: {name}\nevents: Ir\nsummary: {total}\n\ntotals: {total}\n"
        (tmp_path / f"out.{number}").write_text(text)
    assert counts(tmp_path) == {"work": 100.0}


def test_who_made_it_names_the_compiler() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    version = subprocess.run(["gcc", "-dumpfullversion"], check=True, capture_output=True, text=True).stdout.strip()
    assert f"gcc {version}" in made_by("native")
