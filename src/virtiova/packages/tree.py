# SPDX-License-Identifier: Apache-2.0
"""Packages of another suite, unpacked into one folder of the user's cache and run in place.

Unlike the few files of a `Store`, which are handed out as bytes, programs with modules and firmware beside them need
a place in the file system. They are checked against their checksums whenever the folder is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtiova.errors import NotPossibleError
from virtiova.packages.apt import Apt, Progress
from virtiova.packages.store import DamagedError, cache_root, locked, manifest_text, read_manifest, unpack

SUITE: Final = re.compile(r"[a-z]+(-[a-z]+)*")
"""What may be the name of a suite: ``trixie``, ``bookworm-backports``."""
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """The files of a package that match one of ``keep``, patterns of `Path.glob` from the root of the package."""

    package: str
    keep: tuple[str, ...]


class Tree:
    """Parts of packages of one ``suite`` in one folder. ``offline``: nothing is fetched.

    All parts are of one version: when a newer one comes, the others are fetched anew.
    """

    def __init__(
        self,
        suite: str,
        architecture: str,
        *,
        root: Path | None = None,
        offline: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._suite = suite
        self._architecture = architecture
        self._root = (root or cache_root()) / "suites"
        self._name = f"{suite}-{architecture}"
        self._offline = offline
        self._progress = progress
        self.folder = self._root / self._name / "tree"
        """Where the packages' own root is."""

    def get(self, parts: Sequence[Part], stop: threading.Event | None = None) -> dict[str, str]:
        """Have these in `folder`. What could not be had, by package, with the reason: empty if all is well."""
        stop = stop or threading.Event()
        if not self._damage(parts):
            return {}
        if self._offline:
            return {name: f"offline, and {why}" for name, why in self._damage(parts).items()}
        try:
            with locked(self._root, self._name, stop):
                return self._mend(parts, stop)
        except (NotPossibleError, OSError) as error:
            reason = str(error) if isinstance(error, NotPossibleError) else f"{self._root}: {error.strerror}"
            return dict.fromkeys(self._damage(parts), reason)

    # -- reading -------------------------------------------------------------------------------------------------

    def _damage(self, parts: Sequence[Part]) -> dict[str, str]:
        """What is wrong with these parts, by package."""
        found = {}
        for part in parts:
            try:
                self._check(part)
            except DamagedError as damage:
                found[part.package] = str(damage)
        return found

    def _check(self, part: Part) -> str:
        """The version of a part that is there and whole. Raises `DamagedError`."""
        package, sums = read_manifest(self._manifest(part), self._identity(part))
        for name, expected in sums.items():
            try:
                seen = _checksum(self.folder / name)
            except OSError as error:
                raise DamagedError(f"{name} in the cache: {error.strerror}") from error
            if seen != expected:
                raise DamagedError(f"{name} in the cache does not have its checksum")
        return _version(package)

    def _manifest(self, part: Part) -> Path:
        return self._root / self._name / f"{part.package}.json"

    def _identity(self, part: Part) -> list[str]:
        return [part.package, self._architecture, self._suite, *part.keep]

    # -- fetching ------------------------------------------------------------------------------------------------

    def _mend(self, parts: Sequence[Part], stop: threading.Event) -> dict[str, str]:
        """Fetch what is not there or not whole, and everything again if that is of another version."""
        failed: dict[str, str] = {}
        versions: set[str] = set()
        for part in parts:
            try:
                version = self._check(part)
            except DamagedError:
                try:
                    version = self._fetch(part, stop)
                except NotPossibleError as error:
                    failed[part.package] = str(error)
                    continue
            versions.add(version)
        if len(versions) > 1:
            # The suite moved on between two runs: programs do not take modules of another build.
            shutil.rmtree(self._root / self._name)
            failed = {}
            for part in parts:
                try:
                    self._fetch(part, stop)
                except NotPossibleError as error:
                    failed[part.package] = str(error)
        return failed

    def _fetch(self, part: Part, stop: threading.Event) -> str:
        """Download, unpack and move what is kept into the folder; its version. The lock is held."""
        for left in self._root.glob(f"tmp-{self._name}-*"):
            # Whoever made it held this lock, so it was ended in the middle.
            shutil.rmtree(left, ignore_errors=True)
        lists = self._root / f"apt-{self._name}"
        lists.mkdir(exist_ok=True)
        package = Apt(lists, self._architecture, self._progress, stop, self._suite).download(part.package)
        with tempfile.TemporaryDirectory(prefix=f"tmp-{self._name}-", dir=self._root) as name:
            root = Path(name, "root")
            unpack(package, root)
            sums = {}
            for path in _kept(root, part.keep):
                sums[str(path.relative_to(root))] = _checksum(path)
                place = self.folder / path.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
            if not sums:
                raise NotPossibleError(f"{package.name} holds nothing like {', '.join(part.keep)}")
            written = Path(name, "manifest")
            written.write_text(manifest_text(self._identity(part), package.name, sums), encoding="utf-8")
            written.replace(self._manifest(part))
        package.unlink()
        return _version(package.name)


def own_architecture() -> str:
    """Debian's name for the architecture of this machine."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64el"}.get(machine, machine)


def _kept(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Regular files only: a link may lead anywhere."""
    found = {path for pattern in patterns for path in root.glob(pattern)}
    yield from (path for path in sorted(found) if path.is_file() and not path.is_symlink())


def _checksum(path: Path) -> str:
    """SHA-256, hex. A link is not followed."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _version(package: str) -> str:
    """The version in the file name of a package."""
    return package.split("_")[1] if package.count("_") == 2 else package
