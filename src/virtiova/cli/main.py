# SPDX-License-Identifier: Apache-2.0
"""The entry point: the parser, exit codes, signals. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Final, NoReturn

from virtiova import __version__
from virtiova.cli import exits, hints, scan_options
from virtiova.cli.parsing import Parser
from virtiova.errors import NotPossibleError, UsageError, VirtiovaError

_EPILOG: Final = """\
exit status: 0 nothing found, 1 found, 2 usage, 3 could not look, 70 internal error,
77 not possible here, 129 hung up, 130 interrupted, 143 terminated
(0 for serve, which ends with these signals)
'virtiova help COMMAND' is 'virtiova COMMAND --help'.
"""
_ENDED: Final = {
    signal.SIGHUP: ("ended by SIGHUP", exits.HUNG_UP),
    signal.SIGINT: ("interrupted", exits.INTERRUPTED),
    signal.SIGTERM: ("ended by SIGTERM", exits.TERMINATED),
}


# What is asked of the program itself, not of the command that it is when none is named.
_COMMANDS_ANYWAY: Final = frozenset({"-h", "--help", "--version"})


def parser(*, bare: bool = False) -> Parser:
    """The whole command line, without importing any command. ``bare``: nothing was typed, so that a scan's options are
    all that is asked for."""
    top = Parser(
        prog="virtiova",
        description="Virtio devices behind IOMMUs: what is declared, what is predicted, what is observed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.top = True
    top.add_argument("--version", action="version", version=f"virtiova {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    scan_options.add(commands)
    if bare:
        return top
    from virtiova.cli import bench_options, fuzz_options, probe_options, run_options, serve_options

    scan_options.gather(commands)
    probe_options.add(commands)
    fuzz_options.add(commands)
    run_options.matrix(commands)
    run_options.guest(commands)
    serve_options.add(commands)
    bench_options.add(commands)
    run_options.explain(commands)
    return top


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
    return _dispatch(options)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse, with an eye on mistyped options: what follows one would be taken for something else."""
    top = parser(bare=not words)
    if not words or (words[0].startswith("-") and not _COMMANDS_ANYWAY & set(words) and not hints.named(top, words)):
        words = ["scan", *words]
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    known = sorted(name for name in top.names() if name.startswith("--"))
    ours, rest = _split(words)
    for word in ours:
        name = word.split("=")[0]
        if name.startswith("--") and len(name) > 2 and not any(option.startswith(name) for option in known):
            raise UsageError.unknown("option", name, known)
    hints.check_target(top, ours)
    options: argparse.Namespace = top.parse_args(ours)
    options.rest = rest
    return options


def _split(words: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """What follows ``--`` in a scan is somebody else's command line, and none of our options."""
    if words[:1] != ["scan"] or "--" not in words:
        return words, []
    at = list(words).index("--")
    return words[:at], list(words[at + 1 :])


def _mute() -> None:
    """Python flushes its output once more at the very end, and must not complain about it again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = None


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "scan":
        from virtiova.cli import scan

        return scan.run(options)
    if options.command == "gather":
        from virtiova.cli import gather

        return gather.run(options)
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
    if options.command == "fuzz":
        from virtiova.cli import fuzz

        return fuzz.run(options)
    if options.command == "bench":
        from virtiova.cli import bench

        return bench.run(options)
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
    signal.signal(signum, _once_more)
    _asked[signum] = time.monotonic()
    raise KeyboardInterrupt(signum)


_asked: Final[dict[int, float]] = {}
_AT_ONCE: Final = 0.5
"""Seconds: ``timeout`` signals its command, and then the group that the command is in. That is one wish."""


def _once_more(signum: int, _frame: object) -> None:
    """A second one ends us wherever we are, unless it is the first one's other half: we are busy tidying up."""
    if time.monotonic() - _asked.get(signum, 0.0) > _AT_ONCE:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


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
