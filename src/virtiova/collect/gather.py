# SPDX-License-Identifier: Apache-2.0
"""Gathers what a scan reads of this machine, to be judged elsewhere. Reads only; what may be secret stays here."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

from virtiova.collect import redact
from virtiova.collect.box import HEADER, SCHEMA
from virtiova.collect.files import BACKENDS, CPU, DMESG, HYPERVISORS, IOMEM, IOMEM_LINES, KERNEL_OPTIONS, ROWS, XML, Row
from virtiova.collect.gathered import DMESG as DMESG_MEMBER
from virtiova.collect.gathered import LINKS, TREE
from virtiova.collect.tree import LiveTree, Tree, base, matching, text
from virtiova.errors import UsageError

_PLAIN: Final = re.compile(r"[-+,./0-9:@A-Z_a-z]+")
"""Paths of other characters are left out: the kernel has none that matter."""
_LOG: Final = 4 << 20
"""Bytes of the end of a log."""
_KMSG: Final = "/dev/kmsg"
_XML_LIMIT: Final = 1 << 20


class Gathered:
    """Members of a box, as they come."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.files: dict[str, bytes] = {}
        self.folders: set[str] = set()
        self.offered: dict[str, bool] = {}
        self.missed = False
        self._links: dict[str, str] = {}

    def system(self) -> None:
        """The system's own files."""
        for row in ROWS:
            for folder in matching(self.tree, row.folder):
                self._folder(folder, row)
        options, processors = text(self.tree, KERNEL_OPTIONS), self.tree.read(CPU)
        if options is not None:
            self._file(KERNEL_OPTIONS, redact.redacted(options, redact.KERNEL).encode() + b"\n")
        claimed = (text(self.tree, IOMEM) or "").splitlines()
        kept = [line for line in claimed if any(words in line for words in IOMEM_LINES)]
        if kept:
            self._file(IOMEM, "".join(f"{line}\n" for line in kept).encode())
        if processors is not None:
            self._file(CPU, processors.partition(b"\n\n")[0] + b"\n\n")

    def _folder(self, folder: str, row: Row) -> None:
        if not _PLAIN.fullmatch(folder):
            return
        if self.tree.link(folder) is not None:
            self._link(folder)
        elif self.tree.exists(folder):
            self.folders.add(TREE.rstrip("/") + folder)
        for name in row.links:
            self._link(f"{folder}/{name}")
        for name in row.files:
            for path in matching(self.tree, f"{folder}/{name}") if "*" in name else [f"{folder}/{name}"]:
                found = self.tree.read(path)
                if found is not None and _PLAIN.fullmatch(path):
                    self._file(path, found)

    def _file(self, path: str, data: bytes) -> None:
        self.files[TREE.rstrip("/") + path] = data

    def _link(self, path: str) -> None:
        target = self.tree.link(path)
        if target is not None and _PLAIN.fullmatch(path) and _PLAIN.fullmatch(target):
            self._links[path] = target

    def offers(self) -> None:
        """What devices offer, as far as their registers say: that can only be read on the spot."""
        from virtiova.collect import keys as k
        from virtiova.collect import linux

        for device in linux.collect(self.tree).devices:
            for fact in device.facts.all(k.OFFERED):
                if fact.place.source == "pci":
                    self.offered[device.name] = fact.value

    def machines(self) -> None:
        """Those that run here: command lines of hypervisors and of back ends, libvirt's domains."""
        for pid in self.tree.names("/proc"):
            comm = text(self.tree, f"/proc/{pid}/comm") if pid.isdigit() else None
            kind = next((kind for kind, names in _PROCESSES if comm and _one_of(comm, names)), None)
            words = self.tree.read(f"/proc/{pid}/cmdline") if kind is not None else None
            if words:
                self.files[f"{kind}/{pid}.cmdline"] = without_secrets(words)
        for pattern in XML:
            for path in matching(self.tree, pattern):
                found = self.tree.read(path, _XML_LIMIT)
                if found is not None and _PLAIN.fullmatch(path):
                    clean = redact.redacted(found.decode("utf-8", "surrogateescape"), redact.XML)
                    self.files[f"libvirt{path}"] = clean.encode("utf-8", "surrogateescape")

    def kernel_log(self) -> None:
        """The lines of the kernel's log that may matter."""
        lines = kernel_lines(_KMSG, self.tree.problems)
        if lines:
            self.files[DMESG_MEMBER] = "".join(f"{line}\n" for line in lines).encode()

    def log(self, name: str) -> None:
        """The end of a log that the user named."""
        try:
            with open(name, "rb") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(max(0, size - _LOG))
                data = file.read(_LOG)
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}") from error
        clean = redact.redacted(data.decode("utf-8", "replace"), redact.WORDS)
        self.files[self._free("log/" + _tame(base(name) or "log"))] = clean.encode()

    def qmp(self, socket: str) -> None:
        """What a running QEMU says."""
        from virtiova.collect import qmp

        name = self._free(f"qmp/{_tame(base(socket) or 'qmp')}.json")
        document = qmp.transcript(socket)
        self.tree.problems += [f"{socket}: {problem}" for problem in document["problems"]]
        self.missed = self.missed or not document["asked"]
        self.files[name] = json.dumps(document, separators=(",", ":")).encode()

    def _free(self, name: str) -> str:
        """``name``, or with a number if that is taken."""
        number, free = 2, name
        while free in self.files or free == DMESG_MEMBER:
            free, number = f"{name}.{number}", number + 1
        return free

    def members(self, now: float) -> dict[str, bytes]:
        """All, the header first."""
        links = "".join(f"{path}\t{target}\n" for path, target in sorted(self._links.items())).encode()
        uname = os.uname()
        header = {
            "schema": SCHEMA,
            "by": "virtiova gather",
            "host": text(self.tree, "/proc/sys/kernel/hostname") or uname.nodename,
            "kernel": text(self.tree, "/proc/sys/kernel/osrelease") or uname.release,
            "machine": uname.machine,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "root": os.geteuid() == 0,
            "offered": self.offered,
            "problems": self.tree.problems,
        }
        told = (json.dumps(header, indent=1) + "\n").encode()
        return {HEADER: told, LINKS: links, **dict(sorted(self.files.items()))}


