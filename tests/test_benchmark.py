# SPDX-License-Identifier: Apache-2.0
"""The benchmark: real back ends, small; what is missing, what dies, what is overloaded, what is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vhost_user_kit import commands, installed
from virtiova import _load
from virtiova.addr import Access
from virtiova.bench import plan, subjects
from virtiova.bench.front import Session
from virtiova.bench.iotlb import IotlbRun
from virtiova.bench.memory import CONTROL, PAGE, Memory, Shape, entries, pairs, updates
from virtiova.bench.plan import Comparison, Wanted, comparisons, jobs
from virtiova.bench.rows import Document, Row, Setting, Target, Trust
from virtiova.bench.run import How, Run, place, session
from virtiova.bench.subjects import FILE, HANDLER, MEMORY, NET, NULL, TESTPMD, Running, Subject
from virtiova.bench.table import number, text
from virtiova.errors import MachineError, NotPossibleError, ProtocolError, UsageError
from virtiova.wire.vhost_user import Framer, IotlbKind, IotlbMessage

PAGES = 64
HOW = How(rounds=2, seconds=0.04)
needs_daemon = pytest.mark.skipif(
    not installed("qemu-storage-daemon"), reason="n/a: no qemu-storage-daemon (apt install qemu-system-common)"
)
needs_testpmd = pytest.mark.skipif(not installed("dpdk-testpmd"), reason="n/a: no dpdk-testpmd (apt install dpdk-dev)")


@contextlib.contextmanager
def opened(subject: Subject, shape: Shape) -> Iterator[tuple[Running, Session]]:
    with (
        contextlib.closing(Memory(shape)) as memory,
        contextlib.closing(Running(subject, place(), PAGES)) as running,
        session(running, memory) as front,
    ):
        yield running, front


# -- the memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mappings", [0, 1, 2, 16, 63, 64, 200])
def test_every_buffer_is_where_its_mapping_says(mappings: int) -> None:
    shape = Shape(mappings, PAGES)
    messages = Framer().feed(updates(shape))
    told = [IotlbMessage.decode(message.payload) for message in messages]
    assert len(told) == (0 if not mappings else mappings + 1)
    assert {message.kind for message in told} <= {IotlbKind.UPDATE}
    with contextlib.closing(Memory(shape)) as memory:
        used = set()
        for address, page, number_ in struct.iter_unpack("<QQQ", entries(shape, PAGES, spread=True)):
            if shape.bit:
                (span,) = [one for one in told if one.iova <= address < one.iova + one.size]
                uva = span.uaddr + address - span.iova
                found = memory.resolve(address, Access.READ)
                assert found is not None
                assert memory.uva(found[1]) == uva - address % PAGE
            else:
                uva = memory.uva(address)
            pages = memory.regions[1]
            assert uva - pages.uva == page * PAGE + address % PAGE
            assert address % PAGE + 76 <= PAGE
            assert number_ == page, "the same page of the disk, whichever mapping leads there"
            assert address not in (uva, uva - pages.uva + pages.gpa if shape.bit else -1)
            used.add(page)
        assert len(used) == shape.used
        gap = memory.resolve(0x8_0000_0000 + PAGE, Access.READ)
        assert (gap is None) == (mappings != 1)
        assert memory.resolve(0x8_0000_0000 + (max(mappings, PAGES) * 2) * PAGE, Access.READ) is None


def test_pairs_are_between_the_mappings() -> None:
    told = {IotlbMessage.decode(message.payload).iova for message in Framer().feed(updates(Shape(8, PAGES)))}
    messages = [IotlbMessage.decode(message.payload) for message in Framer().feed(pairs(2, 3))]
    assert [message.kind for message in messages] == [IotlbKind.UPDATE, IotlbKind.INVALIDATE] * 3
    assert not told & {message.iova for message in messages}


# -- real back ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [MEMORY, FILE, HANDLER], ids=lambda one: one.name)
@pytest.mark.parametrize("mappings", [0, 200])
def test_our_disks_bring_what_is_on_them(subject: Subject, mappings: int) -> None:
    with opened(subject, Shape(mappings, PAGES)) as (running, front):
        if not running.filled:
            front.fill(PAGES)
        front.reads(PAGES)
        front.driver.forget()
        front._go(8, 20.0, limit=300)
        tally = front.driver.tally()
        assert tally["done"] == 300
        assert tally["checked"] >= 1
        front.driver.forget()
        front._go(4, 20.0, limit=100, sleeping=True)
        assert front.driver.tally()["done"] == 100
        # All was told before; nothing was asked.
        assert front.front.counters.misses == 0


def test_a_disk_with_something_else_on_it_has_no_figure() -> None:
    with opened(MEMORY, Shape(1, PAGES)) as (_, front):
        front.reads(PAGES)
        with pytest.raises(ProtocolError, match="0x0000000000000000 in the data of a request"):
            front.sample(1, 0.04)


@needs_daemon
@pytest.mark.parametrize("subject", [NULL, subjects.URING, subjects.THREADS], ids=lambda one: one.name)
def test_the_storage_daemon_is_driven(subject: Subject) -> None:
    with opened(subject, Shape(0, PAGES)) as (_, front):
        front.reads(PAGES, zeros=subject is NULL)
        front._go(4, 20.0, limit=100)
        assert front.driver.tally()["done"] == 100
        assert front.sample(4, 0.04).p50 <= 1e7
        assert front.driver.flying == 0
    with pytest.raises(NotPossibleError, match="bit 33"), opened(subject, Shape(1, PAGES)):
        pass


@needs_testpmd
def test_testpmd_is_driven_and_asks_for_what_it_does_not_keep() -> None:
    with opened(TESTPMD, Shape(4096, 4096)) as (_, front):
        front.frames()
        front._go(64, 40.0, limit=100)
        assert front.driver.tally()["done"] == 100
        assert front.front.counters.misses > 0
    assert not [line for line in commands() if f"virtiova-bench-{os.getpid()}" in line]


def test_every_frame_is_counted_by_the_device_too() -> None:
    subject = replace(NET, command=NET.command.replace(" -q", ""))
    with opened(subject, Shape(PAGES, PAGES)) as (running, front):
        front.frames()
        front._go(64, 20.0, limit=100)
        assert front.driver.tally()["done"] == 100
        process = running._spawned.process
        assert process is not None
        os.kill(running.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 10
        found: list[str] = []
        while not found and time.monotonic() < deadline:
            found = re.findall(r'\{"schema": "virtiova/serve/1".*\}', process.stderr())
        counted = json.loads(found[-1])
        assert (counted["requests"], counted["bytes"]) == (100, 7600)
        start = CONTROL + next(struct.iter_unpack("<QQQ", entries(Shape(PAGES, PAGES), 1, spread=True)))[1] * PAGE
        page = front.memory.map[start : start + PAGE]
        assert bytes.fromhex("525400000002 525400000001 88b5") in page


def test_messages_of_the_iotlb_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtiova.bench.iotlb._MISSES", 8)
    document = IotlbRun(replace(HOW, rounds=1), _quiet, resident=(0, 100), subjects=("virtiova",)).document()
    figures = {(row.setting.mappings, row.figure): row.mid for row in document.rows if row.unit == "us"}
    assert set(figures) == {(n, f) for n in (0, 100) for f in ("pair", "pair, acknowledged", "miss")}
    # What a miss adds is a difference, and on a busy machine anything.
    assert all(value is not None and (value > 0 or key[1] == "miss") for key, value in figures.items()), document.rows


# -- what goes wrong -----------------------------------------------------------------------------------------------


def _quiet(_: str) -> None:
    pass


def _run(monkeypatch: pytest.MonkeyPatch, chosen: tuple[Subject, ...], **wanted: object) -> Document:
    monkeypatch.setitem(subjects.SUBJECTS, "blk", chosen)
    monkeypatch.setitem(plan.PAGES, "blk", PAGES)
    wanted["image"] = PAGES
    few = {"depths": (2,), "mappings": (1,), "bits": (False,), "fronts": ("poll",)} | wanted
    return Run(Wanted("blk", **few), HOW, _quiet).document()  # type: ignore[arg-type]


def _of(document: Document, subject: Subject) -> dict[str, Row]:
    return {row.figure: row for row in document.rows if row.subject == subject.name}


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(NULL, command=NULL.command.replace("qemu-storage-daemon", "no-such-daemon", 1))
    document = _run(monkeypatch, (MEMORY, gone))
    ours, theirs = _of(document, MEMORY), _of(document, gone)
    assert theirs["requests/s"].mid is None
    assert theirs["requests/s"].note == "n/a: no no-such-daemon (apt install qemu-system-common)"
    assert ours["requests/s"].mid
    assert (ours["ratio"].mid, ours["ratio"].note) == (None, theirs["requests/s"].note)
    printed = "\n".join(text(document))
    assert "n/a: no no-such-daemon (apt install qemu-system-common)" in printed


def test_a_peer_that_dies_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone while its requests are under way; the others are measured all the same."""
    dying, sample = replace(FILE, name="dying"), Session.sample

    def measured(front: Session, *settings: int, **ways: bool) -> object:
        if len(died) < HOW.rounds:
            died.append(front.waits.pid)
            threading.Timer(0.1, os.kill, (front.waits.pid, signal.SIGKILL)).start()
            front._go(2, 30.0)
        return sample(front, *settings, **ways)

    died: list[int] = []
    monkeypatch.setattr(Session, "sample", measured)
    document = _run(monkeypatch, (dying,))
    theirs = _of(document, dying)["requests/s"]
    assert theirs.mid is None
    assert theirs.note.startswith("failed in 2 of 2 rounds; round 1: ")
    assert "closed the main channel" in theirs.note, theirs.note
    died.clear()
    died += [0]
    both = _run(monkeypatch, (dying, MEMORY))
    assert "failed in 1 of 2 rounds" in _of(both, dying)["requests/s"].note
    assert len(_of(both, dying)["requests/s"].samples) == 1
    assert len(_of(both, MEMORY)["requests/s"].samples) == 2
    assert not [line for line in commands(os.getpid()) if "serve" in line]


