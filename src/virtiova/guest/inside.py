# SPDX-License-Identifier: Apache-2.0
"""A Debian guest in which this very Python runs: the host's files read-only by 9p, and a serial line to talk over.

What needs a kernel's devices - VFIO, vhost, vDPA - is tried in it, as root, without any of that touching the host. The
guest ends with us.
"""

from __future__ import annotations

import gzip
import json
import os
import select
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, Final, Self

from virtiova.errors import MachineError, NotPossibleError, ProtocolError
from virtiova.guest import initramfs, kernels
from virtiova.guest.boot import Disk
from virtiova.guest.facts import Console, Translations
from virtiova.guest.starter import Starter
from virtiova.packages.store import Store, Wanted, one_file

ALWAYS: Final = ("virtio_pci", "9p", "9pnet_virtio")
_SHARE_TAG: Final = "hostroot"
_LINE_LIMIT: Final = 4 << 20
_CHUNK: Final = 65536
SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Setting:
    """A kernel, its modules in wish order, a machine and a kernel command line. ``disks`` are behind the nodes of their
    names; ``trace`` are QEMU's events that are listened to."""

    name: str
    meta: str
    pattern: str
    modules: tuple[str, ...]
    arguments: tuple[str, ...]
    append: str = ""
    suite: str = ""
    memory: str = "768"
    disks: tuple[Disk, ...] = ()
    trace: str = ""

    def wanted(self) -> Wanted:
        """The kernel with just these modules."""
        pick = partial(kernels.pick, wanted=(*ALWAYS, *self.modules))
        # Another list of modules is another pick out of the package, and must not be found under the same name.
        which = f"{zlib.crc32(' '.join(self.modules).encode()):08x}"
        return Wanted(f"{self.meta}-{self.name}-{which}", self.meta, "amd64", pick, self.pattern, self.suite)


BUSYBOX: Final = Wanted("busybox", "busybox-static", "amd64", one_file("bin/busybox", "busybox"))


@dataclass(slots=True)
class Files:
    """What a guest boots from."""

    kernel: bytes
    initramfs: bytes


def files(setting: Setting, store: Store) -> Files:
    """Fetch and pack. Raises `NotPossibleError` with what is missing and why."""
    content = store.get(setting.wanted()).content
    busybox = store.get(BUSYBOX).content["busybox"]
    order = content["order"].decode().split()
    script = resources.files("virtiova.guest").joinpath("inside.sh").read_bytes()
    packed = {
        "init": (0o755, script),
        "bin/busybox": (0o755, busybox),
        "modules/order": (0o644, "".join(f"{name}\n" for name in order).encode()),
        **{f"modules/{name}.ko": (0o644, content[f"modules/{name}.ko"]) for name in order},
    }
    folders = (*initramfs.FOLDERS, "newroot")
    return Files(content["kernel"], gzip.compress(initramfs.cpio(packed, folders), 1, mtime=0))


