# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at a back end under load, and another one in its place: each request is answered once, and done."""

from __future__ import annotations

import contextlib
import random
import time
from functools import partial
from pathlib import Path

import pytest

from loaded_kit import AT_ONCE, LoadedGuest
from served_guest import CLOUD, Assets, Guest, Server, assets, image, served, values, wait_for
from virtiova.errors import MachineError

QUEUES = 3
IMAGE = 2 << 20


def kills(tmp_path: Path, times: int, seed: int, io: str) -> tuple[int, list[str]]:
    """So many back ends that are killed under load, and one that is not; requests done, and what they all said."""
    draw = random.Random(seed)
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(IMAGE))
    logs = []
    options = ("blk", str(disk), "--num-queues", str(QUEUES), "--io", io)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, "blk", *options))
        guest = stack.enter_context(LoadedGuest(server.path, str(disk), QUEUES))
        for _ in range(times):
            guest.connect()
            end = time.monotonic() + draw.uniform(0.0, 0.1)
            guest.run(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
            logs.append(server.kill())
            # The guest goes on as long as its machine does not know, and beyond.
            with pytest.raises(MachineError):
                guest.run(lambda: False)
            guest.disconnect()
            assert any(queue.busy for queue in guest.queues), "killed under load"
            server = stack.enter_context(Server(tmp_path, "blk", *options))
        guest.connect()
        before = guest.done
        guest.run(lambda: guest.done > before + 10 * AT_ONCE)
        guest.drain()
        guest.check()
        guest.disconnect()
        logs.append(server.stop())
        return guest.done, logs


HOW = pytest.mark.parametrize("io", ["auto", "uring", "calls"])
"""By threads of the queues, with requests that the kernel is at by itself, or without."""


@HOW
def test_killed_under_load(tmp_path: Path, io: str) -> None:
    done, logs = kills(tmp_path, 6, 1, io)
    assert done > 6 * AT_ONCE
    assert "refused" not in "".join(logs)


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2))
@HOW
def test_killed_under_load_many_times(tmp_path: Path, io: str, seed: int) -> None:
    done, _ = kills(tmp_path, 50, seed, io)
    assert done > 50 * AT_ONCE


# -- behind QEMU


@pytest.fixture(scope="module")
def cloud() -> Assets:
    return assets(CLOUD)


WRITERS = 6
AREA = 32 * 4096
ROUNDS = 25


