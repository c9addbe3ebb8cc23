# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at a back end under load, and another one in its place: each request is answered once, and done."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest

from loaded_kit import AT_ONCE, LoadedGuest
from served_guest import Server
from virtiova.errors import MachineError

QUEUES = 3
IMAGE = 2 << 20


def kills(tmp_path: Path, times: int, seed: int) -> tuple[int, list[str]]:
    """So many back ends that are killed under load, and one that is not; requests done, and what they all said."""
    draw = random.Random(seed)
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(IMAGE))
    logs = []
    options = ("blk", str(disk), "--num-queues", str(QUEUES))
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


def test_killed_under_load(tmp_path: Path) -> None:
    done, logs = kills(tmp_path, 6, 1)
    assert done > 6 * AT_ONCE
    assert "refused" not in "".join(logs)


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2))
def test_killed_under_load_many_times(tmp_path: Path, seed: int) -> None:
    done, _ = kills(tmp_path, 50, seed)
    assert done > 50 * AT_ONCE