class Inside:
    """A running guest whose Python runs ``python -m MODULE``. Use it as a context manager.

    Lines of JSON go both ways. Raises `MachineError` if the guest ends, or says nothing in time.
    """

    def __init__(self, setting: Setting, boot: Files, module: str, words: Sequence[str] = ()) -> None:
        self.console = Console()
        self.translations = Translations()
        self._starter = Starter()
        self._said = bytearray()
        try:
            self._start(setting, boot, module, words)
        except BaseException:
            self.close()
            raise

    def _start(self, setting: Setting, boot: Files, module: str, words: Sequence[str]) -> None:
        emulator = shutil.which("qemu-system-x86_64")
        if emulator is None:
            raise NotPossibleError("qemu-system-x86_64 is not installed (Debian: apt-get install qemu-system-x86)")
        self._tty, tty = self._starter.serial("tty")
        self._line, line = self._starter.serial("line")
        argv = [emulator, "-no-user-config", "-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"]
        argv += ["-accel", "tcg", "-smp", "1", "-m", setting.memory, *setting.arguments]
        argv += ["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]
        argv += ["-device", f"virtio-9p-pci,fsdev=root,mount_tag={_SHARE_TAG},disable-legacy=on", *tty, *line]
        argv += ["-kernel", self._starter.file("kernel", boot.kernel)]
        argv += ["-initrd", self._starter.file("initramfs", boot.initramfs)]
        self.monitor, monitor = self._starter.line("qmp")
        argv += [*monitor, "-mon", "chardev=qmp,mode=control"]
        for disk in setting.disks:
            file = self._starter.file(disk.name, disk.content())
            argv += ["-blockdev", f"driver=raw,node-name={disk.node},file.driver=file,file.filename={file}"]
        self._trace = -1
        if setting.trace:
            self._trace, log = self._starter.pipe()
            argv += ["-trace", setting.trace, "-D", log]
        argv += ["-append", f"console=ttyS0 quiet loglevel=3 panic=-1 {setting.append} {_words(module, words)}"]
        self._process = self._starter.start(argv)

    def tell(self, value: object) -> None:
        """Send a line."""
        self._line.sendall(json.dumps(value).encode() + b"\n")

    def lines(self, seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
        """What it says, until it says that it is over: ``{"end": ...}`` is the last. ``seconds`` are for each."""
        while True:
            found = self.hear(seconds)
            yield found
            if "end" in found:
                return

    def hear(self, seconds: float = SECONDS) -> dict[str, Any]:
        """The next line."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._said:
            left = deadline - time.monotonic()
            if left <= 0:
                raise MachineError(f"the guest said nothing for {seconds:.0f} s; {self._last()}")
            self._pump(left)
        line, _, rest = bytes(self._said).partition(b"\n")
        self._said[:] = rest
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ProtocolError(f"the guest sent what is no JSON: {line[:200]!r}") from error
        if not isinstance(found, dict):
            raise ProtocolError(f"the guest sent what is no object: {line[:200]!r}")
        return found

    def _pump(self, seconds: float) -> None:
        """Wait for output, and take it in."""
        waiting = [self._tty.fileno(), self._line.fileno(), *([self._trace] if self._trace >= 0 else [])]
        ready, _, _ = select.select(waiting, [], [], seconds)
        if self._trace in ready:
            self.translations.feed(os.read(self._trace, _CHUNK))
        if self._tty.fileno() in ready:
            data = self._tty.recv(_CHUNK)
            if not data:
                raise MachineError(f"the guest ended; {self._last()}", self._process.stderr())
            self.console.feed(data)
        if self._line.fileno() in ready:
            self._said += self._line.recv(_CHUNK)
            if len(self._said) > _LINE_LIMIT:
                raise ProtocolError(f"the guest sent a line of more than {_LINE_LIMIT} bytes")

    def facts(self, seconds: float = SECONDS) -> None:
        """Take in what it says on its console, as marked lines, until it says that this is all (``end``)."""
        deadline = time.monotonic() + seconds
        while not self.console.inside.ended:
            left = deadline - time.monotonic()
            if left <= 0:
                raise MachineError(f"the guest did not say all within {seconds:.0f} s; {self._last()}")
            self._pump(left)

    def _last(self) -> str:
        return "its last words: " + " | ".join(self.console.last_lines()[-6:])

    def close(self) -> None:
        """End the guest and let go of everything."""
        self._starter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _words(module: str, words: Sequence[str]) -> str:
    """For the kernel's command line: what /init is to start, and where it finds this package. No blanks in any."""
    said = {
        "python": sys.executable,
        "path": ":".join(dict.fromkeys(path for path in sys.path if path)),
        "module": module,
        "words": ",".join(words),
    }
    for key, value in said.items():
        if any(char.isspace() or char in "\"'" for char in value):
            raise NotPossibleError(f"the guest cannot be told {key} {value!r}: it has a blank or a quote in it")
    return " ".join(f"virtiova.{key}={value}" for key, value in said.items())
