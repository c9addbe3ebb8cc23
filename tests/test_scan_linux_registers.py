# SPDX-License-Identifier: Apache-2.0
"""Registers that are looked at: which, when, and never more. Here files stand in; a real guest is asked elsewhere."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from sysfs_kit import BIT_33, VERSION_1, Box, config_space, features
from virtiova.collect import keys as k
from virtiova.collect import linux
from virtiova.collect.facts import View
from virtiova.collect.tree import LiveTree
from virtiova.wire import pci

FUNCTION = "/sys/devices/pci0000:00/0000:00:02.0"
COMMON_AT = 0x1000


class Live(LiveTree):
    """Files that are taken for this machine's."""

    def __init__(self, box: Box) -> None:
        super().__init__(str(box.root), "this machine")
        self.live = True


def registers(select: int, word: int) -> bytes:
    """A BAR of four pages, with the common configuration in the second one."""
    return bytes(COMMON_AT) + struct.pack("<II", select, word) + bytes(0x4000 - COMMON_AT - 8)


def with_caps(*, bar: int = 4, offset: int = COMMON_AT, length: int = 56, command: int = 6) -> bytes:
    """Configuration space with the capability of the common configuration."""
    data = bytearray(config_space())
    struct.pack_into("<HH", data, 4, command, 0x10)
    data[0x41] = 0x50
    struct.pack_into("<BBBBB3xII", data, 0x50, 9, 0, 16, pci.COMMON, bar, offset, length)
    return bytes(data)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    """A disk that did not take bit 33, and does offer it."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", "6.1", "v", "x86_64")))
    made = Box(tmp_path)
    made.virtio(made.function(FUNCTION, config=with_caps()))
    made.file(f"{FUNCTION}/power_state", "D0\n")
    made.file(f"{FUNCTION}/resource", "0x0 0x0 0x0\n" * 4 + "0xfe000000 0xfe003fff 0x000000000014220c\n")
    made.file(f"{FUNCTION}/resource4", registers(1, 3))
    return made


def offered(box: Box) -> bool | None:
    return look(box).devices[0].facts.get(k.OFFERED)


def look(box: Box) -> View:
    return linux.collect(Live(box))


@pytest.mark.parametrize(
    ("select", "word", "found"),
    [
        (1, 0x3, True),
        (1, 0x1, False),
        (0, 0x3, None),
        (3, 0x3, None),
        (1, 0xFFFFFFFF, None),
        (0xFFFFFFFF, 0xFFFFFFFF, None),
    ],
)
def test_the_second_word_says_it(select: int, word: int, found: bool | None, box: Box) -> None:
    box.file(f"{FUNCTION}/resource4", registers(select, word))
    assert offered(box) is found


def test_nothing_is_changed(box: Box) -> None:
    before = box.at(f"{FUNCTION}/resource4").read_bytes()
    # A mapping that could be written needs more than this.
    box.at(f"{FUNCTION}/resource4").chmod(0o400)
    assert offered(box) is True
    assert box.at(f"{FUNCTION}/resource4").read_bytes() == before


def asleep(box: Box) -> None:
    box.file(f"{FUNCTION}/power_state", "D3hot\n")


def not_said(box: Box) -> None:
    box.at(f"{FUNCTION}/power_state").unlink()


def other_driver(box: Box) -> None:
    box.at(f"{FUNCTION}/driver").unlink()
    box.link(f"{FUNCTION}/driver", "/sys/bus/pci/drivers/other")


def unbound(box: Box) -> None:
    box.at(f"{FUNCTION}/driver").unlink()


def memory_off(box: Box) -> None:
    box.file(f"{FUNCTION}/config", with_caps(command=4))


def ports(box: Box) -> None:
    box.file(f"{FUNCTION}/resource", "0x0 0x0 0x0\n" * 4 + "0xc000 0xffff 0x40101\n")


def too_small(box: Box) -> None:
    box.file(f"{FUNCTION}/resource", "0x0 0x0 0x0\n" * 4 + "0xfe000000 0xfe000fff 0x14220c\n")


def no_lines(box: Box) -> None:
    box.file(f"{FUNCTION}/resource", "rubbish\n")


def odd(box: Box) -> None:
    box.file(f"{FUNCTION}/config", with_caps(offset=COMMON_AT + 2))


def short(box: Box) -> None:
    box.file(f"{FUNCTION}/config", with_caps(length=4))


def no_caps(box: Box) -> None:
    box.file(f"{FUNCTION}/config", config_space())


def as_user(box: Box) -> None:
    box.file(f"{FUNCTION}/config", with_caps()[:64])


def forbidden(box: Box) -> None:
    box.at(f"{FUNCTION}/resource4").unlink()


def is_a_link(box: Box) -> None:
    box.at(f"{FUNCTION}/resource4").rename(box.at(f"{FUNCTION}/other"))
    box.link(f"{FUNCTION}/resource4", f"{FUNCTION}/other")


def shrunk(box: Box) -> None:
    """The page is gone when it is loaded from: what an unplugged function does."""
    box.file(f"{FUNCTION}/resource4", bytes(COMMON_AT))


def taken(box: Box) -> None:
    """What was taken was offered: there is nothing to look for."""
    box.file(f"{FUNCTION}/virtio0/features", features(VERSION_1 | BIT_33))
    box.file(f"{FUNCTION}/resource4", registers(1, 1))


def wide(box: Box) -> None:
    box.file(f"{FUNCTION}/virtio0/features", features(VERSION_1, 128))


def confidential(box: Box) -> None:
    box.file("/sys/class/misc/tdx_guest/dev", "10:1\n")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (asleep, None), (not_said, None), (other_driver, None), (unbound, None), (memory_off, None), (ports, None),
        (too_small, None), (no_lines, None), (odd, None), (short, None), (no_caps, None), (as_user, None),
        (forbidden, None), (is_a_link, None), (shrunk, None), (taken, True), (wide, None), (confidential, None),
    ],
)  # fmt: skip
def test_not_looked_at(change: Callable[[Box], None], found: bool | None, box: Box) -> None:
    assert offered(box) is True, "before"
    change(box)
    assert offered(box) is found
    assert look(box).problems == []


def test_not_on_every_machine(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "x", "6.1", "v", "s390x")))
    assert offered(box) is None


def test_not_by_anybody_else_than_root(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert offered(box) is None


def test_not_out_of_what_was_gathered(box: Box) -> None:
    assert box.one()[1].facts.get(k.OFFERED) is None


def test_who_sleeps_is_not_woken(box: Box) -> None:
    """The kernel wakes a function whose configuration space is read."""
    asleep(box)
    box.at(f"{FUNCTION}/config").unlink()
    os.mkfifo(box.at(f"{FUNCTION}/config"))
    assert k.ATS not in look(box).devices[0].facts
