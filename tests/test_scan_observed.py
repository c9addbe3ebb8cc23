# SPDX-License-Identifier: Apache-2.0
"""What is seen from outside comes to the right path: the states that real guests were seen in, as facts."""

from __future__ import annotations

from typing import Any

import pytest

from virtiova.collect import keys as k
from virtiova.collect.facts import Device, View, ViewKind
from virtiova.collect.monitor_words import dma_roots, netdevs
from virtiova.collect.qmp_rings import rings
from virtiova.result import Path
from virtiova.result.scan import Place
from virtiova.scan import scan_views

HERE = Place("qmp", "here")
IOVA, GPA = (0xFFFFE000, 0xFFFFF000, 0xFFFFF240), (0x27E6000, 0x27E7000, 0x27E7240)


def running(name: str, *, bit: bool, root: str = "", in_ram: bool | None = None) -> Device:
    """A PCI device whose driver runs it."""
    found = Device(name)
    facts: list[tuple[Any, Any]] = [(k.TYPE, "blk"), (k.TRANSPORT, "pci"), (k.STARTED, True), (k.VERSION_1, True)]
    facts += [(k.STATUS, 15), (k.OFFERED, bit), (k.ACCEPTED, bit), (k.BEHIND_IOMMU, True)]
    facts += [(k.DMA_ROOT, root)] if root else []
    if in_ram is not None:
        facts += [(k.RING_ADDRESSES, GPA if in_ram else IOVA), (k.RINGS_IN_RAM, in_ram)]
    for key, value in facts:
        found.facts.put(key, value, HERE)
    return found


def rows(iommu: str, *devices: Device) -> list[tuple[Path | None, Path]]:
    view = View(ViewKind.HOST, "vm", "vm.qmp", devices=list(devices))
    view.machine.put(k.IOMMU, iommu, HERE)
    view.machine.put(k.VMM, "qemu", HERE)
    return [(each.observed, each.verdict) for each in scan_views([view]).devices]


@pytest.mark.parametrize(
    ("iommu", "bit", "root", "in_ram", "observed", "verdict"),
    [
        ("intel", True, "vtd-00.0-dmar", False, Path.TRANSLATED, Path.TRANSLATED),
        ("intel", True, "vtd-nodmar", True, Path.DIRECT, Path.DIRECT),
        ("none", True, "system", True, Path.DIRECT, Path.DIRECT),
        # Misleading: the root of a device that goes around looks like that of one that goes through.
        ("intel", False, "vtd-00.0-dmar", True, Path.BYPASS, Path.BYPASS),
        # An IOVA that is equal to its GPA, as in Xen's dom0, is no bypass.
        ("intel", True, "vtd-00.0-dmar", True, None, Path.TRANSLATED),
        ("intel", True, "vtd-00.0-dmar", None, None, Path.TRANSLATED),
        ("virtio", True, "virtio-iommu-memory-region-3-16", False, Path.TRANSLATED, Path.TRANSLATED),
        ("virtio", True, "system", True, Path.DIRECT, Path.DIRECT),
        ("smmuv3", True, "smmuv3-iommu-memory-region-8-1", False, Path.TRANSLATED, Path.TRANSLATED),
        # Whether an SMMU lets through or maps to itself is not seen from outside.
        ("smmuv3", True, "smmuv3-iommu-memory-region-8-1", True, None, Path.UNKNOWN),
        ("smmuv3", False, "smmuv3-iommu-memory-region-8-1", True, None, Path.BYPASS),
        ("tce", True, "", False, Path.TRANSLATED, Path.TRANSLATED),
        ("zpci", False, "", True, Path.BYPASS, Path.BYPASS),
        # More than one root for devices of one number on several buses: whose is not told.
        ("amd", True, "", True, None, Path.UNKNOWN),
    ],
)
def test_a_state(iommu: str, bit: bool, root: str, in_ram: bool | None, observed: Path | None, verdict: Path) -> None:
    assert rows(iommu, running("d", bit=bit, root=root, in_ram=in_ram)) == [(observed, verdict)]


def test_a_neighbour_shows_that_the_iommu_works() -> None:
    """The SMMU is on: seen of the one, it makes the other's bypass one that was seen."""
    on, off = running("on", bit=True, in_ram=False), running("off", bit=False, in_ram=True)
    assert rows("smmuv3", off, on) == [(Path.BYPASS, Path.BYPASS), (Path.TRANSLATED, Path.TRANSLATED)]


def test_a_neighbour_shows_that_it_may_let_through() -> None:
    on, off = running("on", bit=True, in_ram=True), running("off", bit=False, in_ram=True)
    assert rows("smmuv3", off, on) == [(None, Path.UNKNOWN)] * 2


def test_roots_that_differ_say_nothing() -> None:
    """Behind several root ports all are vtd-00.0; if one of them is let through, which one is not told."""
    device = running("d", bit=True, root="vtd-nodmar")
    device.facts.put(k.DMA_ROOT, "vtd-00.0-dmar", HERE)
    assert rows("intel", device) == [(None, Path.TRANSLATED)]