def test_a_peer_that_takes_requests_and_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtiova.bench.front._STALLED", 0.2)
    with opened(FILE, Shape(0, PAGES)) as (running, front):
        front.reads(PAGES)
        os.kill(-os.getpgid(running.pid), signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(MachineError, match="2 requests were not answered within"):
            front.sample(2, 0.04)
        assert time.monotonic() - begin < 5


def test_a_busy_machine_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    where = place()
    busy = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    with contextlib.ExitStack() as stack:
        for processor in {where.front, where.back}:
            for _ in range(2):
                hog = subprocess.Popen([sys.executable, "-c", busy, str(processor)])
                stack.callback(hog.wait)
                stack.callback(hog.kill)
        document = _run(monkeypatch, (FILE,), depths=(1, 2, 4))
    assert any("others had the processors" in reason for reason in document.against), document.against
    assert "NOT TO BE TRUSTED:" in list(text(document))


def test_figures_that_swing_are_not_trusted() -> None:
    row = Row("blk", "a", Setting(depth=1), "requests/s", "1/s", (1.0, 2.0, 9.0))
    assert Trust().verdict([row, replace(row, samples=(1.0, 1.1, 1.2))]) == [
        "1 of 2 figures have a spread of more than 100 %"
    ]
    assert Trust().verdict([replace(row, samples=(5.0, 5.5, 6.0))]) == []
    assert "hypervisor kept 20 %" in Trust(stolen=0.2).verdict([])[0]
    unknown = ["fewer than 3 rounds: nothing is known of the spread"]
    assert Trust().verdict([]) == Trust().verdict([replace(row, samples=(5.0, 5.5))]) == unknown


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "virtiova", "bench", *words]


