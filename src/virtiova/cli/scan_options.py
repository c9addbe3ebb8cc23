# SPDX-License-Identifier: Apache-2.0
"""The options of ``virtiova scan`` and ``gather``: light, since every start of the program reads them."""

from __future__ import annotations

from virtiova.cli import scan_output_options
from virtiova.cli.parsing import Commands, Once


def add(commands: Commands) -> None:
    """``virtiova scan``."""
    command = commands.add_parser(
        "scan",
        help="what each virtio device here is said to do, why, and what to change",
        description="Without an input: this machine. Nothing is changed on what is scanned.",
        epilog="A QEMU command line can be given as it is, after --.",
    )
    command.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="a libvirt domain (XML), what 'virtiova gather' took (tar, folder), or a folder of these",
    )
    command.add_argument(
        "--qmp", action="append", default=[], metavar="SOCKET", help="ask a running QEMU, from outside"
    )
    command.add_argument("--cmdline", action="append", default=[], metavar="FILE", help="a QEMU command line in a file")
    command.add_argument("--pid", action="append", default=[], metavar="PID", help="the command line of a process")
    command.add_argument("--log", action="append", default=[], metavar="FILE", help="explain the messages of a log")
    command.add_argument(
        "--fail-on",
        action=Once,
        choices=("error", "warning", "note", "never"),
        default="warning",
        help="what counts as found (default: %(default)s)",
    )
    scan_output_options.add(command)
    fleet = command.add_argument_group("for many files")
    fleet.add_argument("--summary", action="store_true", help="by finding and by machine (default: of more than 8)")
    fleet.add_argument("--jobs", action=Once, type=int, metavar="N", help="files at a time (default: one a core)")
    fleet.add_argument(
        "--scheduler",
        action=Once,
        metavar="ADDRESS",
        help="read and judge on the Dask cluster of this scheduler (virtiova[cluster])",
    )
    command.add_argument("-q", "--quiet", action="store_true", help="no output; the exit status says it")
    command.add_argument("-v", "--verbose", action="store_true", help="with the reasons for each device")


def gather(commands: Commands) -> None:
    """``virtiova gather``."""
    command = commands.add_parser(
        "gather",
        help="take what scan reads of this machine along, to be scanned elsewhere",
        description="Writes an archive that 'virtiova scan' takes. Reads only. Passwords in options that are known "
        "for it stay here.",
        epilog="Where there is no Python: 'virtiova gather --script' prints a shell script that does the same.",
    )
    command.add_argument(
        "-o", "--output", action=Once, metavar="FILE", help="the archive (box.tar.gz), or - for stdout"
    )
    command.add_argument(
        "--qmp", action="append", default=[], metavar="SOCKET", help="and what a running QEMU says (may be repeated)"
    )
    command.add_argument(
        "--log", action="append", default=[], metavar="FILE", help="and the end of a log (may be repeated)"
    )
    command.add_argument("--script", action="store_true", help="print the script; nothing is gathered")
    command.add_argument("-q", "--quiet", action="store_true", help="do not say what could not be read")
