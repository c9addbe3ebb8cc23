# SPDX-License-Identifier: Apache-2.0
"""What a device's property comes to: its default, the machine's, ``-global``, and what its own option says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from virtiova.collect.facts import Certainty
from virtiova.collect.qemu.models import Model
from virtiova.collect.qemu.options import Option


@dataclass(frozen=True, slots=True)
class Value:
    """A value, how sure it is, and the option that says so; None: nothing is written."""

    text: str
    certainty: Certainty = Certainty.DEFAULT
    option: Option | None = None


@dataclass(frozen=True, slots=True)
class _Default:
    type: str
    prop: str
    value: Value


_ON_PROXY: Final = frozenset({"disable-legacy", "disable-modern", "ats", "force-legacy", "x-disable-pcie"})
"""Properties of the transport's side. All others are the inner device's, and may be said of either."""


class Properties:
    """The defaults of one machine, and its ``-global`` options."""

    def __init__(self, options: Iterable[Option]) -> None:
        self._globals: dict[tuple[str, str], tuple[int, Value]] = {}
        self._defaults: list[_Default] = []
        for number, option in enumerate(options):
            key = option.get("driver"), option.get("property")
            self._globals[key] = number, Value(option.get("value"), Certainty.SAID, option)

    def default(self, type_: str, prop: str, value: Value) -> None:
        """The machine's own word about a property; a later one counts."""
        self._defaults.append(_Default(type_, prop, value))

    def of(self, option: Option | None, model: Model, prop: str, default: str) -> Value:
        """The property of one device, in the order in which QEMU sets it: the later counts.

        The inner device is made first, with its defaults and globals; then the transport around it.
        """
        if option is not None and prop in option:
            return Value(option.get(prop), Certainty.SAID, option)
        inner = frozenset() if prop in _ON_PROXY else model.inner_types
        return self._set(model.outer_types, prop) or self._set(inner, prop) or Value(default)

    def of_type(self, types: frozenset[str], prop: str, default: str) -> Value:
        """A property of something that is no virtio device: a transport, an IOMMU."""
        return self._set(types, prop) or Value(default)

    def _set(self, types: frozenset[str], prop: str) -> Value | None:
        said = [found for type_ in types if (found := self._globals.get((type_, prop))) is not None]
        if said:
            return max(said, key=lambda each: each[0])[1]
        return next((each.value for each in reversed(self._defaults) if each.prop == prop and each.type in types), None)
