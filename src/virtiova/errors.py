# SPDX-License-Identifier: Apache-2.0
"""The exception tree.

::

    VirtiovaError                 everything that this package raises on purpose
     +-- UsageError               an unknown name, a bad option                       (exit 2)
     +-- NotPossibleError         this machine cannot do it, e.g. no QEMU installed   (exit 77)
     +-- MachineError             the machine died, or stopped answering              (exit 3)
     |    +-- RefusedError        the machine would not even start with that device
     +-- ProtocolError            the other side sent bytes that mean nothing
     |    +-- AccessError         an address outside what may be touched
     +-- NegotiationError         the device, or the driver's platform, refused the features
"""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 24


class VirtiovaError(Exception):
    """Base of all errors raised on purpose by this package."""


class UsageError(VirtiovaError):
    """The user named something that does not exist."""

    @classmethod
    def unknown(
        cls, what: str, name: str, valid: Iterable[str], *, alike: float = 0.5, otherwise: str = ""
    ) -> UsageError:
        """An error for ``name``, which is no valid ``what``, with the nearest valid name.

        ``alike``, from 0 to 1: how much of it that one has to share with ``name``. ``otherwise`` is said where there is
        none, instead of all the valid names.
        """
        # Only who mistyped something waits for it.
        import difflib

        names = sorted({str(each) for each in valid} - {name})
        near = difflib.get_close_matches(name, names, n=1, cutoff=alike)
        more = ", ..." if len(names) > _LISTED else ""
        listed = otherwise or f"valid: {', '.join(names[:_LISTED])}{more}"
        return cls(f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else listed))


class NotPossibleError(VirtiovaError):
    """Not possible on this machine; the message names what is missing."""


class MachineError(VirtiovaError):
    """The machine died or stopped answering. ``stderr`` holds its own last words."""

    def __init__(self, message: str, stderr: str = "") -> None:
        super().__init__(message)
        self.stderr = stderr


class RefusedError(MachineError):
    """The machine refused its command line. ``stderr`` holds its own words.

    ``number``: which of its devices it would not have, counted from 0.
    """

    def __init__(self, message: str, stderr: str = "", number: int = 0) -> None:
        super().__init__(message, stderr)
        self.number = number


class ProtocolError(VirtiovaError):
    """The other side sent bytes that have no meaning, or broke a bound."""


class AccessError(ProtocolError):
    """An access outside of what may be touched."""

    def __init__(self, address: int, length: int, reason: str) -> None:
        super().__init__(f"0x{address:x}+0x{length:x}: {reason}")
        self.address = address
        self.length = length
        self.reason = reason


class NegotiationError(VirtiovaError):
    """Feature negotiation ended without FEATURES_OK, or was given up by the driver."""
