# SPDX-License-Identifier: Apache-2.0
"""The options of ``virtiova bench``: light, since every start of the program reads them."""

from __future__ import annotations

import argparse

from virtiova.cli.parsing import Commands, Once, Parser


def add(commands: Commands) -> None:
    """The command, with what it measures."""
    bench = commands.add_parser(
        "bench",
        help="what honouring the IOMMU costs, beside other back ends",
        description="Measure served devices with their default options, and beside them qemu-storage-daemon and "
        "dpdk-testpmd where these are installed: one front end for all, by turns, in rounds.",
    )
    verbs = bench.add_subparsers(dest="kind", metavar="WHAT", parser_class=Parser, required=True)
    blk = verbs.add_parser("blk", help="disks", description="Reads of 4 KiB, against depth and live mappings.")
    net = verbs.add_parser("net", help="networks", description="Frames of 64 bytes sent, against the same.")
    for verb in (blk, net):
        verb.add_argument("--depth", action="append", type=int, metavar="N", help="this depth only (may be repeated)")
        verb.add_argument(
            "--mappings", action="append", type=int, metavar="N", help="this many live mappings only (may be repeated)"
        )
        verb.add_argument("--bit", action=Once, choices=("on", "off", "both"), default="both", help="bit 33")
        verb.add_argument(
            "--front", action=Once, choices=("poll", "sleep", "both"), default="both", help="how it waits"
        )
        verb.add_argument(
            "--ring",
            action=Once,
            choices=("split", "packed", "both"),
            default="split",
            help="kind of ring (default: %(default)s)",
        )
        _common(verb)
    blk.add_argument("--image", action=Once, metavar="SIZE", default="1M", help="of the disks (default: %(default)s)")
    iotlb = verbs.add_parser("iotlb", help="messages of the IOTLB", description="A pair of update and invalidation.")
    iotlb.add_argument(
        "--mappings", action="append", type=int, metavar="N", help="this many resident only (may be repeated)"
    )
    _common(iotlb)
    vfio = verbs.add_parser(
        "vfio",
        help="mappings of a real IOMMU",
        description="What it costs to map memory for a device that is bound to vfio-pci, and to take it back, beside "
        "the IOTLB messages of a back end of ours. The device is not driven.",
    )
    vfio.add_argument("address", metavar="ADDRESS", help="the device, such as 0000:03:00.0")
    _common(vfio)
    guest = verbs.add_parser(
        "guest",
        help="a Linux guest with strict mappings",
        description="Reads of 4 KiB in a Debian guest under TCG, whose disks are ours and QEMU's own: with strict and "
        "with lazy mappings, and without bit 33.",
    )
    guest.add_argument("--depth", action="append", type=int, metavar="N", help="so many readers (default: 1 and 32)")
    _common(guest, seconds="1.5", quick="2 rounds of 1 s")
    draw = verbs.add_parser("draw", help="a picture of a run", description="Draw what -o has written, and run nothing.")
    draw.add_argument("run", metavar="RUN", help="the run, a .json")
    draw.add_argument("plot", metavar="FILE", help="the picture, .svg or .png (virtiova[plot])")


def _common(
    verb: argparse.ArgumentParser, *, seconds: str = "0.2", quick: str = "3 rounds of 0.1 s, and few settings"
) -> None:
    verb.add_argument("--rounds", action=Once, type=int, metavar="N", default=None, help="default: 9")
    verb.add_argument(
        "--seconds", action=Once, type=float, metavar="S", default=None, help=f"of a sample (default: {seconds})"
    )
    verb.add_argument("--quick", action="store_true", help=quick)
    verb.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORD",
        help="subjects with this word in their name (may be repeated)",
    )
    verb.add_argument(
        "--realtime", action="store_true", help="both sides before all other programs, on a machine with other load"
    )
    verb.add_argument("--list", action="store_true", help="list what would be measured, and run nothing")
    verb.add_argument("--plot", action=Once, metavar="FILE", help="a picture, .svg or .png (virtiova[plot])")
    verb.add_argument("-j", "--json", action="store_true", help="JSON on standard output")
    verb.add_argument("-o", "--output", action="append", metavar="FILE", help="write FILE as well: .json or .txt")
    verb.add_argument("-q", "--quiet", action="store_true", help="no progress")
