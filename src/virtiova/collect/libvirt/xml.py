# SPDX-License-Identifier: Apache-2.0
"""XML as a tree of elements that know their lines: by expat, without document types or entities, everything bounded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from virtiova.errors import ProtocolError

LIMIT: Final = 8 << 20
"""Bytes of a document. A domain with a thousand devices has half a megabyte."""
_ELEMENTS: Final = 200_000
_DEPTH: Final = 64
_ATTRIBUTES: Final = 256
_TEXT: Final = 4096
"""Characters kept of an element's text: a name, a path, a command line. Of what is longer nothing is kept."""
_ATTRIBUTE: Final = re.compile(rb"""\s+([^\s=<>'"/]+)\s*=\s*(?:"[^"]*"|'[^']*')""")
_TAG: Final = re.compile(rb"<[^\s/>]+")


@dataclass(slots=True)
class Element:
    """One element. ``tag`` and the keys of ``attributes`` are bare names, or ``namespace name``. ``line`` is 1-based.

    ``text`` is what it holds itself, without blanks around it.
    """

    tag: str
    line: int
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element] = field(default_factory=list)
    text: str = ""
    where: dict[str, int] = field(default_factory=dict)
    """The lines of its attributes, as far as they are on other lines than the element."""

    def get(self, name: str, default: str = "") -> str:
        """An attribute."""
        return self.attributes.get(name, default)

    def line_of(self, name: str) -> int:
        """The line of an attribute; that of the element if it has none of that name."""
        return self.where.get(name, self.line)

    def all(self, tag: str) -> list[Element]:
        """Its children of that name."""
        return [child for child in self.children if child.tag == tag]

    def find(self, path: str) -> Element | None:
        """The first element on a path: ``os/type``."""
        found: Element | None = self
        for part in path.split("/"):
            if found is None:
                return None
            found = next((child for child in found.children if child.tag == part), None)
        return found

    def said(self, path: str, attribute: str) -> str:
        """An attribute of the first element on a path; empty if either is not there."""
        found = self.find(path)
        return "" if found is None else found.get(attribute)

    def words(self, path: str) -> str:
        """The text of the first element on a path; empty if it is not there."""
        found = self.find(path)
        return "" if found is None else found.text

    def __iter__(self) -> Iterator[Element]:
        return iter(self.children)


def parse(data: bytes, name: str, root: Callable[[Element], str | None]) -> Element:
    """A document's root element. ``root`` is asked as soon as that is known; what it says is what is wrong with it.

    `ProtocolError`, with the line, for all that is no well-formed XML, has a document type (and so might have
    entities), or is larger than anything sane.
    """
    if len(data) > LIMIT:
        raise ProtocolError(f"{name}: {len(data)} bytes; a domain has at most {LIMIT}")
    return _Reader(data, name, root).read()


class _Reader:
    """One document while it is read."""

    def __init__(self, data: bytes, name: str, root: Callable[[Element], str | None]) -> None:
        self._data, self._name, self._check = data, name, root
        self._open: list[Element] = []
        self._texts: list[list[str]] = []
        self._lengths: list[int] = []
        self._root: Element | None = None
        self._count = 0
        parser = expat.ParserCreate(namespace_separator=" ")
        # What is not handled is not expanded: no document type gets that far.
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.StartDoctypeDeclHandler = self._doctype
        parser.ordered_attributes = True
        self._parser = parser

    def read(self) -> Element:
        try:
            self._parser.Parse(self._data, True)
        except expat.ExpatError as error:
            raise ProtocolError(f"{self._name}:{error.lineno}: no XML: {expat.ErrorString(error.code)}") from error
        except (UnicodeError, LookupError, ValueError) as error:
            # An encoding that Python does not have, or that is no single-byte one.
            raise self._wrong(f"no XML: {str(error)[:120]}") from error
        assert self._root is not None  # expat does not end well without one
        return self._root

    def _wrong(self, words: str) -> ProtocolError:
        return ProtocolError(f"{self._name}:{self._parser.CurrentLineNumber}: {words}")

    def _doctype(self, kind: str, *_: object) -> None:
        raise self._wrong(f"a document type ({kind[:40]}); a domain of libvirt's has none, and none is read")

    def _start(self, tag: str, pairs: list[str]) -> None:
        self._count += 1
        if self._count > _ELEMENTS:
            raise self._wrong(f"more than {_ELEMENTS} elements")
        if len(self._open) >= _DEPTH:
            raise self._wrong(f"elements nested more than {_DEPTH} deep")
        if len(pairs) > 2 * _ATTRIBUTES:
            raise self._wrong(f"more than {_ATTRIBUTES} attributes")
        line = self._parser.CurrentLineNumber
        element = Element(tag, line, dict(zip(pairs[::2], pairs[1::2], strict=True)))
        if pairs:
            self._lines(element)
        if self._root is None:
            self._root = element
            wrong = self._check(element)
            if wrong is not None:
                raise self._wrong(wrong)
        else:
            self._open[-1].children.append(element)
        self._open.append(element)
        self._texts.append([])
        self._lengths.append(0)

    def _lines(self, element: Element) -> None:
        """Find the lines of attributes, where the start tag has more than one line. Not in an encoding of two bytes."""
        at = self._parser.CurrentByteIndex
        end = self._data.find(b">", at)
        if end < 0 or b"\n" not in self._data[at:end]:
            return
        tag = _TAG.match(self._data, at)
        here, line = (tag.end(), element.line) if tag else (end, element.line)
        while match := _ATTRIBUTE.match(self._data, here):
            start = match.start(1)
            line += self._data.count(b"\n", here, start)
            prefix, _, name = match[1].decode("utf-8", "replace").rpartition(":")
            if not prefix and name in element.attributes:
                element.where[name] = line
            line += self._data.count(b"\n", start, match.end())
            here = match.end()

    def _characters(self, text: str) -> None:
        if self._open:
            self._lengths[-1] += len(text)
            if self._lengths[-1] <= _TEXT:
                self._texts[-1].append(text)

    def _end(self, _: str) -> None:
        element, texts, length = self._open.pop(), self._texts.pop(), self._lengths.pop()
        element.text = "".join(texts).strip() if length <= _TEXT else ""
