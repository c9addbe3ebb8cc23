# SPDX-License-Identifier: Apache-2.0
"""A device's way from the kernel to us: its group, a container, the device. Nothing is bound or unbound here: what is
not as it has to be is said, with the command that makes it so."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from typing import Final

from virtiova.errors import MachineError, NotPossibleError, UsageError
from virtiova.wire import vfio

_DEVICES: Final = "/sys/bus/pci/devices"
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
        self.container = self._file("/dev/vfio/vfio", "modprobe vfio-pci")
        if fcntl.ioctl(self.container, vfio.GET_API_VERSION) != vfio.API_VERSION:
            raise NotPossibleError("this kernel's VFIO speaks another version of its interface")
        if not fcntl.ioctl(self.container, vfio.CHECK_EXTENSION, vfio.TYPE1V2_IOMMU):
            raise NotPossibleError("this kernel's VFIO has no type 1 IOMMU: modprobe vfio_iommu_type1")
        self.group = self._file(f"/dev/vfio/{group}", f"ls -l /dev/vfio/{group}")
        status = vfio.group_status()
        fcntl.ioctl(self.group, vfio.GROUP_GET_STATUS, status)
        if not vfio.viable(status):
            raise NotPossibleError(self._not_viable(group))
        fcntl.ioctl(self.group, vfio.GROUP_SET_CONTAINER, self.container.to_bytes(4, "little"))
        fcntl.ioctl(self.container, vfio.SET_IOMMU, vfio.TYPE1V2_IOMMU)
        try:
            self.device = fcntl.ioctl(self.group, vfio.GROUP_GET_DEVICE_FD, bytearray(self.address.encode() + b"\0"))
        except OSError as error:
            raise MachineError(f"{self.address}: the kernel does not hand it over: {error.strerror}") from error
        self._cleanup.callback(os.close, self.device)

    def _group(self) -> str:
        """Its group's number, once it is clear that it may be had."""
        at = f"{_DEVICES}/{self.address}"
        if not os.path.exists(at):
            raise UsageError(f"there is no PCI device {self.address}")
        driver = os.path.basename(os.path.realpath(f"{at}/driver")) if os.path.exists(f"{at}/driver") else ""
        if driver != "vfio-pci":
            now = f"bound to {driver}" if driver else "bound to no driver"
            raise NotPossibleError(f"{self.address} is {now}, not to vfio-pci. This binds it:\n{binding(self.address)}")
        if not os.path.exists(f"{at}/iommu_group"):
            raise NotPossibleError(
                f"{self.address} is in no IOMMU group: there is no IOMMU, or it is off (intel_iommu=on)"
            )
        path = os.path.realpath(f"{at}/iommu_group")
        group = os.path.basename(path)
        with contextlib.suppress(OSError), open(f"{path}/name", encoding="utf-8") as file:
            if file.read().strip() == "vfio-noiommu":
                raise NotPossibleError(
                    f"{self.address} is in a group without an IOMMU (enable_unsafe_noiommu_mode): nothing would stand "
                    "between the device and all of memory, and there would be nothing to see"
                )
        return group

    def _not_viable(self, group: str) -> str:
        others = []
        for name in sorted(os.listdir(f"/sys/kernel/iommu_groups/{group}/devices")):
            driver = f"{_DEVICES}/{name}/driver"
            bound = os.path.basename(os.path.realpath(driver)) if os.path.exists(driver) else ""
            if name != self.address and bound not in ("", "vfio-pci", "pcieport"):
                others.append((name, bound))
        said = ", ".join(f"{name} ({driver})" for name, driver in others)
        commands = "\n".join(binding(name) for name, _ in others)
        return f"IOMMU group {group} is not viable: {said} of it are the kernel's. This gives them up:\n{commands}"

    def _file(self, path: str, command: str) -> int:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise NotPossibleError(f"{path}: somebody else has the device") from error
            hint = "as root, or as who owns it" if error.errno in (errno.EACCES, errno.EPERM) else command
            raise NotPossibleError(f"{path}: {error.strerror}: {hint}") from error
        self._cleanup.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Let go of all. May be called more than once."""
        self._cleanup.close()


def binding(address: str) -> str:
    """The commands that give a device to vfio-pci."""
    at = f"{_DEVICES}/{address}"
    bound = [f"echo {address} > {at}/driver/unbind"] if os.path.exists(f"{at}/driver") else []
    lines = [
        "modprobe vfio-pci",
        f"echo vfio-pci > {at}/driver_override",
        *bound,
        f"echo {address} > /sys/bus/pci/drivers_probe",
    ]
    return "\n".join(f"    {line}" for line in lines)
