# SPDX-License-Identifier: Apache-2.0
"""Debian packages of any architecture by name, through apt with lists of its own.

The system's package state is neither read nor changed. Which mirror is asked is what the machine's own apt sources
say; apt checks signatures and checksums as always.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from virtiova.errors import NotPossibleError

Progress = Callable[[str, int, int], None]
"""Told of what is fetched, bytes so far, bytes in all (0: not known)."""

_LISTS_FRESH: Final = 3600.0
_UPDATE_SECONDS: Final = 120.0
_DOWNLOAD_SECONDS: Final = 900.0
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.+-]+")
_URIS: Final = re.compile(r"^'[^']*' (?P<file>\S+) (?P<size>\d+) ", re.M)


@dataclass(frozen=True, slots=True)
class Stanza:
    """A source of packages, as apt's own files name it."""

    uri: str
    suite: str
    signed_by: str

    def __str__(self) -> str:
        key = f"Signed-By: {self.signed_by}\n" if self.signed_by else ""
        return f"Types: deb\nURIs: {self.uri}\nSuites: {self.suite}\nComponents: main\n{key}"


def release(text: str) -> str:
    """The code name of a Debian release from the text of ``os-release``; empty for any other system."""
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if fields.get("ID", "").strip('"') != "debian":
        return ""
    return fields.get("VERSION_CODENAME", "").strip('"')


def one_line(text: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Options and words of each ``deb`` line of a ``sources.list``."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<rest>[^#]+)", line)
        if match:
            pairs = (item.split("=", 1) for item in (match["options"] or "").split() if "=" in item)
            yield {key.lower(): value for key, value in pairs}, match["rest"].split()


def deb822(text: str) -> Iterator[dict[str, str]]:
    """The stanzas of a ``.sources`` file, with lower-case keys; what goes on over lines keeps its lines."""
    for block in re.split(r"\n\s*\n", text):
        stanza: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and key:
                stanza[key] += "\n" + line.rstrip()
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                stanza[key] = value.strip()
        if stanza:
            yield stanza


def debian_stanzas(files: Mapping[str, str], codename: str) -> list[Stanza]:
    """The sources of Debian's ``main`` of this release, its updates and security, among the machine's sources.

    ``files`` maps the names of apt's files to their text. Others' sources have suites or components of other names.
    """
    found: list[Stanza] = []
    for name, text in files.items():
        if name.endswith(".sources"):
            for stanza in deb822(text):
                if "deb" not in stanza.get("types", "").split() or stanza.get("enabled", "yes") == "no":
                    continue
                uris, suites = stanza.get("uris", "").split(), stanza.get("suites", "").split()
                if "main" in stanza.get("components", "").split():
                    found += [Stanza(u, s, stanza.get("signed-by", "")) for u in uris for s in suites]
        else:
            for options, words in one_line(text):
                if "main" in words[2:]:
                    found.append(Stanza(words[0], words[1], options.get("signed-by", "")))
    wanted = {codename, f"{codename}-updates", f"{codename}-security", "stable", "stable-updates", "stable-security"}
    return [s for s in dict.fromkeys(found) if s.suite in wanted and not s.uri.startswith("cdrom:")]


def machine_sources(etc: Path = Path("/etc/apt"), os_release: Path = Path("/etc/os-release")) -> list[Stanza]:
    """Debian's own sources, as this machine's apt knows them."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise NotPossibleError(f"{tool} is not installed: it takes Debian's packages")
    try:
        codename = release(os_release.read_text(encoding="utf-8", errors="replace"))
        paths = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
        files = {p.name: p.read_text(encoding="utf-8", errors="replace") for p in paths if p.is_file()}
    except OSError as error:
        raise NotPossibleError(f"{error.filename}: {error.strerror}") from error
    if not codename:
        raise NotPossibleError("not a Debian system: its kernels and packages have other names")
    stanzas = debian_stanzas(files, codename)
    if not stanzas:
        raise NotPossibleError(f"the apt sources of this machine do not name the main component of {codename}")
    return stanzas


def of_suite(stanzas: Sequence[Stanza], suite: str) -> list[Stanza]:
    """Another suite of the mirrors that have this machine's release itself."""
    return [replace(stanza, suite=suite) for stanza in stanzas if "-" not in stanza.suite]


