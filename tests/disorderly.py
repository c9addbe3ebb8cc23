# SPDX-License-Identifier: Apache-2.0
"""A back end for a disk that works out of order, as those with asynchronous disks do: the first request that it takes
stays where it is, all others are done and given back. ``disorderly.py SOCKET IMAGE`` serves one front end."""

from __future__ import annotations

import os
import select
import socket
import sys
from dataclasses import replace

from virtiova.addr import UVA
from virtiova.device.blk import Blk
from virtiova.device.store import FileStore
from virtiova.dma.regions import RegionRam
from virtiova.dma.space import FlatSpace, Miss
from virtiova.features import Feature, mask
from virtiova.ring.layout import SplitLayout
from virtiova.ring.split_device import SplitDevice
from virtiova.serve import events
from virtiova.serve.inflight import Inflight, InflightFile
from virtiova.serve.loop import receive
from virtiova.serve.offer import offer_of
from virtiova.serve.session import Session
from virtiova.wire.vhost_user import VringAddr


class Disorderly:
    """One connection, and one ring."""

    def __init__(self, sock: socket.socket, image: str) -> None:
        self.sock = sock
        self.disk = Blk(FileStore(image))
        offer = offer_of(self.disk)
        # Of which it does neither.
        others = mask([Feature.RING_PACKED, Feature.IN_ORDER])
        self.session = Session(replace(offer, features=offer.features & ~others))
        self.ram = RegionRam()
        self.size = 0
        self.address: VringAddr | None = None
        self.ring: SplitDevice | None = None
        self.notes: Inflight | None = None
        self.kick = self.call = -1
        self.held = False

    def run(self) -> None:
        """Until the front end goes, or the end."""
        while True:
            watched = [self.sock.fileno(), *([self.kick] if self.kick >= 0 else [])]
            ready, _, _ = select.select(watched, [], [])
            if self.sock.fileno() in ready:
                for event in self.session.receive(*receive(self.sock, self.session.wanted)):
                    assert isinstance(event, events.Event), event
                    self.take(event)
                for message in self.session.replies():
                    self.sock.sendall(message.encode())
            if self.kick in ready:
                os.read(self.kick, 8)
                self.work()

    def take(self, event: events.Event) -> None:
        """What the front end wants."""
        match event:
            case events.MemoryTable():
                for region, fd in zip(event.regions, event.fds, strict=True):
                    self.ram.add(region.gpa, region.size, region.uva, region.offset, fd)
            case events.InflightSet():
                notes = InflightFile(event.description, event.fd).ring(0)
                assert isinstance(notes, Inflight)  # of split rings
                self.notes = notes
            case events.RingSize():
                self.size = event.size
            case events.RingAddress():
                self.address = event.address
            case events.RingCall(fd=int(fd)):
                self.call = fd
            case events.RingKick(fd=int(fd)):
                self.kick = fd
            case events.RingEnabled():
                self.start()
        self.session.acknowledge(event.token)

    def start(self) -> None:
        """Find the ring."""
        assert self.address is not None
        layout = SplitLayout(self.size)
        desc, avail, used = (self.gpa(uva) for uva in (self.address.desc, self.address.avail, self.address.used))
        self.ring = SplitDevice(FlatSpace(self.ram), desc, avail, used, layout, event_idx=False, indirect=False)

    def gpa(self, uva: int) -> int:
        """Where that is in RAM."""
        spans = self.ram.gpa_of(UVA(uva), 1)
        assert not isinstance(spans, Miss), spans
        return spans[0].gpa

    def work(self) -> None:
        """All that there is, but the first."""
        ring = self.ring
        while ring is not None and (chain := ring.pop()) is not None:
            if self.notes is not None:
                self.notes.begin([chain.head])
            if not self.held:
                self.held = True
                continue
            self.disk.handle(0, chain)
            ring.push(chain, chain.written)
            if self.notes is not None:
                self.notes.end([chain.head], ring.next_used)
            os.eventfd_write(self.call, 1)


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        Disorderly(listening.accept()[0], sys.argv[2]).run()
