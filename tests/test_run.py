# SPDX-License-Identifier: Apache-2.0
"""Executors and results: every task is answered once, whatever happens to workers, this process, or the file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import virtiova
from run_work import pid, work
from virtiova.errors import MachineError, NotPossibleError, UsageError
from virtiova.matrix import Planned, run_planned
from virtiova.probe.plan import Task
from virtiova.result import Row
from virtiova.run.cluster import Cluster
from virtiova.run.executor import Done, Executor
from virtiova.run.processes import Processes
from virtiova.run.results import Results, fingerprint

PRELOAD = ("virtiova.matrix.work",)


def model_tasks(count: int) -> list[Planned]:
    return [Planned("model", "", Task("model", "soft", "honest:rng", "device-writes")) for _ in range(count)]


def answers(executor: Executor, tasks: list[str]) -> dict[int, Done[str]]:
    """All answers by number; a second one for the same task would be an error."""
    found: dict[int, Done[str]] = {}
    for done in executor.run(work, iter(enumerate(tasks))):
        assert done.number not in found
        found[done.number] = done
    assert set(found) == set(range(len(tasks)))
    return found


# -- processes ---------------------------------------------------------------------------------------------------


def test_every_task_is_answered_once() -> None:
    tasks = [f"do {n}" for n in range(40)]
    found = answers(Processes(3), tasks)
    assert [found[n].value for n in range(40)] == [f"{n} done" for n in range(40)]


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("raise a fuss", "ValueError: a fuss"),
        ("die", "the worker died of signal 9"),
        ("exit 3", "the worker ended with status 3"),
    ],
)
def test_trouble_costs_one_task(task: str, why: str) -> None:
    tasks = ["do 0", "do 1", task, *(f"do {n}" for n in range(3, 12))]
    found = answers(Processes(2), tasks)
    assert found[2].value is None
    assert found[2].lost == why
    assert all(found[n].value == f"{n} done" for n in found if n != 2)


def test_a_worker_that_hangs_is_ended() -> None:
    start = time.monotonic()
    found = answers(Processes(2, seconds=3.0), ["hang", *(f"do {n}" for n in range(1, 8))])
    assert found[0].lost.startswith("no answer within 3 s")
    assert all(found[n].value for n in range(1, 8))
    assert time.monotonic() - start < 30


def test_tasks_are_taken_as_there_is_room() -> None:
    """A plan of any length must not be taken in at once."""
    taken = 0

    def many() -> Iterator[tuple[int, str]]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number, "do it"

    with contextlib.closing(Processes(2).run(work, many())) as running:
        for _ in range(5):
            next(running)
        assert taken < 12


def test_whoever_stops_early_leaves_no_worker() -> None:
    running = Processes(2).run(pid, iter(enumerate(["x"] * 100)))
    pids = {done.value for done in (next(running) for _ in range(8))}
    running.close()
    assert pids
    for number in pids:
        assert number is not None
        assert not Path(f"/proc/{number}").exists()


def test_workers_end_with_whoever_started_them() -> None:
    """Killed outright, this process can say nothing to its workers: they notice the end of their pipe."""
    program = (
        "import os, sys, time\n"
        "sys.path[:0] = os.environ['SAID'].split(os.pathsep)\n"
        "if __name__ == '__main__':\n"
        "    from virtiova.run.processes import Processes\n"
        "    import run_work\n"
        "    running = Processes(1).run(run_work.pid, iter(enumerate('xyz')))\n"
        "    print(next(running).value, flush=True)\n"
        "    time.sleep(60)\n"
    )
    said = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"SAID": said, "PYTHONPATH": said}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 10
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    """Does a process run? One that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cells_come_back_whole() -> None:
    rows = [done.value for done in Processes(2, preload=PRELOAD).run(run_planned, iter(enumerate(model_tasks(6))))]
    assert len(rows) == 6
    for row in rows:
        assert row is not None
        assert row[0].cell.observed == "translated"
        assert row[0].cell.evidence.witnesses


# -- results -----------------------------------------------------------------------------------------------------


class Item(msgspec.Struct, frozen=True):
    """What is stored in these tests."""

    name: str
    size: int = 0


TASKS = [f"task {n}" for n in range(5)]
PLAN = fingerprint(TASKS)


def opened(path: Path | None, plan: str = PLAN, count: int = 5) -> Results[Item]:
    return Results(path, Item, plan, count)


@pytest.mark.parametrize("named", [True, False])
def test_results_are_read_back_in_the_order_of_the_plan(tmp_path: Path, named: bool) -> None:
    with opened(tmp_path / "r.jsonl" if named else None) as results:
        for number in (3, 0, 4):
            results.add(number, Item(f"ü{number}", number))
        assert [item.size for item in results] == [0, 3, 4]
        assert results[3] == Item("ü3", 3)
        assert (len(results), 3 in results, 1 in results) == (3, True, False)
        with pytest.raises(KeyError):
            results[1]


