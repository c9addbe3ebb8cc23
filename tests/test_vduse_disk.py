# SPDX-License-Identifier: Apache-2.0
"""VDUSE disks in real use, in one guest: the kernel's own driver drives them, with a file system on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from inside_kit import VDUSE, run

USE = "virtiova.guest.disk_in_use"
IMAGE = "/run/disk.img"
Step = tuple[str, ...]


def qsd(name: str) -> Step:
    """QEMU's storage daemon with a disk in VDUSE."""
    export = f"type=vduse-blk,id=e,node-name=n,name={name},writable=on"
    return (
        "start",
        name,
        "qemu-storage-daemon",
        "--blockdev",
        f"file,node-name=n,filename={IMAGE}",
        "--export",
        export,
    )


def ours(name: str, *options: str) -> list[Step]:
    """Our disk in VDUSE."""
    start = ("start", name, "virtiova", "serve", "blk", IMAGE, "--vduse", name, *options)
    return [start, ("until", name, f"serving blk at /dev/vduse/{name}")]


def round_of(name: str, *options: str) -> list[Step]:
    """A disk of ours, a file system on it, and what the image then holds."""
    return [
        shell(f"rm -f {IMAGE}; truncate -s 24M {IMAGE}"),
        *ours(name, *options),
        *add(name),
        ("call", f"{USE}:round_on", name, IMAGE),
        shell(f"vdpa dev del {name}"),
        ("stop", name),
    ]


def shell(words: str) -> Step:
    return ("run", "sh", "-c", words)


def add(name: str, driver: str = "virtio_vdpa") -> list[Step]:
    """The device appears, and is given to a driver."""
    wait = f"for i in $(seq 200); do [ -e /dev/vduse/{name} ] && break; sleep 0.1; done"
    return [shell(f"{wait}; vdpa dev add name {name} mgmtdev vduse"), ("drive", name, driver)]


def script() -> list[tuple[str, list[Step]]]:
    """All that is done in the guest, by what it is for."""
    return [
        ("theirs", [shell(f"truncate -s 24M {IMAGE}"), qsd("theirs"), *add("theirs")]),
        ("scan", [("virtiova", "scan", "-j")]),
        ("theirs used", [("call", f"{USE}:use", "/dev/vda", "3", "65536")]),
        ("gather", [("virtiova", "gather", "-o", "/run/box.tar.gz"), ("virtiova", "scan", "-j", "/run/box.tar.gz")]),
        ("handed", [("drive", "theirs", "vhost_vdpa"), ("virtiova", "scan", "-j")]),
        ("theirs gone", [shell("vdpa dev del theirs"), ("stop", "theirs")]),
        ("auto", round_of("auto")),
        ("python", round_of("slow", "--io", "python")),
        ("queues", round_of("many", "--num-queues", "3")),
    ]


@pytest.fixture(scope="module")
def done() -> dict[str, list[Mapping[str, Any]]]:
    """What came of each part, in one guest."""
    parts = script()
    answers = iter(run(VDUSE, [step for _, steps in parts for step in steps]))
    return {name: [next(answers) for _ in steps] for name, steps in parts}


def value(answer: Mapping[str, Any]) -> Any:
    assert answer["code"] == 0, answer
    return json.loads(answer["out"])


def device(answer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The row of one vDPA device in a scan."""
    assert answer["out"], answer
    rows = [row for row in json.loads(answer["out"])["devices"] if row["address"] == name]
    assert len(rows) == 1, answer
    return dict(rows[0])


@pytest.mark.qemu
def test_a_scan_sees_whose_tables_the_kernels_driver_is_behind(done: dict[str, list[Mapping[str, Any]]]) -> None:
    for answer in (done["scan"][0], done["gather"][1]):
        row = device(answer, "theirs")
        assert (row["verdict"], row["dma"], row["driver"]) == ("translated", "iova > vduse > ram", "virtio_blk")
        assert (row["offered"], row["accepted"], row["backend"]) == (True, True, "vdpa")
        assert any(seen["text"] == "served by qemu-storage-daemon" for seen in row["basis"])
        assert row["findings"] == []


@pytest.mark.qemu
def test_a_scan_sees_what_is_handed_to_user_space(done: dict[str, list[Mapping[str, Any]]]) -> None:
    row = device(done["handed"][1], "theirs")
    assert (row["verdict"], row["driver"], row["type"], row["accepted"]) == ("translated", "vhost_vdpa", "blk", None)


@pytest.mark.qemu
def test_the_use_is_told_right_with_a_device_that_is_not_ours(done: dict[str, list[Mapping[str, Any]]]) -> None:
    found = value(done["theirs used"][0])
    assert (found["files"], found["wrong"], found["changed"]) == (3, [], [])


@pytest.mark.qemu
@pytest.mark.parametrize("how", ["auto", "python", "queues"])
def test_a_file_system_on_our_disk(done: dict[str, list[Mapping[str, Any]]], how: str) -> None:
    made, *_, used, gone, stopped = done[how]
    assert made["code"] == 0, made
    found = value(used)
    assert found["negotiated"]["bit-33"] is True
    assert found["negotiated"]["driver"] == "virtio_vdpa"
    assert found["negotiated"]["queues"] == (3 if how == "queues" else 1)
    assert (found["use"]["wrong"], found["use"]["changed"], found["image"]["wrong"]) == ([], [], [])
    assert found["use"]["files"] == found["image"]["files"] == 12
    assert found["whole"]["disk"] == found["whole"]["image"]
    assert (gone["code"], stopped["code"]) == (0, 0), (gone, stopped)
    assert "IOVAs, through the IOTLB" in stopped["err"]
