# SPDX-License-Identifier: Apache-2.0
"""The entry point: the parser, exit codes, signals. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn, TypeAlias

from virtiova import __version__
from virtiova.cli import exits
from virtiova.errors import NotPossibleError, UsageError, VirtiovaError

_EPILOG: Final = """\
exit status: 0 nothing found, 1 found, 2 usage, 3 could not look, 70 internal error, 77 not possible here
"""


class _Parser(argparse.ArgumentParser):
    """An option or command that was mistyped is answered with the nearest one, like every other name."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        kind, _, rest = message.partition(": ")
        if kind == "unrecognized arguments":
            raise UsageError.unknown("option", rest.split()[0], self.names())
        if "invalid choice" in rest and "COMMAND" in kind:
            raise UsageError.unknown("command", rest.split("'")[1], self.names())
        raise UsageError(message)

    def names(self) -> set[str]:
        """All options and commands, those of the commands included."""
        found: set[str] = set()
        for action in self._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                found.update(action.choices)
                for parser in action.choices.values():
                    found |= parser.names()
        return found


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def parser() -> argparse.ArgumentParser:
    """The whole command line, without importing any command."""
    top = _Parser(
        prog="virtiova",
        description="Virtio devices behind IOMMUs: what is declared, what is predicted, what is observed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"virtiova {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _probe(commands)
    _matrix(commands)
    _explain(commands)
    return top


def _probe(commands: _Commands) -> None:
    probe = commands.add_parser(
        "probe",
        help="see on a real device where its bytes land",
        description="Drive a real device with two pages, one where the IOMMU points and one where the bare address "
        "points, and look at which of them it touched. Without a target: the default table.",
    )
    _output(probe)
    probe.add_argument("--list", action="store_true", help="list machines, IOMMUs, devices and experiments")
    targets = probe.add_subparsers(dest="target", metavar="TARGET", parser_class=_Parser)
    qemu = targets.add_parser("qemu", help="a device of QEMU", description="Probe a device of QEMU.")
    qemu.add_argument("--machine", default="q35", metavar="NAME", help="machine type (default: %(default)s)")
    qemu.add_argument(
        "--iommu",
        default="intel",
        metavar="NAME",
        help="none or intel[,option=value...] (default: %(default)s)",
    )
    qemu.add_argument("--device", required=True, metavar="SPEC", help="as for QEMU: 'virtio-blk-pci,iommu_platform=on'")
    qemu.add_argument(
        "--interface",
        default="auto",
        metavar="NAME",
        help="of a transitional device: auto, modern or legacy (default: %(default)s)",
    )
    model = targets.add_parser(
        "model",
        help="a device of the in-process machine",
        description="Probe a device of the in-process machine.",
    )
    model.add_argument("behaviour", help="honest, quirky or lying")
    model.add_argument("--device", default="blk", metavar="KIND", help="blk, net or rng (default: %(default)s)")
    model.add_argument("--iommu", default="soft", metavar="NAME", help="soft or none (default: %(default)s)")
    for target in (qemu, model):
        target.add_argument(
            "--experiment",
            action="append",
            metavar="NAME",
            help="run this one only (may be repeated; default: all)",
        )
        _output(target, inherit=True)


def _output(probe: argparse.ArgumentParser, *, inherit: bool = False) -> None:
    """Options of every probe. A sub-command's absent option must not undo what was said before it."""
    unset = argparse.SUPPRESS if inherit else None
    no = argparse.SUPPRESS if inherit else False
    probe.add_argument("-j", "--json", action="store_true", default=no, help="JSON on standard output")
    probe.add_argument(
        "-o",
        "--output",
        action="append",
        metavar="FILE",
        default=unset,
        help="write FILE.json or FILE.txt as well",
    )
    probe.add_argument("-q", "--quiet", action="store_true", default=no, help="no table; the exit status says it")
    probe.add_argument(
        "-v", "--verbose", action="store_true", default=no, help="with the chain of reasons for each cell"
    )
    probe.add_argument("--script", action="store_true", default=no, help="print the Python that does the same")
    _common(probe, inherit=inherit)


def _matrix(commands: _Commands) -> None:
    matrix = commands.add_parser(
        "matrix",
        help="every system that the patch names, predicted against observed",
        description="Run every cell that this machine can run, system by system, and say of the others why not.",
    )
    names = "a system, machine or IOMMU (may be repeated)"
    matrix.add_argument("--only", action="append", default=[], metavar="NAME", help=f"this one only: {names}")
    matrix.add_argument("--skip", action="append", default=[], metavar="NAME", help=f"not this one: {names}")
    matrix.add_argument(
        "--qemu",
        action="append",
        default=[],
        metavar="DIR",
        help="another QEMU installation besides this machine's: DIR or its usr/bin holds the binaries",
    )
    matrix.add_argument("--full", action="store_true", help="every experiment, and every device type on every IOMMU")
    matrix.add_argument("--guests", action="store_true", help="boot real kernels as well (takes minutes)")
    matrix.add_argument("--offline", action="store_true", help="fetch no packages for --guests")
    matrix.add_argument("--list", action="store_true", help="list the cells, and run nothing")
    matrix.add_argument(
        "--results",
        metavar="FILE",
        help="write every result to this JSON Lines file as it comes; a second run with it goes on",
    )
    matrix.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run the cells on the Dask cluster of this scheduler (virtiova[cluster])",
    )
    matrix.add_argument("-j", "--json", action="store_true", help="JSON on standard output")
    matrix.add_argument(
        "-o",
        "--output",
        action="append",
        metavar="FILE",
        help="write FILE.json, .html, .svg, .xml (JUnit) or .txt as well (may be repeated)",
    )
    matrix.add_argument("-q", "--quiet", action="store_true", help="no table; the exit status says it")
    _common(matrix)


def _common(command: argparse.ArgumentParser, *, inherit: bool = False) -> None:
    """Options of every command that runs cells."""
    command.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS if inherit else None,
        help="cells at a time (default: one a core)",
    )
    command.add_argument(
        "--fail-on",
        choices=("mismatch", "bypass", "unknown", "never"),
        default=argparse.SUPPRESS if inherit else "mismatch",
        help="what counts as found (default: mismatch)",
    )
    command.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default=argparse.SUPPRESS if inherit else "auto",
        help="default: auto; NO_COLOR is obeyed",
    )


