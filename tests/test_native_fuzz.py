# SPDX-License-Identifier: Apache-2.0
"""The native half under a coverage-guided fuzzer: nothing found, and what is put there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fuzz
from fuzz import NATIVE, ROOT, SEEDS, TARGETS

try:
    LACKS = "" if fuzz.clang() else "never"
except fuzz.MissingError as missing:
    LACKS = str(missing)
needs_clang = pytest.mark.skipif(bool(LACKS), reason=LACKS)

PLANTED = {
    "blk: past the end": ("blk", "size / VV_SECTOR <= blk->sectors - sector;", "size / VV_SECTOR <= blk->sectors;"),
    "blk: only to be read": ("blk", "(write && !blk->may_write) ||", ""),
    "blk: refused and kept": ("blk", "vv_ring_put_back(ring, &blk->chain);\n            got", "got"),
    "net: over the border of a leaf": ("net", "|| left < one[at].length)) {", ")) {"),
    "net: buffers that are kept": ("net", "vv_receive_put_back(net, ring, *count);", ""),
    "radix: a byte too many": ("radix", "*left = ((uint64_t)1 << shift) - inside;", "*left = ((uint64_t)1 << shift);"),
    "radix: more is dropped": ("radix", "at == end ? last & inside : inside;", "inside;"),
    "radix: a table is lost": ("radix", "vv_free_table(radix, vv_next(table[at]));\n    free(table);", "free(table);"),
    "radix: nobody hears of it": ("radix", "radix->generation++;\n    vv_drop(", "vv_drop("),
    "ring: the permission": (
        "ring",
        "desc->address, desc->length, VV_WRITE)))",
        "desc->address, desc->length, VV_READ)))",
    ),
    "ring: an element over the border": (
        "ring",
        "return leaf->size - inside >= length ? leaf->host + inside : NULL;",
        "return leaf->host + inside;",
    ),
    "ring: a head that is loaded twice": (
        "ring",
        "if (vv_unlikely(head >= ring->size ||",
        "if (vv_unlikely(vv_load_relaxed16(at, 0) >= ring->size ||",
    ),
    "ring: more than there are": ("ring", "ring->taken >= ring->size ||", ""),
    "ring: what is refused is gone": (
        "ring",
        "return VV_HELP;\n    vv_packed_move(ring, &ring->next_avail, &ring->avail_wrap, chain->slots);",
        "return ring->next_avail ^= 1, VV_HELP;\n"
        "    vv_packed_move(ring, &ring->next_avail, &ring->avail_wrap, chain->slots);",
    ),
}


def test_every_target_is_listed() -> None:
    assert {path.stem.removeprefix("fuzz_") for path in NATIVE.glob("fuzz_*.c")} == TARGETS.keys() == SEEDS.keys()


@needs_clang
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(tmp_path: Path, target: str) -> None:
    outcome = fuzz.run(target, tmp_path / target, seconds=5, seed=1)
    assert outcome.crash is None, outcome.said[-20000:]
    assert outcome.runs > 1000
    assert outcome.corpus > len(list(SEEDS[target]())), "it learns nothing"


@pytest.mark.sweep
@needs_clang
@pytest.mark.timeout(400)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_for_longer(tmp_path: Path, target: str) -> None:
    outcome = fuzz.run(target, tmp_path / target, seconds=200)
    assert outcome.crash is None, outcome.said[-20000:]
    for header, percent in fuzz.coverage(target, tmp_path / target).items():
        assert percent > TARGETS[target].lines, f"{header}: the fuzzer gets to {percent} % of its lines only"


@pytest.mark.sweep
@needs_clang
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(tmp_path: Path, name: str) -> None:
    target, right, wrong = PLANTED[name]
    outcome = fuzz.run(target, tmp_path / target, seconds=150, plant=(right, wrong), seed=1)
    assert outcome.crash is not None, f"{outcome.runs} inputs, and nothing was found"
    again = subprocess.run(
        [str(tmp_path / target / f"fuzz_{target}"), str(outcome.crash)], check=False, capture_output=True, timeout=60
    )
    assert again.returncode, "the input that is kept shows it"


@needs_clang
def test_the_tool_says_what_it_found(tmp_path: Path) -> None:
    """And nothing else is planted than what was asked for."""
    tool = [sys.executable, str(ROOT / "tools" / "fuzz.py"), "radix", "--into", str(tmp_path), "--seconds", "60"]
    _, right, wrong = PLANTED["radix: a byte too many"]
    done = subprocess.run([*tool, "--plant", right, wrong], check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 1, done.stderr
    assert "left == last_of(leaf) - iova + 1" in done.stderr
    assert "again: " in done.stderr.splitlines()[-1]
    done = subprocess.run(
        [*tool, "--plant", "no text of ours", ""], check=False, capture_output=True, text=True, timeout=60
    )
    assert "is in 0 native sources, wanted one" in done.stderr
    assert done.returncode == 1
