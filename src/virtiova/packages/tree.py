# SPDX-License-Identifier: Apache-2.0
"""Packages of another suite, unpacked into one folder of the user's cache and run in place.

Unlike the few files of a `Store`, which are handed out as bytes, programs with modules and firmware beside them need
a place in the file system. They are checked against their checksums whenever the folder is asked for.
"""

from __future__ import annotations

import fcntl
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
_CURRENT: Final = "current"
_FOLDER: Final = re.compile(r"v[0-9A-Za-z.+~-]+")
"""What the folder of a version may be called."""
_NO_VERSION: Final = "none"
_TRIES: Final = 10


class _MovedOnError(Exception):
    """A package is of another version than those that are there."""


@dataclass(frozen=True, slots=True)
class Part:
    """The files of a package that match one of ``keep``, patterns of `Path.glob` from the root of the package."""

    package: str
    keep: tuple[str, ...]


class Tree:
    """Parts of packages of one ``suite`` in one folder. ``offline``: nothing is fetched.

    All parts are of one version. When a newer one comes, the others are fetched anew, into a folder of that version's:
    who runs from the older one goes on, and the last of them to end leaves it to be removed.
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
        self._versions = self._root / self._name
        self._version = ""
        """The folder of the version that we look at; empty: there is none."""

    @property
    def folder(self) -> Path:
        """Where the packages' own root is, once `get` was called. It stays there as long as this process does."""
        return self._versions / (self._version or _NO_VERSION) / "tree"

    def get(self, parts: Sequence[Part], stop: threading.Event | None = None) -> dict[str, str]:
        """Have these in `folder`. What could not be had, by package, with the reason: empty if all is well."""
        stop = stop or threading.Event()
        self._look()
        if not self._damage(parts):
            return {}
        if self._offline:
            return {name: f"offline, and {why}" for name, why in self._damage(parts).items()}
        try:
            with locked(self._root, self._name, stop):
                self._look()
                return self._mend(parts, stop)
        except (NotPossibleError, OSError) as error:
            reason = str(error) if isinstance(error, NotPossibleError) else f"{self._root}: {error.strerror}"
            return dict.fromkeys(self._damage(parts), reason)

    # -- reading -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Turn to the newest version there is, and hold it."""
        for _ in range(_TRIES):
            try:
                version = os.readlink(self._versions / _CURRENT)
            except OSError:
                version = ""
            # Never a way out of the folder, whatever the link says.
            self._version = version if _FOLDER.fullmatch(version) else ""
            if not self._version or hold(self._versions / self._version):
                return
        self._version = ""

    def _damage(self, parts: Sequence[Part]) -> dict[str, str]:
        """What is wrong with these parts, by package."""
        found = {}
        for part in parts:
            try:
                self._check(part)
            except DamagedError as damage:
                found[part.package] = str(damage)
        return found

    def _check(self, part: Part) -> None:
        """Raises `DamagedError` unless a part is there and whole."""
        _, sums = read_manifest(self._manifest(part), self._identity(part))
        for name, expected in sums.items():
            try:
                seen = _checksum(self.folder / name)
            except OSError as error:
                raise DamagedError(f"{name} in the cache: {error.strerror}") from error
            if seen != expected:
                raise DamagedError(f"{name} in the cache does not have its checksum")

    def _manifest(self, part: Part) -> Path:
        return self.folder.parent / f"{part.package}.json"

    def _identity(self, part: Part) -> list[str]:
        return [part.package, self._architecture, self._suite, *part.keep]

    # -- fetching ------------------------------------------------------------------------------------------------

    def _mend(self, parts: Sequence[Part], stop: threading.Event) -> dict[str, str]:
        """Fetch what is not there or not whole, and everything if that is of another version."""
        if self._version:
            try:
                return self._fill(parts, stop)
            except _MovedOnError:
                # The suite moved on between two runs: programs do not take modules of another build.
                self._version = ""
        for again in (True, False):
            try:
                failed = self._fill(parts, stop)
                break
            except _MovedOnError as error:
                # It did so while we were at it.
                if not again:
                    raise NotPossibleError(f"packages of different versions: {error}") from None
                self._version = ""
        if self._version:
            link = self._versions / f"{_CURRENT}.new"
            link.unlink(missing_ok=True)
            link.symlink_to(self._version)
            link.replace(self._versions / _CURRENT)
            self._look()
            self._clear()
        return failed

    def _fill(self, parts: Sequence[Part], stop: threading.Event) -> dict[str, str]:
        """Complete the folder of our version; without one, the first package says which. What could not be had."""
        failed: dict[str, str] = {}
        for part in parts:
            try:
                self._check(part)
            except DamagedError:
                try:
                    self._fetch(part, stop)
                except NotPossibleError as error:
                    failed[part.package] = str(error)
        return failed

    def _clear(self) -> None:
        """Remove older versions that nobody holds."""
        for path in self._versions.iterdir():
            if path.name == self._version or path.is_symlink() or not (_FOLDER.fullmatch(path.name) and path.is_dir()):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Out of the way as a whole: half of it must not be taken for a version.
                aside = self._root / f"tmp-{self._name}-old-{path.name}"
                path.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)

    def _fetch(self, part: Part, stop: threading.Event) -> None:
        """Download, unpack and move what is kept into the folder of its version. The lock is held."""
        for left in self._root.glob(f"tmp-{self._name}-*"):
            # Whoever made it held this lock, so it was ended in the middle.
            shutil.rmtree(left, ignore_errors=True)
        lists = self._root / f"apt-{self._name}"
        lists.mkdir(exist_ok=True)
        package = Apt(lists, self._architecture, self._progress, stop, self._suite).download(part.package)
        version = _version(package.name)
        if self._version not in ("", version):
            raise _MovedOnError(f"{part.package} is of {version}, what is there of {self._version}")
        with tempfile.TemporaryDirectory(prefix=f"tmp-{self._name}-", dir=self._root) as name:
            root = Path(name, "root")
            unpack(package, root)
            kept = list(_kept(root, part.keep))
            if not kept:
                raise NotPossibleError(f"{package.name} holds nothing like {', '.join(part.keep)}")
            self._version = version
            sums = {}
            for path in kept:
                sums[str(path.relative_to(root))] = _checksum(path)
                place = self.folder / path.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
            written = Path(name, "manifest")
            written.write_text(manifest_text(self._identity(part), package.name, sums), encoding="utf-8")
            written.replace(self._manifest(part))
        package.unlink()


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
    """The version in the file name of a package, as the name of a folder."""
    version = package.split("_")[1] if package.count("_") == 2 else package
    return "v" + re.sub(r"[^0-9A-Za-z.+~-]", "-", version)


_held: Final[dict[Path, int]] = {}
_hold_lock: Final = threading.Lock()


def hold(folder: Path) -> bool:
    """Keep a folder from being removed, as long as this process lives; False if it is gone.

    The lock is the kernel's, shared, and on the folder itself: it ends with the process, however that ends.
    """
    with _hold_lock:
        try:
            there = folder.stat()
            if folder in _held and os.path.samestat(os.fstat(_held[folder]), there):
                return True
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # It may have been taken away between the two.
            if os.path.samestat(os.fstat(fd), folder.stat()):
                old, _held[folder] = _held.get(folder), fd
                fd = -1 if old is None else old
                return True
        except OSError:
            return False
        finally:
            if fd >= 0:
                os.close(fd)
    return False
