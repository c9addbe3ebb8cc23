# SPDX-License-Identifier: Apache-2.0
"""Conformance cases: a line a case for people, JSON and JUnit for machines."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from virtiova.report.junit import attribute, body
from virtiova.report.words import plain
from virtiova.result import SCHEMA, CaseResult, Verdict

_COLORS: Final = {Verdict.PASS: "\x1b[32m", Verdict.FAIL: "\x1b[31m", Verdict.UNKNOWN: "\x1b[33m"}
_DIM, _OFF = "\x1b[2m", "\x1b[0m"
_INDENT: Final = " " * 9
_QUOTED: Final = 3


def lines(
    results: Sequence[CaseResult], *, width: int | None = None, color: bool = False, verbose: bool = False
) -> Iterator[str]:
    """A line a case: result, id, title, what was seen, and the sentence it rests on. With a ``width`` what was seen
    goes on below, and the sentence is shown where it matters; ``verbose``: everywhere, with what the back end said."""
    longest = max((len(each.case) for each in results), default=0)
    for each in results:
        result = each.result.upper() if each.result is Verdict.FAIL else each.result.value
        head = f"{result:7}  {each.case:{longest}}  {each.title}"
        seen = "; or: ".join([plain(each.evidence.seen), *each.evidence.readings])
        if width is None:
            yield f"{head}: {seen} [{each.citation}]"
        else:
            yield from _paint(head, each.result, color=color)
            notable = each.result is not Verdict.PASS
            for text in (seen, f"[{each.citation}]" if notable or verbose else ""):
                yield from textwrap.wrap(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT)
        if verbose or (width is not None and each.result is Verdict.FAIL):
            said = each.evidence.words if verbose else each.evidence.words[-_QUOTED:]
            yield from (f"{_INDENT}said: {plain(word)}" for word in said)
        if verbose:
            yield from (f"{_INDENT}asked: {word}" for word in each.evidence.asked)


def _paint(line: str, result: Verdict, *, color: bool) -> Iterator[str]:
    yield f"{_COLORS.get(result, _DIM)}{line}{_OFF}" if color else line


def summary(results: Sequence[CaseResult]) -> str:
    """One line: how many cases, and how many of each result."""
    count = Counter(each.result for each in results)
    noun = "case" if len(results) == 1 else "cases"
    said = ", ".join(f"{count[verdict]} {verdict}" for verdict in Verdict if count[verdict])
    return f"{len(results)} {noun}: {said or 'none'}"


def in_words(results: Sequence[CaseResult]) -> Iterator[str]:
    """What a reader wants to know first: whether it honours the IOMMU, as far as that was asked."""
    by_case = {each.case: each for each in results}
    offered, translated = by_case.get("bit33-offered"), by_case.get("translate")
    if translated is not None and translated.result is Verdict.FAIL:
        yield "It takes bit 33, and its bytes do not go where the IOMMU's mappings lead."
    elif translated is not None and translated.result is Verdict.PASS:
        fails = sum(each.result is Verdict.FAIL for each in results)
        rest = f", and fails {fails} of the cases" if fails else ""
        yield f"With bit 33 its bytes go where the IOMMU's mappings lead{rest}."
    elif offered is not None and offered.evidence.readings:
        yield "It does not offer bit 33: what is asked about the IOMMU does not apply to it."
    if unasked := sum(each.unanswered for each in results):
        yield f"{unasked} of the cases could not be asked: nothing is known of these."


def document(results: Sequence[CaseResult]) -> str:
    """The probe's schema, one element of ``cells`` a case."""
    return msgspec.json.format(msgspec.json.encode({"schema": SCHEMA, "cells": objects(results)}), indent=2).decode()


def objects(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """Cases as elements of ``cells``."""
    return [msgspec.to_builtins(each) for each in results]


def junit(results: Sequence[CaseResult]) -> Iterator[str]:
    """The cases as JUnit XML: a failed one is a failure; one that could not be asked an error; one that two readings
    allow, and one that does not apply, is skipped with the reason."""
    count = Counter(each.result for each in results)
    errors = sum(each.unanswered for each in results)
    skipped = count[Verdict.UNKNOWN] + count[Verdict.NOT_APPLICABLE] - errors
    totals = f'tests="{len(results)}" failures="{count[Verdict.FAIL]}" errors="{errors}" skipped="{skipped}"'
    yield '<?xml version="1.0" encoding="UTF-8"?>\n'
    yield f'<testsuites name="virtiova conformance" {totals}>\n'
    yield f'  <testsuite name="virtiova conformance" {totals}>\n'
    for each in results:
        where = f"{each.machine}.{each.device}"
        yield f"    <testcase classname={attribute(where)} name={attribute(each.case)}>"
        said = f"{each.title}: {'; or: '.join([each.evidence.seen, *each.evidence.readings])} [{each.citation}]"
        if each.result is Verdict.FAIL:
            text = body("\n".join([said, *each.evidence.words]))
            yield f"<failure message={attribute(each.evidence.seen)}>{text}</failure>"
        elif each.result is Verdict.PASS:
            yield f"<system-out>{body(said)}</system-out>"
        elif each.unanswered:
            yield f"<error message={attribute(said)}/>"
        else:
            yield f"<skipped message={attribute(f'{each.result}: {said}')}/>"
        yield "</testcase>\n"
    yield "  </testsuite>\n</testsuites>\n"
