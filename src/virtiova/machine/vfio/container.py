# SPDX-License-Identifier: Apache-2.0
"""A device's way from the kernel to us: its group, a container, the device. Nothing is bound or unbound here: what is
not as it has to be is said, with the command that makes it so."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from typing import Final

from virtiova.errors import MachineError, NotPossibleError, UsageError
from virtiova.machine.vfio.calls import CallError, call
from virtiova.wire import pci, vfio

_DEVICES: Final = "/sys/bus/pci/devices"
_GROUPS: Final = "/sys/kernel/iommu_groups"
_CMDLINE: Final = "/proc/cmdline"
_FILES: Final = "/dev/vfio"
_HARMLESS: Final = ("vfio-pci", "pcieport", "pci-stub")
"""Drivers that leave a group viable (Linux, ``driver_managed_dma``)."""
_OFF: Final = re.compile(r"(?:intel_iommu|amd_iommu|iommu)=off")
_LONGEST: Final = 4096
_ADDRESS: Final = re.compile(r"(?:(?P<domain>[0-9a-f]{4}):)?(?P<rest>[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")


def full_address(text: str) -> str:
    """``03:00.0`` with its domain. Raises `UsageError` for what is no PCI address."""
    match = _ADDRESS.fullmatch(text.lower())
    if match is None:
        raise UsageError(f"{text!r} is no PCI address, such as 0000:03:00.0")
    return f"{match['domain'] or '0000'}:{match['rest']}"


class Opened:
    """The descriptors of a device that is bound to vfio-pci. Raises `NotPossibleError` with what is missing."""

    def __init__(self, address: str) -> None:
        self.address = full_address(address)
        self._cleanup = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        group = self._group()
        at = f"{_FILES}/{group}"
        self.container = self._file(f"{_FILES}/vfio", "modprobe vfio-pci, or a kernel that has VFIO's containers")
        if call(self.container, "VFIO_GET_API_VERSION", vfio.GET_API_VERSION) != vfio.API_VERSION:
            raise NotPossibleError("this kernel's VFIO speaks another version of its interface")
        if not call(self.container, "VFIO_CHECK_EXTENSION", vfio.CHECK_EXTENSION, vfio.TYPE1V2_IOMMU):
            raise NotPossibleError("this kernel's VFIO has no type 1 IOMMU: modprobe vfio_iommu_type1")
        self.group = self._file(at, f"ls -l {_FILES}, for a kernel that has groups")
        status = vfio.group_status()
        call(self.group, "VFIO_GROUP_GET_STATUS", vfio.GROUP_GET_STATUS, status)
        if not vfio.viable(status):
            raise NotPossibleError(self._not_viable(group))
        self._attach(at)
        try:
            self.device = call(
                self.group,
                "VFIO_GROUP_GET_DEVICE_FD",
                vfio.GROUP_GET_DEVICE_FD,
                bytearray(self.address.encode() + b"\0"),
            )
        except CallError as error:
            if error.errno == errno.EBUSY:
                raise NotPossibleError(_busy(at)) from error
            raise MachineError(f"{self.address}: the kernel does not hand it over: {error}") from error
        self._cleanup.callback(os.close, self.device)

    def _attach(self, group: str) -> None:
        """Put the group into the container, and an IOMMU behind that."""
        argument = self.container.to_bytes(4, "little")
        try:
            call(self.group, "VFIO_GROUP_SET_CONTAINER", vfio.GROUP_SET_CONTAINER, argument)
            call(self.container, "VFIO_SET_IOMMU", vfio.SET_IOMMU, vfio.TYPE1V2_IOMMU)
        except CallError as error:
            if error.errno == errno.EBUSY:
                raise NotPossibleError(_busy(group)) from error
            if error.errno == errno.EPERM:
                raise NotPossibleError(
                    f"{self.address}: the kernel does not put it behind the IOMMU: it has no interrupt remapping, or "
                    "firmware keeps memory for the device. dmesg | tail says which; of the first,\n"
                    "    echo Y > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts\n"
                    "lets a device send any interrupt, and it would be given away"
                ) from error
            raise MachineError(f"{self.address}: {error}") from error

    def _group(self) -> str:
        """Its group's number, once it is clear that it may be had. Nothing is opened for that, and nothing is advised
        to be unbound that would be of no use here."""
        at = f"{_DEVICES}/{self.address}"
        if not os.path.exists(at):
            raise UsageError(f"there is no PCI device {self.address}: lspci -Dd {pci.VENDOR_VIRTIO:04x}: lists them")
        vendor, device = _word(f"{at}/vendor"), _word(f"{at}/device")
        if vendor is not None and vendor != pci.VENDOR_VIRTIO:
            raise UsageError(f"{self.address} ({vendor:04x}:{device or 0:04x}) is no virtio device")
        if not os.path.exists(f"{at}/iommu_group"):
            raise NotPossibleError(f"{self.address} is in no IOMMU group: {_no_iommu()}")
        driver = _driver(self.address)
        path = os.path.realpath(f"{at}/iommu_group")
        with contextlib.suppress(OSError), open(f"{path}/name", encoding="utf-8") as file:
            if file.read(_LONGEST).strip() == "vfio-noiommu":
                raise NotPossibleError(
                    f"{self.address} is in a group without an IOMMU (enable_unsafe_noiommu_mode): nothing would stand "
                    "between the device and all of memory, and there would be nothing to see. "
                    "echo N > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode, bind it anew, and with an IOMMU: "
                    + _no_iommu()
                )
        if driver != "vfio-pci":
            now = f"bound to {driver}" if driver else "bound to no driver"
            raise NotPossibleError(f"{self.address} is {now}, not to vfio-pci. This binds it:\n{binding(self.address)}")
        return os.path.basename(path)

    def _not_viable(self, group: str) -> str:
        others = []
        for name in sorted(os.listdir(f"{_GROUPS}/{group}/devices")):
            bound = _driver(name)
            if name != self.address and bound not in ("", *_HARMLESS):
                others.append((name, bound))
        if not others:
            return f"IOMMU group {group} is not viable: {_busy(f'{_FILES}/{group}')}"
        said = ", ".join(f"{name} ({driver})" for name, driver in others)
        commands = "\n".join(binding(name) for name, _ in others)
        return (
            f"IOMMU group {group} is not viable: all of it is handed over or nothing, and the kernel has {said}. "
            f"This gives up what the kernel has:\n{commands}"
        )

    def _file(self, path: str, command: str) -> int:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise NotPossibleError(_busy(path)) from error
            if error.errno in (errno.EACCES, errno.EPERM):
                command = "run it as root, as with sudo"
            raise NotPossibleError(f"{path}: {error.strerror}: {command}") from error
        self._cleanup.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Let go of all. May be called more than once."""
        self._cleanup.close()


