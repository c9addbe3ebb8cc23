# SPDX-License-Identifier: Apache-2.0
"""Boots one guest in an emulated processor, with its console and its monitor at our end. Nothing gets a file name.

Kernel, initramfs and disks are anonymous memory, console and monitor are socket pairs, the trace log is a pipe.
"""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.errors import MachineError, NotPossibleError, RefusedError
from virtiova.guest import initramfs
from virtiova.guest.facts import Console, Translations
from virtiova.guest.platforms import Emulator, Platform
from virtiova.guest.starter import Starter
from virtiova.packages.store import Store, Wanted, one_file
from virtiova.packages.tree import own_architecture

DISK_SIZE: Final = 1 << 20
READ_SIZE: Final = 16 * 4096
"""How much of each disk /init reads."""
BOOT_SECONDS: Final = 150.0
_CHUNK: Final = 65536
_SHARE: Final = "/usr/share/qemu"
"""Where Debian's QEMU has its firmware; a QEMU that runs out of the cache has none beside it."""


@dataclass(frozen=True, slots=True)
class Assets:
    """All that a platform boots from, read and checked."""

    emulator: str
    share: str
    kernel: bytes
    initramfs: bytes
    xen: bytes
    packages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the guest, with or without the bit; its serial number is its name in the guest."""

    bit: bool

    @property
    def name(self) -> str:
        """QEMU's id and the guest's serial number."""
        return "bit-on" if self.bit else "bit-off"

    @property
    def node(self) -> str:
        """QEMU's name of what is behind it."""
        return f"file-{self.name}"

    def content(self) -> bytes:
        """What is on it: text that names the disk and the sector."""
        sectors = range(DISK_SIZE // 512)
        return b"".join((b"virtiova %s %08d " % (self.name.encode(), n)).ljust(512, b".") for n in sectors)


def _emulator(emulator: Emulator, store: Store, stop: threading.Event | None) -> tuple[str, str]:
    """A QEMU binary and where its firmware is if it does not know: installed, or out of its Debian package."""
    path = shutil.which(emulator.binary)
    if path is not None:
        return path, ""
    wanted = emulator_wanted(emulator)
    try:
        content = store.get(wanted, stop).content["qemu"]
    except NotPossibleError as error:
        raise NotPossibleError(
            f"{emulator.binary} is not installed (Debian: apt-get install {emulator.package}), nor can it be had "
            f"for this run alone: {error}"
        ) from error
    return _executable(store, wanted, content), _SHARE


def emulator_wanted(emulator: Emulator) -> Wanted:
    """The emulator alone, out of its package, for this machine's own architecture."""
    return Wanted(emulator.binary, emulator.package, own_architecture(), one_file(f"usr/bin/{emulator.binary}", "qemu"))


def _executable(store: Store, wanted: Wanted, content: bytes) -> str:
    """The checked bytes as something that can be run: the cached file itself, made executable."""
    path = store.root / wanted.folder / "qemu"
    try:
        path.chmod(0o755)
    except OSError as error:
        raise NotPossibleError(f"{path}: {error.strerror}") from error
    return str(path)


def assets(platform: Platform, store: Store, stop: threading.Event | None = None, *, gather: bytes = b"") -> Assets:
    """Fetch and read what the platform needs. Raises `NotPossibleError` with what is missing and why.

    ``gather`` is a script for the guest (`initramfs.build`); what it makes is `Console.box`.
    """
    emulator, share = _emulator(platform.emulator, store, stop)
    files = [store.get(wanted, stop) for wanted in platform.wanted()]
    kernel, busybox = files[0].content, files[1].content
    order = kernel["order"].decode().split()
    modules = {name: kernel[f"modules/{name}.ko"] for name in order}
    return Assets(
        emulator=emulator,
        share=share,
        kernel=kernel["kernel"],
        initramfs=initramfs.build(busybox["busybox"], modules, order, gather),
        xen=files[2].content["xen"] if platform.xen is not None else b"",
        packages=tuple(file.package for file in files),
    )


class Boot:
    """A booting guest. Use it as a context manager; `close` ends it."""

    def __init__(self, platform: Platform, files: Assets, disks: Sequence[Disk], *, shell: bool = False) -> None:
        self.platform = platform
        self.disks = tuple(disks)
        self.console = Console()
        self.translations = Translations()
        self.started = time.monotonic()
        self._starter = Starter()
        try:
            self._start(files, shell)
        except BaseException:
            self.close()
            raise

    # -- starting ------------------------------------------------------------------------------------------------

    def _start(self, files: Assets, shell: bool) -> None:
        self.tty, tty = self._starter.serial("tty")
        self.monitor, monitor = self._starter.line("qmp")
        argv = [files.emulator, "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot"]
        argv += ["-L", files.share] if files.share else []
        argv += ["-nodefaults"] if self.platform.nodefaults else []
        argv += ["-accel", "tcg", "-smp", "1", "-m", self.platform.memory, *self.platform.arguments]
        argv += [*tty, *monitor, "-mon", "chardev=qmp,mode=control", *self._kernel(files, shell)]
        for place, disk in enumerate(self.disks):
            argv += self._disk(disk, place)
        self._trace = -1
        if self.platform.trace:
            self._trace, log = self._starter.pipe()
            argv += ["-trace", self.platform.trace, "-D", log]
        self._process = self._starter.start(argv)

    def _kernel(self, files: Assets, shell: bool) -> list[str]:
        words = f"quiet loglevel=3 virtiova.disks={len(self.disks)} {self.platform.append}"
        words += " virtiova.shell" if shell else ""
        kernel, initrd = self._starter.file("kernel", files.kernel), self._starter.file("initramfs", files.initramfs)
        if self.platform.xen is None:
            return ["-kernel", kernel, "-initrd", initrd, "-append", words]
        hypervisor = self._starter.file("xen", files.xen)
        # Multiboot modules: the kernel with its words, then its initramfs. A comma separates them.
        return ["-kernel", hypervisor, "-append", self.platform.xen, "-initrd", f"{kernel} {words},{initrd}"]

    def _disk(self, disk: Disk, place: int) -> list[str]:
        options = [f"{self.platform.device}", f"id={disk.name}", f"drive={disk.node}", f"serial={disk.name}"]
        options.append(f"iommu_platform={'on' if disk.bit else 'off'}")
        if self.platform.bus == "pci":
            options.append("disable-legacy=on")
        if self.platform.places:
            options.append(f"bus={self.platform.places[place]}")
        image = self._starter.file(disk.name, disk.content())
        backing = f"driver=raw,node-name={disk.node},read-only=on,file.driver=file,file.filename={image}"
        return ["-blockdev", backing, "-device", ",".join(options)]

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, seconds: float = BOOT_SECONDS, stop: threading.Event | None = None) -> bool:
        """Read the console until the guest has said all; False if it did not within ``seconds``, or until ``stop``.

        Raises `MachineError` if QEMU ends before, `RefusedError` if it ended without a word from the guest.
        """
        deadline = self.started + seconds
        while not self.console.inside.ended:
            left = deadline - time.monotonic()
            if left <= 0 or (stop is not None and stop.is_set()):
                return False
            if not self.pump(min(left, 1.0)):
                raise self._ended()
        return True

    def pump(self, seconds: float) -> bool:
        """Wait for output and take it in; False when the console was closed."""
        waiting = [self.tty.fileno(), *([self._trace] if self._trace >= 0 else [])]
        ready, _, _ = select.select(waiting, [], [], seconds)
        if self._trace in ready:
            self.drain()
        if self.tty.fileno() in ready:
            data = self.tty.recv(_CHUNK)
            if not data:
                return False
            self.console.feed(data)
        return True

    def drain(self) -> None:
        """Take in what the trace log holds."""
        if self._trace < 0:
            return
        for _ in range(64):
            try:
                data = os.read(self._trace, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                return
            self.translations.feed(data)

    def words(self) -> list[str]:
        """The last console lines, and QEMU's own after them."""
        said = [line[:300] for line in self._process.stderr().splitlines() if line.strip()]
        return [*self.console.last_lines(), *said[-10:]]

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def _ended(self) -> MachineError:
        code = self._process.exit_code(5.0)
        stderr = self._process.stderr().strip()
        if not self.console.inside.values and not self.console.last_lines():
            return RefusedError(f"QEMU did not start the guest (exit status {code})", stderr)
        return MachineError(f"the guest ended in the middle (QEMU's exit status {code})", stderr)

    def close(self) -> None:
        """End the guest and let go of everything."""
        self._starter.close()

    def __enter__(self) -> Boot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
