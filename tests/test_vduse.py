# SPDX-License-Identifier: Apache-2.0
"""Devices of ours as vDPA devices of a real Linux 6.12: the kernel in between, its own driver in front."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from inside_kit import VDUSE, run
from virtiova.cli import exits
from virtiova.features import Feature

SERVE = ("virtiova", "serve", "blk", "/run/disk.img", "--sandbox", "on", "--vduse", "d0")
ENDS = ("virtiova", "serve", "blk", "/run/fs.img", "--vduse", "f0")
ADD = ("run", "vdpa", "dev", "add", "name", "f0", "mgmtdev", "vduse")
STEPS = {
    "bit 33": ("call", "vduse_inside:without_bit_33"),
    "image": ("run", "truncate", "-s", "16M", "/run/disk.img", "/run/fs.img"),
    "start": ("start", "disk", *SERVE),
    "made": ("until", "disk", "vdpa dev add name d0 mgmtdev vduse"),
    "busy": ("virtiova", "serve", "net", "--discard", "--vduse", "d0"),
    "add": ("run", "vdpa", "dev", "add", "name", "d0", "mgmtdev", "vduse"),
    "drive": ("drive", "d0", "virtio_vdpa"),
    "disk": ("call", "vduse_inside:appears", "/dev/vda"),
    "accepted": ("call", "vduse_inside:accepted"),
    "load": ("start", "load", sys.executable, "-m", "vduse_inside"),
    "under way": ("until", "load", "piece 30"),
    "killed": ("stop", "disk", "SIGKILL"),
    "orphan": ("call", "vduse_inside:left"),
    "another": ("virtiova", "serve", "blk", "--memory", "16M", "--vduse", "d0"),
    "again": ("start", "disk", *SERVE),
    "taken over": ("until", "disk", "going on with it"),
    "written": ("until", "load", "all written"),
    "in the file": ("call", "vduse_inside:wrong", "/run/disk.img"),
    "on the disk": ("call", "vduse_inside:wrong", "/dev/vda"),
    "end": ("stop", "disk"),
    "left": ("call", "vduse_inside:left"),
    "unused": ("start", "disk", *SERVE),
    "unused made": ("until", "disk", "vdpa dev add"),
    "unused killed": ("stop", "disk", "SIGKILL"),
    "unused again": ("start", "disk", *SERVE),
    "made anew": ("until", "disk", "vdpa dev add"),
    "unused end": ("stop", "disk", "SIGINT"),
    "left at last": ("call", "vduse_inside:left"),
    "rng": ("virtiova", "serve", "rng", "--vduse", "r0"),
    "net": ("start", "net", "virtiova", "serve", "net", "--neighbour", "10.0.2.2", "--vduse", "n0"),
    "net made": ("until", "net", "vdpa dev add"),
    "net add": ("run", "vdpa", "dev", "add", "name", "n0", "mgmtdev", "vduse"),
    "net drive": ("drive", "n0", "virtio_vdpa"),
    "net there": ("call", "vduse_inside:ping", "10.0.2.2"),
    "net end": ("stop", "net"),
    "left after net": ("call", "vduse_inside:left"),
    # How a disk ends that is in use.
    "made vhost's": ("start", "f0", *ENDS),
    "ready": ("until", "f0", "the kernel is to drive it"),
    "added": ADD,
    "whose": ("call", "vduse_inside:who", "f0"),
    "handed over": ("call", "vduse_inside:do_as_told", "f0"),
    "mounted": ("call", "vduse_inside:mount_and_write", "f0"),
    "ended under it": ("stop", "f0"),
    "left under it": ("call", "vduse_inside:left"),
    "dead": ("call", "vduse_inside:after_the_end"),
    "new": ("start", "f0", *ENDS),
    "new ready": ("until", "f0", "vdpa dev add"),
    "new added": ADD,
    "new driven": ("drive", "f0", "virtio_vdpa"),
    "read": ("call", "vduse_inside:read_again", "f0"),
    "given": ("drive", "f0", "vhost_vdpa"),
    "holder": ("start", "holder", "call", "vduse_inside:hold", "f0"),
    "held": ("until", "holder", "holding"),
    "ended in use": ("stop", "f0"),
    "left in use": ("call", "vduse_inside:left"),
    "gone on": ("start", "f0", *ENDS),
    "went on": ("until", "f0", "going on with it"),
    "let go": ("stop", "holder", "SIGKILL"),
    "ended unused": ("stop", "f0"),
    "left unused": ("call", "vduse_inside:left"),
    "nobody": ("call", "vduse_inside:as_nobody", "serve", "blk", "--memory", "16M", "--vduse", "f0"),
    "no module": ("call", "vduse_inside:without_module"),
    "without": ("virtiova", *ENDS[1:]),
}


@pytest.fixture(scope="module")
def did() -> dict[str, Mapping[str, Any]]:
    """What came of each step, all in one guest."""
    return dict(zip(STEPS, run(VDUSE, list(STEPS.values())), strict=True))


def said(answer: Mapping[str, Any]) -> Any:
    assert answer["code"] in (0, None), answer
    return json.loads(answer["out"])


def test_the_kernel_refuses_a_device_without_bit_33(did: dict[str, Mapping[str, Any]]) -> None:
    assert said(did["bit 33"]) == {"off": "EINVAL", "on": "made"}


def test_it_becomes_a_disk_whose_driver_took_bit_33(did: dict[str, Mapping[str, Any]]) -> None:
    assert did["made"]["code"] == did["add"]["code"] == did["drive"]["code"] == 0, did["made"]
    assert json.loads(did["disk"]["out"]) == "yes", did["disk"]
    (bits,) = said(did["accepted"])
    assert bits[Feature.ACCESS_PLATFORM] == bits[Feature.VERSION_1] == "1", bits


def test_a_name_that_somebody_serves_is_busy(did: dict[str, Mapping[str, Any]]) -> None:
    assert did["busy"]["code"] == exits.COULD_NOT_LOOK
    assert "served by another process" in did["busy"]["err"]


def test_killed_under_load_the_next_start_goes_on_and_nothing_is_lost(did: dict[str, Mapping[str, Any]]) -> None:
    assert did["under way"]["code"] == 0, did["under way"]
    assert "all written" not in did["under way"]["err"], "killed while it wrote"
    assert did["killed"]["code"] == -9
    assert {"/dev/vduse/d0", "/sys/bus/vdpa/devices/d0"} <= set(said(did["orphan"]))
    assert did["taken over"]["code"] == 0, did["taken over"]
    assert did["written"]["code"] == 0, (did["written"], did["end"])
    assert said(did["in the file"]) == said(did["on the disk"]) == []
    assert '"faults": 0' in did["end"]["err"]
    assert '"broken": 0' in did["end"]["err"]


def test_another_device_does_not_go_on_with_it(did: dict[str, Mapping[str, Any]]) -> None:
    assert did["another"]["code"] == exits.COULD_NOT_LOOK
    assert "vdpa dev del d0" in did["another"]["err"]


def test_nothing_is_left_whoever_ended_it(did: dict[str, Mapping[str, Any]]) -> None:
    assert did["end"]["code"] == 0, did["end"]
    assert did["unused end"]["code"] == 0, did["unused end"]
    assert "destroyed, and made anew" in did["made anew"]["err"]
    assert did["net end"]["code"] == 0, did["net end"]
    for each in ("left", "left at last", "left after net"):
        assert said(did[each]) == [], each


def test_kinds_that_the_kernel_does_not_take(did: dict[str, Mapping[str, Any]]) -> None:
    assert did["rng"]["code"] == exits.NOT_POSSIBLE
    assert "it takes block and net" in did["rng"]["err"]


def test_a_network_card(did: dict[str, Mapping[str, Any]]) -> None:
    assert did["net made"]["code"] == 0, did["net made"]
    assert said(did["net there"]) == "answered", (did["net there"], did["net end"])


def test_the_command_that_is_printed_hands_it_to_the_kernels_driver(did: dict[str, Mapping[str, Any]]) -> None:
    # The guest has loaded vhost_vdpa first.
    assert said(did["whose"]) == "vhost_vdpa"
    assert said(did["handed over"]) == "virtio_vdpa"


def test_ended_under_a_mounted_file_system_it_loses_nothing_and_says_so(did: dict[str, Mapping[str, Any]]) -> None:
    ended = did["ended under it"]
    assert (ended["code"], said(did["left under it"])) == (0, []), ended
    assert "/run/mount is still mounted, and its disk has gone" in ended["err"]
    assert "f0 is destroyed" in ended["err"]
    assert (said(did["dead"])["read"], said(did["dead"])["written"]) == ("EIO", "EIO")
    # Nobody had asked for what was written to be on the disk: Linux brought it there while its disk went.
    assert said(did["read"]) == said(did["mounted"]), did["new driven"]


def test_ended_while_a_process_uses_it_it_stays_and_is_gone_on_with(did: dict[str, Mapping[str, Any]]) -> None:
    ended = did["ended in use"]
    assert ended["code"] == 0, ended
    assert ended["seconds"] < 10
    assert "/dev/vhost-vdpa-0 is in use by a process" in ended["err"]
    assert "to be rid of it: vdpa dev del f0" in ended["err"]
    assert {"/dev/vduse/f0", "/sys/bus/vdpa/devices/f0"} <= set(said(did["left in use"]))
    assert did["went on"]["code"] == 0, did["went on"]
    assert (did["ended unused"]["code"], said(did["left unused"])) == (0, []), did["ended unused"]


def test_what_is_missing_is_said_with_the_command_that_supplies_it(did: dict[str, Mapping[str, Any]]) -> None:
    code, text = said(did["nobody"])
    assert (code, "run this as root" in text) == (exits.NOT_POSSIBLE, True), text
    assert said(did["no module"]) == "gone"
    assert did["without"]["code"] == exits.NOT_POSSIBLE
    assert "modprobe vduse" in did["without"]["err"]
