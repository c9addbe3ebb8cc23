# SPDX-License-Identifier: Apache-2.0
"""The entry point: the parser, exit codes, signals. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn, TypeAlias

from virtiova import __version__
from virtiova.cli import exits, hints, serve_options
from virtiova.errors import NotPossibleError, UsageError, VirtiovaError

_EPILOG: Final = """\
exit status: 0 nothing found, 1 found, 2 usage, 3 could not look, 70 internal error,
77 not possible here, 129 hung up, 130 interrupted, 143 terminated
'virtiova help COMMAND' is 'virtiova COMMAND --help'.
"""
_ENDED: Final = {
    signal.SIGHUP: ("ended by SIGHUP", exits.HUNG_UP),
    signal.SIGINT: ("interrupted", exits.INTERRUPTED),
    signal.SIGTERM: ("ended by SIGTERM", exits.TERMINATED),
}
_seen: Final[set[str]] = set()
"""The options with one value that this command line has had so far, before and after the command's name."""


class _Once(argparse.Action):
    """An option with one value: given twice, one of the two would be lost without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        if self.dest in _seen:
            raise UsageError(f"{option_string} is given twice")
        _seen.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """An option or command that was mistyped is answered with the nearest one, like every other name."""

    top = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.top:
            _seen.clear()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        kind, _, rest = message.partition(": ")
        if kind == "unrecognized arguments":
            word = rest.split()[0]
            if word.split("=")[0] in self.names():
                raise UsageError(f"{word} does not belong here")
            raise UsageError.unknown("option", word, self.names())
        argument = kind.removeprefix("argument ")
        if "invalid choice" in rest:
            raise hints.choice(self, argument, rest)
        if match := re.fullmatch(r"invalid (int|float) value: (.*)", rest):
            raise UsageError(f"{argument} takes a number, not {match[2]}")
        raise UsageError(message.removeprefix("argument "))

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


def parser() -> _Parser:
    """The whole command line, without importing any command."""
    top = _Parser(
        prog="virtiova",
        description="Virtio devices behind IOMMUs: what is declared, what is predicted, what is observed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.top = True
    top.add_argument("--version", action="version", version=f"virtiova {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _probe(commands)
    _matrix(commands)
    _guest(commands)
    serve_options.add(commands.add_parser, _Once, _Parser)
    _explain(commands)
    return top


def _probe(commands: _Commands) -> None:
    probe = commands.add_parser(
        "probe",
        help="see on a real device where its bytes land",
        description="Drive a real device with two pages, one where the IOMMU points and one where the bare address "
        "points, and look at which of them it touched. Without a target: the default table.",
        epilog="Each target has options of its own, such as --device and --experiment: virtiova probe qemu --help",
    )
    _output(probe)
    probe.add_argument("--list", action="store_true", help="list machines, IOMMUs, devices, places and experiments")
    targets = probe.add_subparsers(dest="target", metavar="TARGET", parser_class=_Parser)
    qemu = targets.add_parser("qemu", help="a device of QEMU", description="Probe a device of QEMU.")
    qemu.add_argument(
        "--machine",
        action=_Once,
        default="q35",
        metavar="NAME",
        help="machine type: q35, virt, virt-mmio, sun4u, pseries, riscv-virt (default: %(default)s)",
    )
    qemu.add_argument(
        "--iommu",
        action=_Once,
        metavar="NAME",
        help="one that the machine can have (see probe --list), with [,option=value...] (default: the machine's own; "
        "q35: intel)",
    )
    qemu.add_argument(
        "--device",
        action="append",
        required=True,
        metavar="SPEC",
        help="as for QEMU: 'virtio-blk-pci,iommu_platform=on'; place=root-port, root-bus or bypass says where it goes. "
        "May be repeated: several devices in one machine",
    )
    qemu.add_argument(
        "--interface",
        action=_Once,
        default="auto",
        metavar="NAME",
        help="of a transitional device: auto, modern or legacy (default: %(default)s)",
    )
    qemu.add_argument(
        "--qemu",
        action=_Once,
        metavar="WHICH",
        help="another QEMU than this machine's: a directory with the binaries, or a suite of Debian to fetch it from",
    )
    qemu.add_argument("--offline", action="store_true", help="fetch no packages for --qemu")
    qemu.add_argument(
        "--backend",
        action=_Once,
        metavar="COMMAND",
        help="what serves a vhost-user-*-pci device: started for each cell; {socket} is where it is to listen, {image} "
        "the path of a disk image of ours, {net} the number of a datagram socket",
    )
    model = targets.add_parser(
        "model",
        help="a device of the in-process machine",
        description="Probe a device of the in-process machine.",
    )
    model.add_argument("behaviour", help="honest, quirky, lying or stale")
    model.add_argument(
        "--device", action=_Once, default="blk", metavar="KIND", help="blk, console, net or rng (default: %(default)s)"
    )
    model.add_argument(
        "--iommu", action=_Once, default="soft", metavar="NAME", help="soft or none (default: %(default)s)"
    )
    for target in (qemu, model, _vhost_user(targets)):
        target.add_argument(
            "--experiment",
            action="append",
            metavar="NAME",
            help="run this one only (may be repeated; default: all)",
        )
        _output(target, inherit=True)


def _vhost_user(targets: _Commands) -> _Parser:
    target = targets.add_parser(
        "vhost-user",
        help="a vhost-user back end",
        description="Probe a vhost-user back end: our own front end is the machine and the IOMMU.",
    )
    target.add_argument("socket", nargs="?", metavar="SOCKET", help="where a back end listens; one cell at a time")
    target.add_argument(
        "--spawn",
        action=_Once,
        metavar="COMMAND",
        help="start the back end for each cell instead: {socket} is where it is to listen, or {fd} the number of its "
        "connected socket; {image} is the path of a disk image of ours, {net} the number of a datagram socket",
    )
    target.add_argument(
        "--type",
        action=_Once,
        metavar="KIND",
        help="blk, console, net or rng (default: guessed, which the output says)",
    )
    target.add_argument(
        "--write", action="store_true", help="allow writes to its disk, in the upper half; they are put back"
    )
    target.add_argument(
        "--echo", action="store_true", help="its network sends back each frame that it is given (testpmd's io mode)"
    )
    return target


def _output(probe: argparse.ArgumentParser, *, inherit: bool = False) -> None:
    """Options of every probe. A sub-command's absent option must not undo what was said before it."""
    no = argparse.SUPPRESS if inherit else False
    probe.add_argument("-j", "--json", action="store_true", default=no, help="JSON on standard output")
    probe.add_argument(
        "-o",
        "--output",
        # A sub-command's list does not replace the one before it.
        dest="more_output" if inherit else "output",
        action="append",
        metavar="FILE",
        help="write FILE as well; its suffix, .json or .txt, is the format",
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
        metavar="WHICH",
        help="another QEMU besides this machine's: a directory that has the binaries, or whose usr/bin has, or a suite "
        "of Debian to fetch it from, such as bookworm-backports (may be repeated)",
    )
    matrix.add_argument("--full", action="store_true", help="every experiment, and every device type on every IOMMU")
    matrix.add_argument("--guests", action="store_true", help="boot real kernels as well (takes minutes)")
    matrix.add_argument("--offline", action="store_true", help="fetch no packages for --guests or --qemu")
    matrix.add_argument("--list", action="store_true", help="list the cells, and run nothing")
    matrix.add_argument(
        "--results",
        action=_Once,
        metavar="FILE",
        help="write every result to this JSON Lines file as it comes; a second run with it goes on",
    )
    matrix.add_argument(
        "--scheduler",
        action=_Once,
        metavar="ADDRESS",
        help="run the cells on the Dask cluster of this scheduler (virtiova[cluster])",
    )
    matrix.add_argument("-j", "--json", action="store_true", help="JSON on standard output")
    matrix.add_argument(
        "-o",
        "--output",
        action="append",
        metavar="FILE",
        help="write FILE as well; its suffix, .json, .html, .svg, .xml (JUnit) or .txt, is the format (may be "
        "repeated)",
    )
    matrix.add_argument("-q", "--quiet", action="store_true", help="no table; the exit status says it")
    _common(matrix)