def test_interrupted_it_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    words = _command("blk", "--only", "virtiova", "--depth", "1", "-o", str(output))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("virtiova-*/socket")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        children = commands(process.pid)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)
    assert children, said
    assert process.returncode == 130, said
    assert said[0] == b""
    assert said[1].decode().splitlines() == ["virtiova: interrupted"]
    assert os.listdir(tmp_path) == []
    assert not [line for line in commands() if str(tmp_path) in line]


# -- what is planned -----------------------------------------------------------------------------------------------


def test_every_subject_comes_first_in_some_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def tried(_: Run, subject: Subject, *_rest: object) -> None:
        seen.append(subject.name)

    monkeypatch.setattr(Run, "_try", tried)
    one = Run(Wanted("blk", (1,), (1,), (False,), ("poll",)), replace(HOW, rounds=6), _quiet)
    monkeypatch.setattr("virtiova.bench.run.alone", lambda *_: _sample())
    one.document()
    names = [subject.name for subject in one._subjects]
    assert {seen[turn] for turn in range(0, len(seen), len(names))} == set(names)


def _sample() -> object:
    from virtiova.bench.front import Sample

    return Sample(1.0, 1.0, 1.0, 0, 0.0)


def test_the_issue_s_targets_are_asked_for() -> None:
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


