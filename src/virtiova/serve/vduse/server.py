# SPDX-License-Identifier: Apache-2.0
"""The life of a VDUSE device: made, served, and destroyed again whichever way the serving ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from virtiova import _core
from virtiova.device.base import Device
from virtiova.device.blk import Bit
from virtiova.features import DeviceId, mask
from virtiova.serve.crew import Crew, Spin
from virtiova.serve.host import RING_FEATURES
from virtiova.serve.journal import log
from virtiova.serve.server import Service
from virtiova.serve.vduse.loop import VduseConnection
from virtiova.serve.vduse.node import Control, Node
from virtiova.serve.vduse.session import VduseSession
from virtiova.wire.vduse import SERVING, DeviceConfig

RING_SIZE: Final = 256
"""Entries that each ring may have."""


def config_of(device: Device, name: str) -> DeviceConfig:
    """What is made for a device. Its configuration can be read only: what is for writing it is not offered."""
    features = device.features | RING_FEATURES
    if device.device_id == DeviceId.BLOCK:
        features &= ~mask([Bit.CONFIG_WCE])
    return DeviceConfig(name, device.device_id, features, device.queues, device.config())


class VduseServer(Service):
    """Serves ``device`` as the VDUSE device ``name``. ``say`` gets the log, ``report`` the counters when somebody asks
    for them. Use as a context manager."""

    controls = SERVING

    def __init__(
        self,
        device: Device,
        name: str,
        *,
        say: Callable[[str], None] = log,
        report: Callable[[str], None] = log,
        spin: Spin | None = None,
    ) -> None:
        super().__init__(say, report)
        self._device = device
        self._say = say
        self._name = name
        self.where = f"/dev/vduse/{name}"
        self._node: Node | None = None
        self._control: Control | None = None
        self._made = False
        config = config_of(device, name)
        spin = spin or Spin()
        try:
            self._control = Control()
            self._node = self._make(config)
            self._crew = Crew.of(device, spin, say)
        except BaseException:
            self.close()
            raise
        self._lookout = _core.Lookout(int(spin.seconds * 1e9), spin.fixed) if spin.seconds else None
        self._session = VduseSession(config.features, config.queues, self._node)

    def _make(self, config: DeviceConfig) -> Node:
        assert self._control is not None
        self._control.create(config)
        self._made = True
        node = Node(self._name, config.queues)
        try:
            node.set_up(RING_SIZE)
        except BaseException:
            node.close()
            raise
        return node

    def run(self) -> None:
        """Serve until `stop`."""
        assert self._node is not None
        self._say(f"to make it a device of this machine: vdpa dev add name {self._name} mgmtdev vduse")
        self.counters.connections += 1
        connection = VduseConnection(
            self._device,
            self._node,
            self._session,
            say=self._chatter,
            counters=self.counters,
            crew=self._crew,
            lookout=self._lookout,
        )
        with contextlib.closing(connection):
            connection.run(self._told, self._wake)

    def close(self) -> None:
        """Destroy the device, and end the threads."""
        super().close()
        node, self._node = self._node, None
        if node is not None:
            node.close()
        control, self._control = self._control, None
        if control is not None:
            try:
                if self._made and not control.destroy(self._name):
                    self._say(f"{self._name} is on the vDPA bus still: vdpa dev del {self._name}")
            finally:
                control.close()
