# SPDX-License-Identifier: Apache-2.0
"""``virtiova probe``: choose the cells, run them, print them, and say by the exit status what was found."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Final

from virtiova.cli import exits
from virtiova.cli.outputs import opened
from virtiova.cli.progress import clear, on_terminal
from virtiova.cli.script import script
from virtiova.errors import UsageError
from virtiova.machine.backend import KINDS, BackEnd
from virtiova.machine.handed import Handed
from virtiova.machine.qemu import suites
from virtiova.machine.qemu.boards import BOARDS, find_board
from virtiova.machine.qemu.command import CONTROL_DEVICES, PLACES, devices
from virtiova.machine.qemu.installation import Installation
from virtiova.machine.vdpa.machine import VdpaDevice
from virtiova.machine.vfio.machine import VfioDevice
from virtiova.machine.vhost.machine import VHOST_FILES, VhostDevice
from virtiova.probe.edu import CONTROL_EXPERIMENT, CONTROL_TITLE
from virtiova.probe.experiment import EXPERIMENTS, SEVERAL
from virtiova.probe.plan import (
    BEHAVIOURS,
    MODEL_DEVICES,
    VHOST_USER,
    Runner,
    Task,
    all_experiments,
    backend_tasks,
    check,
    handed_tasks,
    qemu_or_model,
    usual_iommu,
    with_ring,
)
from virtiova.report import text
from virtiova.result import Cell, Path

_HANDED: Final = (VfioDevice, VhostDevice, VdpaDevice)
"""What the kernel hands over, by name of the machine; what it is shows when it is opened."""


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.list:
        if options.target is not None or options.json:
            raise UsageError("--list goes alone")
        print(listing())
        return exits.OK
    if options.jobs is not None and options.jobs < 1:
        raise UsageError("--jobs takes a number from 1 on")
    if options.target == "vhost-user" and (options.conformance or options.case):
        from virtiova.cli import conformance

        return conformance.run(options)
    named = [*(options.output or []), *(getattr(options, "more_output", None) or [])]
    outputs = [_format_of(name) for name in named]
    if options.target == "qemu" and options.iommu is None:
        options.iommu = usual_iommu(options.machine, backend=bool(options.backend))
    tasks, notice = _tasks(options)
    for task in tasks:
        check(task)
    installation = _installation(options) if options.target == "qemu" else Installation()
    tasks = [replace(task, qemu=installation.directory) for task in tasks]
    if options.script:
        print(script(options, outputs, installation.directory), end="")
        return exits.OK
    if options.target == "qemu":
        board = find_board(options.machine)
        installation.check(board, board.iommu(options.iommu))
    if notice:
        print(f"virtiova: {notice}; showing the in-process machine instead", file=sys.stderr)
    with opened(outputs) as files:
        cells = _collect(tasks, options)
        files.write(lambda kind: [rendered(kind, cells)])
    if not options.quiet:
        sys.stdout.write(
            _render(cells, options, [*_remarks(tasks, cells), *([_MODEL_ONLY.format(notice)] if notice else [])])
        )
    return status(cells, options.fail_on)


def _installation(options: argparse.Namespace) -> Installation:
    """The QEMU that was named, or the machine's own."""
    if options.qemu is None:
        return Installation()
    try:
        board = find_board(options.machine)
        return suites.named(options.qemu, [board], offline=options.offline, progress=on_terminal())
    finally:
        clear()


def status(cells: Iterable[Cell], fail_on: str) -> int:
    """0: nothing found; 1: found; 3: there is a cell without an answer, and nothing worse.

    Where only ``fail_on`` makes it 1 that is said on standard error: the table shows nothing that is wrong.
    """
    if fail_on == "never":
        return exits.OK
    also = {"mismatch": None, "bypass": Path.BYPASS, "unknown": Path.UNKNOWN}[fail_on]
    asked_for, wrong, silent = 0, 0, 0
    for cell in cells:
        asked_for += cell.observed is also
        wrong += cell.mismatch and cell.explained is None
        silent += cell.observed is Path.UNKNOWN
    if asked_for and not wrong:
        noun = "cell" if asked_for == 1 else "cells"
        print(
            f"virtiova: exit status 1: {asked_for} {noun} observed as {fail_on} (--fail-on {fail_on})", file=sys.stderr
        )
    if asked_for or wrong:
        return exits.FOUND
    return exits.COULD_NOT_LOOK if silent else exits.OK


def _tasks(options: argparse.Namespace) -> tuple[list[Task], str]:
    if options.target is None:
        return qemu_or_model()
    if options.target == "qemu":
        first, *others = [with_ring(device, options.ring) for device in options.device]
        names = options.experiment or all_experiments(*options.device)
        served = BackEnd(spawn=options.backend) if options.backend else None
        rest = (options.interface, "", served, tuple(others))
        return [Task(options.machine, options.iommu, first, name, *rest) for name in names], ""
    if options.target == "vhost-user":
        backend = BackEnd(
            options.socket or "", options.spawn or "", options.type or "", write=options.write, echo=options.echo
        )
        # Printing a script connects to nobody.
        return backend_tasks(backend, options.experiment, ring=options.ring, guess=not options.script), ""
    handed = _handed(options)
    if handed is not None:
        # Nor does it open anything.
        return handed_tasks(handed, options.experiment, ring=options.ring, look=not options.script), ""
    names = options.experiment or all_experiments(options.device)
    device = with_ring(f"{options.behaviour}:{options.device}", options.ring)
    return [Task("model", options.iommu, device, name) for name in names], ""


