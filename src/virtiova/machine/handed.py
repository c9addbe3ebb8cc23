# SPDX-License-Identifier: Apache-2.0
"""A device that this machine's kernel hands over to user space: by what it is named, and how it is had."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from virtiova.ports import Machine


class OpenedMachine(Machine, Protocol):
    """A machine that ends with its ``with``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Handed(Protocol):
    """What names such a device: a value, to be compared and taken to other processes. The machine that it opens is a
    new one each time, and leaves the device as it found it."""

    @property
    def machine(self) -> str:
        """The machine's name, as in the output: ``vfio``."""

    @property
    def iommu(self) -> str:
        """The name of the IOMMU that stands in front of it."""

    @property
    def place(self) -> str:
        """Where it is: the kernel hands what is there to one at a time."""

    def check(self) -> None:
        """`UsageError` if nothing can ever be named like that. Opens nothing."""

    def look(self) -> str:
        """Open it, and say what it is called in the output, as ``virtio-blk``. It does no DMA for that.

        Raises `NotPossibleError` with what is missing, and the command that supplies it; `UsageError` for what is not
        to be probed.
        """

    def open(self, *, packed: bool = False) -> OpenedMachine:
        """Have it. ``packed``: the driver is offered packed rings if the device offers them. Raises as `look`."""
