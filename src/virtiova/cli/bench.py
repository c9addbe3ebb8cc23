# SPDX-License-Identifier: Apache-2.0
"""``virtiova bench``: rounds of measuring, and a table, JSON or a picture of what came of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Final

from virtiova.bench import plan
from virtiova.bench.guest import GuestRun
from virtiova.bench.iotlb import IotlbRun
from virtiova.bench.memory import PAGE
from virtiova.bench.rows import Document
from virtiova.bench.run import How, Run
from virtiova.cli import exits
from virtiova.cli.outputs import opened
from virtiova.cli.serve import parse_size
from virtiova.errors import UsageError

_ROUNDS: Final = 9
_SECONDS: Final = 0.2
_QUICK: Final = How(3, 0.1)
_GUEST_SECONDS: Final = 1.5
_QUICK_GUEST: Final = How(2, 1.0)
_MOST: Final = 65536
"""Mappings: as many as a back end of ours keeps, and more than DPDK's."""
_LARGEST: Final = 1 << 30
_READERS: Final = 64
"""In the guest: each is a process."""
_LARGEST_RUN: Final = 64 << 20
_KINDS: Final = {"json": "json", "txt": "text"}


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.kind == "draw":
        return _draw_again(options.run, options.plot)
    how = _how(options)
    outputs = [(name, _kind(name)) for name in options.output or []]
    if options.plot is not None:
        from virtiova.bench.plot import check

        check(options.plot)
    say = _say if sys.stderr.isatty() and not options.quiet else _silent
    if options.kind == "iotlb":
        _numbers("--mappings", options.mappings, 0, _MOST)
        iotlb = IotlbRun(how, say, resident=options.mappings or (), quick=options.quick, subjects=options.only)
        work, listed = iotlb.document, iotlb.listed
    elif options.kind == "guest":
        _numbers("--depth", options.depth, 1, _READERS)
        guest = GuestRun(how, say, depths=options.depth or (), subjects=options.only)
        work, listed = guest.document, guest.listed
    elif options.kind == "vfio":
        from virtiova.bench.vfio import VfioRun

        mapped = VfioRun(options.address, how, say, quick=options.quick, subjects=options.only)
        work, listed = mapped.document, mapped.listed
    else:
        requests = Run(_wanted(options), how, say)
        work, listed = requests.document, requests.listed
    if options.list:
        print(*listed(), sep="\n")
        return exits.OK
    with opened(outputs) as files:
        document = work()
        say("")
        files.write(lambda kind: _pieces(document, kind))
        if options.plot is not None:
            _draw(document, options.plot)
    sys.stdout.writelines(_pieces(document, "json" if options.json else "text"))
    ours = [row for row in document.rows if row.subject.startswith("virtiova")]
    return exits.OK if all(row.samples or row.note.startswith("n/a") or row.unit == "x" for row in ours) else 3


def _how(options: argparse.Namespace) -> How:
    guest = options.kind == "guest"
    quick, usual = (_QUICK_GUEST, _GUEST_SECONDS) if guest else (_QUICK, _SECONDS)
    rounds = options.rounds if options.rounds is not None else quick.rounds if options.quick else _ROUNDS
    seconds = options.seconds if options.seconds is not None else quick.seconds if options.quick else usual
    if not 1 <= rounds <= 1000:
        raise UsageError(f"--rounds {rounds}, wanted 1 to 1000")
    if not 0.02 <= seconds <= 60:
        raise UsageError(f"--seconds {seconds:g}, wanted 0.02 to 60")
    return How(rounds, seconds, options.realtime)


def _wanted(options: argparse.Namespace) -> plan.Wanted:
    _numbers("--depth", options.depth, 1, plan.DEEPEST[options.kind])
    _numbers("--mappings", options.mappings, 1, _MOST)
    return plan.Wanted(
        options.kind,
        sorted(set(options.depth or (plan.QUICK_DEPTHS if options.quick else plan.DEPTHS))),
        sorted(set(options.mappings or (plan.QUICK_MAPPINGS if options.quick else plan.MAPPINGS))),
        (False, True) if options.bit == "both" else (options.bit == "on",),
        plan.FRONTS if options.front == "both" else (options.front,),
        options.only,
        _image(options),
        plan.RINGS if options.ring == "both" else (options.ring,),
    )


def _image(options: argparse.Namespace) -> int:
    """Pages of the image."""
    if options.kind != "blk":
        return plan.IMAGE
    size = parse_size(options.image)
    if size % PAGE or size > _LARGEST:
        raise UsageError(f"--image {options.image}, wanted pages of 4 KiB, at most {_LARGEST >> 20}M")
    return size // PAGE


def _numbers(option: str, values: Iterable[int] | None, least: int, most: int) -> None:
    for value in values or ():
        if not least <= value <= most:
            raise UsageError(f"{option} {value}, wanted {least} to {most}")


def _kind(name: str) -> str:
    kind = _KINDS.get(name.rpartition(".")[2])
    if kind is None:
        raise UsageError(f"{name}: wanted a name that ends in .json or .txt")
    return kind


def _pieces(document: Document, kind: str) -> Iterable[str]:
    if kind == "json":
        from virtiova.bench.document import encode

        return [encode(document), "\n"]
    from virtiova.bench.table import text

    return (f"{line}\n" for line in text(document))


def _draw_again(run: str, name: str) -> int:
    """A picture of a run that was written before."""
    import msgspec

    from virtiova.bench.document import decode, rows
    from virtiova.bench.plot import check

    check(name)
    try:
        with open(run, "rb") as file:
            data = file.read(_LARGEST_RUN + 1)
    except OSError as error:
        raise UsageError(f"{run}: cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_RUN:
        raise UsageError(f"{run}: more than {_LARGEST_RUN >> 20} MiB, which no run has")
    try:
        made = decode(data)
    except msgspec.DecodeError as error:
        raise UsageError(f"{run}: not a run of virtiova bench: {error}") from error
    if not any(result.median is not None and result.setting.pages for result in made.results):
        raise UsageError(f"{run}: it has no figures of blk or net")
    _draw(Document(rows(made), made.about, made.against), name)
    return exits.OK


def _draw(document: Document, name: str) -> None:
    from virtiova.bench.plot import picture

    made = picture(document, name.rpartition(".")[2])
    beside = f"{name}.part"
    try:
        with open(beside, "wb") as file:
            file.write(made)
        os.replace(beside, name)
    except OSError as error:
        raise UsageError(f"{name}: cannot be written: {error.strerror}") from error


def _say(what: str) -> None:
    sys.stderr.write(f"\r\x1b[K{what}")
    sys.stderr.flush()


def _silent(_: str) -> None:
    pass