def _common(command: argparse.ArgumentParser, *, inherit: bool = False) -> None:
    """Options of every command that runs cells."""
    command.add_argument(
        "--jobs",
        action=_Once,
        type=int,
        metavar="N",
        default=argparse.SUPPRESS if inherit else None,
        help="cells at a time (default: one a core)",
    )
    command.add_argument(
        "--fail-on",
        action=_Once,
        choices=("mismatch", "bypass", "unknown", "never"),
        default=argparse.SUPPRESS if inherit else "mismatch",
        help="what counts as found (default: mismatch)",
    )
    command.add_argument(
        "--color",
        action=_Once,
        choices=("auto", "always", "never"),
        default=argparse.SUPPRESS if inherit else "auto",
        help="default: auto; NO_COLOR is obeyed",
    )


def _guest(commands: _Commands) -> None:
    guest = commands.add_parser(
        "guest",
        help="boot a real kernel and see what its drivers do",
        description="Boot Debian's own kernels in an emulated processor, and see from inside and from outside what "
        "their virtio drivers do with bit 33. Kernels come from Debian's packages into the cache folder.",
    )
    verbs = guest.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser, required=True)
    verbs.add_parser("list", help="list the platforms, and what of them is in the cache")
    run = verbs.add_parser("run", help="boot platforms", description="Boot platforms, named as 'list' does, or 'all'.")
    run.add_argument("platforms", nargs="+", metavar="PLATFORM", help="a name from 'guest list', or all")
    run.add_argument(
        "--bit",
        action=_Once,
        choices=("on", "off", "both"),
        default="both",
        help="which disks are shown (default: %(default)s)",
    )
    run.add_argument("--offline", action="store_true", help="only what is in the cache; the rest is n/a")
    run.add_argument("--console", action="store_true", help="a shell on the guest's console; Ctrl-] ends it")
    run.add_argument(
        "--seconds", action=_Once, type=float, metavar="N", default=None, help="longest time for a boot (default: 150)"
    )
    run.add_argument(
        "--jobs", action=_Once, type=int, metavar="N", default=None, help="guests at a time (default: one a core)"
    )
    run.add_argument("-j", "--json", action="store_true", help="JSON on standard output")
    run.add_argument("-v", "--verbose", action="store_true", help="with the chain of reasons for each disk")