class Apt:
    """apt for one architecture, with everything it writes below ``folder``. For one process at a time.

    ``suite`` is another suite of the same mirror instead of the machine's own: ``bookworm-backports``.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        suite: str = "",
    ) -> None:
        self._folder = folder
        self._suite = suite
        self._architecture = architecture
        self._progress = progress or (lambda *_: None)
        self._stop = stop or threading.Event()

    def download(self, package: str, pattern: str = "") -> Path:
        """Fetch a package into ``folder``, and say where it is.

        With a ``pattern`` the package is a meta package: what it depends on whose name matches is fetched.
        """
        self._update()
        name = self._behind(package, pattern) if pattern else package
        said = self._run(["apt-get", "download", "--print-uris", name], _UPDATE_SECONDS)
        match = _URIS.search(said)
        size = int(match["size"]) if match else 0
        target = self._folder / "debs"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        self._run(["apt-get", "download", name], _DOWNLOAD_SECONDS, watch=(name, size), cwd=target)
        found = sorted(target.glob("*.deb"))
        if len(found) != 1:
            raise NotPossibleError(f"apt fetched {len(found)} files for {name}")
        return found[0]

    def _behind(self, package: str, pattern: str) -> str:
        """What a meta package stands for."""
        said = self._run(["apt-cache", "show", "--no-all-versions", package], _UPDATE_SECONDS)
        for line in said.splitlines():
            key, _, value = line.partition(":")
            if key == "Depends":
                for item in value.split(","):
                    name = item.split()[0] if item.split() else ""
                    if re.fullmatch(pattern, name) and _NAME.fullmatch(name):
                        return name
        raise NotPossibleError(f"{package} ({self._architecture}) depends on nothing like {pattern}")

    def _update(self) -> None:
        stamp = self._folder / "updated"
        stanzas = machine_sources()
        if self._suite:
            stanzas = of_suite(stanzas, self._suite)
        wanted = "\n".join(map(str, stanzas))
        fresh = stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < _LISTS_FRESH
        if fresh and stamp.read_text(encoding="utf-8") == wanted:
            return
        for part in ("lists/partial", "cache/archives/partial"):
            (self._folder / part).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        # Updates and security are not kept for every architecture, and a mirror may be in the middle of an update;
        # the release itself does not change, and has all that is needed.
        release_alone = [stanza for stanza in stanzas if "-" not in stanza.suite]
        for last, chosen in ((False, stanzas), (True, release_alone)):
            text = "\n".join(map(str, chosen))
            (self._folder / "debian.sources").write_text(text, encoding="utf-8")
            try:
                self._run(["apt-get", "update"], _UPDATE_SECONDS, watch=(f"package lists, {self._architecture}", 0))
                break
            except NotPossibleError:
                if last or not release_alone or chosen == release_alone:
                    raise
        stamp.write_text(wanted, encoding="utf-8")

    def _options(self) -> list[str]:
        here = self._folder
        settings = {
            "APT::Architecture": self._architecture,
            "APT::Architectures": self._architecture,
            # A mirror that is not there must be noticed, also by "update", which only warns otherwise.
            "APT::Update::Error-Mode": "any",
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "1",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
            "Dir::State": str(here),
            "Dir::State::Lists": str(here / "lists"),
            "Dir::State::status": str(here / "status"),
            "Dir::Etc::SourceList": str(here / "debian.sources"),
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Cache": str(here / "cache"),
        }
        return [f"-o{key}={value}" for key, value in settings.items()]

    def _run(
        self,
        argv: Sequence[str],
        seconds: float,
        *,
        watch: tuple[str, int] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """One apt command; what it said. A failure is `NotPossibleError` with apt's own words."""
        command = [argv[0], *self._options(), *argv[1:]]
        deadline = time.monotonic() + seconds
        with subprocess.Popen(
            command,
            cwd=cwd or self._folder,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            try:
                while True:
                    try:
                        out, err = process.communicate(timeout=0.2)
                        break
                    except subprocess.TimeoutExpired:
                        if time.monotonic() > deadline:
                            raise NotPossibleError(f"{argv[0]} {argv[1]} took more than {seconds:.0f} s") from None
                        if self._stop.is_set():
                            raise NotPossibleError(f"{argv[0]} {argv[1]} was interrupted") from None
                        if watch is not None:
                            self._progress(watch[0], self._so_far(cwd), watch[1])
            finally:
                if process.poll() is None:
                    process.kill()
        if process.returncode != 0:
            raise NotPossibleError(f"{argv[0]} {argv[1]}: {_reason(err.splitlines())}")
        return out

    def _so_far(self, cwd: Path | None) -> int:
        if cwd is None:
            return 0
        return sum(_sizes([cwd, self._folder / "cache/archives/partial"]))


def _sizes(folders: Iterable[Path]) -> Iterator[int]:
    for folder in folders:
        for path in folder.glob("*"):
            try:
                yield path.stat().st_size
            except OSError:  # renamed by apt in the meantime
                continue


def _reason(lines: Sequence[str]) -> str:
    """The line of apt's that says why, without the words around it."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith(("E:", "Err:"))] or said
    return errors[0].removeprefix("E:").strip()[:300] if errors else "failed without a word"
