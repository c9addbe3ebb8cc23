# SPDX-License-Identifier: Apache-2.0
"""One call of the kernel's VFIO interface, with its refusal in words."""

from __future__ import annotations

import fcntl

from virtiova.errors import MachineError


class CallError(MachineError):
    """The kernel did not do what it was asked for. ``errno`` is its reason."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number


def call(fd: int, what: str, request: int, argument: int | bytes | bytearray = 0) -> int:
    """An ioctl's answer; ``what`` is its name for the error. A ``bytearray`` holds what the kernel wrote."""
    try:
        answer: object = fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise CallError(f"VFIO: {what}: {error.strerror}", error.errno or 0) from error
    # Of what cannot be written to, a copy comes back instead.
    return answer if isinstance(answer, int) else 0
