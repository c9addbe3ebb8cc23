# SPDX-License-Identifier: Apache-2.0
"""Back ends over vhost-user in the matrix: which ones, and what they are asked.

Two of ours are wrong on purpose. They stand here to show that the matrix would say so; what is seen of them is
explained, as the known departures of other products are.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from virtiova import __version__
from virtiova.machine.backend import BackEnd
from virtiova.machine.qemu.installation import qemu_version
from virtiova.probe.plan import VHOST_USER

OURS: Final = "virtiova"
ON: Final = ",iommu_platform=on"


@dataclass(frozen=True, slots=True)
class Program:
    """A back end. ``label`` is how its cells name it, ``command`` what is started for each of them, ``package`` whose
    it is; ``spoken`` and ``behind`` are the experiments over our own front end, and behind QEMU with the bit asked
    for."""

    label: str
    kind: str
    command: str
    package: str
    spoken: tuple[str, ...]
    behind: tuple[str, ...] = ()
    behind_off: tuple[str, ...] = ()
    echo: bool = False

    @property
    def program(self) -> str:
        """The name of what is started."""
        return self.command.partition(" ")[0]

    @property
    def missing(self) -> str:
        """Why it cannot be had here; empty if it can."""
        if self.program == OURS or shutil.which(self.program):
            return ""
        return f"{self.program} is not installed (to have it: apt-get install {self.package})"

    @property
    def product(self) -> str:
        """Its name and, where it says so, its version."""
        if self.program == OURS:
            return f"{OURS}-{self.label.removeprefix('serve-')} {__version__}"
        version = qemu_version(self.program) if self.program.startswith("qemu") else "unknown"
        return self.program if version == "unknown" else f"{self.program} {version}"

    def device(self, machine: str) -> str:
        """The device that it is the other half of, without the bit."""
        return f"vhost-user-{self.kind}{'' if machine == VHOST_USER else '-pci'}"

    def back_end(self) -> BackEnd:
        """What a task has of it."""
        return BackEnd(spawn=self.command, kind=self.kind, echo=self.echo, product=self.product)

    def asked(self, machine: str) -> Iterator[tuple[str, str]]:
        """What its device is told, and the experiment."""
        if machine == VHOST_USER:
            yield from (("", name) for name in self.spoken)
            return
        yield from ((ON, name) for name in self.behind)
        yield from (("", name) for name in self.behind_off)


PROGRAMS: Final = (
    Program(
        "serve-blk",
        "blk",
        f"{OURS} serve blk {{image}} --socket-path {{socket}}",
        "",
        ("device-writes", "device-reads", "ring", "unmapped", "unmap", "remap", "not-taken", "translation-off"),
        ("device-writes", "device-reads", "ring", "unmap", "remap"),
        ("device-writes", "device-reads"),
    ),
    Program(
        "serve-leaky",
        "blk",
        f"{OURS} serve leaky {{image}} --socket-path {{socket}}",
        "",
        ("device-writes", "unmap"),
    ),
    Program(
        "serve-stale",
        "blk",
        f"{OURS} serve stale {{image}} --socket-path {{socket}}",
        "",
        ("device-writes", "unmap", "remap"),
    ),
    Program(
        "storage-daemon",
        "blk",
        "qemu-storage-daemon --blockdev driver=file,node-name=f0,filename={image} "
        "--export type=vhost-user-blk,id=e0,node-name=f0,addr.type=unix,addr.path={socket},writable=on",
        "qemu-system-common",
        ("device-writes", "device-reads", "ring", "unmapped"),
        ("device-writes",),
        ("device-writes", "device-reads"),
    ),
    Program(
        "testpmd",
        "net",
        "dpdk-testpmd --no-huge -m 128 --no-pci --no-telemetry --no-shconf --lcores 0@0,1@0 "
        "--vdev net_vhost0,iface={socket},queues=1,iommu-support=1 "
        "-- --no-mlockall --forward-mode=io --auto-start --total-num-mbufs=2048 --stats-period=60",
        "dpdk-dev",
        ("device-writes", "ring"),
        echo=True,
    ),
)


def here(backend: BackEnd) -> BackEnd:
    """A back end as it is started here: our own program is the one that is running."""
    name, _, rest = backend.spawn.partition(" ")
    if name != OURS:
        return backend
    return replace(backend, spawn=f"{shlex.quote(sys.executable)} -m virtiova {rest}")