def area(writer: int, round_: int) -> bytes:
    line = f"writer {writer} round {round_}\n".encode()
    return (line * (AREA // len(line) + 1))[:AREA]


def write(guest: Guest, rounds: int) -> None:
    """Let the writers begin."""
    for writer in range(WRITERS):
        guest.do(f"writer {writer} {rounds} >/tmp/log{writer} 2>&1 &")


def busy(guest: Guest) -> bool:
    """Whether the first of them still writes."""
    return "busy" in guest.do("test -e /tmp/wrote0 || say busy")


STALLED = 60.0
"""Seconds in which the disk of a guest that writes must have changed, whatever else the machine does."""


def settle(guest: Guest, disk: Path) -> None:
    """Wait until all writers have ended: as long as they take, while they do something."""
    last, since = b"", time.monotonic()
    while len(values(guest.do("for f in /tmp/wrote*; do test -e $f && say wrote $f; done; :"), "wrote")) < WRITERS:
        there = disk.read_bytes()
        if there != last:
            last, since = there, time.monotonic()
        assert time.monotonic() - since < STALLED, f"nothing is written any more; {guest.words()}"
        time.sleep(0.2)


def check(guest: Guest, disk: Path, rounds: int) -> None:
    """They end; what each read back was what it wrote, and the disk says the same."""
    settle(guest, disk)
    guest.do("wait; cat /tmp/log*")
    wrote = values(guest.do("for f in /tmp/wrote*; do say wrote $(cat $f); done"), "wrote")
    assert wrote == [str(rounds)] * WRITERS, guest.words()
    there = disk.read_bytes()
    for writer in range(WRITERS):
        assert there[AREA * writer : AREA * (writer + 1)] == area(writer, rounds)
    assert there[AREA * WRITERS :] == image(8192)[AREA * WRITERS :]


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rings", ["", ",packed=on"], ids=["split", "packed"])
@pytest.mark.parametrize("bit", [True, False])
def test_a_guest_whose_disk_is_killed_under_load(cloud: Assets, tmp_path: Path, bit: bool, rings: str) -> None:
    """QEMU connects again; the guest waits, and sees no error; what its writers read back is what they wrote."""
    disk = tmp_path / "disk"
    disk.write_bytes(image(8192))
    draw = random.Random(5)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, "blk", "blk", str(disk)))
        options = served("blk", server.path, 0, bit=bit, extra=rings, chardev=",reconnect=1")
        guest = stack.enter_context(Guest(cloud, options))
        guest.booted()
        # Behind VT-d: one of the firmware's ring, which QEMU kicks once more when nothing of it is mapped any longer.
        firmware = values(guest.do("complaints"), "complaint")
        write(guest, ROUNDS)
        kills = 0
        while busy(guest) and kills < 6:
            time.sleep(draw.uniform(0.2, 1.5))
            log = server.kill()
            assert "makes no sense" not in log, log
            assert "refused" not in log, log
            server = stack.enter_context(Server(tmp_path, "blk", "blk", str(disk)))
            connected = partial(lambda server: "features 0x" in server.log(), server)
            wait_for(connected, "QEMU again")
            kills += 1
        assert kills >= 2
        check(guest, disk, ROUNDS)
        assert values(guest.do("complaints"), "complaint") == firmware
        guest.kill()
        told = server.stop()
        assert ("IOVAs" in told) is bit
        assert ("RING_PACKED" in told) is bool(rings)


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rings", ["", ",packed=on"], ids=["split", "packed"])
@pytest.mark.parametrize("bit", [True, False])
def test_a_machine_that_pauses_under_load(cloud: Assets, tmp_path: Path, bit: bool, rings: str) -> None:
    """QEMU stops the rings, writes status 0, and goes on later where it was, with the file that it kept."""
    disk = tmp_path / "disk"
    disk.write_bytes(image(8192))
    draw = random.Random(6)
    with Server(tmp_path, "blk", "blk", str(disk)) as server:
        with Guest(cloud, served("blk", server.path, 0, bit=bit, extra=rings)) as guest:
            guest.booted()
            write(guest, ROUNDS)
            pauses = 0
            while busy(guest) and pauses < 20:
                time.sleep(draw.uniform(0, 0.3))
                guest.qmp("stop")
                guest.qmp("cont")
                pauses += 1
            assert pauses >= 5
            check(guest, disk, ROUNDS)
        log = server.stop()
    assert "makes no sense" not in log
    assert "refused" not in log


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bit", [True, False])
def test_a_network_is_killed_under_load(cloud: Assets, tmp_path: Path, bit: bool) -> None:
    """It has no file of what is in flight: the used index says where to go on, and the guest's link comes back.

    Not so QEMU 7.2's vhost-user-rng-pci: with ``reconnect=1`` it ends at its start, by an assertion of its own.
    """
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(Server(tmp_path, "net", "net", "--neighbour", "10.0.2.2"))
        devices = served("net", net.path, 0, bit=bit, chardev=",reconnect=1")
        guest = stack.enter_context(Guest(cloud, devices))
        guest.booted()
        guest.do("net")
        guest.do("ping -i 0.01 10.0.2.2 >/dev/null &")
        for _ in range(3):
            guest.do("sleep 1")
            assert "makes no sense" not in net.kill()
            net = stack.enter_context(Server(tmp_path, "net", "net", "--neighbour", "10.0.2.2"))
            wait_for(lambda: "addresses in rings" in net.log(), "QEMU again")  # noqa: B023  (called here)
            # Linux looks at a link that has come back once a second, and drops what is sent until then.
            guest.do("sleep 2")
            assert guest.do("echoes 5 1000") == ["echoes 5"]
        guest.kill()


@pytest.mark.qemu
@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bit", [True, False])
def test_a_guest_migrates_under_load(cloud: Assets, tmp_path: Path, bit: bool) -> None:
    """Rings go on where they were, in another QEMU, with a dirty log on until then. Whether that log is complete is not
    seen here, as the guest's processors touch nearly all of these pages, too: that is test_serve_migration.py's."""
    disk = tmp_path / "disk"
    disk.write_bytes(image(8192))
    state = tmp_path / "state"
    with Server(tmp_path, "blk", "blk", str(disk)) as server:
        options = served("blk", server.path, 0, bit=bit)
        with Guest(cloud, options) as guest:
            guest.booted()
            write(guest, ROUNDS)
            guest.qmp("migrate", {"uri": f"exec:cat >{state}"})
            wait_for(lambda: _migrated(guest), "the end of the migration", 60.0)
            guest.kill()
        with Guest(cloud, [*options, "-incoming", f"exec:cat {state}"]) as guest:
            # What comes first on the console may be lost in between.
            guest.do("  :")
            assert busy(guest), "it migrated under load"
            check(guest, disk, ROUNDS)
        log = server.stop()
    assert "makes no sense" not in log
    assert "refused" not in log


def _migrated(guest: Guest) -> bool:
    told = guest.qmp("query-migrate")
    assert isinstance(told, dict)
    assert told.get("status") in ("setup", "active", "device", "completed"), told
    return bool(told["status"] == "completed")
