# SPDX-License-Identifier: Apache-2.0
"""A command line of any program that is known here: of QEMU, of Cloud Hypervisor, of a back end."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from virtiova.collect import backends, cloud_hypervisor
from virtiova.collect.facts import View
from virtiova.result.scan import Place

if TYPE_CHECKING:
    from virtiova.collect.qemu.options import Reader

_LIMIT: Final = 1 << 20
_BEFORE: Final = 6
"""Words that may stand before a program: sudo, env A=B, taskset -c 1, ..."""


def collect(words: Sequence[str], place: Place, read: Reader | None = None) -> View:
    """What a command line says, by its program; of one that nobody knows it is QEMU's reader who says so.

    ``read`` gives the files that it names."""
    found = _other(words, place)
    if found is not None:
        return found
    from virtiova.collect import qemu

    return qemu.collect(words, place, read=read)


def of_file(data: bytes, name: str, read: Reader | None = None) -> View:
    """The command line that a file holds: shell text, or words with a NUL after each."""
    place = Place("command line", name)
    if len(data) <= _LIMIT:
        if b"\0" in data:
            words = backends.words_of(data)
        else:
            try:
                words = shlex.split(data.decode("utf-8", "replace").replace("\\\n", " "), comments=True)
            except ValueError:
                words = []
        found = _other(words, place)
        if found is not None:
            return found
    from virtiova.collect import qemu

    return qemu.collect(qemu.words_of(data), place, read=read)


def _other(words: Sequence[str], place: Place) -> View | None:
    """A view of what is not QEMU."""
    if any(posixpath.basename(word).startswith("qemu-system-") for word in words[: _BEFORE + 1]):
        return None
    for start in range(min(_BEFORE, len(words))):
        rest = words[start:]
        if cloud_hypervisor.is_command(rest):
            return cloud_hypervisor.collect(rest, place)
        served = backends.recognise(rest)
        if served is not None:
            return backends.collect(rest, place, served)
    return None