def _explain(commands: _Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="why: the rule for given facts, an experiment, a known departure, a word",
        description="Explain the rule for given facts ('rule', with the options below), an experiment, the id of a "
        "known departure, or a word of the glossary. Works offline.",
    )
    explain.add_argument(
        "what",
        nargs="?",
        help="rule, the name of an experiment, an id such as QEMU-BUS-MASTER, or a word of the glossary; without it, "
        "all that there is",
    )
    answers = ("yes", "no", "unknown")
    rule = explain.add_argument_group("facts, for 'rule'")
    rule.add_argument("--offered", action=_Once, choices=answers, help="does the device offer bit 33?")
    rule.add_argument("--accepted", action=_Once, choices=answers, help="does the driver take it?")
    rule.add_argument("--platform", action=_Once, metavar="NAME", help="what is in front (default: iommu)")
    rule.add_argument("--generation", action=_Once, metavar="NAME", help="before, patch, mainline or today")
    rule.add_argument("--insists", action=_Once, choices=answers, help="is it known to refuse without the bit?")
    rule.add_argument("--legacy", action="store_true", help="the driver uses the legacy interface")
    rule.add_argument("--hardware", action="store_true", help="a physical device")
    rule.add_argument("--payload", metavar="KIND", help="an address inside a request, such as page-number")
    explain.add_argument("-j", "--json", action="store_true", help="JSON on standard output (for 'rule')")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(words)
        finally:
            # Here, not at the very end, a full disk or a closed pipe can still be told from our own bug.
            sys.stdout.flush()
    except UsageError as error:
        return _complain(str(error), exits.USAGE)
    except NotPossibleError as error:
        return _complain(str(error), exits.NOT_POSSIBLE)
    except VirtiovaError as error:
        return _complain(str(error), exits.COULD_NOT_LOOK)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _mute()
        return exits.OK
    except OSError as error:
        _mute()
        return _complain(str(error), exits.COULD_NOT_LOOK)
    except KeyboardInterrupt as error:
        signum, *so_far = error.args or (signal.SIGINT,)
        word, code = _ENDED[signal.Signals(signum)]
        return _complain("".join([word, *so_far]), code)


def _run(words: Sequence[str]) -> int:
    options = _parse(words)
    options.typed = tuple(words)
    if options.command is None:
        parser().print_help()
        return exits.USAGE
    return _dispatch(options)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse, with an eye on mistyped options: what follows one would be taken for something else."""
    top = parser()
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    options = sorted(name for name in top.names() if name.startswith("--"))
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and len(name) > 2 and not any(option.startswith(name) for option in options):
            raise UsageError.unknown("option", name, options)
    hints.check_target(top, words)
    return top.parse_args(words)


def _mute() -> None:
    """Python flushes its output once more at the very end, and must not complain about it again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = None


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "probe":
        from virtiova.cli import probe

        return probe.run(options)
    if options.command == "matrix":
        from virtiova.cli import matrix

        return matrix.run(options)
    if options.command == "guest":
        from virtiova.cli import guest

        return guest.run(options)
    if options.command == "serve":
        from virtiova.cli import serve

        return serve.run(options)
    from virtiova.cli import explain

    return explain.run(options)


def _complain(message: str, status: int) -> int:
    print(f"virtiova: {message}", file=sys.stderr)
    return status


def _terminated(signum: int, _frame: object) -> None:
    """Ctrl-C and SIGTERM: end every machine first, so that nobody waits for one."""
    # A module that is only half imported when the signal comes has started nothing yet.
    kill_all = getattr(sys.modules.get("virtiova.machine.qemu.process"), "kill_all", None)
    if kill_all is not None:
        kill_all()
    signal.signal(signum, signal.SIG_DFL)
    raise KeyboardInterrupt(signum)


def entry() -> NoReturn:
    """The console script."""
    for signum in _ENDED:
        signal.signal(signum, _terminated)
    try:
        status = main()
    except Exception:
        import traceback

        traceback.print_exc()
        status = _complain("internal error; please report the lines above", exits.INTERNAL)
    sys.exit(status)
