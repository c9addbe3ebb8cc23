# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what is planned, what is said, and its command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from bench_kit import command, example, quiet
from virtiova import _load
from virtiova.bench import plan, subjects
from virtiova.bench.plan import Comparison, Wanted, comparisons, jobs
from virtiova.bench.rows import Document, Row, Setting, Target, Trust
from virtiova.bench.run import How, Run
from virtiova.bench.subjects import FILE, HANDLER, MEMORY, NET, NULL, TESTPMD, Subject
from virtiova.bench.table import number, text
from virtiova.errors import NotPossibleError, UsageError

# -- what is planned -----------------------------------------------------------------------------------------------


def test_every_subject_comes_first_in_some_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def tried(_: Run, subject: Subject, *_rest: object) -> None:
        seen.append(subject.name)

    monkeypatch.setattr(Run, "_try", tried)
    one = Run(Wanted("blk", (1,), (1,), (False,), ("poll",)), How(rounds=6, seconds=0.04), quiet)
    monkeypatch.setattr("virtiova.bench.run.alone", lambda *_: _sample())
    one.document()
    names = [subject.name for subject in one._subjects]
    assert {seen[turn] for turn in range(0, len(seen), len(names))} == set(names)


def _sample() -> object:
    from virtiova.bench.front import Sample

    return Sample(1.0, 1.0, 1.0, 0, 0.0)


def test_the_targets_are_asked_for() -> None:
    targets = {}
    for kind in ("blk", "net"):
        wanted = Wanted(kind)
        for job in jobs(wanted):
            for setting in job.settings():
                for subject in wanted.chosen():
                    for one in comparisons(subject, setting):
                        if one.target is not None:
                            targets[subject.name, one.beside, setting] = one.target
    polled = [Setting(1, 4096, depth, "poll") for depth in (1, 32)]
    asleep = Setting(1, 4096, 1, "sleep")
    expected = {(MEMORY.name, NULL.name, setting): Target(2.0) for setting in polled}
    expected |= {(FILE.name, subjects.URING.name, setting): Target(1.5) for setting in polled}
    expected |= {(HANDLER.name, subjects.URING.name, setting): Target(1.0) for setting in polled}
    expected |= {(MEMORY.name, NULL.name, asleep): Target(3.0), (FILE.name, subjects.URING.name, asleep): Target(3.0)}
    for mappings in (1, 256, 2000):
        expected[NET.name, TESTPMD.name, Setting(mappings, 8192, 128, "poll")] = Target(2.0)
    expected[NET.name, NET.name, Setting(65536, 8192, 128, "poll")] = Target(0.8)
    assert targets == expected


def test_a_sweep_has_its_own_figure_to_be_held_against() -> None:
    planned = {setting for job in jobs(Wanted("net")) for setting in job.settings()}
    for setting in planned:
        for one in comparisons(NET, setting):
            assert one.setting in planned, one
    distinct = Setting(65536, 65536, 128, "poll")
    assert distinct in planned
    assert Comparison(NET.name, Setting(1, 8192, 128, "poll")) in list(comparisons(NET, distinct))


# -- what is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"), [(None, "-"), (0.0, "0"), (999.4, "999"), (999.6, "1k"), (12345.0, "12.3k"), (2.5e7, "25M")]
)
def test_numbers_are_short(value: float | None, said: str) -> None:
    assert number(value) == said


def test_tables_fit() -> None:
    lines = list(text(example()))
    assert max(map(len, lines)) <= 100
    (line,) = [line for line in lines if "128" in line and NET.name in line and "1M..3M" in line]
    assert line.endswith("NOT MET")


