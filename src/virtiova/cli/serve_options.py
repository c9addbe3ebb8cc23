# SPDX-License-Identifier: Apache-2.0
"""The options of ``virtiova serve``: light, since every start of the program reads them."""

from __future__ import annotations

import argparse
from typing import Final

from virtiova.cli.parsing import Commands, Once, Parser

DISKS: Final = {
    "blk": ("a disk", "Serve a disk: a file, a block device, or memory."),
    "leaky": (
        "wrong on purpose: a disk that goes around the IOMMU",
        "Serve a disk that takes bit 33 and uses the bare address all the same. For testing others.",
    ),
    "stale": (
        "wrong on purpose: a disk that is deaf to invalidations",
        "Serve a disk that keeps every translation that it was ever given. For testing others.",
    ),
}
"""Disks by the word on the command line: help and description."""


def add(commands: Commands) -> None:
    """The command, with its kinds of devices."""
    serve = commands.add_parser(
        "serve",
        help="serve a device over vhost-user",
        description="Serve a device over vhost-user: a back end that honours the IOMMU, for QEMU and other front ends. "
        "SIGTERM, SIGINT and SIGHUP end it, and the exit status is 0 then; SIGUSR1 writes the counters to standard "
        "error, also with -q.",
    )
    kinds = serve.add_subparsers(dest="kind", metavar="DEVICE", parser_class=Parser, required=True)
    for name, (short, long) in DISKS.items():
        disk = kinds.add_parser(name, help=short, description=long)
        disk.add_argument("image", nargs="?", metavar="IMAGE", help="a file or block device; used in place")
        disk.add_argument("--blk-file", action=Once, metavar="IMAGE", help="the same, as management software says it")
        disk.add_argument("--memory", action=Once, metavar="SIZE", help="a disk in memory instead, such as 64M")
        disk.add_argument("--read-only", action="store_true", help="nothing can be written")
        disk.add_argument("--num-queues", action=Once, type=int, default=1, metavar="N", help="default: %(default)s")
        disk.add_argument(
            "--io",
            action=Once,
            choices=("auto", "uring", "calls", "mapped", "python"),
            default="auto",
            help="how bytes move: auto, the default: between file and guest by the kernel, and by io_uring "
            "what has to wait; uring: all by io_uring; calls: nothing by io_uring; mapped: the file as memory, for one "
            "that is in memory; python: each request through the device class",
        )
        disk.add_argument("--serial", action=Once, metavar="TEXT", help="what the disk says of itself, up to 20 bytes")
        _common(disk)
    _common(kinds.add_parser("rng", help="a source of random bytes", description="Serve random bytes."))
    net = kinds.add_parser("net", help="a network", description="Serve a network device.")
    net.add_argument("--tap", action=Once, metavar="NAME", help="on a tap interface of this machine")
    net.add_argument("--datagram", action=Once, nargs=2, metavar=("LOCAL", "REMOTE"), help="between two Unix sockets")
    net.add_argument("--datagram-fd", action=Once, type=int, metavar="N", help="on this connected datagram socket")
    net.add_argument("--neighbour", action=Once, metavar="ADDRESS", help="alone with a host that answers ping there")
    net.add_argument("--discard", action="store_true", help="on a wire with nobody on it: frames are counted, no more")
    net.add_argument(
        "--io",
        action=Once,
        choices=("auto", "python"),
        default="auto",
        help="auto, the default: queues without Python where the wire can be had so; python: each frame through the "
        "device class",
    )
    net.add_argument("--mac", action=Once, metavar="MAC", help="of the device, if the front end asks for it")
    _common(net)
    console = kinds.add_parser("console", help="a terminal", description="Serve a console of one port.")
    console.add_argument("--stdio", action="store_true", help="on this program's own input and output")
    console.add_argument("--pty", action="store_true", help="on a pseudo-terminal, whose name is said")
    console.add_argument("--terminal", action=Once, metavar="PATH", help="for whoever connects to this Unix socket")
    console.add_argument("--terminal-fd", action=Once, type=int, metavar="N", help="on this connected socket")
    console.add_argument("--size", action=Once, metavar="COLUMNSxROWS", help="of the terminal, such as 80x25")
    _common(console)


def _common(device: argparse.ArgumentParser) -> None:
    device.add_argument("--socket-path", action=Once, metavar="PATH", help="listen there; removed at the end")
    device.add_argument("--fd", action=Once, type=int, metavar="N", help="use this open socket instead")
    device.add_argument("--vduse", action=Once, metavar="NAME", help="as a vDPA device of this machine instead")
    device.add_argument("--socket-mode", action=Once, metavar="MODE", help="of the socket, octal (default: 600)")
    device.add_argument("--socket-owner", action=Once, metavar="USER[:GROUP]", help="who the socket is given to")
    device.add_argument("--print-capabilities", action="store_true", help="say as JSON what this back end can do")
    device.add_argument("--print-descriptor", action="store_true", help="say as JSON where it is, for a file of QEMU's")
    device.add_argument(
        "--sandbox",
        action=Once,
        choices=("auto", "on", "off"),
        default="auto",
        help="give up all system calls that are not needed; auto, the default: where that can be done",
    )
    device.add_argument(
        "--spin",
        action=Once,
        default="auto",
        metavar="MICROSECONDS",
        help="how long to look out for work before sleeping; auto, the default: up to 200, as long as has been of use; "
        "off: not at all",
    )
    device.add_argument("-j", "--json", action="store_true", help="counters on standard output at the end, as JSON")
    device.add_argument("-q", "--quiet", action="store_true", help="no log")
