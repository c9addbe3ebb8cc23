# SPDX-License-Identifier: Apache-2.0
"""Two files that a front end and its back end write in together: what is in flight, and what was written to memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

from virtiova.device.base import Device
from virtiova.features import Feature
from virtiova.serve.descriptors import close
from virtiova.serve.dirty import DirtyLog, LoggedRam
from virtiova.serve.inflight import InflightFile, ring_bytes
from virtiova.serve.rings import Ring
from virtiova.wire.vhost_user import InflightDescription, LogDescription


class Records:
    """The files of one connection: of requests of ``rings``, and of writes to ``ram``."""

    def __init__(self, device: Device, ram: LoggedRam, rings: Sequence[Ring]) -> None:
        self._device = device
        self._ram = ram
        self._rings = rings
        self._log: DirtyLog | None = None
        self._inflight: InflightFile | None = None

    # -- in flight

    def make_inflight(self, wanted: InflightDescription) -> tuple[bytes, int]:
        """A new file, used from now on: what is answered for it, and its descriptor, to be closed once it was sent."""
        size = wanted.queues * ring_bytes(wanted.queue_size, packed=self._packed)
        fd = os.memfd_create("virtiova-inflight", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            description = InflightDescription(size, 0, wanted.queues, wanted.queue_size)
            self._use(InflightFile(description, fd, packed=self._packed, fresh=True))
        except BaseException:
            close(fd)
            raise
        return description.encode(), fd

    def take_inflight(self, description: InflightDescription, fd: int) -> None:
        """Use the file that an earlier back end has left. `ProtocolError`: it is none."""
        try:
            self._use(InflightFile(description, fd, packed=self._packed))
        finally:
            close(fd)

    def drop_inflight(self, *, of_other_rings: bool = False) -> None:
        """Note nothing in it any more; ``of_other_rings``: only if its notes are of the other kind of ring."""
        if of_other_rings and (self._inflight is None or self._inflight.packed is self._packed):
            return
        self._use(None)

    def _use(self, file: InflightFile | None) -> None:
        old, self._inflight = self._inflight, file
        for ring in self._rings:
            ring.inflight = file.ring(ring.index) if file is not None and ring.index < file.queues else None
            ring.rebuild()
        if old is not None:
            old.close()

    @property
    def _packed(self) -> bool:
        return self._device.has(Feature.RING_PACKED)

    # -- the dirty log

    def take_log(self, description: LogDescription, fd: int, *, on: bool) -> bool:
        """Use this log, now if it is ``on``; as `note` has it."""
        try:
            fresh = DirtyLog(description, fd)
        finally:
            close(fd)
        old, self._log = self._log, fresh
        turned = self.note(on=on)
        if old is not None:
            old.close()
        return turned

    def note(self, *, on: bool) -> bool:
        """Note in the log, if there is one, what is written from now on, or do not; whether that is a change, so that
        nobody may go on by a space that goes around it."""
        log = self._log if on else None
        turned = (log is None) != (self._ram.log is None)
        self._ram.log = log
        return turned

    def drop_log(self) -> bool:
        """Let go of the log; as `note` has it."""
        turned = self.note(on=False)
        log, self._log = self._log, None
        if log is not None:
            log.close()
        return turned

    # -- both

    def shrunk(self) -> str:
        """What the front end shortened under us, if anything: bytes that we write there would reach nobody."""
        if self._ram.damaged:
            return f"the front end shortened its memory at 0x{self._ram.damaged[0]:x}"
        if self._log is not None and self._log.damaged:
            return "the front end shortened its dirty log"
        if self._inflight is not None and self._inflight.damaged:
            return "the front end shortened the file of what is in flight"
        return ""

    def close(self) -> None:
        """Let go of both. The rings, which are to be stopped by now, are not told."""
        files, self._log, self._inflight, self._ram.log = (self._log, self._inflight), None, None, None
        try:
            if files[0] is not None:
                files[0].close()
        finally:
            if files[1] is not None:
                files[1].close()
