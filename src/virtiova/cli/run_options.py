# SPDX-License-Identifier: Apache-2.0
"""The options of ``virtiova matrix``, ``guest`` and ``explain``: light, since every start of the program reads them."""

from __future__ import annotations

from virtiova.cli.parsing import Commands, Once, Parser, common


def matrix(commands: Commands) -> None:
    """``virtiova matrix``."""
    command = commands.add_parser(
        "matrix",
        help="every system that the patch names, predicted against observed",
        description="Run every cell that this machine can run, system by system, and say of the others why not.",
    )
    names = "a system, machine or IOMMU (may be repeated)"
    command.add_argument("--only", action="append", default=[], metavar="NAME", help=f"this one only: {names}")
    command.add_argument("--skip", action="append", default=[], metavar="NAME", help=f"not this one: {names}")
    command.add_argument(
        "--qemu",
        action="append",
        default=[],
        metavar="WHICH",
        help="another QEMU besides this machine's: a directory that has the binaries, or whose usr/bin has, or a suite "
        "of Debian to fetch it from, such as bookworm-backports (may be repeated)",
    )
    command.add_argument("--full", action="store_true", help="every experiment, and every device type on every IOMMU")
    command.add_argument("--guests", action="store_true", help="boot real kernels as well (takes minutes)")
    command.add_argument("--offline", action="store_true", help="fetch no packages for --guests or --qemu")
    command.add_argument("--list", action="store_true", help="list the cells, and run nothing")
    command.add_argument(
        "--results",
        action=Once,
        metavar="FILE",
        help="write every result to this JSON Lines file as it comes; a second run with it goes on",
    )
    command.add_argument(
        "--scheduler",
        action=Once,
        metavar="ADDRESS",
        help="run the cells on the Dask cluster of this scheduler (virtiova[cluster])",
    )
    command.add_argument("-j", "--json", action="store_true", help="JSON on standard output")
    command.add_argument(
        "-o",
        "--output",
        action="append",
        metavar="FILE",
        help="write FILE as well; its suffix, .json, .html, .svg, .xml (JUnit) or .txt, is the format (may be "
        "repeated)",
    )
    command.add_argument("-q", "--quiet", action="store_true", help="no table; the exit status says it")
    common(command)


def guest(commands: Commands) -> None:
    """``virtiova guest``."""
    command = commands.add_parser(
        "guest",
        help="boot a real kernel and see what its drivers do",
        description="Boot Debian's own kernels in an emulated processor, and see from inside and from outside what "
        "their virtio drivers do with bit 33. Kernels come from Debian's packages into the cache folder.",
    )
    verbs = command.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser, required=True)
    verbs.add_parser("list", help="list the platforms, and what of them is in the cache")
    run = verbs.add_parser("run", help="boot platforms", description="Boot platforms, named as 'list' does, or 'all'.")
    run.add_argument("platforms", nargs="+", metavar="PLATFORM", help="a name from 'guest list', or all")
    run.add_argument(
        "--bit",
        action=Once,
        choices=("on", "off", "both"),
        default="both",
        help="which disks are shown (default: %(default)s)",
    )
    run.add_argument("--offline", action="store_true", help="only what is in the cache; the rest is n/a")
    run.add_argument("--console", action="store_true", help="a shell on the guest's console; Ctrl-] ends it")
    run.add_argument(
        "--seconds", action=Once, type=float, metavar="N", default=None, help="longest time for a boot (default: 150)"
    )
    run.add_argument(
        "--jobs", action=Once, type=int, metavar="N", default=None, help="guests at a time (default: one a core)"
    )
    run.add_argument("-j", "--json", action="store_true", help="JSON on standard output")
    run.add_argument("-v", "--verbose", action="store_true", help="with the chain of reasons for each disk")


def explain(commands: Commands) -> None:
    """``virtiova explain``."""
    command = commands.add_parser(
        "explain",
        help="why: the rule for given facts, an experiment, a known departure, a word",
        description="Explain the rule for given facts ('rule', with the options below), an experiment, the id of a "
        "finding or known departure, or a word of the glossary. Works offline.",
    )
    command.add_argument(
        "what",
        nargs="?",
        help="rule, the name of an experiment, an id such as VA101 or QEMU-BUS-MASTER, or a word of the glossary; "
        "without it, all that there is",
    )
    answers = ("yes", "no", "unknown")
    rule = command.add_argument_group("facts, for 'rule'")
    rule.add_argument("--offered", action=Once, choices=answers, help="does the device offer bit 33?")
    rule.add_argument("--accepted", action=Once, choices=answers, help="does the driver take it?")
    rule.add_argument("--platform", action=Once, metavar="NAME", help="what is in front (default: iommu)")
    rule.add_argument("--generation", action=Once, metavar="NAME", help="before, patch, mainline or today")
    rule.add_argument("--insists", action=Once, choices=answers, help="is it known to refuse without the bit?")
    rule.add_argument("--legacy", action="store_true", help="the driver uses the legacy interface")
    rule.add_argument("--hardware", action="store_true", help="a physical device")
    rule.add_argument("--payload", metavar="KIND", help="an address inside a request, such as page-number")
    command.add_argument("-j", "--json", action="store_true", help="JSON on standard output (for 'rule')")
