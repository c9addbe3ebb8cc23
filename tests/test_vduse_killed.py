# SPDX-License-Identifier: Apache-2.0
"""Who serves a VDUSE disk is killed under a file system in use, again and again: nothing is lost, nothing fails."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from inside_kit import VDUSE, run
from virtiova.cli import exits

pytestmark = [pytest.mark.timeout(600), pytest.mark.sweep, pytest.mark.qemu]
SERVE = ("virtiova", "serve", "blk", "/run/fs.img", "--vduse", "f0")
ADD = ("run", "vdpa", "dev", "add", "name", "f0", "mgmtdev", "vduse")
KILLS = 8
Step = tuple[str, ...]


def again() -> list[Step]:
    """Killed while the load goes on, unserved for a moment, and gone on with."""
    return [
        ("run", "sleep", "1.5"),
        ("stop", "f0", "SIGKILL"),
        ("run", "sleep", "0.3"),
        ("start", "f0", *SERVE),
        ("until", "f0", "going on with it"),
    ]


def script() -> dict[str, list[Step]]:
    """All that is done in the guest."""
    return {
        "made": [
            ("run", "truncate", "-s", "32M", "/run/fs.img"),
            ("start", "f0", *SERVE),
            ("until", "f0", "vdpa dev add"),
            ADD,
            ("drive", "f0", "virtio_vdpa"),
        ],
        "mounted": [("call", "vduse_inside:mount_and_write", "f0")],
        "load": [("start", "load", "call", "vduse_inside:load_a_file", "24")],
        "killed": [step for _ in range(KILLS) for step in again()],
        "loaded": [("until", "load", "requests"), ("stop", "load", "SIGKILL")],
        "read": [("call", "vduse_inside:read_and_unmount")],
        "ended": [("stop", "f0"), ("call", "vduse_inside:left")],
        "checked": [("call", "vduse_inside:checked_image")],
        # The kernel asks for an answer when a process lets go of the device, and has none for 30 s.
        "held": [
            ("start", "f0", *SERVE),
            ("until", "f0", "vdpa dev add"),
            ADD,
            ("drive", "f0", "vhost_vdpa"),
            ("start", "holder", "call", "vduse_inside:hold", "f0"),
            ("until", "holder", "holding"),
            ("stop", "f0", "SIGKILL"),
            ("stop", "holder", "SIGKILL"),
        ],
        "asleep": [
            ("start", "f0", *SERVE),
            ("until", "f0", "made anew"),
            ("until", "f0", "vdpa dev add"),
            ADD,
            ("drive", "f0", "vhost_vdpa"),
            ("start", "holder", "call", "vduse_inside:hold", "f0"),
            ("until", "holder", "holding"),
            ("call", "vduse_inside:signal_server", "f0", str(int(signal.SIGSTOP))),
            ("stop", "holder", "SIGKILL"),
            ("call", "vduse_inside:signal_server", "f0", str(int(signal.SIGCONT))),
            ("until", "f0", "f0 is destroyed"),
            ("stop", "f0"),
            ("call", "vduse_inside:left"),
        ],
        "new": [
            ("start", "f0", *SERVE),
            ("until", "f0", "vdpa dev add"),
            ("stop", "f0"),
            ("call", "vduse_inside:left"),
        ],
    }


@pytest.fixture(scope="module")
def did() -> dict[str, list[Mapping[str, Any]]]:
    """What came of each part, in one guest."""
    parts = script()
    answers = iter(run(VDUSE, [step for steps in parts.values() for step in steps]))
    return {name: [next(answers) for _ in steps] for name, steps in parts.items()}


def value(answer: Mapping[str, Any]) -> Any:
    assert answer["code"] == 0, answer
    return json.loads(answer["out"])


def test_no_request_fails_and_none_is_lost(did: dict[str, list[Mapping[str, Any]]]) -> None:
    assert all(step["code"] in (0, -9) for step in did["killed"]), did["killed"]
    until, _ = did["loaded"]
    assert until["code"] == 0, until
    found = json.loads(until["err"].strip().splitlines()[-1])
    assert (found["wrong"], found["failed"]) == (0, 0), found
    assert found["requests"] > 100, found


def test_files_are_as_they_were_written(did: dict[str, list[Mapping[str, Any]]]) -> None:
    assert value(did["read"][0]) == value(did["mounted"][0])
    assert value(did["checked"][0]) == 0
    ended, left = did["ended"]
    assert (ended["code"], value(left)) == (0, []), ended
    assert '"faults": 0' in ended["err"]
    assert '"broken": 0' in ended["err"]


def test_one_that_the_kernel_gave_up_is_made_anew(did: dict[str, list[Mapping[str, Any]]]) -> None:
    until = did["asleep"][1]
    assert until["code"] == 0, until
    assert "f0 was given up by the kernel: taken off the vDPA bus, destroyed, and made anew" in until["err"]


def test_one_that_the_kernel_gives_up_while_it_sleeps_leaves_nothing(did: dict[str, list[Mapping[str, Any]]]) -> None:
    *_, until, ended, left = did["asleep"]
    assert until["code"] == 0, until
    assert (ended["code"], value(left)) == (exits.COULD_NOT_LOOK, []), ended
    assert "a message of its was not answered in time" in ended["err"]
    _, made, gone, left = did["new"]
    assert (made["code"], gone["code"], value(left)) == (0, 0, []), (made, gone)
