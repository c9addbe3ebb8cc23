# SPDX-License-Identifier: Apache-2.0
"""The life of a VDUSE device: made or taken over, served, and destroyed again whichever way the serving ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from virtiova import _core
from virtiova.device.base import Device
from virtiova.device.blk import Bit
from virtiova.errors import MachineError, VirtiovaError
from virtiova.features import DeviceId, mask
from virtiova.serve.crew import Crew, Spin
from virtiova.serve.journal import log
from virtiova.serve.offer import RING_FEATURES
from virtiova.serve.server import Service
from virtiova.serve.vduse.bus import Remover
from virtiova.serve.vduse.loop import VduseConnection
from virtiova.serve.vduse.node import Control, Node
from virtiova.serve.vduse.notes import Notes, identity
from virtiova.serve.vduse.session import VduseSession
from virtiova.wire.vduse import SERVING, DeviceConfig, name_bytes

RING_SIZE: Final = 256
"""Entries that each ring may have."""


def config_of(device: Device, name: str) -> DeviceConfig:
    """What is made for a device. Its configuration can be read only: what is for writing it is not offered."""
    features = device.features | RING_FEATURES
    if device.device_id == DeviceId.BLOCK:
        features &= ~mask([Bit.CONFIG_WCE])
    return DeviceConfig(name, device.device_id, features, device.queues, device.config())


def _news(say: Callable[[str], None]) -> Callable[[str], None]:
    """``say``, but not a second time where addresses are looked up: that is found anew with each range of memory, and
    is the same for all of them."""
    said = ""

    def tell(line: str) -> None:
        nonlocal said
        if line.startswith("addresses in rings"):
            if line == said:
                return
            said = line
        say(line)

    return tell


def handing_over(name: str) -> str:
    """The command that gives a vDPA device of vhost_vdpa's to the kernel's own driver: who of the two has it is decided
    by which module was loaded first."""
    at = "/sys/bus/vdpa"
    return (
        f"echo {name} > {at}/drivers/vhost_vdpa/unbind && "
        f"echo virtio_vdpa > {at}/devices/{name}/driver_override && "
        f"echo {name} > {at}/drivers/virtio_vdpa/bind"
    )


class VduseServer(Service):
    """Serves ``device`` as the VDUSE device ``name``. ``say`` gets the log, ``report`` the counters when somebody asks
    for them. Use as a context manager.

    ``medium`` says what the device's bytes are: one whose process was killed is gone on with only if that is the same.
    """

    controls = SERVING

    def __init__(
        self,
        device: Device,
        name: str,
        *,
        medium: str = "",
        say: Callable[[str], None] = log,
        report: Callable[[str], None] = log,
        spin: Spin | None = None,
    ) -> None:
        name_bytes(name)
        super().__init__(say, report)
        self.where = f"/dev/vduse/{name}"
        self._say = say
        self._name = name
        self._taken_over = False
        spin = spin or Spin()
        config = config_of(device, name)
        with contextlib.ExitStack() as undo:
            undo.callback(super().close)
            self._control = Control()
            undo.callback(self._control.close)
            self._remover = Remover(name)
            undo.callback(self._close_remover)
            self._node, self._notes = self._open(config, identity(config, RING_SIZE, medium))
            undo.callback(self._destroy)
            self._crew = Crew.of(device, spin, say)
            self._connection = VduseConnection(
                device,
                self._node,
                VduseSession(config.features, config.queues, self._node, self._notes),
                self._notes,
                self._remover,
                say=_news(self._chatter),
                counters=self.counters,
                crew=self._crew,
                lookout=_core.Lookout(int(spin.seconds * 1e9), spin.fixed) if spin.seconds else None,
            )
            undo.callback(self._connection.close)
            self._undo = undo.pop_all()

    # -- the device

    def _open(self, config: DeviceConfig, who: bytes) -> tuple[Node, Notes]:
        """Make the device, or take over the one of which the process was killed."""
        try:
            self._control.create(config)
        except FileExistsError:
            if not self._control.destroy(self._name):
                self._taken_over = True
                return self._take_over(config, who)
            self._say(f"{self._name} was left by somebody, on no bus: destroyed, and made anew")
            self._control.create(config)
        return self._make(config, who)

    def _make(self, config: DeviceConfig, who: bytes) -> tuple[Node, Notes]:
        """What there is to one that was just created."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._control.destroy, self._name)
            notes = Notes(self._name, config.queues, RING_SIZE, who, fresh=True)
            undo.callback(notes.close, remove=True)
            node = Node(self._name, config.queues)
            undo.callback(node.close)
            node.set_up(RING_SIZE)
            undo.pop_all()
        return node, notes

    def _take_over(self, config: DeviceConfig, who: bytes) -> tuple[Node, Notes]:
        remedy = f"to be rid of it: vdpa dev del {self._name}"
        with contextlib.ExitStack() as undo:
            node = Node(self._name, config.queues)
            undo.callback(node.close)
            try:
                notes = Notes(self._name, config.queues, RING_SIZE, who, fresh=False)
            except FileNotFoundError:
                raise MachineError(f"{self._name} is on the vDPA bus already, as something else; {remedy}") from None
            undo.callback(notes.close, remove=False)
            if not notes.same(who):
                raise MachineError(f"{self._name} is on the vDPA bus already, as something else; {remedy}")
            try:
                node.features()
            except OSError as error:
                given_up = error
            else:
                undo.pop_all()
                return node, notes
        # Nobody can serve that one any more, and whoever drives it is not served.
        self._taken_over = False
        why = self._remover.wait()
        self._remover.close()
        self._remover = Remover(self._name)
        if why or not self._control.destroy(self._name):
            reason = f" ({why})" if why else ""
            raise MachineError(
                f"the kernel has given {self._name} up: {given_up.strerror}; {remedy}{reason}"
            ) from given_up
        self._say(f"{self._name} was given up by the kernel: taken off the vDPA bus, destroyed, and made anew")
        self._control.create(config)
        return self._make(config, who)

    def _destroy(self) -> None:
        self._node.close()
        gone = self._control.destroy(self._name)
        self._notes.close(remove=gone)
        if gone:
            self._say(f"{self._name} is destroyed")
        else:
            self._say(
                f"{self._name} stays, on the vDPA bus: the next start with that name and the same device goes on with "
                f"it; to be rid of it: vdpa dev del {self._name}, then start and end once more"
            )

    def _close_remover(self) -> None:
        self._remover.close()

    # -- serving

    def run(self) -> None:
        """Serve until `stop`; then have the device taken off the bus, and serve as long as that takes."""
        if self._taken_over:
            self._connection.resume()
            self._say(f"{self._name} is on the vDPA bus already: going on with it")
        else:
            self._say(f"to make it a device of this machine: vdpa dev add name {self._name} mgmtdev vduse")
            self._say(f"if vhost_vdpa has it then, and the kernel is to drive it: {handing_over(self._name)}")
        self.counters.connections += 1
        try:
            self._connection.run(self._told, self._wake)
        except BaseException:
            # Whoever waits for an answer of ours would wait for ever.
            with contextlib.suppress(VirtiovaError, OSError):
                self._leave()
            raise
        self._leave()

    def _leave(self) -> None:
        if why := self._connection.leave(self._wake):
            self._say(f"{self._name} cannot be taken off the vDPA bus: {why}")
        for path in self._remover.dead:
            self._say(
                f"{path} is still mounted, and its disk has gone: what was written there is in the image; umount it"
            )

    def close(self) -> None:
        """End the threads, and destroy the device if it is off the bus. May be called more than once."""
        self._undo.close()
