# SPDX-License-Identifier: Apache-2.0
"""The kernel's own back ends, in a real guest: all experiments, and what is asked and told over the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from inside_kit import VHOST, run
from virtiova.cli import exits
from virtiova.guest.inside import Setting

NET, VSOCK = "/dev/vhost-net", "/dev/vhost-vsock"
BOTH = (NET, VSOCK)
ASKED = ("asked", "first_form", "without_the_bit", "rules", "given_up", "left", "rings_for_reading")
PACKED = ("virtiova", "probe", "vhost", NET, "--ring", "packed", "--experiment", "ring", "-j")
STEPS = (
    *(("virtiova", "probe", "vhost", path, "-j") for path in BOTH),
    *(("call", f"vhost_inside:{name}", path) for name in ASKED for path in BOTH),
    PACKED,
    ("call", "vhost_inside:header", NET),
    ("call", "vhost_inside:denied", NET),
)
EXPECTED = {
    "device-writes": "translated",
    "device-reads": "translated",
    "ring": "translated",
    "indirect": "translated",
    "split-buffer": "translated",
    "past-end": "blocked",
    "unmapped": "blocked",
    "read-only": "blocked",
    "write-only": "blocked",
    "unmap": "blocked",
    "unmap-stale": "stale",
    "remap": "translated",
    "remap-stale": "stale",
    "not-taken": "bypass",
    "carry-on": "n/a",
    "never-offered": "n/a",
    "no-version-1": "bypass",
    "renegotiate": "bypass",
    "msi": "translated",
    "empty-tables": "blocked",
    "translation-off": "direct",
    "bus-master-off": "n/a",
}
Answers = Mapping[tuple[str, ...], Mapping[str, Any]]

pytestmark = pytest.mark.qemu


NEWER = replace(VHOST, name="vhost-newer", suite="bookworm-backports")
"""Linux 6.12."""


@pytest.fixture(
    scope="module", params=[VHOST, pytest.param(NEWER, marks=pytest.mark.sweep)], ids=lambda each: each.name
)
def done(request: pytest.FixtureRequest) -> Answers:
    """What came of each step in one guest."""
    setting = request.param
    assert isinstance(setting, Setting)
    return dict(zip(STEPS, run(setting, STEPS), strict=True))


def said(done: Answers, name: str, path: str) -> dict[str, Any]:
    answer = done["call", f"vhost_inside:{name}", path]
    assert answer["code"] == 0, answer
    found = json.loads(answer["out"].splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("path", BOTH)
def test_every_experiment_goes_as_predicted(done: Answers, path: str) -> None:
    answer = done["virtiova", "probe", "vhost", path, "-j"]
    assert answer["code"] == exits.OK, answer
    cells = json.loads(answer["out"])["cells"]
    assert {cell["experiment"]: cell["observed"] for cell in cells} == EXPECTED
    assert all(cell["observed"] in cell["predicted"] for cell in cells if cell["predicted"])
    assert all(cell["explained"] is None and "disagreements" not in cell for cell in cells)


def test_packed_rings_are_not_offered(done: Answers) -> None:
    (cell,) = json.loads(done[PACKED]["out"])["cells"]
    assert cell["observed"] == "translated"
    assert cell["evidence"]["words"][0] == "rings: split: packed ones were asked for, and are not offered"


@pytest.mark.parametrize("path", BOTH)
def test_a_miss_without_a_mapping_is_the_fault_record(done: Answers, path: str) -> None:
    cells = {
        cell["experiment"]: cell for cell in json.loads(done["virtiova", "probe", "vhost", path, "-j"]["out"])["cells"]
    }
    for name, reason in (("unmapped", "not mapped"), ("read-only", "not writable"), ("write-only", "not readable")):
        evidence = cells[name]["evidence"]
        assert evidence["faults"][0]["reason"] == reason
        assert evidence["faults"][0]["address"] & ~0xFFF == evidence["x"]
        assert re.search(r"[1-9]\d* MISS, [1-9]\d* UPDATE, .* [1-9]\d* without a mapping", evidence["words"][-1])
    for name in ("not-taken", "renegotiate", "no-version-1"):
        # Nobody asks where the bit was not taken.
        assert cells[name]["evidence"]["faults"] == []


@pytest.mark.parametrize("path", BOTH)
def test_each_address_is_asked_for_once_until_it_is_taken_back(done: Answers, path: str) -> None:
    assert said(done, "asked", path) == {
        "done": [True, True, True],
        "rings asked for": True,
        "data asked for": True,
        "all asked for are ours": True,
        "second": [],
        "nothing was changed": [],
        "after": True,
        "v2": True,
    }


@pytest.mark.parametrize("path", BOTH)
def test_messages_of_the_first_form(done: Answers, path: str) -> None:
    found = said(done, "first_form", path)
    assert found["observed"] == "translated"
    assert re.search(r" [3-9] MISS, [3-9] UPDATE", found["words"][-1])


@pytest.mark.parametrize(("path", "since"), [(NET, "4.8"), (VSOCK, "5.11")])
def test_a_kernel_that_has_no_iotlb(done: Answers, path: str, since: str) -> None:
    found = said(done, "without_the_bit", path)
    assert (found["offered"], found["predicted"], found["observed"]) == (False, ["bypass"], "bypass")
    assert (
        f"does not offer bit 33: it has no IOTLB, and takes guest-physical addresses only (since Linux {since}"
        in (found["words"][0])
    )
    assert " 0 MISS, 0 UPDATE" in found["words"][-1]


@pytest.mark.parametrize("path", BOTH)
def test_what_the_kernel_takes_and_refuses(done: Answers, path: str) -> None:
    assert said(done, "rules", path) == {
        "memory before owner": "EPERM",
        "own twice": "EBUSY",
        "not offered": "EOPNOTSUPP",
        "update without 33": "EFAULT",
        "update": "ok",
        "of nothing": "EINVAL",
        "the last page": "ok",
        "beyond it": "EFAULT",
        "to the kernel's memory": "EFAULT",
        "all taken back": ["ok", "ok"],
        # It keeps its IOTLB all the same: see the next test.
        "update after 33 was given up": "ok",
        "largest ring": ["ok", "EINVAL"],
        "queue 2": "ENOBUFS",
        "reset owner": "ok" if path == NET else "ENOTTY",
        "owned again": "ok" if path == NET else "EBUSY",
        # That takes the IOTLB away, at last.
        "update after that": "EFAULT" if path == NET else "ok",
    }


@pytest.mark.parametrize("path", BOTH)
def test_a_file_that_took_the_bit_once_cannot_give_it_up(done: Answers, path: str) -> None:
    """Our own addresses, which a ring has without the bit, are looked up in an IOTLB that nobody fills any more. That
    is why a reset is another file (`renegotiate` in the experiments does it)."""
    assert said(done, "given_up", path) == {"start": "EFAULT"}


@pytest.mark.parametrize("path", BOTH)
def test_nothing_is_left(done: Answers, path: str) -> None:
    found = said(done, "left", path)
    assert found["after"] == found["before"]
    assert found["during"][0] > found["before"][0]
    assert found["during"][1] > found["before"][1]
    # The interface is in a network of its own.
    assert found["during"][2] == found["before"][2]


@pytest.mark.parametrize("path", BOTH)
def test_the_kernel_writes_to_a_used_ring_that_it_may_only_read(done: Answers, path: str) -> None:
    """It asks whether it may read the flags of the used ring, and then writes them: two bytes in a page that the IOMMU
    allows to be read. No fault: it never asks for the right to write (drivers/vhost/vhost.c, `vhost_put_user`
    translates as `vhost_get_user` does)."""
    found = said(done, "rings_for_reading", path)
    assert found["asked first"] == [True, 1]
    assert found["used ring"] == "0000" + b"ag".hex()
    assert found["faults"] == []


def test_the_number_of_buffers_is_not_written(done: Answers) -> None:
    """Without mergeable buffers, against virtio 1.4, 5.1.6.4.1, which wants 1 there. Mended by a3b9c053d82a
    ("vhost/net: Set num_buffers for virtio 1.0")."""
    found = said(done, "header", NET)
    assert found["before"] == "00" * 10
    assert found["frame"] == "ff" * 4
    assert found["buffers"] not in ("0100", "0000")


def test_who_may_not(done: Answers) -> None:
    answer = done["call", "vhost_inside:denied", NET]
    found = said(done, "denied", NET)
    assert found["code"] == exits.NOT_POSSIBLE
    assert "/dev/vhost-net: not for this user: run it as root" in answer["err"]
    assert found["may open"] == "a network of our own cannot be made: run it as root (CAP_SYS_ADMIN)"
