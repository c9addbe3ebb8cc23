# SPDX-License-Identifier: Apache-2.0
"""A Debian guest whose disk, entropy and network are served by ``virtiova serve``: both ends, and their leftovers."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from virtiova.errors import NotPossibleError
from virtiova.guest import initramfs, kernels
from virtiova.guest.starter import Starter
from virtiova.packages.store import Store, Wanted, one_file

MODULES = ("virtio_pci", "virtio_blk", "virtio_rng", "virtio_net")
SECONDS = 90.0
MEMORY_MIB = 512
"""An address of 0xffff.... is then provably none of RAM."""


@dataclass(frozen=True)
class Kernel:
    """A Debian kernel with what this guest needs of it."""

    meta: str
    pattern: str
    modules: tuple[str, ...]
    suite: str = ""

    def wanted(self) -> Wanted:
        name = f"{self.meta}-served"
        return Wanted(name, self.meta, "amd64", partial(kernels.pick, wanted=self.modules), self.pattern, self.suite)


CLOUD = Kernel("linux-image-cloud-amd64", r"linux-image-[0-9].*-cloud-amd64", MODULES)
# The first of Debian's kernels with a driver for virtio-iommu. That comes before the devices that are to be behind it.
NEWER = Kernel(
    "linux-image-amd64", r"linux-image-[0-9].*-amd64", ("virtio_iommu", *MODULES), suite="bookworm-backports"
)
BUSYBOX = Wanted("busybox", "busybox-static", "amd64", one_file("bin/busybox", "busybox"))


@dataclass(frozen=True)
class Assets:
    """Kernel and initramfs, as bytes."""

    kernel: bytes
    initramfs: bytes


def assets(kernel: Kernel, store: Store | None = None) -> Assets:
    """Fetched into the user's cache when first needed; the test is skipped, with the reason, where that cannot be."""
    store = store or Store()
    try:
        files, busybox = store.get(kernel.wanted()).content, store.get(BUSYBOX).content["busybox"]
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    order = files["order"].decode().split()
    content = {
        "init": (0o755, Path(__file__).with_name("served_init.sh").read_bytes()),
        "bin/busybox": (0o755, busybox),
        "modules/order": (0o644, "".join(f"{name}\n" for name in order).encode()),
        **{f"modules/{name}.ko": (0o644, files[f"modules/{name}.ko"]) for name in order},
    }
    return Assets(files["kernel"], gzip.compress(initramfs.cpio(content, initramfs.FOLDERS), 1, mtime=0))


# -- QEMU's side

VTD = ("-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on")
VIRTIO_IOMMU = ("-device", "virtio-iommu-pci")
NONE: tuple[str, ...] = ()


def served(kind: str, path: str, index: int, *, bit: bool, extra: str = "", chardev: str = "") -> list[str]:
    """QEMU's options for a device of ``kind`` at a socket, behind a root port of its own."""
    on = "iommu_platform=on,ats=on" if bit else "iommu_platform=off"
    argv = ["-chardev", f"socket,id=c{index},path={path}{chardev}"]
    argv += ["-device", f"pcie-root-port,id=rp{index},slot={index + 1},chassis={index + 1}"]
    place = f"id={kind}{index},bus=rp{index},{on}{extra}"
    if kind == "net":
        # QEMU 7.2 without KVM ends with a segmentation fault in vhost_net_start() if such a device has MSI-X.
        argv += ["-netdev", f"vhost-user,id=n{index},chardev=c{index}"]
        return [*argv, "-device", f"virtio-net-pci,netdev=n{index},vectors=0,{place}"]
    return [*argv, "-device", f"vhost-user-{kind}-pci,chardev=c{index},{place}"]