def test_json_keeps_to_the_published_schema() -> None:
    from virtiova.bench.document import decode, encode, schema

    published = json.loads((Path(__file__).parent.parent / "docs" / "bench-1.schema.json").read_text())
    assert published == schema()
    made = json.loads(encode(example()))
    assert made["schema"] == "virtiova/bench/1"
    assert made["trusted"] is False
    first = made["results"][0]
    assert [first[name] for name in ("min", "median", "max", "rounds")] == [1e6, 2e6, 3e6, 3]
    setting = {"bit": True, "mappings": 2000, "pages": 8192, "depth": 128, "front": "poll", "ring": "split"}
    assert first["setting"] == setting
    assert made["results"][3]["target"] == {"value": 2.0, "at_most": False, "met": False}
    assert made["results"][4]["median"] is None
    decode(json.dumps(made))
    import msgspec

    for change in ({"extra": 1}, {"schema": "virtiova/bench/2"}, {"trusted": "yes"}):
        with pytest.raises(msgspec.ValidationError):
            decode(json.dumps(made | change))


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_pictures(kind: str) -> None:
    from virtiova.bench import plot

    made = plot.picture(example(), kind)
    assert made == plot.picture(example(), kind)
    if kind == "svg":
        assert b"NOT TO BE TRUSTED: a reason" in made.replace(b"\n", b" ")
        assert NET.name.encode() in made
    else:
        assert made.startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from virtiova.bench import plot

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NotPossibleError, match=r"virtiova\[plot\]"):
        plot.check("run.svg")
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        plot.check("run.pdf")


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("blk --image 5000", "a size of '5000'"),
        ("blk --image 2G", "--image 2G, wanted pages of 4 KiB, at most 1024M"),
        ("blk --rounds 0", "--rounds 0, wanted 1 to 1000"),
        ("blk --seconds 0.001", "--seconds 0.001, wanted 0.02 to 60"),
        ("blk --depth 171", "--depth 171, wanted 1 to 170"),
        ("net --mappings 65537", "--mappings 65537, wanted 1 to 65536"),
        ("blk --only nobody", "no subject of bench blk has nobody in its name"),
        (
            "blk --only null-co --bit on",
            "nothing is left to measure: no setting that was asked for is one of qemu-storage",
        ),
        ("blk --only null-co --ring packed", "nothing is left to measure"),
        ("net --bit on --front sleep --mappings 2000", "nothing is left to measure"),
        ("net --ring round", "unknown value of --ring"),
        ("blk -o run.csv", "run.csv: wanted a name that ends in .json or .txt"),
        ("blk --plot run.pdf", "wanted a name that ends in .svg or .png"),
        ("guests", "guests"),
    ],
)
def test_usage(words: str, complaint: str) -> None:
    done = subprocess.run(command(*shlex.split(words)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_the_command_measures_and_writes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = (
            "net --only virtiova --rounds 2 --seconds 0.02 --depth 128 --mappings 1 --mappings 16 --bit on --front poll"
        )
        files = f"-j -o {folder}/run.txt --plot {folder}/run.svg"
        done = subprocess.run(
            command(*words.split(), *files.split()), capture_output=True, text=True, timeout=100, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        results = json.loads(done.stdout)["results"]
        found = {
            (row["setting"]["mappings"], row["figure"]): row["median"] for row in results if row["subject"] == NET.name
        }
        assert found[1, "requests/s"] > 0
        assert found[16, "ratio"] > 0
        assert sorted(os.listdir(folder)) == ["run.svg", "run.txt"]
        assert (
            "Nothing speaks" in Path(folder, "run.txt").read_text() or "NOT TO" in Path(folder, "run.txt").read_text()
        )


def test_what_would_be_measured_is_listed() -> None:
    done = subprocess.run(command("blk", "--list"), capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["DEPTH", "FRONT", "RING", "MAPPED"]
    assert any(
        line.startswith("virtiova memory") and "65536 mappings of 4 KiB onto 4096 pages" in line for line in lines
    )
    assert any(line.startswith("front end alone") for line in lines)
    assert not any("qemu-storage-daemon" in line and "mapping" in line for line in lines)
    assert not any("packed" in line for line in lines)
    assert plan.DEEPEST["blk"] <= _load.MAX_SLOTS


@pytest.mark.parametrize(
    ("words", "rings"), [("", {"split"}), ("--ring packed", {"packed"}), ("--ring both", {"split", "packed"})]
)
def test_kinds_of_rings(words: str, rings: set[str]) -> None:
    wanted = command("blk", "--list", "--depth", "32", "--mappings", "1", *words.split())
    lines = subprocess.run(wanted, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert {word for line in lines for word in line.split() if word in ("split", "packed")} - {"rings"} == rings
    lacking = [line for line in lines if "it has no packed rings" in line]
    assert bool(lacking) == ("packed" in rings)
    assert all(line.startswith("qemu-storage-daemon") for line in lacking)


def test_the_front_end_alone_if_it_is_wanted() -> None:
    def subjects(words: str) -> set[str]:
        done = subprocess.run(command(*words.split(), "--list"), capture_output=True, text=True, timeout=60, check=True)
        return {line[:27].strip() for line in done.stdout.splitlines()[1:]}

    assert subjects("net --only alone") == {plan.ALONE}
    assert subjects("net --only virtiova") == {"virtiova net"}
    assert plan.ALONE in subjects("net")
    assert plan.ALONE not in subjects("net --front sleep")


@pytest.mark.timeout(100)
def test_packed_rings_are_measured() -> None:
    words = (
        "--ring",
        "packed",
        "--depth",
        "4",
        "--mappings",
        "16",
        "--mappings",
        "1",
        "--rounds",
        "1",
        "--seconds",
        "0.05",
        "-j",
    )
    done = subprocess.run(
        command("blk", "--only", "memory", *words), capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = {
        (row["setting"]["front"], row["setting"]["mappings"]): row["median"]
        for row in json.loads(done.stdout)["results"]
        if row["setting"]["ring"] == "packed" and row["figure"] == "requests/s"
    }
    assert found.keys() == {("poll", 0), ("sleep", 0), ("poll", 1), ("sleep", 1), ("poll", 16)}
    assert all(rate and rate > 0 for rate in found.values())


def test_a_picture_of_a_run_that_was_written(tmp_path: Path) -> None:
    from virtiova.bench.document import encode

    def drawn(run: Path, name: str) -> subprocess.CompletedProcess[str]:
        words = command("draw", str(run), str(tmp_path / name))
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    written = tmp_path / "run.json"
    written.write_text(encode(example()))
    done = drawn(written, "run.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert NET.name in (tmp_path / "run.svg").read_text()
    for data, words in (("{", "not a run of virtiova bench"), (encode(Document([], [], [])), "it has no figures")):
        written.write_text(data)
        done = drawn(written, "other.svg")
        assert done.returncode == 2
        assert words in done.stderr
    assert drawn(tmp_path / "nowhere.json", "other.svg").returncode == 2
    assert sorted(os.listdir(tmp_path)) == ["run.json", "run.svg"]


def test_rounds_that_failed_speak_against_a_run() -> None:
    whole = Row("net", "ours", Setting(), "requests/s", "1/s", (5.0, 5.1, 5.2))
    assert Trust().verdict([whole, whole]) == []
    four = replace(whole, samples=(5.0, 5.1, 5.2, 5.0))
    assert Trust().verdict([four, replace(whole, note="failed in 1 of 4 rounds")]) == [
        "1 of 2 figures lack rounds that failed"
    ]
