# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a real guest: what is made of its figures, what is missing, and once for real."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from virtiova.bench import guest, guest_machine
from virtiova.bench.document import decode, encode
from virtiova.bench.guest import GuestRun
from virtiova.bench.guest_machine import _documents
from virtiova.bench.run import How
from virtiova.bench.table import text
from virtiova.errors import NotPossibleError, UsageError


def silent(_: str) -> None:
    pass


def test_what_cannot_be_had_is_said_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> guest_machine.Assets:
        raise NotPossibleError("no mirror")

    monkeypatch.setattr(guest, "assets", missing)
    document = GuestRun(How(1, 0.1), silent).document()
    rates = [row for row in document.rows if row.figure == "requests/s"]
    assert len(rates) == 2 * len(guest.DISKS)
    assert {row.note for row in rates} == {"n/a: no mirror"}
    assert any("no mirror" in line for line in text(document))
    assert all(result.median is None for result in decode(encode(document)).results)


def test_ratios_are_of_the_same_round() -> None:
    run = GuestRun(How(2, 0.1), silent, depths=[1], subjects=["strict", "off"])
    rates = {"virtiova strict": (10, 30), "virtiova bit off": (100, 100), "QEMU's own, strict": (50, 50)}
    rates["QEMU's own, bit off"] = (100, 200)
    for name, found in rates.items():
        run._found[name, 1].rates.update(enumerate(map(float, found)))
    guest._count(run._found["virtiova strict", 1], 0, {"requests": 1, "misses": 2}, {"requests": 11, "misses": 42})
    rows = {(row.subject, row.figure): row.samples for row in run._rows()}
    assert rows["virtiova strict", "ratio"] == (0.1, 0.3)
    assert rows["QEMU's own, strict", "ratio"] == (0.5, 0.25)
    assert rows["virtiova strict", "ratio of ratios"] == pytest.approx((0.2, 1.2))
    assert rows["virtiova strict", "misses a request"] == (4.0,)
    assert ("virtiova bit off", "ratio") not in rows


def test_words_and_counters() -> None:
    with pytest.raises(UsageError, match="no subject"):
        GuestRun(How(), silent, subjects=["nobody"])
    assert len(list(GuestRun(How(), silent, depths=[4]).listed())) == len(guest.DISKS)
    said = 'a line\n{"schema": "virtiova/serve/1", "requests": 3}\n{"schema": "other"}\n{ no JSON\n'
    assert _documents(said) == [{"requests": 3}]


@pytest.mark.sweep
@pytest.mark.qemu
@pytest.mark.timeout(400)
def test_a_real_guest_is_measured() -> None:
    words = ["bench", "guest", "--rounds", "1", "--seconds", "0.5", "--depth", "1", "--only", "virtiova", "-j"]
    done = subprocess.run(
        [sys.executable, "-m", "virtiova", *words], capture_output=True, text=True, timeout=390, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    found = {(row["subject"], row["figure"]): row for row in json.loads(done.stdout)["results"]}
    if found["virtiova strict", "requests/s"]["note"].startswith("n/a"):
        pytest.skip(found["virtiova strict", "requests/s"]["note"])
    assert all(row["median"] is not None for row in found.values())
    assert found["virtiova strict", "misses a request"]["median"] >= 3
    assert found["virtiova strict, direct", "misses a request"]["median"] < 4
    assert found["virtiova bit off", "misses a request"]["median"] == 0
