# SPDX-License-Identifier: Apache-2.0
"""vDPA devices in a real guest: QEMU's disk in user space, and ours; and what a device can say that makes no sense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

import vdpa_kit
from inside_kit import VDUSE, run
from virtiova.cli import exits

DEVICE = "/dev/vhost-vdpa-0"
THEIRS = (
    *("--blockdev", "driver=file,node-name=d,filename=/run/theirs.img"),
    *("--chardev", "socket,id=m,path=/run/monitor,server=on,wait=off", "--monitor", "chardev=m"),
    *("--export", "type=vduse-blk,id=e,node-name=d,name=theirs,writable=on"),
)
SHORT = "for each in /sys/class/vduse/*; do [ -e $each/msg_timeout ] && echo 1 > $each/msg_timeout; done"
KEEPS = f"grep -l {vdpa_kit.MEMORY} /proc/[0-9]*/maps | wc -l"


def probe(path: str, *words: str) -> tuple[str, ...]:
    """A probe with JSON; words without a dash are experiments."""
    named = [word for each in words for word in ((each,) if each.startswith("-") else ("--experiment", each))]
    return ("virtiova", "probe", "vdpa", path, "-j", *named)


def add(name: str) -> tuple[str, ...]:
    """The device is made, once its program is there, and user space has it."""
    wait = f"for i in $(seq 100); do [ -e /dev/vduse/{name} ] && break; sleep 0.1; done"
    return ("run", "sh", "-c", f"{wait}; {SHORT}; vdpa dev add name {name} mgmtdev vduse")


STEPS: dict[str, tuple[str, ...]] = {
    "nothing there": probe(DEVICE),
    "images": ("run", "truncate", "-s", "8M", "/run/theirs.img", "/run/ours.img", "/run/deaf.img"),
    "theirs": ("start", "theirs", "qemu-storage-daemon", *THEIRS),
    "added": add("theirs"),
    "the kernel's": ("drive", "theirs", "virtio_vdpa"),
    "not ours": probe(DEVICE),
    "no override": ("run", "sh", "-c", "echo > /sys/bus/vdpa/devices/theirs/driver_override"),
    "ours now": ("drive", "theirs", "vhost_vdpa"),
    "not allowed": ("call", "vdpa_kit:nobody", DEVICE),
    "no such kind": probe("/dev/null"),
    "theirs probed": probe(
        DEVICE,
        "--write",
        "device-writes",
        "device-reads",
        "ring",
        "unmapped",
        "write-only",
        "unmap",
        "remap",
        "not-taken",
    ),
    "left alone": ("run", "sh", "-c", KEEPS),
    "resized": ("call", "vdpa_kit:resize", DEVICE, "/run/monitor", "d"),
    "holder": ("start", "holder", "call", "vdpa_kit:hold", DEVICE),
    "held": ("until", "holder", "held"),
    "mapped": ("run", "sh", "-c", KEEPS),
    "busy": probe(DEVICE, "device-writes"),
    "killed": ("stop", "holder", "SIGKILL"),
    "let go": ("run", "sh", "-c", KEEPS),
    "after a kill": probe(DEVICE, "device-writes"),
    "version 1": probe(DEVICE, "no-version-1", "device-writes"),
    "last words": ("until", "theirs", "Assertion"),
    "ended": probe(DEVICE, "device-writes"),
    "ours": ("start", "ours", "virtiova", "serve", "blk", "/run/ours.img", "--vduse", "ours"),
    "ours added": add("ours"),
    "ours is had": ("drive", "ours", "vhost_vdpa"),
    "ours probed": probe(
        "/dev/vhost-vdpa-1", "--write", "device-writes", "device-reads", "write-only", "unmap", "not-taken", "carry-on"
    ),
    "packed": probe("/dev/vhost-vdpa-1", "--ring=packed", "device-writes", "ring"),
    "deaf": ("start", "deaf", "call", "vdpa_kit:deaf", "/run/deaf.img", "deaf"),
    "deaf added": add("deaf"),
    "deaf is had": ("drive", "deaf", "vhost_vdpa"),
    "deaf probed": probe("/dev/vhost-vdpa-2", "device-writes", "unmap", "remap"),
    "wire": ("start", "wire", "call", "vdpa_kit:echo", "/run/near", "/run/far"),
    "wired": ("until", "wire", "echoing"),
    "net": ("start", "net", "virtiova", "serve", "net", "--vduse", "net", "--datagram", "/run/near", "/run/far"),
    "net added": add("net"),
    "net is had": ("drive", "net", "vhost_vdpa"),
    "net probed": probe("/dev/vhost-vdpa-3", "--echo", "device-writes", "device-reads", "not-taken"),
}
Answers = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def done() -> Answers:
    """What came of each step in one guest."""
    return dict(zip(STEPS, run(VDUSE, list(STEPS.values())), strict=True))


def cells(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    assert answer["out"], answer
    return {cell["experiment"]: cell for cell in json.loads(answer["out"])["cells"]}


def observed(answer: Mapping[str, Any]) -> dict[str, str]:
    return {name: cell["observed"] for name, cell in cells(answer).items()}


@pytest.mark.qemu
def test_what_is_missing_is_said_with_what_supplies_it(done: Answers) -> None:
    answer = done["nothing there"]
    assert answer["code"] == exits.NOT_POSSIBLE
    assert "vdpa dev add name NAME mgmtdev MGMTDEV" in answer["err"]
    answer = done["not ours"]
    assert answer["code"] == exits.NOT_POSSIBLE
    assert "echo theirs > /sys/bus/vdpa/drivers/virtio_vdpa/unbind\n" in answer["err"]
    assert "echo theirs > /sys/bus/vdpa/drivers/vhost_vdpa/bind\n" in answer["err"]
    answer = done["not allowed"]
    assert json.loads(answer["out"]) == exits.NOT_POSSIBLE
    assert "not for this user" in answer["err"]
    answer = done["no such kind"]
    assert answer["code"] == exits.USAGE
    assert "/dev/null is no vDPA device" in answer["err"]
    answer = done["busy"]
    assert answer["code"] == exits.NOT_POSSIBLE
    assert "somebody else has it" in answer["err"]


@pytest.mark.qemu
def test_with_the_bit_what_is_mapped_is_translated_and_all_else_is_stopped(done: Answers) -> None:
    answer = done["theirs probed"]
    assert answer["code"] == exits.OK, answer
    assert observed(answer) == {
        "device-writes": "translated",
        "device-reads": "translated",
        "ring": "translated",
        "unmapped": "blocked",
        "write-only": "translated",
        "unmap": "blocked",
        "remap": "translated",
        # Linux takes the word of a driver without it, and so does that device.
        "not-taken": "translated",
    }
    found = cells(answer)
    assert found["write-only"]["explained"] == "VDUSE-WRITE-ONLY"
    assert (found["not-taken"]["offered"], found["not-taken"]["accepted"]) == (True, False)
    assert set(found["not-taken"]["predicted"]) == {"translated", "refused"}


@pytest.mark.qemu
def test_our_device_refuses_a_driver_without_the_bit_and_that_is_predicted(done: Answers) -> None:
    answer = done["ours probed"]
    assert answer["code"] == exits.OK, answer
    assert observed(answer) == {
        "device-writes": "translated",
        "device-reads": "translated",
        "write-only": "blocked",
        "unmap": "blocked",
        "not-taken": "refused",
        "carry-on": "blocked",
    }
    assert observed(done["packed"]) == {"device-writes": "translated", "ring": "translated"}
    assert "rings: packed" in cells(done["packed"])["ring"]["evidence"]["words"]


@pytest.mark.qemu
def test_a_network_device(done: Answers) -> None:
    answer = done["net probed"]
    assert answer["code"] == exits.OK, answer
    assert observed(answer) == {"device-writes": "translated", "device-reads": "translated", "not-taken": "refused"}


@pytest.mark.qemu
def test_a_device_that_is_deaf_to_changes_is_found(done: Answers) -> None:
    answer = done["deaf probed"]
    assert answer["code"] == exits.FOUND, answer
    assert observed(answer) == {"device-writes": "translated", "unmap": "stale", "remap": "stale"}


@pytest.mark.qemu
def test_a_configuration_that_changes_is_told_and_read_again(done: Answers) -> None:
    answer = done["resized"]
    assert answer["code"] == 0, answer
    assert json.loads(answer["out"]) == {"before": 16384, "after": 32768, "told": True}


@pytest.mark.qemu
def test_no_program_keeps_memory_of_a_probe_that_ended(done: Answers) -> None:
    assert done["left alone"]["out"].strip() == "0"
    # As long as there is one it does, and so does the probe itself; also if that is killed they let go.
    assert done["mapped"]["out"].strip() == "2"
    assert done["killed"]["code"] == -9
    assert done["let go"]["out"].strip() == "0"
    assert done["after a kill"]["code"] == exits.OK


@pytest.mark.qemu
def test_a_device_whose_program_ends_costs_its_own_answers_only(done: Answers) -> None:
    assert done["last words"]["code"] == 0, done["last words"]
    answer = done["version 1"]
    assert answer["code"] == exits.COULD_NOT_LOOK
    found = cells(answer)
    assert observed(answer) == {"no-version-1": "unknown", "device-writes": "unknown"}
    for cell in found.values():
        assert "does not answer" in cell["evidence"]["note"]
    answer = done["ended"]
    assert answer["code"] == exits.NOT_POSSIBLE
    assert "the program that it is has ended, or hangs" in answer["err"]