def _explain(commands: _Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="why: the rule for given facts, an experiment, a known departure",
        description="Explain the rule for given facts ('rule', with the options below), an experiment, or the id of "
        "a known departure. Works offline.",
    )
    explain.add_argument("what", help="rule, the name of an experiment, or an id such as QEMU-BUS-MASTER")
    answers = ("yes", "no", "unknown")
    rule = explain.add_argument_group("facts, for 'rule'")
    rule.add_argument("--offered", choices=answers, default="unknown", help="does the device offer bit 33?")
    rule.add_argument("--accepted", choices=answers, default="unknown", help="does the driver take it?")
    rule.add_argument("--platform", default="iommu", metavar="NAME", help="what is in front (default: iommu)")
    rule.add_argument("--generation", default="today", metavar="NAME", help="before, patch, mainline or today")
    rule.add_argument("--insists", choices=answers, default="unknown", help="is it known to refuse without the bit?")
    rule.add_argument("--legacy", action="store_true", help="the driver uses the legacy interface")
    rule.add_argument("--hardware", action="store_true", help="a physical device")
    explain.add_argument("-j", "--json", action="store_true", help="JSON on standard output")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        options = parser().parse_args(argv)
        if options.command is None:
            parser().print_help()
            return exits.USAGE
        return _dispatch(options)
    except UsageError as error:
        return _complain(str(error), exits.USAGE)
    except NotPossibleError as error:
        return _complain(str(error), exits.NOT_POSSIBLE)
    except VirtiovaError as error:
        return _complain(str(error), exits.COULD_NOT_LOOK)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain about it again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.OK
    except OSError as error:
        return _complain(str(error), exits.COULD_NOT_LOOK)
    except KeyboardInterrupt:
        return _complain("interrupted", exits.INTERRUPTED)


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "probe":
        from virtiova.cli import probe

        return probe.run(options)
    if options.command == "matrix":
        from virtiova.cli import matrix

        return matrix.run(options)
    from virtiova.cli import explain

    return explain.run(options)


def _complain(message: str, status: int) -> int:
    print(f"virtiova: {message}", file=sys.stderr)
    return status


def _terminated(signum: int, _frame: object) -> None:
    """Ctrl-C and SIGTERM: end every machine first, so that nobody waits for one."""
    process = sys.modules.get("virtiova.machine.qemu.process")
    if process is not None:
        process.kill_all()
    signal.signal(signum, signal.SIG_DFL)
    raise KeyboardInterrupt


def entry() -> NoReturn:
    """The console script."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _terminated)
    try:
        status = main()
        sys.stdout.flush()
    except Exception:
        import traceback

        traceback.print_exc()
        status = _complain("internal error; please report the lines above", exits.INTERNAL)
    sys.exit(status)
