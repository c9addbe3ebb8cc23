# SPDX-License-Identifier: Apache-2.0
"""Machines by hand, for the tests of rules: facts by the names of their keys, and logs through their collector."""

from __future__ import annotations

import importlib.util
import inspect
from ast import (
    AST,
    Call,
    Constant,
    If,
    IfExp,
    NodeTransformer,
    Not,
    Tuple,
    UnaryOp,
    expr,
    fix_missing_locations,
    parse,
    walk,
)
from ast import BoolOp as Both
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from virtiova.collect import facts as collected
from virtiova.collect import logs
from virtiova.collect.facts import Certainty, Device, Facts, View, ViewKind
from virtiova.result.scan import Place, Scan
from virtiova.scan.engine import scan_view
from virtiova.scan.rule import Rule

PLACE = Place("sysfs", "/sys/x")


def put(facts: Facts, certainty: Certainty = Certainty.SEEN, /, **values: object) -> None:
    """``values`` by the names of their keys, with ``_`` for ``-``."""
    known = collected.keys()
    for name, value in values.items():
        facts.put(known[name.replace("_", "-")], value, PLACE, certainty)


def device(name: str = "virtio0", /, **values: Any) -> Device:
    """A PCI device with these facts."""
    made = Device(name)
    put(made.facts, **{"type": "blk", "transport": "pci", "address": "0000:00:03.0", **values})
    return made


def machine(*devices: Device, log: str = "", kind: ViewKind = ViewKind.HOST, **values: Any) -> View:
    """A machine with these devices and facts, and with what is in a log."""
    view = View(kind, "vm", "vm", devices=list(devices))
    put(view.machine, **values)
    if log:
        told = logs.collect(log.encode(), "x.log")
        view.log = told.log
        view.machine.take(told.machine)
    return view


@dataclass(frozen=True)
class Case:
    """A machine, and all that is said of it: ids with the device's name, an open one with ``?``: ``VA203? d0``."""

    name: str
    view: View
    said: set[str] = field(default_factory=set)


def said(scan: Scan) -> set[str]:
    """What a scan says, in the words of `Case.said`."""
    return {f"{each.id} {each.device}".strip() for each in scan.findings} | {
        f"{each.id}? {each.device}".strip() for each in scan.undecided
    }


def of(view: View, rules: Sequence[Rule], ids: frozenset[str]) -> set[str]:
    """What these rules say of a machine, of those with one of ``ids``."""
    return {words for words in said(scan_view(view, rules)) if words[:5] in ids}


# -- mutants of conditions


def _conditions(node: AST) -> int:
    """How many parts an ``and`` or ``or`` has; none if its last is a default: ``or ""``, ``or ()``."""
    if not isinstance(node, Both) or isinstance(node.values[-1], Constant | Tuple | Call):
        return 0
    return len(node.values)


class _Invert(NodeTransformer):
    """Inverts the condition that is the ``number``-th, or leaves out one half of an ``and`` or ``or``."""

    def __init__(self, number: int) -> None:
        self.number, self.what = number, ""
        self._seen = 0

    def _turn(self, node: expr) -> expr:
        self._seen += 1
        if self._seen - 1 != self.number:
            return node
        self.what = f"line {node.lineno}"
        return UnaryOp(Not(), node)

    def visit_If(self, node: If) -> AST:
        self.generic_visit(node)
        node.test = self._turn(node.test)
        return node

    def visit_IfExp(self, node: IfExp) -> AST:
        self.generic_visit(node)
        node.test = self._turn(node.test)
        return node

    def visit_BoolOp(self, node: Both) -> AST:
        self.generic_visit(node)
        if not _conditions(node):
            return node
        for index in range(len(node.values)):
            if self._seen == self.number:
                self.what = f"line {node.lineno}, without part {index + 1}"
                node.values = [each for at, each in enumerate(node.values) if at != index]
            self._seen += 1
        return node.values[0] if len(node.values) == 1 else node


def conditions(module: ModuleType) -> int:
    """How many mutants a module has."""
    count = 0
    for node in walk(parse(inspect.getsource(module))):
        count += 1 if isinstance(node, If | IfExp) else _conditions(node)
    return count


def mutants(module: ModuleType) -> Iterator[tuple[str, ModuleType]]:
    """The module with one condition inverted, or with a part of one left out, each in turn."""
    source, spec = inspect.getsource(module), module.__spec__
    assert spec is not None
    for number in range(conditions(module)):
        turn = _Invert(number)
        tree = fix_missing_locations(turn.visit(parse(source)))
        made = importlib.util.module_from_spec(spec)
        exec(compile(tree, spec.origin or "", "exec"), made.__dict__)
        yield turn.what, made


__all__ = ["Case", "conditions", "device", "machine", "mutants", "of", "put", "said"]
