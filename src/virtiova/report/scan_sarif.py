# SPDX-License-Identifier: Apache-2.0
"""A scan as SARIF 2.1.0: findings at the line of the file that they were read in, which code-scanning pages show.

What was read of a running system is in no file of a repository: such a finding is shown at the first line of what was
scanned, as the user named it. What could not be decided or read are notifications: they are nothing to mend.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Protocol
from urllib.parse import quote

from virtiova.report.sarif import log
from virtiova.report.scan_words import Part, parts, settles
from virtiova.report.words import plain
from virtiova.result.scan import Place, Scan, ScanFinding, Severity
from virtiova.spec import Citation

FILES: Final = frozenset({"libvirt", "command line", "log"})
"""Sources whose places are lines of files that the user named."""
_RANKS: Final = {Severity.ERROR: 90.0, Severity.WARNING: 60.0, Severity.NOTE: 20.0}


class RuleText(Protocol):
    """What is known of a rule, whether it applies or not."""

    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def severity(self) -> Severity: ...
    @property
    def why(self) -> str: ...
    @property
    def fix(self) -> dict[str, str]: ...
    @property
    def citation(self) -> Citation: ...


def document(scan: Scan, rules: Sequence[RuleText], *, version: str, folder: str) -> str:
    """One run. ``rules`` are all that there are. ``folder``: what the names of files are to be relative to."""
    by_machine = parts(scan)
    numbers = {rule.id: number for number, rule in enumerate(rules)}
    results = [_result(part, each, numbers, folder) for part in by_machine for each in part.findings]
    said = [_notification(*each) for part in by_machine for each in _notifications(part)]
    invocation = {"executionSuccessful": True, "toolExecutionNotifications": said}
    return log(version, [_rule(rule) for rule in rules], results, invocations=[invocation]) + "\n"


class _Names(dict[str, str]):
    """What is filled in for a device stands for any device: ``{device}`` is said ``DEVICE``."""

    def __missing__(self, key: str) -> str:
        return key.upper()


def _rule(rule: RuleText) -> dict[str, Any]:
    fix = {product: words.format_map(_Names()) for product, words in rule.fix.items()}
    # In code nothing is markup: a fix may be an element of XML.
    fixes = [f"**{product}**: `{words}`" for product, words in fix.items()]
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": f"{rule.title} ({rule.citation})"},
        "defaultConfiguration": {"level": rule.severity.value, "rank": _RANKS[rule.severity]},
        "help": {
            "text": "\n\n".join([rule.why, *_fixes(fix)]),
            "markdown": "\n\n".join([rule.why, "### What to change", *fixes, f"Source: {rule.citation}"]),
        },
        "properties": {"tags": ["virtio", "iommu"]},
    }


def _fixes(fix: dict[str, str]) -> list[str]:
    return [f"Fix, {product}: {words}" for product, words in fix.items()]


def _result(part: Part, each: ScanFinding, numbers: dict[str, int], folder: str) -> dict[str, Any]:
    about = f"{each.device}: " if each.device else ""
    seen = "; ".join(map(str, each.seen))
    said = [f"{about}{each.title}", *([f"Seen: {seen}"] if seen else []), *_fixes(each.fix)]
    shown = [seen for seen in each.seen if in_file(seen.place)]
    first = shown[0].place if shown else None
    made: dict[str, Any] = {
        "ruleId": each.id,
        "kind": "fail",
        "level": each.severity.value,
        "message": {"text": _paragraphs(said)},
        "locations": [{**_at(first, part, folder), "logicalLocations": [_logical(part, each.device)]}],
        "relatedLocations": [
            {"id": number, **_at(seen.place, part, folder), "message": {"text": plain(seen.text)}}
            for number, seen in enumerate(shown[1:], 1)
        ],
        "partialFingerprints": {"finding/v1": plain(f"{each.machine}/{each.device}/{each.id}")},
    }
    if each.id in numbers:
        made["ruleIndex"] = numbers[each.id]
    if each.ignored:
        made["suppressions"] = [{"kind": "external", "status": "accepted", "justification": plain(each.ignored)}]
    return made


def _paragraphs(lines: Iterable[str]) -> str:
    """Paragraphs without control characters."""
    return "\n\n".join(map(plain, lines))


def in_file(place: Place) -> bool:
    """Is it a line of a file that the user named?"""
    return place.source in FILES and place.line > 0 and bool(place.name)


def _logical(part: Part, device: str) -> dict[str, str]:
    machine = plain(part.machine.name) or "machine"
    if not device:
        return {"name": machine, "fullyQualifiedName": machine, "kind": "module"}
    return {"name": plain(device), "fullyQualifiedName": f"{machine}/{plain(device)}", "kind": "resource"}


def _at(place: Place | None, part: Part, folder: str) -> dict[str, Any]:
    """Where it is shown. Pages that show findings want a file and a line for all of them."""
    name = place.name if place is not None else next(iter(part.machine.sources), "") or part.machine.name or "scan"
    line = place.line if place is not None else 1
    return {"physicalLocation": {"artifactLocation": {"uri": uri(name, folder)}, "region": {"startLine": line}}}


def uri(name: str, folder: str) -> str:
    """A file as a reference: relative to ``folder`` where it is in there, else with its whole name."""
    path = os.path.normpath(os.path.join(folder, name.replace("\x00", "\ufffd")))
    within = os.path.relpath(path, folder)
    outside = within == os.pardir or within.startswith(os.pardir + os.sep)
    # What is before a colon would be read as a scheme: it is escaped, too.
    said = quote(path if outside else within, errors="replace")
    return f"file://{said}" if outside else said


def _notifications(part: Part) -> Iterator[tuple[str, str]]:
    for problem in part.problems:
        yield "warning", f"{part.machine.name}: could not read {problem}"
    for each in part.undecided:
        about = f"{each.id} {each.device}".rstrip()
        yield "note", f"{part.machine.name}: could not be decided: {about}: {settles(each.settle)}"


def _notification(level: str, text: str) -> dict[str, Any]:
    return {"level": level, "message": {"text": plain(text)}}
