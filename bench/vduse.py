# SPDX-License-Identifier: Apache-2.0
"""VDUSE beside vhost-user: the same program and image as a disk of one guest, in both ways, read by turns.

Usage: vduse.py [--rounds N] [--seconds S] [--spin WORD] [--io WORD]. One Linux 6.12 under TCG has three disks of
16 MiB in memory: `virtiova serve blk` by VDUSE, in the guest; QEMU's storage daemon by VDUSE, in the guest; and
`virtiova serve blk` by vhost-user, in the host. The same driver (virtio_blk) and readers, 4 KiB at random places past
the page cache. What serves by VDUSE is emulated with the guest, what serves by vhost-user is not: only the two by VDUSE
are on equal ground.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from virtiova.guest import disk_in_use
from virtiova.guest.inside import Inside, files
from virtiova.guest.settings import VDUSE
from virtiova.packages.store import Store

PAGE = 4096
SIZE = 16 << 20
DEPTHS = (1, 32)
OURS, THEIRS, OVER = "virtiova, VDUSE", "qemu-storage-daemon, VDUSE", "virtiova, vhost-user from the host"


def reads(disk: str, depth: int, seconds: float) -> float:
    """Reads a second of ``depth`` readers, each with one request at a time."""
    pipes = []
    for reader in range(depth):
        out, inside = os.pipe()
        if os.fork() == 0:
            fd, chance = os.open(disk, os.O_RDONLY | os.O_DIRECT), random.Random(reader)
            buffer, count = [mmap.mmap(-1, PAGE)], 0
            began = time.monotonic()
            while (now := time.monotonic()) < began + seconds:
                if os.preadv(fd, buffer, chance.randrange(SIZE // PAGE) * PAGE) != PAGE:
                    os._exit(1)
                count += 1
            os.write(inside, json.dumps(count / (now - began)).encode())
            os._exit(0)
        os.close(inside)
        pipes.append(out)
    found = []
    for out in pipes:
        with os.fdopen(out, "rb") as file:
            found.append(float(json.loads(file.read())))
        os.wait()
    return sum(found)


def inside(rounds: int, seconds: float, spin: str, io: str) -> None:
    """The guest's side: a line of JSON for each sample."""
    images = {name: f"/run/{name}.img" for name in ("ours", "theirs")}
    for path in images.values():
        with open(path, "wb") as file:
            file.write(random.Random(1).randbytes(SIZE))
    serve = [
        sys.executable,
        "-m",
        "virtiova",
        "serve",
        "blk",
        images["ours"],
        "--vduse",
        "ours",
        "-q",
        "--spin",
        spin,
        "--io",
        io,
    ]
    export = "type=vduse-blk,id=e,node-name=n,name=theirs"
    daemon = ["qemu-storage-daemon", "--blockdev", f"file,node-name=n,filename={images['theirs']}", "--export", export]
    started = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for words in (serve, daemon)]
    disks = {}
    for name in images:
        while not os.path.exists(f"/dev/vduse/{name}"):
            time.sleep(0.1)
        subprocess.run(["vdpa", "dev", "add", "name", name, "mgmtdev", "vduse"], check=True)
        at = f"/sys/bus/vdpa/devices/{name}/driver/unbind"
        if os.path.exists(at) and "vhost_vdpa" in os.path.realpath(os.path.dirname(at)):
            Path(at).write_text(name, encoding="ascii")
            Path("/sys/bus/vdpa/drivers/virtio_vdpa/bind").write_text(name, encoding="ascii")
        disks[name] = disk_in_use.of_vdpa(name)
    over = next(f"/dev/{name}" for name in os.listdir("/sys/block") if f"/dev/{name}" not in disks.values())
    subjects = [(OURS, disks["ours"]), (THEIRS, disks["theirs"]), (OVER, over)]
    for turn in range(rounds):
        for depth in DEPTHS:
            for name, disk in subjects[turn % 3 :] + subjects[: turn % 3]:
                print(json.dumps({"name": name, "depth": depth, "rate": reads(disk, depth, seconds)}), flush=True)
    print(json.dumps({"end": True}), flush=True)
    for process in started:
        process.terminate()


def measure(rounds: int, seconds: float, spin: str, io: str) -> dict[tuple[str, int], list[float]]:
    """The samples of each disk and depth, in the order of the rounds."""
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        image, socket = f"{folder}/image", f"{folder}/socket"
        Path(image).write_bytes(random.Random(1).randbytes(SIZE))
        serve = [sys.executable, "-m", "virtiova", "serve", "blk", image, "--socket-path", socket, "-q", "--spin", spin]
        serve += ["--io", io]
        with subprocess.Popen(serve) as server:
            try:
                while not os.path.exists(socket):
                    time.sleep(0.1)
                more: tuple[str, ...] = (
                    "-object",
                    f"memory-backend-memfd,id=m,size={VDUSE.memory}M,share=on",
                    "-M",
                    "memory-backend=m",
                )
                disk = ("-device", "vhost-user-blk-pci,chardev=c,num-queues=1,disable-legacy=on")
                more += ("-chardev", f"socket,id=c,path={socket}")
                setting = replace(VDUSE, arguments=(*VDUSE.arguments, *more, *disk))
                with Inside(
                    setting, files(setting, Store()), "vduse", ("inside", str(rounds), str(seconds), spin, io)
                ) as guest:
                    for said in guest.lines(300):
                        if "rate" in said:
                            found.setdefault((said["name"], said["depth"]), []).append(said["rate"])
            finally:
                server.terminate()
    return found


def main() -> None:
    """Measure, and print medians with least and most, and ratios of the same round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--spin", default="auto", help="of virtiova serve")
    parser.add_argument("--io", default="auto", help="of virtiova serve")
    options = parser.parse_args()
    found = measure(options.rounds, options.seconds, options.spin, options.io)
    for depth in DEPTHS:
        own = found[OURS, depth]
        for name in (OURS, THEIRS, OVER):
            rates = found[name, depth]
            ratios = [one / other for one, other in zip(own, rates, strict=True)]
            spread = f"({min(rates):.0f}..{max(rates):.0f})"
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            print(f"depth {depth:2}  {name:36} {statistics.median(rates):7.0f} {spread:16} ours to it {ratio}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        inside(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5])
    else:
        main()