MTREE = """\
FlatView #0
 AS "vtd-root", root: vtd-00.0
 AS "vtd-root", root: vtd-1f.3
 Root memory region: vtd-nodmar
FlatView #1
 AS "vtd-root", root: vtd-00.0
 Root memory region: vtd-00.0-dmar
FlatView #2
 AS "smmuv3-iommu-memory-region-16-0", root: smmuv3-iommu-memory-region-16-0
 Root memory region: smmuv3-iommu-memory-region-16-0
FlatView #3
 AS "virtio-iommu-device", root: virtio-iommu-memory-region-5-250
 Root memory region: system
FlatView #4
 AS "amd_iommu_devfn_8", root: amdvi_root
 Root memory region: amdvi_root
"""


def test_roots_by_slot_and_function() -> None:
    assert dma_roots(MTREE.replace("\n", "\r\n")) == {
        0x00: ["vtd-nodmar", "vtd-00.0-dmar"],
        0xFB: ["vtd-nodmar"],
        0x10: ["smmuv3-iommu-memory-region-16-0"],
        0xFA: ["system"],
        0x08: ["amdvi_root"],
    }
    assert dma_roots("rubbish") == {}


def test_net_back_ends() -> None:
    said = "nn: index=0,type=nic,model=virtio-net-pci\r\n \\ n: index=0,type=vhost-user,x\r\nm: index=0,type=tap,y\r\n"
    assert netdevs(said) == {"n": "vhost-user", "m": "tap"}


# -- rings -----------------------------------------------------------------------------------------------------------


class Machine:
    """A queue in memory that a device works on while it is looked at."""

    def __init__(
        self,
        *,
        avail: int = 40,
        used: int = 40,
        seen: int | None = None,
        order: str = "little",
        at: dict[str, int] | None = None,
    ):
        self.status = {"vring-desc": GPA[0], "vring-avail": GPA[1], "vring-used": GPA[2], "vring-num": 128} | (at or {})
        self.avail, self.used = avail, used
        self.seen = used if seen is None else seen
        self.step, self.read, self.order = 0, list[str](), order

    def ask(self, command: str, **arguments: str | int) -> Any:
        if command == "human-monitor-command":
            line = str(arguments["command-line"])
            self.read.append(line)
            index = self.seen if line.endswith(f"{GPA[2]:x}") else self.avail
            data = bytes(2) + (index & 0xFFFF).to_bytes(2, "big" if self.order == "big" else "little")
            return "0000000000000000: " + " ".join(f"0x{byte:02x}" for byte in data)
        if command.endswith("element"):
            return {"avail": {"idx": self.avail & 0xFFFF}, "used": {"idx": self.used & 0xFFFF}}
        self.used += self.step
        return self.status | {"last-avail-idx": self.avail & 0xFFFF, "used-idx": self.used & 0xFFFF}


RAM = (0, 0xBFFFFFFF)
STATUS: dict[str, Any] = {"num-vqs": 1, "guest-features": {"transports": ["VIRTIO_F_VERSION_1: x"]}}


def found(machine: Machine, status: dict[str, Any] = STATUS, ram: tuple[int, ...] = RAM) -> bool | None:
    device = Device("d")
    device.facts.put(k.STARTED, True, HERE)
    rings(machine, device, "/d", status, ram)
    return device.facts.get(k.RINGS_IN_RAM)


def test_rings_are_where_they_are() -> None:
    assert found(Machine()) is True
    assert found(Machine(used=0xFFFF)) is True
    assert found(Machine(used=0x10003)) is True, "the index has wrapped"
    assert found(Machine(avail=40 + 128, used=40)) is True, "a driver that is ahead"


def test_rings_are_elsewhere() -> None:
    assert found(Machine(seen=7)) is False
    outside = Machine(at={"vring-desc": IOVA[0], "vring-avail": IOVA[1], "vring-used": IOVA[2]})
    assert found(outside) is False
    assert outside.read == [], "what is no memory is not read: it may be a register"


def test_what_was_not_seen_is_not_said() -> None:
    assert found(Machine(used=0)) is None, "a queue that was never used"
    assert found(Machine(at={"vring-desc": 0})) is None, "a queue that was never set up"
    assert found(Machine(), ram=()) is None, "where memory is was not told"
    packed = {"num-vqs": 1, "guest-features": {"transports": ["VIRTIO_F_RING_PACKED: x", "VIRTIO_F_VERSION_1: x"]}}
    assert found(Machine(), packed) is None, "a packed ring has no indices"
    busy = Machine(seen=7)
    busy.step = 1
    assert found(busy) is None, "one that works while it is compared may have been missed"


def test_a_device_that_works_meanwhile() -> None:
    machine = Machine(seen=47)
    machine.step = 2
    assert found(machine) is True, "its index went past what was read in memory"


def test_while_vhost_runs_the_indices_are_those_in_the_rings() -> None:
    assert found(Machine(), STATUS | {"vhost-started": True}) is True
    assert found(Machine(used=0), STATUS | {"vhost-started": True}) is None


def test_a_big_endian_legacy_ring() -> None:
    status = {"num-vqs": 1, "guest-features": {"transports": []}, "device-endian": "big"}
    assert found(Machine(order="big"), status) is True
    assert found(Machine(order="big")) is False, "a modern one is little-endian on any machine"