def test_every_line_is_one_result(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with opened(path) as results:
        results.add(2, Item("a\nb"))
        lines = path.read_bytes().splitlines()
    assert msgspec.json.decode(lines[0])["schema"] == "virtiova/results/1"
    assert msgspec.json.decode(lines[1]) == {"n": 2, "result": {"name": "a\nb", "size": 0}}
    assert len(lines) == 2


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with opened(path) as results:
        results.add(1, Item("one"))
    with opened(path) as results:
        assert len(results) == 1
        assert not results.repaired
        results.add(0, Item("zero"))
        with pytest.raises(ValueError, match="has a result already"):
            results.add(1, Item("again"))
    with opened(path) as results:
        assert [item.name for item in results] == ["zero", "one"]


def test_every_half_of_a_last_line_is_repaired(tmp_path: Path) -> None:
    """Wherever a crash cuts the file: what was whole stays, and the rest is run again."""
    path = tmp_path / "r.jsonl"
    with opened(path) as results:
        results.add(0, Item("zero", 7))
        whole = path.stat().st_size
        results.add(1, Item("ünë", 8))
    content = path.read_bytes()
    for length in range(whole, len(content)):
        path.write_bytes(content[:length])
        with opened(path) as results:
            assert [item.name for item in results] == ["zero"]
            assert results.repaired is (length > whole)
            results.add(1, Item("ünë", 8))
        assert path.read_bytes() == content


def test_every_half_of_the_first_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    opened(path).close()
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        opened(path).close()
        assert path.read_bytes() == content


def test_a_result_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with opened(path) as results:
        results.add(0, Item("first"))
    line = path.read_bytes().splitlines(keepends=True)[1]
    path.write_bytes(path.read_bytes() + line.replace(b"first", b"again"))
    with opened(path) as results:
        assert [item.name for item in results] == ["first"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"precious notes\n", "no results file"),
        (b'{"schema": "virtiova/probe/1", "cells": []}\n', "no results file"),
        (b"\xff\xfe\n", "no results file"),
        (b"precious notes without an end", "no results file"),
    ],
)
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=match):
        opened(path)
    assert path.read_bytes() == content


def test_a_file_of_another_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    opened(path).close()
    with pytest.raises(UsageError, match="belongs to another plan"):
        opened(path, fingerprint(["others"]))
    path.write_bytes(path.read_bytes().replace(virtiova.__version__.encode(), b"0.0.0"))
    with pytest.raises(UsageError, match=r"written by virtiova 0\.0\.0"):
        opened(path)


@pytest.mark.parametrize("damage", [b"{}\n", b'{"n":9,"result":{"name":"x"}}\n', b'{"n":0,"result":{"name":1}}\n'])
def test_damage_before_the_end_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "r.jsonl"
    with opened(path) as results:
        results.add(0, Item("zero"))
    first, second = path.read_bytes().splitlines(keepends=True)
    content = first + damage + second
    path.write_bytes(content)
    with pytest.raises(UsageError, match="line 2 is damaged"):
        opened(path)
    assert path.read_bytes() == content


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with opened(tmp_path / "r.jsonl"), pytest.raises(UsageError, match="another run is writing"):
        opened(tmp_path / "r.jsonl")


def test_a_plan_is_known_by_its_tasks() -> None:
    assert fingerprint(TASKS) == PLAN
    assert len({PLAN, fingerprint(TASKS[:-1]), fingerprint([*TASKS[:-1], "x"]), fingerprint(TASKS[::-1])}) == 4


# -- a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Generator[Any, None, None]:
    """Two workers, each a process, on this machine."""
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'virtiova[cluster]'")
    import logging

    # The death of a worker is part of the test, and no news.
    for name in ("distributed.nanny", "distributed.scheduler", "distributed.worker", "distributed.core"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as local:
        yield local


@contextlib.contextmanager
def connected(address: str) -> Iterator[Cluster]:
    found = Cluster(address)
    try:
        yield found
    finally:
        found.close()


def test_cells_on_a_cluster_and_a_worker_killed_in_the_middle(cluster: Any) -> None:
    """No cell is lost, and none counts twice."""
    tasks = model_tasks(60)
    pids = [worker.pid for worker in cluster.workers.values()]
    seen: Counter[int] = Counter()
    with connected(cluster.scheduler_address) as executor:
        for done in executor.run(run_planned, iter(enumerate(tasks))):
            seen[done.number] += 1
            assert done.value is not None, done.lost
            assert done.value[0].cell.observed == "translated"
            if sum(seen.values()) == 10:
                os.kill(pids[0], signal.SIGKILL)
    assert seen == Counter(range(60))


def test_trouble_on_a_cluster_costs_one_task(cluster: Any) -> None:
    bad = Planned("model", "", Task("model", "soft", "honest:rng", "no-such-experiment"))
    broken = Planned("model", "", Task("no-such-machine", "soft", "honest:rng", "device-writes"))
    tasks = [*model_tasks(3), bad, broken]
    with connected(cluster.scheduler_address) as executor:
        found = {done.number: done for done in executor.run(run_planned, iter(enumerate(tasks)))}
    assert set(found) == set(range(5))
    observed = {n: done.value[0].cell.observed.value if done.value else done.lost for n, done in found.items()}
    assert observed == {0: "translated", 1: "translated", 2: "translated", 3: "n/a", 4: "n/a"}


@pytest.mark.parametrize(("address", "error"), [("tcp://127.0.0.1:1", MachineError), ("no:such:thing", UsageError)])
def test_nobody_there(address: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="needs Dask: pip install 'virtiova[cluster]'")
    monkeypatch.setattr("virtiova.run.cluster.CONNECT_SECONDS", 0.5)
    with pytest.raises(error):
        Cluster(address)


def test_without_dask_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(NotPossibleError, match=r"\.\[cluster\]"):
        Cluster("tcp://127.0.0.1:1")


def test_rows_are_stored_as_they_are() -> None:
    (row,) = run_planned(model_tasks(1)[0])
    with Results(None, Row, "plan", 1) as results:
        results.add(0, row)
        assert results[0] == row
