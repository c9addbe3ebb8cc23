# SPDX-License-Identifier: Apache-2.0
"""Boots platforms and says what each disk came to: declared, predicted, observed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Final

from virtiova.addr import AddressKind, hexaddr
from virtiova.collect.monitor import Monitor
from virtiova.errors import MachineError, NotPossibleError, ProtocolError, RefusedError
from virtiova.guest import judge
from virtiova.guest.boot import BOOT_SECONDS, READ_SIZE, Boot, Disk, assets
from virtiova.guest.facts import Console, Translations
from virtiova.guest.outside import Outside, look
from virtiova.guest.platforms import Platform
from virtiova.packages.store import Store
from virtiova.policy import RULES, Rules, departure, predict
from virtiova.result import Cell, Evidence, Path, path_order

EXPERIMENT: Final = "guest-driver"
ABOUT: Final = """\
guest-driver: what a real kernel's driver does with the bit

Boots one of Debian's kernels with two disks, one with bit 33 and one without. From outside: the addresses that the
devices were given, held against RAM and against what the emulated IOMMU translated. From inside: the bit, the IOMMU
group, the calls of the DMA API, and whether the right data were read. 'virtiova guest list' names the platforms.

rests on  Linux, vring_use_dma_api(); commit 1a937693993f (in v4.8)"""
_ADDRESSES: Final = frozenset({"desc", "avail", "used"})


def disks_for(bits: Sequence[bool]) -> tuple[Disk, ...]:
    """The disks that a guest is given to judge those with ``bits``.

    One with the bit is always there: beside one without, it is the control that shows whether the IOMMU translates
    at all. That both work in one machine is what the patch is per device for.
    """
    return (Disk(bit=True), *((Disk(bit=False),) if False in bits else ()))


def run(
    platform: Platform,
    bits: Sequence[bool] = (True, False),
    *,
    store: Store | None = None,
    seconds: float = BOOT_SECONDS,
    rules: Rules = RULES,
    stop: threading.Event | None = None,
) -> list[Cell]:
    """Boot a platform once and judge its disks, those with the bit on and off as ``bits`` says.

    With ``stop`` set it is given up. Whatever goes wrong is an outcome: what cannot be had is `n/a` with the reason,
    a guest that hangs or ends is `unknown` with its last console lines.
    """
    try:
        files = assets(platform, store or Store(), stop)
    except NotPossibleError as error:
        return [_without(platform, bit, Path.NOT_APPLICABLE, str(error), rules) for bit in bits]
    except (ProtocolError, OSError) as error:
        return [_without(platform, bit, Path.UNKNOWN, str(error), rules) for bit in bits]
    words: list[str] = []
    try:
        with Boot(platform, files, disks_for(bits)) as boot:
            try:
                if not boot.run(seconds, stop):
                    raise MachineError(f"the guest did not say all within {seconds:.0f} s")
                cells = judge_boot(boot, look_at(boot), rules)
            except (MachineError, ProtocolError):
                words = boot.words()
                raise
    except RefusedError as error:
        return [_without(platform, bit, Path.UNKNOWN, str(error), rules, words) for bit in bits]
    except NotPossibleError as error:
        return [_without(platform, bit, Path.NOT_APPLICABLE, str(error), rules) for bit in bits]
    except (MachineError, ProtocolError, OSError) as error:
        return [_without(platform, bit, Path.UNKNOWN, str(error), rules, words) for bit in bits]
    return [cells[bit] for bit in bits]


def run_all(
    platforms: Sequence[Platform],
    bits: Sequence[bool] = (True, False),
    *,
    store: Store | None = None,
    seconds: float = BOOT_SECONDS,
    jobs: int | None = None,
    rules: Rules = RULES,
    stop: threading.Event | None = None,
) -> Iterator[Cell]:
    """`run` for several, side by side; the cells in the order of the platforms, as they become ready."""
    shared = store or Store()
    stop = stop or threading.Event()
    pool = ThreadPoolExecutor(jobs or os.cpu_count() or 1, thread_name_prefix="virtiova-guest")
    try:
        futures = [pool.submit(run, p, bits, store=shared, seconds=seconds, rules=rules, stop=stop) for p in platforms]
        for future in futures:
            yield from future.result()
    finally:
        # Nothing to stop if all came to their end; whoever does not want the rest does not wait for it either.
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def look_at(boot: Boot) -> dict[Disk, Outside]:
    """What QEMU says of the disks of a guest that has said all. Once a boot: it hangs up QEMU's monitor."""
    boot.drain()
    return look_with(boot.monitor, boot.disks, boot.translations, pci=boot.platform.bus == "pci")


