# SPDX-License-Identifier: Apache-2.0
"""A few files of each of Debian's packages, in the user's cache folder; fetched when first needed.

Each `Wanted` is a folder of a few files and a manifest with their checksums. Files are checked whenever they are
used, and what is handed out are the bytes that were checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from virtiova.errors import NotPossibleError
from virtiova.packages.apt import Apt, Progress

FORMAT: Final = 1
_MANIFEST: Final = "manifest.json"
_MANIFEST_LIMIT: Final = 1 << 20
_LOCK_SECONDS: Final = 1200.0
_UNPACK_SECONDS: Final = 300.0

Pick = Callable[[Path], Mapping[str, bytes]]
"""From an unpacked package to the files that are kept of it, by relative name."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Some files of a package. With a ``behind`` the package is a meta package: the dependency whose name matches.

    ``suite`` is another suite of the same mirror instead of the machine's own: ``bookworm-backports``.
    """

    name: str
    package: str
    architecture: str
    pick: Pick = field(compare=False)
    behind: str = ""
    suite: str = ""

    @property
    def folder(self) -> str:
        """Its name in the cache."""
        return "-".join(part for part in (self.name, self.architecture, self.suite) if part)


@dataclass(frozen=True, slots=True)
class Files:
    """Checked files: ``content`` by name, and which package of which version they are from."""

    content: dict[str, bytes]
    package: str


class DamagedError(Exception):
    """A cached thing is not there, or not what it was."""


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/virtiova``, or below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "virtiova"
    except RuntimeError as error:
        raise NotPossibleError(f"no folder to keep packages in: {error}; set XDG_CACHE_HOME") from error


@contextlib.contextmanager
def locked(root: Path, name: str, stop: threading.Event) -> Iterator[None]:
    """Hold a lock in the cache that the kernel takes back however this process ends."""
    root.mkdir(parents=True, exist_ok=True)
    fd = os.open(root / f"{name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline or stop.is_set():
                    raise NotPossibleError(f"another process holds {root / name}.lock") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(fd)


class Store:
    """The cache. ``offline``: nothing is fetched, and what is not there is `NotPossibleError`."""

    def __init__(self, root: Path | None = None, *, offline: bool = False, progress: Progress | None = None) -> None:
        self.root = (root or cache_root()) / "guest"
        self._offline = offline
        self._progress = progress

    def has(self, wanted: Wanted) -> bool:
        """Is it in the cache, whole?"""
        try:
            self._read(wanted)
        except DamagedError:
            return False
        return True

    def get(self, wanted: Wanted, stop: threading.Event | None = None) -> Files:
        """The files, from the cache or fetched. Two processes that want the same fetch it once.

        Fetching is given up when ``stop`` is set.
        """
        stop = stop or threading.Event()
        try:
            return self._read(wanted)
        except DamagedError as damage:
            reason = str(damage)
        if self._offline:
            raise NotPossibleError(f"offline, and {wanted.package} ({wanted.architecture}): {reason}")
        try:
            # One at a time for each architecture: they share apt's lists.
            with locked(self.root, wanted.architecture, stop):
                with contextlib.suppress(DamagedError):
                    return self._read(wanted)
                self._fetch(wanted, stop)
                return self._read(wanted)
        except DamagedError as damage:
            raise NotPossibleError(f"{wanted.package}: damaged as soon as it was written: {damage}") from damage
        except OSError as error:
            raise NotPossibleError(f"cannot keep {wanted.package} in {self.root}: {error.strerror}") from error

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self, wanted: Wanted) -> Files:
        folder = self.root / wanted.folder
        package, sums = read_manifest(folder / _MANIFEST, _identity(wanted))
        content = {}
        for name, expected in sums.items():
            try:
                data = (folder / name).read_bytes()
            except OSError as error:
                raise DamagedError(f"{name} in the cache: {error.strerror}") from error
            if hashlib.sha256(data).hexdigest() != expected:
                raise DamagedError(f"{name} in the cache does not have its checksum")
            content[name] = data
        return Files(content, package)

    # -- fetching ------------------------------------------------------------------------------------------------

    def _fetch(self, wanted: Wanted, stop: threading.Event) -> None:
        """Download, unpack, pick, and put the result in its place as a whole. The lock is held."""
        for left in self.root.glob(f"tmp-{wanted.architecture}-*"):
            # Whoever made it held this lock, so it was ended in the middle.
            shutil.rmtree(left, ignore_errors=True)
        lists = self.root / "-".join(part for part in ("apt", wanted.architecture, wanted.suite) if part)
        lists.mkdir(exist_ok=True)
        apt = Apt(lists, wanted.architecture, self._progress, stop, wanted.suite)
        package = apt.download(wanted.package, wanted.behind)
        with tempfile.TemporaryDirectory(prefix=f"tmp-{wanted.architecture}-", dir=self.root) as name:
            work = Path(name)
            unpack(package, work / "root")
            files = wanted.pick(work / "root")
            new = work / "new"
            for file, data in files.items():
                path = new / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            sums = {file: hashlib.sha256(data).hexdigest() for file, data in sorted(files.items())}
            (new / _MANIFEST).write_text(manifest_text(_identity(wanted), package.name, sums), encoding="utf-8")
            place = self.root / wanted.folder
            if place.exists():
                place.rename(work / "old")
            new.rename(place)
        package.unlink()


def _identity(wanted: Wanted) -> list[str]:
    identity = [wanted.name, wanted.package, wanted.architecture, wanted.behind]
    return [*identity, wanted.suite] if wanted.suite else identity


def manifest_text(identity: Sequence[str], package: str, sums: Mapping[str, str]) -> str:
    """What says which files are in the cache: their checksums (SHA-256, hex) by relative name."""
    manifest = {"format": FORMAT, "wanted": list(identity), "package": package, "sha256": dict(sums)}
    return json.dumps(manifest, indent=1)


def read_manifest(path: Path, identity: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The package's file name and the checksums by relative name. Raises `DamagedError`."""
    manifest = _manifest(path)
    if manifest.get("wanted") != list(identity):
        raise DamagedError("in the cache is something else of that name")
    sums, package = manifest.get("sha256"), manifest.get("package")
    if not isinstance(sums, dict) or not isinstance(package, str) or not sums:
        raise DamagedError("its manifest in the cache is damaged")
    for name in sums:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise DamagedError("its manifest in the cache is damaged")
    return package, sums


def _manifest(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise DamagedError("its manifest in the cache is damaged")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError("not in the cache") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError("its manifest in the cache is damaged") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError("its manifest in the cache is of another form")
    return manifest


def unpack(package: Path, root: Path) -> None:
    """All files of a package below ``root``, which does not exist yet."""
    root.mkdir()
    try:
        done = subprocess.run(
            ["dpkg-deb", "-x", str(package), str(root)],
            capture_output=True,
            timeout=_UNPACK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NotPossibleError(f"{package.name} could not be unpacked in {_UNPACK_SECONDS:.0f} s") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NotPossibleError(f"{package.name}: {said[-1][:200] if said else 'dpkg-deb failed'}")


def one_file(path: str, name: str) -> Pick:
    """Keep one file of a package, the first that matches ``path``, as ``name``."""

    def pick(root: Path) -> dict[str, bytes]:
        found = [p for p in sorted(root.glob(path)) if p.is_file() and not p.is_symlink()]
        if not found:
            raise NotPossibleError(f"the package holds no {path}")
        return {name: found[0].read_bytes()}

    return pick
