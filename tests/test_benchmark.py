# SPDX-License-Identifier: Apache-2.0
"""The benchmark: real back ends, small; what is missing, what dies, what is overloaded, what is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench_kit import command, quiet
from vhost_user_kit import commands, installed
from virtiova.addr import Access
from virtiova.bench import plan, subjects
from virtiova.bench.front import Session
from virtiova.bench.iotlb import IotlbRun
from virtiova.bench.memory import CONTROL, PAGE, Memory, Shape, entries, pairs, updates
from virtiova.bench.plan import Wanted
from virtiova.bench.rows import Document, Row, Setting, Trust
from virtiova.bench.run import How, Run, place, session
from virtiova.bench.subjects import FILE, HANDLER, MEMORY, NET, NULL, TESTPMD, Running, Subject
from virtiova.bench.table import text
from virtiova.errors import MachineError, NotPossibleError, ProtocolError
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
    document = IotlbRun(replace(HOW, rounds=1), quiet, resident=(0, 100), subjects=("virtiova",)).document()
    figures = {(row.setting.mappings, row.figure): row.mid for row in document.rows if row.unit == "us"}
    assert set(figures) == {(n, f) for n in (0, 100) for f in ("pair", "pair, acknowledged", "miss")}
    # What a miss adds is a difference, and on a busy machine anything.
    assert all(value is not None and (value > 0 or key[1] == "miss") for key, value in figures.items()), document.rows


# -- what goes wrong -----------------------------------------------------------------------------------------------


def _run(monkeypatch: pytest.MonkeyPatch, chosen: tuple[Subject, ...], **wanted: object) -> Document:
    monkeypatch.setitem(subjects.SUBJECTS, "blk", chosen)
    monkeypatch.setitem(plan.PAGES, "blk", PAGES)
    wanted["image"] = PAGES
    few = {"depths": (2,), "mappings": (1,), "bits": (False,), "fronts": ("poll",)} | wanted
    return Run(Wanted("blk", **few), HOW, quiet).document()  # type: ignore[arg-type]


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


def test_interrupted_it_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    words = command("blk", "--only", "virtiova", "--depth", "1", "-o", str(output))
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
