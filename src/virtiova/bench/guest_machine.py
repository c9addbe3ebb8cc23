# SPDX-License-Identifier: Apache-2.0
"""A Debian guest whose disks are measured from inside: QEMU under TCG with VT-d, served disks and QEMU's own.

Nothing of QEMU has a file name: kernel, initramfs and console are inherited descriptors. All disks are in one guest, so
that they are measured by turns; each is behind a root port, and so in an IOMMU group, of its own.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import select
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Final, Self

from virtiova.errors import MachineError, NotPossibleError
from virtiova.guest import initramfs, kernels
from virtiova.guest.starter import Starter
from virtiova.machine.backend import BackEnd, Spawned
from virtiova.packages.store import Store, Wanted, one_file

BOOT_SECONDS: Final = 180.0
SIZE_MIB: Final = 64
"""Of each disk."""
_QEMU: Final = "qemu-system-x86_64"
_MEMORY_MIB: Final = 512
_LINE: Final = 4096
_LINES: Final = 2000
_COUNTER_SECONDS: Final = 5.0
_LIBRARIES: Final = {"ld-linux-x86-64.so.2": "lib64", "libc.so.6": "lib", "libm.so.6": "lib"}
"""Where the guest wants them."""
_MODULES: Final = ("virtio_pci", "virtio_blk")


def _libraries(root: Path) -> dict[str, bytes]:
    """What a program of Debian's needs to run at all."""
    found = {}
    for name in _LIBRARIES:
        paths = [path for path in sorted(root.rglob(name)) if path.is_file()]
        if not paths:
            raise NotPossibleError(f"the package holds no {name}")
        found[name] = paths[0].read_bytes()
    return found


KERNEL: Final = Wanted(
    "linux-image-cloud-amd64-bench",
    "linux-image-cloud-amd64",
    "amd64",
    partial(kernels.pick, wanted=_MODULES),
    r"linux-image-[0-9].*-cloud-amd64",
)
BUSYBOX: Final = Wanted("busybox", "busybox-static", "amd64", one_file("bin/busybox", "busybox"))
IOPING: Final = Wanted("ioping", "ioping", "amd64", one_file("usr/bin/ioping", "ioping"))
LIBC: Final = Wanted("libc6-bench", "libc6", "amd64", _libraries)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the guest. ``group``: the type of its IOMMU group, DMA (strict) or DMA-FQ (lazy); empty: bit off.
    ``options``: more of QEMU's for the device."""

    name: str
    ours: bool
    group: str
    options: str = ""

    @property
    def bit(self) -> bool:
        """Whether bit 33 is offered."""
        return bool(self.group)


@dataclass(frozen=True, slots=True)
class Assets:
    """Kernel and initramfs, and of which packages they are."""

    kernel: bytes
    initramfs: bytes
    packages: tuple[str, ...]


def assets(store: Store | None = None) -> Assets:
    """From the user's cache, or fetched. `NotPossibleError` names what cannot be had, and why."""
    if shutil.which(_QEMU) is None:
        raise NotPossibleError("qemu-system-x86")
    store = store or Store()
    kernel, busybox, ioping, libc = (store.get(wanted) for wanted in (KERNEL, BUSYBOX, IOPING, LIBC))
    order = kernel.content["order"].decode().split()
    content = {
        "init": (0o755, resources.files("virtiova.bench").joinpath("guest_init.sh").read_bytes()),
        "bin/busybox": (0o755, busybox.content["busybox"]),
        "bin/ioping": (0o755, ioping.content["ioping"]),
        "modules/order": (0o644, "".join(f"{name}\n" for name in order).encode()),
        **{f"modules/{name}.ko": (0o644, kernel.content[f"modules/{name}.ko"]) for name in order},
        **{
            f"{'lib64' if name.startswith('ld-') else 'lib'}/{name}": (0o755, libc.content[name]) for name in _LIBRARIES
        },
    }
    archive = initramfs.cpio(content, [*initramfs.FOLDERS, "lib", "lib64"])
    packages = tuple(each.package for each in (kernel, busybox, ioping, libc))
    return Assets(kernel.content["kernel"], gzip.compress(archive, 1, mtime=0), packages)


