# SPDX-License-Identifier: Apache-2.0
"""``virtiova guest``: list the platforms, boot them, or sit down at one's console."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Final

from virtiova.cli import exits
from virtiova.cli.progress import on_terminal
from virtiova.errors import MachineError, NotPossibleError, UsageError
from virtiova.guest.boot import BOOT_SECONDS, Boot, assets, emulator_wanted
from virtiova.guest.facts import MARK
from virtiova.guest.platforms import PLATFORMS, Platform, find
from virtiova.guest.run import disks_for, run_all
from virtiova.packages.store import Store
from virtiova.report import text
from virtiova.result import Cell, Path

_BITS: Final = {"on": (True,), "off": (False,), "both": (True, False)}
_ESCAPE: Final = b"\x1d"
_HELD: Final = 1 << 16
"""Bytes that are kept of what is typed before the guest listens."""
_SAID: Final = 64


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.verb == "list":
        print(listing(Store(offline=True)))
        return exits.OK
    if options.jobs is not None and options.jobs < 1:
        raise UsageError("--jobs takes a number from 1 on")
    seconds = BOOT_SECONDS if options.seconds is None else options.seconds
    if not 0 < seconds < 1e6:
        raise UsageError("--seconds takes a number above 0")
    platforms = chosen(options.platforms)
    store = Store(offline=options.offline, progress=on_terminal())
    if options.console:
        if len(platforms) != 1:
            raise UsageError("--console takes one platform")
        return console(platforms[0], store, _BITS[options.bit])
    found = run_all(platforms, _BITS[options.bit], store=store, seconds=seconds, jobs=options.jobs)
    cells = _collect(found, len(platforms) * len(_BITS[options.bit]))
    if options.json:
        from virtiova.report import json

        print(json.document(cells))
    else:
        print(_table(cells, options))
    return status(cells)


def status(cells: list[Cell]) -> int:
    """1: something was not as predicted; 3: there is a cell without an answer; 77: none could be had at all."""
    if any(cell.mismatch and cell.explained is None for cell in cells):
        return exits.FOUND
    if any(cell.observed is Path.UNKNOWN for cell in cells):
        return exits.COULD_NOT_LOOK
    return exits.NOT_POSSIBLE if all(cell.observed is Path.NOT_APPLICABLE for cell in cells) else exits.OK


def chosen(names: list[str]) -> list[Platform]:
    """The rows of those names, each once."""
    if "all" in names:
        return list(PLATFORMS.values())
    return [find(name) for name in dict.fromkeys(names)]


def listing(store: Store) -> str:
    """The platforms, and what of them is there already."""
    rows = [("PLATFORM", "MACHINE", "IOMMU", "IN THE CACHE", "WHAT IT IS")]
    for platform in PLATFORMS.values():
        wanted = list(platform.wanted())
        if shutil.which(platform.emulator.binary) is None:
            wanted.append(emulator_wanted(platform.emulator))
        missing = [w.package for w in wanted if not store.has(w)]
        there = "yes" if not missing else f"no: {missing[0]}" + (" ..." if missing[1:] else "")
        rows.append((platform.name, platform.machine, platform.iommu, there, platform.title))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def _collect(found: Iterator[Cell], total: int) -> list[Cell]:
    """All cells, with their number on a terminal while they come."""
    cells = []
    show = sys.stderr.isatty()
    for cell in found:
        cells.append(cell)
        if show:
            sys.stderr.write(f"\r\x1b[K{len(cells)}/{total} disks")
            sys.stderr.flush()
    if show:
        sys.stderr.write("\r\x1b[K")
    return cells


def _table(cells: list[Cell], options: argparse.Namespace) -> str:
    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else None
    parts = [text.table(cells, width=width), "", text.summary(cells)]
    for cell in cells:
        if cell.observed is Path.UNKNOWN and cell.evidence.words:
            parts += ["", f"{cell.evidence.inside['platform']}: the last lines of the console"]
            parts += [f"  {line}" for line in cell.evidence.words]
    if options.verbose:
        parts += ["", text.chains(cells)]
    return "\n".join(parts)


def console(platform: Platform, store: Store, bits: tuple[bool, ...]) -> int:
    """Boot for a person: what is typed goes to the guest, until it powers off or Ctrl-] is typed."""
    files = assets(platform, store)
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}{platform.title}: booting; Ctrl-] ends it", file=sys.stderr)
    with Boot(platform, files, disks_for(bits), shell=True) as boot, _RawTerminal():
        _pump(boot)
    return exits.OK


def _pump(boot: Boot) -> None:
    import select

    tty, typed = boot.tty, sys.stdin.fileno()
    said, held = b"", b""
    awake = ended = False
    while True:
        boot.drain()
        listening = [tty.fileno()] if ended or len(held) >= _HELD else [tty.fileno(), typed]
        ready, _, _ = select.select(listening, [], [], 0.2)
        if tty.fileno() in ready:
            data = tty.recv(4096)
            if not data:
                return
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            # What comes before the guest has opened its console is lost, or loses its beginning.
            said = (said + data)[-_SAID:]
            awake = awake or MARK.encode() in said
        if typed in ready:
            keys = os.read(typed, 1024)
            before, escape, _ = keys.partition(_ESCAPE)
            held += before
            if escape:
                return
            # The end of a script that was piped in: the guest may go on to its own end.
            ended = not keys
        if awake and held:
            try:
                tty.sendall(held)
            except OSError as error:
                raise MachineError(f"the guest is gone: {error.strerror}") from error
            held = b""


class _RawTerminal:
    """The terminal without echo and line editing, as the guest does both; put back at the end."""

    def __enter__(self) -> None:
        self._saved: list[object] | None = None
        if not sys.stdin.isatty():
            return
        import termios
        import tty

        try:
            self._saved = list(termios.tcgetattr(sys.stdin.fileno()))
            tty.setraw(sys.stdin.fileno())
        except termios.error as error:
            raise NotPossibleError(f"this terminal cannot be used as a console: {error}") from error

    def __exit__(self, *_: object) -> None:
        if self._saved is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]