def _handed(options: argparse.Namespace) -> Handed | None:
    """What the kernel hands over, for the targets that are such devices."""
    if options.target == "vfio":
        return VfioDevice(options.address, options.write, options.echo, options.i_know)
    if options.target == "vhost":
        return VhostDevice(options.path)
    if options.target == "vdpa":
        return VdpaDevice(options.path, options.write, options.echo)
    return None


def _collect(tasks: Sequence[Task], options: argparse.Namespace) -> list[Cell]:
    show = sys.stderr.isatty() and not options.quiet
    cells: list[Cell] = []
    count = sum(len(task.devices) for task in tasks)
    for cell in Runner(jobs=options.jobs).run(tasks):
        cells.append(cell)
        if show:
            sys.stderr.write(f"\r{len(cells)}/{count} cells")
            sys.stderr.flush()
    if show:
        sys.stderr.write("\r\x1b[K")
    return cells


_MODEL_ONLY = "No real device was probed: {}."


def _remarks(tasks: Sequence[Task], cells: Sequence[Cell]) -> list[str]:
    """What else there is to say of a back end: what was guessed of it, and what was left alone."""
    backend = next((task.backend for task in tasks if task.backend is not None), None)
    if backend is None:
        return []
    said = []
    if backend.guess:
        said.append(f"That the device is of type {backend.kind} is a guess: {backend.guess}. --type says it.")
    elif any(cell.observed is Path.UNKNOWN for cell in cells):
        said.append(f"That the device is of type {backend.kind} is what --type says; without it the type is guessed.")
    if backend.kind == "blk" and not backend.write and not backend.owns("blk"):
        said.append("Nothing was written to its disk: experiments that would do so need --write.")
    return said


def _render(cells: Sequence[Cell], options: argparse.Namespace, remarks: Sequence[str]) -> str:
    if options.json:
        return rendered("json", cells)
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if terminal else None
    color = options.color == "always" or (options.color == "auto" and terminal and not os.environ.get("NO_COLOR"))
    parts = [text.table(cells, width=width, color=color), "", text.summary(cells)]
    if options.target is None:
        parts += ["", *text.in_words(cells)]
    parts += remarks
    if options.verbose:
        parts += ["", text.chains(cells)]
    return "\n".join(parts) + "\n"


def _format_of(name: str) -> tuple[str, str]:
    suffix = FilePath(name).suffix
    if suffix not in (".json", ".txt"):
        raise UsageError(f"{name}: the suffix picks the format, and must be .json or .txt")
    return name, suffix[1:]


def rendered(kind: str, cells: Sequence[Cell]) -> str:
    """The cells as a file ``.json`` or ``.txt`` has them."""
    if kind == "json":
        from virtiova.report import json

        return json.document(cells) + "\n"
    return text.table(cells) + "\n\n" + text.summary(cells) + "\n"


def listing() -> str:
    """What can be named on the command line."""
    rows = [
        ("machines", f"{', '.join((*BOARDS, 'model', VHOST_USER, *(each.machine for each in _HANDED)))}"),
        *(("IOMMUs", f"{', '.join(board.iommus)} ({name})") for name, board in BOARDS.items()),
        ("IOMMUs", "soft, none (model)"),
        ("IOMMUs", f"iotlb ({VHOST_USER})"),
        *(("IOMMUs", f"{each.iommu} ({each.machine})") for each in _HANDED),
        *(("devices", f"{', '.join(names)} ({', '.join(machines)})") for names, machines in _devices()),
        ("devices", f"{', '.join(MODEL_DEVICES)} (model)"),
        ("devices", f"{', '.join(VHOST_FILES)} ({VhostDevice.machine})"),
        ("types", f"{', '.join(sorted(KINDS))} ({VHOST_USER})"),
        ("places", f"{', '.join(PLACES)} ({', '.join(name for name, board in BOARDS.items() if board.has_places)})"),
        ("behaviours", f"{', '.join(BEHAVIOURS)} (model)"),
    ]
    lines = []
    for name, values in rows:
        first, indent = name.ljust(13), " " * 13
        lines += textwrap.wrap(values, 100, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    lines.append("experiments")
    width = max(len(name) for name in EXPERIMENTS | SEVERAL)
    lines += [f"  {e.id.ljust(width)}  {e.title}" for e in (EXPERIMENTS | SEVERAL).values()]
    lines.append(f"  {CONTROL_EXPERIMENT.ljust(width)}  {CONTROL_TITLE} ({' and '.join(CONTROL_DEVICES)} only)")
    return "\n".join(lines)


def _devices() -> list[tuple[list[str], list[str]]]:
    """Which devices can be tested, and on which machines: those that have the same are named together."""
    found: dict[frozenset[str], tuple[list[str], list[str]]] = {}
    for name, board in BOARDS.items():
        names = devices(board)
        found.setdefault(frozenset(names), (list(names), []))[1].append(name)
    return list(found.values())
