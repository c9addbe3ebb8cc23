# SPDX-License-Identifier: Apache-2.0
"""The options of ``virtiova fuzz``: light, since every start of the program reads them."""

from __future__ import annotations

from virtiova.cli.parsing import Commands, Once, Parser


def add(commands: Commands) -> None:
    """The command, and its only target."""
    command = commands.add_parser(
        "fuzz",
        help="look for what a vhost-user back end does not stand",
        description="Play sequences of messages, rings and IOTLB traffic, good ones and wrong ones, against a back "
        "end: look for crashes, hangs, writes outside of what was granted, and requests that are never used.",
    )
    targets = command.add_subparsers(dest="target", metavar="TARGET", parser_class=Parser, required=True)
    target = targets.add_parser(
        "vhost-user",
        help="a vhost-user back end that is started here",
        description="Fuzz a vhost-user back end. The same seed plays the same sequences.",
    )
    target.add_argument(
        "--spawn",
        action=Once,
        required=True,
        metavar="COMMAND",
        help="start the back end: {socket} is where it is to listen, or {fd} the number of its connected socket; "
        "{image} is the path of a disk image of ours, {net} the number of a datagram socket",
    )
    target.add_argument(
        "--type", action=Once, metavar="KIND", help="device type: blk, console, net or rng (default: it is guessed)"
    )
    target.add_argument("--echo", action="store_true", help="the network device sends back every frame")
    target.add_argument(
        "--seed", action=Once, type=int, default=0, metavar="N", help="which sequences (default: %(default)s)"
    )
    target.add_argument(
        "--time", action=Once, type=float, default=60.0, metavar="SECONDS", help="how long (default: %(default)g)"
    )
    target.add_argument(
        "--sequences", action=Once, type=int, metavar="N", help="no more than so many sequences (default: no limit)"
    )
    target.add_argument(
        "-o", "--output", action=Once, metavar="FILE", help="write what shows a finding again to FILE, a Python program"
    )
    target.add_argument("--jobs", action=Once, type=int, metavar="N", help="back ends at a time (default: one a core)")
    target.add_argument(
        "--scheduler",
        action=Once,
        metavar="ADDRESS",
        help="play on the Dask cluster of this scheduler (virtiova[cluster])",
    )
    target.add_argument("-j", "--json", action="store_true", help="JSON on standard output")
    target.add_argument("-q", "--quiet", action="store_true", help="say nothing; the exit status says it")
