# SPDX-License-Identifier: Apache-2.0
"""``name,key=value,...``: options as QEMU takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from virtiova.errors import UsageError

_ON: Final = frozenset({"on", "yes", "true", "y"})
_MAX: Final = 4096


def is_on(value: str) -> bool:
    """Is a boolean value on?"""
    return value.lower() in _ON


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """A name with options."""

    name: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> OptionSpec:
        """Parse what a user typed. A bare key means ``on``, as in QEMU."""
        if not text or len(text) > _MAX or not text.isprintable():
            raise UsageError(f"neither a device nor an IOMMU: {text[:60]!r}")
        name, *rest = text.split(",")
        options = {}
        for item in rest:
            key, equals, value = item.partition("=")
            if not key:
                raise UsageError(f"{text!r}: empty option")
            options[key] = value if equals else "on"
        return cls(name, options)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    def told(self, *besides: str) -> str:
        """The options as text, without those named."""
        return ",".join(f"{k}={v}" for k, v in self.options.items() if k not in besides)

    def on(self, key: str) -> bool:
        """Is a boolean option given and on?"""
        return is_on(self.options.get(key, "off"))
