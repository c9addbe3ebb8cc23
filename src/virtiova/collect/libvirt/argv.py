# SPDX-License-Identifier: Apache-2.0
"""The QEMU command line that libvirt makes of a domain, as far as virtio devices and IOMMUs are concerned.

What such a command line comes to is the business of `collect.qemu`. Here every word of it gets the line of the element
it comes from, every property that of its attribute; and what libvirt adds by itself is marked.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Final

from virtiova.collect.libvirt.xml import Element
from virtiova.collect.qemu.words import Word
from virtiova.errors import ProtocolError

QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0 "
_PROBLEMS: Final = 64
_DEVICES: Final = 4096
"""Bridges and virtio devices of one machine. 256 buses have 32 slots each, and a port takes one."""


@dataclass(slots=True)
class Frontend:
    """One ``-device``: its properties in order, and the line of each that has one of its own."""

    driver: str
    id: str
    line: int
    properties: dict[str, str | bool] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    implied: bool = False
    """libvirt adds it; there is no element."""
    placed: bool = True
    """The file says where it is. If not, libvirt is yet to give it an address."""
    backend_implied: bool = False
    """That vhost serves it is libvirt's default."""
    backend_line: int = 0

    def set(self, key: str, value: str | bool, line: int) -> None:
        """One property, and the line that says so."""
        self.properties[key] = value
        self.lines[key] = line

    def word(self) -> Word:
        """Its argument."""
        return Word(json.dumps({"driver": self.driver, **self.properties, "id": self.id}), self.line)


@dataclass(slots=True)
class Argv:
    """The words, and what is to be known of them beyond."""

    name: str
    """Of the file."""
    words: list[Word] = field(default_factory=list)
    frontends: dict[str, Frontend] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _pending: list[tuple[str, Word | Frontend]] = field(default_factory=list)
    _again: dict[str, int] = field(default_factory=dict)

    def option(self, name: str, text: str, line: int) -> None:
        """An option and its argument."""
        self._pending.append((name, Word(text, line)))

    def keyed(self, name: str, first: str, line: int, **pairs: str) -> None:
        """An option of keys and values; commas in values are doubled, as QEMU wants it."""
        said = [first, *(f"{key.replace('_', '-')}={value.replace(',', ',,')}" for key, value in pairs.items())]
        self.option(name, ",".join(part for part in said if part), line)

    def device(self, frontend: Frontend) -> None:
        """A device. Its id is made unique: in a file that libvirt wrote it is."""
        if len(self.frontends) >= _DEVICES:
            raise ProtocolError(f"{self.name}: more than {_DEVICES} ports and virtio devices")
        name = frontend.id
        while frontend.id in self.frontends:
            self._again[name] = self._again.get(name, 1) + 1
            frontend.id = f"{name}-{self._again[name]}"
        self.frontends[frontend.id] = frontend
        self._pending.append(("device", frontend))

    def problem(self, line: int, words: str) -> None:
        """Something in the file that means nothing, or nothing here."""
        if len(self.problems) < _PROBLEMS:
            self.problems.append(f"{self.name}:{line}: {words}")

    def finish(self, domain: Element, binary: str) -> list[Word]:
        """All words: what libvirt makes, then what the file passes through."""
        self._override(domain)
        self.words = [Word(binary)]
        for name, argument in self._pending:
            self.words.append(Word(f"-{name}", argument.line))
            if isinstance(argument, Frontend):
                self.words.append(argument.word())
            elif argument:
                self.words.append(argument)
        passed = [Word(arg.get("value"), arg.line_of("value")) for arg in passed_through(domain)]
        for word, following in itertools.zip_longest(passed, passed[1:], fillvalue=Word("-")):
            # What an option says is on the line of its argument.
            self.words.append(word if following.startswith("-") else Word(word, following.line))
        return self.words

    def _override(self, domain: Element) -> None:
        """``<qemu:override>``: properties of devices, by alias, as somebody wants them."""
        for device in _below(domain, "override", "device"):
            found = self.frontends.get(device.get("alias"))
            for each in _below(device, "frontend", "property") if found is not None else ():
                assert found is not None
                key = each.get("name")
                if each.get("type") == "remove":
                    found.properties.pop(key, None)
                elif key not in ("driver", "id"):
                    said = each.get("value")
                    value: str | bool = said == "true" if each.get("type") == "bool" else said
                    found.set(key, value, each.line_of("value"))


def passed_through(domain: Element) -> list[Element]:
    """The words of ``<qemu:commandline>``."""
    return _below(domain, "commandline", "arg")


def _below(element: Element, outer: str, inner: str) -> list[Element]:
    """All elements ``inner`` in the elements ``outer`` of one, both of the namespace of QEMU's additions."""
    return [each for found in element.all(QEMU_NAMESPACE + outer) for each in found.all(QEMU_NAMESPACE + inner)]