def look_with(
    line: socket.socket, disks: Sequence[Disk], translations: Translations, *, pci: bool = True
) -> dict[Disk, Outside]:
    """The same over a line to QEMU's monitor, which is hung up."""
    with Monitor(line) as monitor:
        return {disk: look(monitor, disk.name, translations, pci=pci) for disk in disks}


def judge_boot(boot: Boot, looked: Mapping[Disk, Outside], rules: Rules = RULES) -> dict[bool, Cell]:
    """A cell for each disk, by whether it has the bit."""
    return judge_disks(boot.platform, boot.console, looked, rules)


def judge_disks(
    platform: Platform, console: Console, looked: Mapping[Disk, Outside], rules: Rules = RULES
) -> dict[bool, Cell]:
    """The same of any guest's disks."""
    inside = console.inside
    cells: dict[bool, Cell] = {}
    control: Path | None = None
    for disk, outside in looked.items():
        said = inside.disks.get(disk.name, {})
        expected = sha256(disk.content()[:READ_SIZE]).hexdigest()
        seen = judge.Seen(
            inside=inside,
            disk=said,
            outside=outside,
            data_right=said.get("sha256") == expected,
            has_iommu=platform.iommu != "none",
            control=control,
            traced=bool(platform.trace),
        )
        cells[disk.bit] = _cell(platform, console, seen, rules)
        # The first disk is the one with the bit (`disks_for`).
        control = control or cells[disk.bit].observed
    return cells


def _cell(platform: Platform, console: Console, seen: judge.Seen, rules: Rules) -> Cell:
    outside = seen.outside
    facts = platform.facts(offered=outside.offered, accepted=outside.accepted)
    prediction = predict(facts, rules)
    kind, observed = judge.address_kind(seen), judge.path(seen)
    disagreements = judge.disagreements(seen, prediction, kind, platform.group)
    values = {key: value for key, value in seen.inside.values.items() if key not in ("begin", "end")}
    evidence = Evidence(
        x=outside.desc,
        transfer="write",
        features_ok=outside.features_ok,
        control="machine" if not seen.has_iommu else "none" if seen.control is None else "neighbour",
        live="the guest read what is on the disk" if seen.data_right else "",
        note="" if observed is not Path.UNKNOWN else judge.sentence(seen, kind),
        words=console.last_lines() if observed is Path.UNKNOWN else [],
        inside={"platform": platform.name} | values | seen.disk,
        outside={"seen": judge.sentence(seen, kind)} | _outside_words(outside),
    )
    cell = Cell(
        machine=platform.machine,
        iommu=platform.iommu,
        device=platform.device,
        experiment=EXPERIMENT,
        offered=outside.offered,
        accepted=outside.accepted,
        address=kind,
        predicted=path_order(prediction.paths),
        observed=observed,
        explained=None,
        evidence=evidence,
        reasons=list(prediction.reasons),
        disagreements=disagreements,
    )
    if cell.mismatch:
        cell = replace(cell, explained=departure("QEMU", facts, observed))
    return cell


def _outside_words(outside: Outside) -> dict[str, str]:
    words = {}
    for key, value in asdict(outside).items():
        if isinstance(value, bool):
            words[key] = "yes" if value else "no"
        else:
            words[key] = hexaddr(value) if key in _ADDRESSES else str(value)
    return words


def _without(
    platform: Platform,
    bit: bool,
    observed: Path,
    note: str,
    rules: Rules,
    words: Sequence[str] = (),
) -> Cell:
    """The cell of a guest that was not seen."""
    prediction = predict(platform.facts(offered=bit, accepted=None), rules)
    applicable = observed is not Path.NOT_APPLICABLE
    return Cell(
        machine=platform.machine,
        iommu=platform.iommu,
        device=platform.device,
        experiment=EXPERIMENT,
        offered=None,
        accepted=None,
        address=AddressKind.UNKNOWN,
        predicted=path_order(prediction.paths) if applicable else [],
        observed=observed,
        explained=None,
        evidence=Evidence(note=note, words=list(words), inside={"platform": platform.name}),
        reasons=list(prediction.reasons) if applicable else [],
    )
