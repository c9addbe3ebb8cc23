# SPDX-License-Identifier: Apache-2.0
"""Random rings in numbers, also with the native half under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import json
import mmap
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from native_crash import HOOK, IDS, Packed, go_on
from ring_storm import RING, Storm
from virtiova.ring.layout import DESC_F_WRITE

ROOT = Path(__file__).resolve().parent.parent


def sanitized(
    into: Path, *arguments: str, plant: Sequence[Sequence[str]] = (), seconds: float = 110
) -> subprocess.CompletedProcess[str]:
    """Python with a native half that is looked after."""
    options = ["--into", str(into), *(word for one in plant for word in ("--plant", *one)), "--", *arguments]
    command = [sys.executable, str(ROOT / "tools" / "sanitize.py"), *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds, cwd=ROOT)


def storm(into: Path, *arguments: str, seconds: float = 110) -> dict[str, Any]:
    done = sanitized(into, "tests/ring_storm.py", *arguments, seconds=seconds)
    assert done.returncode == 0, done.stderr[-6000:]
    came: dict[str, Any] = json.loads(done.stdout)
    assert came["poisoned"], "without it the sanitizer cannot tell where our memory ends"
    return came


def test_random_rings() -> None:
    here = Storm(seed=2)
    here.run(6000)
    assert here.came["rings"] >= 6000
    assert {"out of reach", "means nothing", "0 served", "1 served", "2 served", "3 served"} <= here.came.keys()
    assert here.iotlb.radix.tables, "the native table was used"
    assert {"natively", "0 packed", "1 packed", "2 packed"} <= here.came.keys(), "and the native end"


def test_the_same_rings_for_the_same_seed() -> None:
    one, same, other = Storm(3), Storm(3), Storm(4)
    for each in (one, same, other):
        each.run(300)
    assert one.came == same.came != other.came


def test_a_byte_that_may_only_be_read_is_missed() -> None:
    """The storm itself can fail: here a device writes into what it may only read, in the very place."""
    here = Storm(5)
    here.mappings()
    kept = here.kept
    here.arena.memory[here.arena.place(here.untouchable()[-1])] ^= 1
    assert here.look() != kept


@pytest.mark.timeout(320)
def test_rings_that_change_under_sanitizers(tmp_path: Path) -> None:
    assert storm(tmp_path / "san", "--rings", "5000", "--scribble", seconds=300)["rings"] >= 5000


@pytest.mark.sweep
@pytest.mark.timeout(3000)
def test_a_million_rings_under_sanitizers(tmp_path: Path) -> None:
    assert storm(tmp_path / "san", "--rings", "1000000", "--seed", "7", seconds=2900)["rings"] >= 1_000_000


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_the_native_tests_under_sanitizers(tmp_path: Path) -> None:
    files = ["core", "radix", "regions", "iotlb", "hostile_ring", "drain"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not nothing_stays and not torn"]
    done = sanitized(
        tmp_path / "san", "-m", "pytest", *options, *[f"tests/test_{file}.py" for file in files], seconds=580
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


PLANTED = [
    ("start > self.view.len - length", "start > self.view.len - length + 1"),
    ("(iova | inside) <= last", "(iova | inside) <= last + 1"),
    ("*left = ((uint64_t)1 << shift) - inside;", "*left = ((uint64_t)1 << shift) - inside + 1;"),
    ("while (vv_unlikely(left < length))", "while (vv_unlikely(left + 4096 < length))"),
    ("desc->address, desc->length, VV_WRITE", "desc->address, desc->length, VV_READ"),
    ("return leaf->size - inside >= length ?", "return leaf->size - inside >= 1 ?"),
]


@pytest.mark.sweep
@pytest.mark.timeout(320)
@pytest.mark.parametrize(("wrong", "planted"), PLANTED, ids=["window", "leaf", "left", "piece", "permission", "end"])
def test_a_planted_mistake_is_found(tmp_path: Path, wrong: str, planted: str) -> None:
    done = sanitized(tmp_path / "san", "tests/ring_storm.py", "--rings", "50000", plant=[(wrong, planted)], seconds=300)
    assert done.returncode != 0, done.stdout
    found = ("AddressSanitizer: ", "runtime error: ", "may only be read", "more than the interval")
    assert any(words in done.stderr for words in found), done.stderr[-3000:]


OTHERWISE = [
    ("(written ? VV_F_WRITE : 0)", "0"),
    ("return back && back <= slots;", "return back && back < slots;"),
    ("index >= entries))", "index > entries))"),
    ("ring->untold += ring->unpublished_slots;", "ring->untold += 2 * ring->unpublished;"),
    ("if (vv_unlikely(chain->in))", "if (0)"),
    ("vv_inflight_take(ring, chain->id);", ";"),
    ("vv_listed_8(vv_listed_at(ring, ring->batch[at]), 0);", ";"),
    ("ring->listed[chain->slots - 1] = desc;", ";"),
]


@pytest.mark.sweep
@pytest.mark.timeout(320)
@pytest.mark.parametrize(("wrong", "planted"), OTHERWISE)
def test_a_native_end_that_does_otherwise_is_found(tmp_path: Path, wrong: str, planted: str) -> None:
    done = sanitized(tmp_path / "san", "tests/native_kit.py", plant=[(wrong, planted)], seconds=300)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    found = ("AssertionError: done otherwise", "AddressSanitizer: ")
    assert any(words in done.stderr for words in found), done.stderr[-3000:]


@pytest.mark.sweep
@pytest.mark.timeout(320)
def test_the_native_end_does_what_python_does_under_sanitizers(tmp_path: Path) -> None:
    done = sanitized(tmp_path / "san", "tests/native_kit.py", seconds=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 300


@pytest.mark.sweep
@pytest.mark.timeout(320)
def test_a_native_end_that_is_killed_before_any_of_its_stores(tmp_path: Path) -> None:
    done = sanitized(tmp_path / "san", "tests/native_crash.py", plant=[HOOK], seconds=300)
    assert done.returncode == 0, done.stderr[-3000:]
    stores = json.loads(done.stdout)
    assert len(stores) == 6
    assert all(count >= (20 if name.startswith("Packed") else 7) * 4 for name, count in stores.items()), stores


TOO_EARLY = [
    ("= chain->first_note;\n}", "= chain->first_note;\n    vv_listed_8(vv_listed_at(ring, chain->first_note), 0);\n}"),
    (
        "vv_listed_16(header + VV_LISTED_FREE, chain->first_note);\n    vv_listed_16(header + VV_LISTED_USED, used);",
        "vv_listed_16(header + VV_LISTED_USED, used);\n    vv_listed_16(header + VV_LISTED_FREE, chain->first_note);",
    ),
    ("vv_inflight_end(ring);\n    ring->untold", "(void)0;\n    ring->untold"),
]


@pytest.mark.sweep
@pytest.mark.timeout(320)
@pytest.mark.parametrize("plant", TOO_EARLY, ids=["not in flight", "place before list", "never ended"])
def test_notes_in_another_order_are_found(tmp_path: Path, plant: tuple[str, str]) -> None:
    done = sanitized(tmp_path / "san", "tests/native_crash.py", plant=[plant, HOOK], seconds=300)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "AssertionError: " in done.stderr
    assert ", before store " in done.stderr, done.stderr[-3000:]


def test_what_the_dead_marked_as_used_behind_what_the_driver_sees() -> None:
    """It had written all but the flags of the first of four when it died."""
    kind, done = Packed(), mmap.mmap(-1, 4096)
    assert kind.made.drain is not None
    kind.made.drain.state = kind.made.twin.state
    assert len(kind.made.drain.pop(4)) == 4
    for number, name in enumerate(IDS[1:], 1):
        place = kind.BEFORE + 2 * number
        used = struct.pack("<IHH", 4, name, DESC_F_WRITE | kind.LAYOUT.used(place))
        kind.made.put(RING + kind.LAYOUT.entry(place) + 8, used)
    assert kind.seen() == []
    go_on(kind, done)
    assert list(done[:4]) == [1, 1, 1, 1]
