# SPDX-License-Identifier: Apache-2.0
"""What the tests of VFIO do in their guest, beside commands: others than root, others who have the device, and ends
that nobody planned."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import inside_kit
from virtiova.addr import IOVA
from virtiova.errors import AccessError
from virtiova.machine.vfio.container import Opened
from virtiova.machine.vfio.function import VfioFunction
from virtiova.machine.vfio.iommu import VfioIommu
from virtiova.machine.vfio.limits import Limits
from virtiova.machine.vfio.machine import VfioDevice, VfioMachine
from virtiova.probe.cell import run_cell
from virtiova.probe.experiment import find
from virtiova.probe.rig import Outcome, Rig
from virtiova.transport.pci import ModernPci
from virtiova.wire import pci, vfio

_USER = 1000
_CAP_IPC_LOCK = 14
_VERSION_3 = 0x20080522
_DELETE_MODULE = 176


def _group(address: str) -> str:
    return f"/dev/vfio/{os.path.basename(os.path.realpath(f'/sys/bus/pci/devices/{address}/iommu_group'))}"


def _forked(first: Callable[[], object], words: Sequence[str]) -> Any:
    """What a step comes to in a child that has done something ``first``."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        try:
            first()
            os.write(write, json.dumps(inside_kit.do(words)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read()
    os.waitpid(pid, 0)
    return json.loads(said)


def _become() -> None:
    os.setgroups([])
    os.setgid(_USER)
    os.setuid(_USER)


def as_user(*words: str) -> Any:
    """A step of somebody who is not root."""
    return _forked(_become, words)


def as_owner(address: str, *words: str) -> Any:
    """A step of somebody who is not root, and to whom the group belongs."""
    os.chown(_group(address), _USER, _USER)
    try:
        return _forked(_become, words)
    finally:
        os.chown(_group(address), 0, 0)


def _little_memory() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    head, data = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, data) == 0
    for word in (0, 1):
        data[word] &= ~(1 << _CAP_IPC_LOCK)
    assert libc.capset(head, data) == 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8192, 8192))


def with_little_memory(*words: str) -> Any:
    """A step of who may lock two pages."""
    return _forked(_little_memory, words)


def while_had(address: str, *words: str) -> Any:
    """A step while somebody has the device."""
    with VfioDevice(address, i_know=True).open():
        return inside_kit.do(words)


def killed(address: str, *words: str) -> Any:
    """A step after who had the device, and had let it loose, was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        machine = VfioDevice(address, i_know=True).open()
        _loose(Rig(machine))
        os.write(write, b"x")
        time.sleep(60)
        os._exit(1)
    os.close(write)
    ready = os.read(read, 1)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(read)
    assert (ready, os.WTERMSIG(status)) == (b"x", signal.SIGKILL)
    return inside_kit.do(words)


def _loose(rig: Rig) -> None:
    """Have the device run: bus master on, DRIVER_OK."""
    rig.enable_iommu()
    rig.negotiate()
    rig.start()


class _Kept:
    """The device's descriptor, kept beyond the machine's end, so that the kernel has not reset it yet."""

    def __init__(self, machine: VfioMachine) -> None:
        self.fd = os.dup(machine.interrupts._device)
        self.function = VfioFunction(self.fd, machine.address)

    def state(self) -> dict[str, int]:
        command = self.function.read_config(pci.COMMAND, 2)
        self.function.write_config(pci.COMMAND, 2, pci.COMMAND_MEMORY)
        return {"command": command, "status": ModernPci(self.function, self.function.config()).read_status()}


def broken(address: str) -> Any:
    """The device's state before and after an experiment that fails in its middle, in a way that nobody planned."""
    kept: list[_Kept] = []
    before: list[dict[str, int]] = []

    def make() -> VfioMachine:
        machine = VfioDevice(address, i_know=True).open()
        kept.append(_Kept(machine))
        return machine

    def run(rig: Rig) -> Outcome:
        _loose(rig)
        machine = rig.machine
        assert isinstance(machine, VfioMachine)
        command = machine._function.read_config(pci.COMMAND, 2)
        before.append({"command": command, "status": machine.registers.read_status()})
        raise RuntimeError("broken on purpose")

    experiment = dataclasses.replace(find("unmapped"), run=run)
    try:
        run_cell(make, experiment, machine="vfio", iommu="vfio", device="virtio-rng")
    except RuntimeError as error:
        (it,) = kept
        after = it.state()
        os.close(it.fd)
        return {"error": str(error), "before": before[0], "after": after}
    raise AssertionError("nothing was broken")


def signals(address: str) -> Any:
    """How often the device signalled in one experiment, in which way, and what the control came to."""
    seen: list[str] = []

    def make() -> VfioMachine:
        machine = VfioDevice(address, i_know=True).open()
        taken = machine.interrupts.taken

        def counted() -> bool:
            came = taken()
            if came:
                seen.append(machine.interrupts.kind)
            return came

        machine.interrupts.taken = counted  # type: ignore[method-assign]
        return machine

    cell = run_cell(make, find("device-writes"), machine="vfio", iommu="vfio", device="virtio-rng")
    changed = [w.page for w in cell.evidence.witnesses if w.role == "control" and w.before != w.after]
    return {"signals": seen, "control": cell.evidence.control, "pages": changed, "observed": str(cell.observed)}


def ranges(address: str) -> Any:
    """The IOVAs that may be mapped, and what comes of mapping the window of the interrupt messages: by us, and by the
    kernel if it is asked all the same."""
    with VfioDevice(address).open() as machine:
        tables = machine.iommu
        assert isinstance(tables, VfioIommu)
        try:
            tables.map(IOVA(0xFEE00000), machine._memory.ram.blocks[0].gpa, 4096)
            ours = "mapped"
        except AccessError as error:
            ours = str(error)
    opened = Opened(address)
    try:
        room = (ctypes.c_char * 8192)()
        at = -(-ctypes.addressof(room) // 4096) * 4096
        request = vfio.map_dma(0xFEE00000, at, 4096, vfio.DmaFlag.READ)
        try:
            fcntl.ioctl(opened.container, vfio.IOMMU_MAP_DMA, request)
            kernels = "mapped"
        except OSError as error:
            kernels = os.strerror(error.errno or 0)
        return {"ranges": Limits(opened.container).ranges, "ours": ours, "kernel's": kernels}
    finally:
        opened.close()


def without_type1(*words: str) -> Any:
    """A step after the IOMMU's module has left the kernel, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_DELETE_MODULE, b"vfio_iommu_type1", os.O_NONBLOCK):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return inside_kit.do(words)


def left() -> Any:
    """What of VFIO this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return [path for path in found if "vfio" in path]
