# SPDX-License-Identifier: Apache-2.0
"""Which views are of one machine, and what they come to together."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device, LogLine, View, ViewKind
from virtiova.collect.qemu import collect as command_line
from virtiova.result import Path
from virtiova.result.scan import Place
from virtiova.scan import scan_views
from virtiova.scan.join import join

HERE = Place("sysfs", "here")
GUEST, HOST, WRITTEN, LOG = ViewKind.GUEST, ViewKind.HOST, ViewKind.CONFIGURATION, ViewKind.LOG
UUIDS = ("11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222")

NOBODY = "03000200-0400-0500-0006-000700080009"


def view(kind: ViewKind, source: str, places: Mapping[str, str], *, name: str = "", uuid: str = "") -> View:
    """A view with a device of a type at each of ``places``."""
    found = View(kind, name, source)
    for key, value in ((k.NAME, name), (k.UUID, uuid)):
        if value:
            found.machine.put(key, value, Place("sysfs", source))
    for number, (place, type_) in enumerate(places.items()):
        device = Device(f"virtio{number}" if kind is GUEST else f"{type_}{number}")
        device.facts.put(k.PLACE, place, Place("sysfs", source))
        device.facts.put(k.TYPE, type_, Place("sysfs", source))
        found.devices.append(device)
    return found


ONE = {"pci:00:01.0": "net", "pci:00:02.0/00.0": "blk"}
OTHER = {"pci:00:01.0": "blk", "pci:00:03.0": "rng"}


def sources(*views: View) -> list[set[str]]:
    return [set(each.source.split("\n")) for each in join(views)]


@pytest.mark.parametrize(
    ("views", "wanted"),
    [
        ([(GUEST, ONE, "a", UUIDS[0]), (HOST, OTHER, "b", UUIDS[0].upper())], 1),
        ([(GUEST, ONE, "a", UUIDS[0]), (HOST, ONE, "a", UUIDS[1])], 2),
        ([(GUEST, ONE, "a", UUIDS[0]), (HOST, {"pci:00:1f.0": "net"}, "b", UUIDS[0])], 2),
        ([(GUEST, ONE, "a", NOBODY), (GUEST, ONE, "b", NOBODY)], 2),
        ([(GUEST, ONE, "a", ""), (WRITTEN, ONE, "a", UUIDS[1])], 1),
        ([(GUEST, ONE, "a", ""), (HOST, OTHER, "b", "")], 2),
        ([(GUEST, ONE, "guest", ""), (HOST, ONE, "vm7", "")], 1),
        ([(GUEST, ONE, "guest", ""), (HOST, {**ONE, "pci:00:09.0": "rng"}, "vm7", "")], 1),
        ([(GUEST, ONE, "guest", ""), (HOST, {"pci:00:01.0": "net", "pci:00:09.0": "rng"}, "vm7", "")], 2),
        ([(GUEST, ONE, "guest", ""), (HOST, {**ONE, "pci:00:01.0": "rng"}, "vm7", "")], 2),
        ([(GUEST, ONE, "x", ""), (GUEST, ONE, "y", "")], 2),
        ([(HOST, ONE, "x", ""), (WRITTEN, ONE, "y", "")], 2),
        ([(HOST, ONE, "x", ""), (WRITTEN, ONE, "", "")], 1),
        ([(WRITTEN, ONE, "", ""), (WRITTEN, ONE, "", "")], 2),
        ([(GUEST, ONE, "a", ""), (HOST, ONE, "b", ""), (HOST, ONE, "c", "")], 3),
        ([(GUEST, ONE, "localhost", ""), (GUEST, {"pci:00:08.0": "fs"}, "localhost", "")], 2),
        ([(GUEST, ONE, "localhost", ""), (GUEST, ONE, "localhost", "")], 2),
        ([(HOST, ONE, "vm", ""), (HOST, ONE, "vm", "")], 2),
        ([(WRITTEN, ONE, "vm", ""), (WRITTEN, ONE, "vm", "")], 1),
        ([(WRITTEN, ONE, "vm", ""), (WRITTEN, OTHER, "vm", "")], 2),
        ([(HOST, ONE, "a", UUIDS[0]), (WRITTEN, ONE, "a", UUIDS[0]), (GUEST, ONE, "b", "")], 1),
        ([(GUEST, {"ccw:0.0.0001": "net"}, "", ""), (HOST, {"ccw:fe.0.0001": "net"}, "", "")], 1),
    ],
)
def test_what_is_one_machine(views: list[tuple[ViewKind, dict[str, str], str, str]], wanted: int) -> None:
    given_ = [view(kind, f"s{n}", places, name=name, uuid=uuid) for n, (kind, places, name, uuid) in enumerate(views)]
    for order in (given_, given_[::-1]):
        found = join(order)
        assert len(found) == wanted
        assert {each.kind for each in found} == ({ViewKind.JOINED} if wanted == 1 else {each.kind for each in order})
        assert {part for each in sources(*order) for part in each} == {each.source for each in given_}
    assert len(join(join(given_))) == wanted


def test_the_same_view_alone_stays_as_it_is() -> None:
    alone = view(GUEST, "s", ONE)
    assert join([alone])[0] is alone
    assert join([]) == []


def test_a_log_is_of_the_only_machine() -> None:
    log = View(LOG, "", "qemu.log", log=[LogLine("words", HERE)])
    (found,) = join([log, view(GUEST, "box", ONE, name="a")])
    assert (found.kind, found.name, [line.text for line in found.log]) == (ViewKind.JOINED, "a", ["words"])
    several = [view(GUEST, f"box{n}", ONE, name=f"n{n}", uuid=UUIDS[n]) for n in range(2)]
    assert [each.kind for each in join([*several, log])] == [GUEST, GUEST, LOG]
    both = join([log, View(LOG, "", "dmesg", log=[LogLine("more", HERE)])])
    assert [(each.kind, len(each.log)) for each in both] == [(LOG, 2)]


def bits(found: View, device: int, *, certainty: Certainty = Certainty.SEEN, **values: bool) -> None:
    for name, value in values.items():
        found.devices[device].facts.put(k.OFFERED if name == "offered" else k.ACCEPTED, value, HERE, certainty)


def test_both_sides_complete_each_other() -> None:
    """The host knows what is offered; the guest, whose driver it is and what it took."""
    inside, outside = view(GUEST, "box", ONE, name="guest"), view(HOST, "qmp", ONE, name="vm")
    inside.machine.put(k.KERNEL, "6.1.0", HERE)
    outside.machine.put(k.IOMMU, "intel", HERE)
    bits(inside, 0, accepted=False)
    bits(outside, 0, offered=True)
    inside.devices[0].facts.put(k.STARTED, True, HERE)
    inside.devices[0].facts.put(k.GROUP_TYPE, "DMA", HERE)
    (row, *_) = scan_views([inside, outside]).devices
    assert (row.name, row.offered, row.accepted, row.verdict) == ("virtio0", True, False, Path.BYPASS)
    (joined,) = join([inside, outside])
    assert joined.devices[0].facts.get(k.ALSO_CALLED) == ("net0",)
    assert joined.name == "guest"


def test_contradictions_stay_to_be_seen() -> None:
    inside, outside = (
        view(GUEST, "box", ONE, uuid=UUIDS[0]),
        view(HOST, "qmp", ONE | {"pci:00:01.0": "rng"}, uuid=UUIDS[0]),
    )
    bits(inside, 1, accepted=True)
    bits(outside, 1, accepted=False)
    scan = scan_views([inside, outside])
    seen = {each.device: [one.text for one in each.seen] for each in scan.findings if each.id == "VA901"}
    assert set(seen) == {"virtio0", "virtio1"}
    assert "accepted is no" in seen["virtio1"]
    assert len(scan.devices) == 2


def test_what_runs_counts_before_what_is_written() -> None:
    """A command line, and the same machine as its monitor has it: the offer is what the device offers."""
    words = "qemu-system-x86_64 -M q35 -name vm -device virtio-rng-pci,id=r,bus=pcie.0,addr=8,iommu_platform=on,rng=o"
    written = command_line(words.split(), Place("command line", "vm.sh"))
    running = view(HOST, "qmp", {"pci:00:08.0": "rng"}, name="vm")
    bits(running, 0, offered=False)
    for order in ([written, running], [running, written]):
        (found,) = join(order)
        (device,) = [each for each in found.devices if each.facts.get(k.TYPE) == "rng"]
        assert device.facts.get(k.OFFERED) is False
        assert device.facts.get(k.CONFIGURED) is True


def test_an_option_whose_place_is_not_known_is_known_by_its_id() -> None:
    written, running = (
        view(WRITTEN, "vm.sh", {"": "net"}, name="vm"),
        view(HOST, "qmp", {"pci:00:08.0": "net"}, name="vm"),
    )
    running.devices += view(HOST, "qmp", {"pci:00:09.0": "net"}).devices
    for order in ([written, running], [running, written]):
        (found,) = join(order)
        assert [len(each.facts.all(k.TYPE)) for each in found.devices] == [2, 1], "one name, two places: two devices"


def test_places_that_two_devices_have_are_not_mixed_up() -> None:
    """Several PCI domains that one side does not tell: no device becomes two, no two become one."""
    outside = View(HOST, "vm", "qmp")
    for name in ("a", "b"):
        device = Device(name)
        device.facts.put(k.PLACE, "pci:00:00.0/00.0", HERE)
        outside.devices.append(device)
    inside = view(GUEST, "box", {"pci:00:00.0/00.0": "blk", "pci:0001:00:00.0/00.0": "blk"}, name="vm")
    assert len(join([inside, outside])[0].devices) == 4


@given(
    st.lists(st.tuples(st.sampled_from([GUEST, HOST, WRITTEN, LOG]), st.integers(0, 3), st.integers(0, 2)), max_size=7)
)
def test_nothing_is_lost(given_: list[tuple[ViewKind, int, int]]) -> None:
    views = []
    for number, (kind, name, uuid) in enumerate(given_):
        places = {} if kind is LOG else [ONE, OTHER, {}][number % 3]
        uuid_text = UUIDS[uuid] if uuid < 2 and kind is not LOG else ""
        found = view(kind, f"s{number}", places, name=f"n{name}" if name else "", uuid=uuid_text)
        found.problems.append(f"problem {number}")
        found.log.append(LogLine(f"line {number}", HERE))
        views.append(found)
    joined = join(views)
    assert sorted(part for each in joined for part in each.source.split("\n")) == [f"s{n}" for n in range(len(views))]
    assert sorted(line for each in joined for line in each.problems) == [f"problem {n}" for n in range(len(views))]
    assert sorted(line.text for each in joined for line in each.log) == [f"line {n}" for n in range(len(views))]
    for each in joined:
        uuids = {fact.value for fact in each.machine.all(k.UUID)}
        assert len(uuids) <= 1
        where = [device.facts.get(k.PLACE) for device in each.devices]
        assert len(where) == len(set(where))
    facts = sum(len(list(device.facts)) for one in views for device in one.devices)
    kept = [fact for each in joined for device in each.devices for fact in device.facts if fact.key != "also-called"]
    assert len(kept) == facts


def test_a_thousand_views_are_joined_in_no_time() -> None:
    """Half of them pairs by UUID, half of one name: neither is compared with all others."""
    views = []
    for number in range(500):
        uuid = f"{number:08d}-0000-0000-0000-000000000000"
        views += [view(kind, f"{kind}{number}", ONE, name="localhost", uuid=uuid) for kind in (GUEST, HOST)]
        views.append(view(GUEST, f"alone{number}", {f"pci:00:{number % 32:02x}.0": "net"}, name="localhost"))
    start = time.process_time()
    found = join(views)
    assert time.process_time() - start < 2.0
    assert sum(each.kind is ViewKind.JOINED for each in found) == 500
    assert len(found) == 1000, "machines of one name stay apart"