class Guest:
    """QEMU with a guest that takes commands over its console; without ``files``, whatever its disks boot. A context
    manager."""

    def __init__(
        self, files: Assets | None, devices: Sequence[str], *, iommu: Sequence[str] = VTD, append: str = ""
    ) -> None:
        self.lines: list[str] = []
        self._buffer = b""
        self._said = b""
        self._capable = False
        self._starter = Starter()
        try:
            self._start(files, devices, iommu, append)
        except BaseException:
            self.close()
            raise

    def _start(self, files: Assets | None, devices: Sequence[str], iommu: Sequence[str], append: str) -> None:
        self._tty, tty = self._starter.serial("tty")
        self._qmp, qmp = self._starter.line("qmp")
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none"]
        argv += ["-accel", "tcg", "-cpu", "qemu64", "-smp", "1", "-m", str(MEMORY_MIB)]
        argv += ["-machine", "q35,kernel-irqchip=split,memory-backend=m0"]
        argv += ["-object", f"memory-backend-memfd,id=m0,size={MEMORY_MIB}M,share=on"]
        argv += [*tty, *qmp, "-mon", "chardev=qmp,mode=control"]
        if files is not None:
            argv += ["-kernel", self._starter.file("kernel", files.kernel)]
            argv += ["-initrd", self._starter.file("initramfs", files.initramfs)]
            argv += ["-append", f"console=ttyS0 quiet loglevel=3 panic=-1 no_timer_check {append}"]
        self.process = self._starter.start([*argv, *iommu, *devices])

    def booted(self, seconds: float = SECONDS) -> list[str]:
        """Wait until the guest takes commands; what it said until then."""
        return self._until_done(seconds)

    def do(self, command: str, seconds: float = SECONDS) -> list[str]:
        """What the guest says to a command; it must succeed."""
        self.tell(command)
        return self._until_done(seconds, command)

    def tell(self, command: str) -> None:
        """Send a command and do not wait."""
        self._tty.sendall(command.encode() + b"\n")

    def _until_done(self, seconds: float, command: str = "boot") -> list[str]:
        end = time.monotonic() + seconds
        said: list[str] = []
        while True:
            line = self.line(end, command)
            if line.startswith("@ done "):
                assert line == "@ done 0", f"{command}: {line}; {said}; {self.words()}"
                return said
            if line.startswith("@ "):
                said.append(line[2:])

    def line(self, end: float, command: str) -> str:
        """The next line on the console, before ``end`` of the clock; ``command`` is what is said if none comes."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._tty], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the guest said nothing more to {command!r}; {self.words()}"
            data = self._tty.recv(65536)
            assert data, f"QEMU ended during {command!r}; {self.words()}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        text = line.decode("utf-8", "replace").rstrip("\r")
        self.lines.append(text)
        return text

    def words(self) -> str:
        """The last of what guest and QEMU said."""
        return "\n".join([*self.lines[-15:], self.process.stderr()[-2000:]])

    def qmp(self, command: str, arguments: Mapping[str, object] | None = None, *, event: str = "") -> object:
        """One QMP command, which must not fail; what it returns. With an ``event``, wait for that as well."""
        end = time.monotonic() + SECONDS
        if not self._capable:
            self._capable = True
            self.qmp("qmp_capabilities")
        self._qmp.sendall(json.dumps({"execute": command, "arguments": {**(arguments or {})}}).encode())
        wanted = {"return", event} - {""}
        returned: object = None
        while wanted:
            message = self._message(end, command)
            assert "error" not in message, f"{command}: {message}"
            returned = message.get("return", returned)
            wanted -= {"return"} & message.keys() | {str(message.get("event"))}
        return returned

    def _message(self, end: float, command: str) -> dict[str, object]:
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._qmp], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"QEMU did not answer {command}, or nothing came of it; {self.words()}"
            data = self._qmp.recv(65536)
            assert data, f"QEMU ended during {command}; {self.words()}"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def kill(self) -> None:
        """End QEMU as a crash would."""
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.ended()

    def ended(self, seconds: float = 20.0) -> bool:
        """Whether QEMU ends within that time."""
        return self.process.exit_code(seconds) is not None

    def close(self) -> None:
        self._starter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def values(said: Sequence[str], key: str) -> list[str]:
    """What followed ``key`` in a guest's answers."""
    return [line.removeprefix(f"{key} ") for line in said if line.startswith(f"{key} ")]


def value(said: Sequence[str], key: str) -> str:
    """The one of them."""
    (found,) = values(said, key)
    return found


# -- our side


SERVE = [sys.executable, "-m", "virtiova", "serve"]


class Server:
    """``virtiova serve`` in a process of its own. A context manager; it must end by itself when asked to."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.path = str(folder / f"{name}.sock")
        self._asked = False
        self._log = open(folder / f"{name}.log", "w+b")  # noqa: SIM115  (lives as long as this does)
        command = [*SERVE, *arguments, "--socket-path", self.path]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        wait_for(lambda: os.path.exists(self.path) or self.process.poll() is not None, "a socket")
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        """All that it said."""
        self._log.flush()
        return Path(self._log.name).read_text("utf-8", "replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> str:
        """End it; its log."""
        if self.alive:
            self._asked = True
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        log = self.log()
        assert code in (0, -signal.SIGTERM, 128 + signal.SIGTERM), log
        return log

    def kill(self) -> str:
        """End it as a crash would; its log."""
        self._asked = True
        self.process.kill()
        self.process.wait()
        return self.log()

    def close(self) -> None:
        died = not self.alive and not self._asked
        if self.alive:
            self.process.kill()
        self.process.wait()
        self._log.close()
        assert not died, f"a server ended by itself: {Path(self._log.name).read_text('utf-8', 'replace')}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_for(done: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Poll; an assertion if it does not come."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what} did not come within {seconds:g} s"
        time.sleep(0.01)


def image(sectors: int) -> bytes:
    """A disk that says the number of each of its sectors."""
    return b"".join(b"sector %08d " % n * 32 for n in range(sectors))


@contextlib.contextmanager
def serving(folder: Path, disk: Path) -> Iterator[tuple[Server, Server, Server]]:
    """A disk, an entropy source and a network with somebody who answers ping."""
    with (
        Server(folder, "blk", "blk", str(disk)) as blk,
        Server(folder, "rng", "rng") as rng,
        Server(folder, "net", "net", "--neighbour", "10.0.2.2") as net,
    ):
        yield blk, rng, net
