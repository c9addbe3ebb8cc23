# SPDX-License-Identifier: Apache-2.0
"""Both ends of a packed ring, which check each other; and one laid into RAM by hand, byte by byte."""

from __future__ import annotations

from split_kit import SLOT, AnyPair, Reach, Way, World
from virtiova.addr import GPA
from virtiova.dma.ram import MappedRam
from virtiova.ring.chain import Chain
from virtiova.ring.layout import DESC_F_NEXT, DESC_F_WRITE, EVENT_DESC, EVENT_DISABLE, PackedDesc, PackedLayout
from virtiova.ring.packed_device import PackedDevice
from virtiova.ring.packed_driver import PackedDriver


class PackedPair(AnyPair):
    """Both ends of one packed ring, and a model of every request that is under way."""

    layout: PackedLayout
    driver: PackedDriver
    device: PackedDevice

    def __init__(
        self,
        size: int,
        reach: Reach = "mapped",
        way: Way = "direct",
        *,
        event_idx: bool,
        in_order: bool = False,
    ) -> None:
        self.in_order = in_order
        self.named = False
        """Whether the device's wish names a descriptor, which none does before its first one."""
        self.wish_place = 0
        self.world = World(reach, way, pages=2 * size + 80)
        self.layout = PackedLayout(size)
        self.driver = PackedDriver(
            self.world.alloc(self.layout.total), self.layout, event_idx=event_idx, in_order=in_order
        )
        self.device = PackedDevice(
            self.world.space, *self.driver.parts, self.layout, event_idx=event_idx, indirect=True
        )
        super().__init__(size, event_idx=event_idx)

    def check_kick(self, kick: bool, old: int) -> None:
        passed = old <= self.wish < self.n_published
        if self.wants_kick and (passed or not self.named):
            assert kick, "a notification lost"
        elif kick:
            # A wish of long ago looks like one of this lap.
            assert self.wants_kick
            assert self.driver.place - self.wish_place > self.layout.size, "a notification too many"

    def publish(self) -> bool:
        if self.added or self.named:
            return super().publish()
        # A driver that has nothing new may be told that it may kick.
        return self.driver.publish()

    def push(self, which: int, fill: int) -> bool:
        return super().push(0 if self.in_order else which, fill)

    def push_together(self, count: int) -> bool:
        """Complete the oldest requests as a device does that keeps their order: all of them whole but the last, which
        is the only one that it names."""
        batch, self.popped = self.popped[:count], self.popped[count:]
        if not batch:
            return False
        for sent, chain in batch:
            sent.answer = (b"together %08d " % self.serial * SLOT)[: chain.writable]
            chain.write(sent.answer)
            self.n_pushed += 1
            self.used.append(sent)
        whole = Chain(self.world.space, batch[-1][1].head, [], [], sum(chain.slots for _, chain in batch))
        self.device.push(whole, batch[-1][1].written)
        return True

    def sleep(self) -> bool:
        self.named = self.event_idx
        self.wish_place = self.device.place
        return super().sleep()

    def stay_awake(self) -> None:
        super().stay_awake()
        self.wants_kick = False


class RawPackedRing:
    """A packed ring at ``base`` of RAM. Nothing is checked here: tests write what they like."""

    def __init__(self, ram: MappedRam, base: int, size: int = 8) -> None:
        self.layout = PackedLayout(size)
        self.ram = ram
        self.desc = base
        self.driver = base + self.layout.driver
        self.device = base + self.layout.device
        self.place = 0

    def put_desc(self, place: int, desc: PackedDesc) -> None:
        """A descriptor with all its flags as they are."""
        self.ram.write(GPA(self.desc + self.layout.entry(place)), desc.pack())

    def get_desc(self, place: int) -> PackedDesc:
        return PackedDesc.unpack(self.ram.read(GPA(self.desc + self.layout.entry(place)), 16))

    def offer(self, *buffers: tuple[int, int, bool], number: int = 0) -> None:
        """Make a list of (address, length, device writes) available; its buffer id is in the last descriptor only."""
        rows = []
        for at, (address, length, write) in enumerate(buffers):
            last = at == len(buffers) - 1
            flags = (DESC_F_WRITE if write else 0) | (0 if last else DESC_F_NEXT)
            rows.append((address, length, number if last else 0xFFFF, flags))
        self.offer_rows(*rows)

    def offer_rows(self, *rows: tuple[int, int, int, int]) -> None:
        """The same of (address, length, id, flags besides those that say whose it is)."""
        for address, length, number, flags in rows:
            self.put_desc(self.place, PackedDesc(address, length, number, flags | self.layout.available(self.place)))
            self.place += 1

    def wish(self, value: int, place: int = 0) -> None:
        """The driver's event suppression."""
        word = self.layout.encode(place).to_bytes(2, "little") + value.to_bytes(2, "little")
        self.ram.write(GPA(self.driver), word)

    def device_wish(self) -> tuple[int, int]:
        """The device's event suppression: place and flags."""
        word = self.ram.read(GPA(self.device), 4)
        return int.from_bytes(word[:2], "little"), int.from_bytes(word[2:], "little")


WISHES = (0, EVENT_DISABLE, EVENT_DESC, 3)