def binding(address: str) -> str:
    """The commands that give a device to vfio-pci."""
    at = f"{_DEVICES}/{address}"
    bound = [f"echo {address} > {at}/driver/unbind"] if _driver(address) else []
    lines = [
        "modprobe vfio-pci",
        f"echo vfio-pci > {at}/driver_override",
        *bound,
        f"echo {address} > /sys/bus/pci/drivers_probe",
    ]
    return "\n".join(f"    {line}" for line in lines)


def _driver(address: str) -> str:
    """The name of a device's driver; empty if it has none."""
    path = f"{_DEVICES}/{address}/driver"
    return os.path.basename(os.path.realpath(path)) if os.path.exists(path) else ""


def _word(path: str) -> int | None:
    """A number that the kernel says in a file."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return int(file.read(_LONGEST), 16)
    return None


def _busy(path: str) -> str:
    return f"{path}: somebody else has the device: fuser -v {path} says who"


def _no_iommu() -> str:
    """What would give this machine one."""
    with contextlib.suppress(OSError):
        if os.listdir(_GROUPS):
            return "this machine's IOMMU has groups for other devices only"
    words: list[str] = []
    with contextlib.suppress(OSError), open(_CMDLINE, encoding="utf-8", errors="replace") as file:
        words = [word for word in file.read(_LONGEST).split() if _OFF.fullmatch(word)]
    if words:
        return f"the IOMMU was switched off by {' '.join(words)} on the kernel's command line"
    return (
        "there is no IOMMU, or it is off: switch it on in the firmware's setup (VT-d, AMD-Vi, SMMU), and boot with "
        "intel_iommu=on on the kernel's command line where it is Intel's; a virtual machine has one if its program "
        "gives it one (QEMU: -device intel-iommu)"
    )
