# SPDX-License-Identifier: Apache-2.0
"""Citations: which sentence a rule rests on, as data. One specification version for the whole tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SPEC_VERSION: Final = "virtio 1.4"


@dataclass(frozen=True, slots=True)
class Citation:
    """A place in a public text: ``source`` is a specification or a commit, ``place`` a section or subject."""

    source: str
    place: str
    gist: str

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.gist}"


def spec(section: str, gist: str) -> Citation:
    """A sentence of the virtio specification, in our words."""
    return Citation(SPEC_VERSION, section, gist)


def commit(sha: str, subject: str, since: str) -> Citation:
    """A commit of the Linux kernel or QEMU, cited as ``sha ("subject") (in since)``."""
    return Citation(f"commit {sha}", f'"{subject}"', f"in {since}")