_PROCESSES: Final = (("qemu", HYPERVISORS), ("backend", BACKENDS))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: how many files are in the box, what could not be read, and whether something that the user
    named is not in it."""

    files: int
    problems: list[str]
    missed: bool


def gather(out: BinaryIO, tree: Tree | None = None, *, qmp: Sequence[str] = (), logs: Sequence[str] = ()) -> Outcome:
    """Write a box of this machine to ``out``.

    ``qmp`` are sockets of running QEMUs, ``logs`` are files. Raises `UsageError` for a log that is not there.
    """
    here = LiveTree() if tree is None else tree
    found = Gathered(here)
    for name in logs:
        found.log(name)
    for socket in qmp:
        found.qmp(socket)
    found.system()
    found.machines()
    if here.live:
        found.offers()
        found.kernel_log()
    write(out, found.members(time.time()), found.folders)
    return Outcome(len(found.files), list(here.problems), found.missed)


def write(out: BinaryIO, files: Mapping[str, bytes], folders: Iterable[str] = ()) -> None:
    """A box: a tar packed with gzip, files in their order."""
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.GNU_FORMAT, compresslevel=6) as archive:
        for name, data in files.items():
            archive.addfile(_member(name, len(data)), io.BytesIO(data))
        for name in sorted(folders):
            folder = _member(name, 0)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o700
            archive.addfile(folder)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def without_secrets(words: bytes) -> bytes:
    """A command line as /proc has it, words that end with NUL, without passwords."""
    plain = words.decode("utf-8", "surrogateescape").replace("\n", " ").replace("\0", "\n")
    return redact.redacted(plain, redact.WORDS).replace("\n", "\0").encode("utf-8", "surrogateescape")


def kernel_lines(path: str, problems: list[str]) -> list[str]:
    """The lines of the kernel's log that may matter, oldest first, with their time as ``dmesg`` has it."""
    wanted = re.compile("|".join(DMESG), re.IGNORECASE)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return []
    lines = []
    with open(fd, "rb", buffering=0):
        for _ in range(1 << 17):
            try:
                record = os.read(fd, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # overwritten while it was read: the next one follows
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
                break
            if not record:
                break
            head, _, said = record.decode("utf-8", "replace").partition(";")
            line = said.partition("\n")[0]
            when = head.split(",")[2:3]
            if wanted.search(line) and when and when[0].isdigit():
                lines.append(f"[{int(when[0]) / 1e6:12.6f}] {redact.redacted(line, redact.KERNEL)}")
    return lines


def _one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _tame(name: str) -> str:
    return re.sub(r"[^-+,.0-9:@A-Z_a-z]", "_", name)[:100].lstrip(".") or "_"