class Guest:
    """A guest with ``disks``, those of ours each served by a process. A context manager.

    Raises `MachineError` for whatever ends or says nothing, with its last words.
    """

    def __init__(self, files: Assets, disks: Sequence[Disk]) -> None:
        self._lines: list[str] = []
        self._buffer = b""
        self._starter = Starter()
        self.disks = tuple(disks)
        self.served: dict[str, Spawned] = {}
        try:
            self._start(files)
            self._until_done(BOOT_SECONDS, "its boot")
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _start(self, files: Assets) -> None:
        self._tty, tty = self._starter.serial("tty")
        argv = [_QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none"]
        argv += ["-accel", "tcg", "-cpu", "qemu64", "-smp", "1", "-m", str(_MEMORY_MIB)]
        argv += ["-machine", "q35,kernel-irqchip=split,memory-backend=m0"]
        argv += ["-object", f"memory-backend-memfd,id=m0,size={_MEMORY_MIB}M,share=on"]
        # Without a caching mode, as Linux refuses to be lazy with it; the disks' own IOTLBs are told all the same.
        argv += ["-device", "intel-iommu,intremap=on,device-iotlb=on", *tty]
        argv += ["-kernel", self._starter.file("kernel", files.kernel)]
        argv += ["-initrd", self._starter.file("initramfs", files.initramfs), "-append"]
        argv += ["console=ttyS0 quiet loglevel=3 panic=-1 no_timer_check intel_iommu=on iommu.strict=1"]
        for place, disk in enumerate(self.disks):
            argv += self._disk(disk, place)
        self.process = self._starter.start(argv)

    def _disk(self, disk: Disk, at: int) -> Iterator[str]:
        yield from ("-device", f"pcie-root-port,id=rp{at},slot={at + 1},chassis={at + 1}")
        options = "iommu_platform=on,ats=on" if disk.bit else "iommu_platform=off"
        place = f"id=disk{at},bus=rp{at},{options}{disk.options}"
        if disk.ours:
            command = (
                f"{shlex.quote(sys.executable)} -m virtiova serve blk --memory {SIZE_MIB}M --socket-path {{socket}}"
            )
            spawned = self.served[disk.name] = Spawned(BackEnd(spawn=command, kind="blk"), -1, -1)
            self._starter.keep(spawned.close)
            yield from ("-chardev", f"socket,id=c{at},path={spawned.path}")
            yield from ("-device", f"vhost-user-blk-pci,chardev=c{at},num-queues=1,{place}")
        else:
            yield from ("-blockdev", f"driver=null-co,node-name=n{at},size={SIZE_MIB << 20},read-zeroes=on")
            yield from ("-device", f"virtio-blk-pci,drive=n{at},num-queues=1,{place}")

    def _prepare(self) -> None:
        """See to it that each disk is what it is called."""
        for at, disk in enumerate(self.disks):
            name = _device(at)
            (said,) = self._values(self.do(f"disk {name} {disk.group}"), "disk")
            wanted = [name, str(int(disk.bit))] + ([disk.group] if disk.bit else [])
            if said.split()[: len(wanted)] != wanted:
                raise MachineError(f"{disk.name} is {said!r} in the guest, wanted {' '.join(wanted)!r}")
        # Rings of the firmware's, at its addresses, are faults when the kernel turns the IOMMU on: nobody's fault.
        self.do("dmesg -c >/dev/null")

    # -- what is measured

    def read(self, disk: Disk, depth: int, seconds: float) -> float:
        """Requests a second of ``depth`` readers, each of which waits for its own."""
        at = self.disks.index(disk)
        command = f"readers {_device(at)} {depth} {seconds:g} {SIZE_MIB}m"
        said = self._values(self.do(command, 6 * seconds + 60), "read")
        try:
            found = [int(count) / (int(time) / 1e9) for count, time in (line.split() for line in said)]
        except (ValueError, ZeroDivisionError) as error:
            raise MachineError(f"readers of {disk.name} said {said!r}") from error
        if len(found) != depth:
            raise MachineError(f"{len(found)} of {depth} readers of {disk.name} came to an end")
        return sum(found)

    def complaints(self) -> list[str]:
        """Of the guest's kernel, about faults and errors of disks."""
        return self._values(self.do("complaints"), "complaint")

    def counters(self, disk: Disk) -> Mapping[str, int]:
        """What the disk's server has counted so far; nothing for one of QEMU's."""
        spawned = self.served.get(disk.name)
        if spawned is None or spawned.process is None:
            return {}
        before = len(_documents(spawned.process.stderr()))
        os.kill(spawned.process.pid, signal.SIGUSR1)
        end = time.monotonic() + _COUNTER_SECONDS
        while time.monotonic() < end:
            found = _documents(spawned.process.stderr())
            if len(found) > before:
                return found[-1]
            time.sleep(0.01)
        raise spawned.gone("it did not say what it has counted")

    # -- the console

    def do(self, command: str, seconds: float = 60.0) -> list[str]:
        """What the guest says to a command of its shell, which must succeed."""
        try:
            self._tty.sendall(command.encode() + b"\n")
        except OSError as error:
            raise MachineError(f"QEMU is gone: {self._words()}") from error
        return self._until_done(seconds, command)

    def _until_done(self, seconds: float, what: str) -> list[str]:
        end = time.monotonic() + seconds
        said: list[str] = []
        while len(said) < _LINES:
            line = self._line(end, what)
            if line == "@ done 0":
                return said
            if line.startswith("@ done "):
                raise MachineError(f"the guest failed in {what!r}: {'; '.join(said[-3:])} {self._words()}")
            if line.startswith("@ "):
                said.append(line[2:])
        raise MachineError(f"the guest talks without end in {what!r}")

    def _line(self, end: float, what: str) -> str:
        while b"\n" not in self._buffer and len(self._buffer) < _LINE:
            ready, _, _ = select.select([self._tty], [], [], max(0.0, end - time.monotonic()))
            data = self._tty.recv(65536) if ready else b""
            if not data:
                how = "QEMU ended" if ready else "the guest said nothing more"
                raise MachineError(f"{how} in {what!r}: {self._words()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        text = "".join(c if c.isprintable() else " " for c in line[:_LINE].decode("utf-8", "replace").rstrip("\r"))
        self._lines = [*self._lines[-10:], text]
        return text

    @staticmethod
    def _values(said: Sequence[str], key: str) -> list[str]:
        return [line.removeprefix(f"{key} ") for line in said if line.startswith(f"{key} ")]

    def _words(self) -> str:
        return "; ".join([*self._lines[-3:], *self.process.stderr().strip().splitlines()[-2:]])[-600:]

    def close(self) -> None:
        """End the guest and all servers. May be called more than once."""
        self._starter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _device(at: int) -> str:
    """Linux's name: it finds them in the order of their root ports."""
    return f"vd{chr(ord('a') + at)}"


def _documents(said: str) -> list[dict[str, int]]:
    """The counters in a server's log."""
    found = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            document = json.loads(line[line.index("{") :])
            if isinstance(document, dict) and document.get("schema") == "virtiova/serve/1":
                found.append({name: value for name, value in document.items() if isinstance(value, int)})
    return found