def _example() -> Document:
    setting = Setting(2000, 8192, 128, "poll")
    row = Row("net", NET.name, setting, "requests/s", "1/s", (1e6, 2e6, 3e6))
    return Document(
        [
            row,
            replace(row, figure="latency, median", unit="us", samples=(1.0, 2.0, 3.0)),
            replace(row, figure="latency, 99 %", unit="us", samples=(123456.0,)),
            replace(row, figure="ratio", unit="x", samples=(1.5,), beside=TESTPMD.name, target=Target(2.0)),
            replace(row, subject=TESTPMD.name, samples=(), note="n/a: no dpdk-testpmd (apt install dpdk-dev) " * 4),
            Row("iotlb", NET.name, Setting(60_000), "pair", "us", (0.5,)),
            Row("iotlb", NET.name, Setting(60_000), "pair, acknowledged", "us", (0.5,)),
            Row("iotlb", NET.name, Setting(60_000), "miss", "us"),
        ],
        ["about"],
        ["a reason"],
    )


def test_tables_fit() -> None:
    lines = list(text(_example()))
    assert max(map(len, lines)) <= 100
    (line,) = [line for line in lines if "128" in line and NET.name in line and "1M..3M" in line]
    assert line.endswith("NOT MET")


def test_json_keeps_to_the_published_schema() -> None:
    from virtiova.bench.document import decode, encode, schema

    published = json.loads((Path(__file__).parent.parent / "docs" / "bench-1.schema.json").read_text())
    assert published == schema()
    made = json.loads(encode(_example()))
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

    made = plot.picture(_example(), kind)
    assert made == plot.picture(_example(), kind)
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
    done = subprocess.run(_command(*shlex.split(words)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_the_command_measures_and_writes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = (
            "net --only virtiova --rounds 2 --seconds 0.02 --depth 128 --mappings 1 --mappings 16 --bit on --front poll"
        )
        files = f"-j -o {folder}/run.txt --plot {folder}/run.svg"
        done = subprocess.run(
            _command(*words.split(), *files.split()), capture_output=True, text=True, timeout=100, check=False
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
    done = subprocess.run(_command("blk", "--list"), capture_output=True, text=True, timeout=60, check=True)
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
    wanted = _command("blk", "--list", "--depth", "32", "--mappings", "1", *words.split())
    lines = subprocess.run(wanted, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert {word for line in lines for word in line.split() if word in ("split", "packed")} - {"rings"} == rings
    lacking = [line for line in lines if "it has no packed rings" in line]
    assert bool(lacking) == ("packed" in rings)
    assert all(line.startswith("qemu-storage-daemon") for line in lacking)


def test_the_front_end_alone_if_it_is_wanted() -> None:
    def subjects(words: str) -> set[str]:
        done = subprocess.run(
            _command(*words.split(), "--list"), capture_output=True, text=True, timeout=60, check=True
        )
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
        _command("blk", "--only", "memory", *words), capture_output=True, text=True, timeout=90, check=False
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
        command = _command("draw", str(run), str(tmp_path / name))
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    written = tmp_path / "run.json"
    written.write_text(encode(_example()))
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
