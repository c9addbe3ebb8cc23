# SPDX-License-Identifier: Apache-2.0
"""``virtiova explain``: the rule for given facts, an experiment, a known departure, or a word. Works offline."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from virtiova.cli import exits, glossary
from virtiova.conformance.case import Case
from virtiova.errors import UsageError
from virtiova.features import Generation
from virtiova.policy import DEPARTURES, Facts, Front, Mapping, Payload, predict
from virtiova.result import Path, Prediction, Sides, path_order
from virtiova.scan.rule import Rule as FindingRule

_ANSWER: Final[dict[str, bool | None]] = {"yes": True, "no": False, "unknown": None}
PLATFORMS: Final[dict[str, tuple[Front, bool, bool]]] = {
    "none": (Front.NONE, False, False),
    "iommu": (Front.TRANSLATING, False, False),
    "iommu-off": (Front.OFF, False, False),
    "passthrough": (Front.PASSTHROUGH, False, False),
    "xen": (Front.NONE, True, False),
    "xen-iommu": (Front.TRANSLATING, True, False),
    "restricted": (Front.NONE, False, True),
    "restricted-iommu": (Front.TRANSLATING, False, True),
}
"""Name on the command line: what is in front, a Xen domain, restricted memory."""
_PLATFORM: Final = "iommu"


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.what == "rule":
        facts = facts_of(options)
        print(_as_json(facts, options) if options.json else rule_text(facts, options))
        return exits.OK
    for name in ("offered", "accepted", "platform", "generation", "insists", "legacy", "hardware", "payload", "json"):
        if getattr(options, name):
            raise UsageError(f"--{name} goes with 'explain rule' only")
    print(_other(options.what) if options.what else listing())
    return exits.OK


def listing() -> str:
    """All that can be explained, in groups, one a line."""
    lines: list[str] = []
    for title, rows in _all().items():
        width = max(map(len, rows))
        lines += ["", title] if lines else [title]
        lines += [f"  {name.ljust(width)}  {said}".rstrip() for name, said in rows.items()]
    return "\n".join(lines)


def _all() -> dict[str, dict[str, str]]:
    from virtiova.conformance.cases import CASES
    from virtiova.guest.run import EXPERIMENT
    from virtiova.matrix.negotiate import TITLES
    from virtiova.probe.edu import CONTROL_EXPERIMENT, CONTROL_TITLE
    from virtiova.probe.experiment import EXPERIMENTS, SEVERAL
    from virtiova.scan.rules import BY_ID as FINDINGS

    experiments = {row.id: row.title for row in (EXPERIMENTS | SEVERAL).values()}
    cases = {row.id: row.title for row in CASES.values()}
    others = {CONTROL_EXPERIMENT: CONTROL_TITLE, **TITLES, EXPERIMENT: "what a booted kernel does with its two disks"}
    known = {"rule", *experiments, *others, *cases}
    return {
        "the rule, for given facts": {"rule": "options say the facts: see 'virtiova explain --help'"},
        "experiments": experiments | others,
        "conformance cases": cases,
        "findings of a scan": {row.id: row.title for row in FINDINGS.values()},
        "known departures": {row.id: f"{row.product} {row.versions}: {row.title}" for row in DEPARTURES},
        "words": {word: "" for word in glossary.entries() if word not in known},
    }


def facts_of(options: argparse.Namespace) -> Facts:
    """The facts that were named on the command line; what was not named is not known."""
    platform, generation = options.platform or _PLATFORM, options.generation or Generation.TODAY
    if platform not in PLATFORMS:
        raise UsageError.unknown("platform", platform, PLATFORMS)
    if generation not in list(Generation):
        raise UsageError.unknown("generation", generation, Generation)
    if (options.payload or Payload.NONE) not in list(Payload):
        raise UsageError.unknown("payload", options.payload, Payload)
    front, xen, restricted = PLATFORMS[platform]
    offered, accepted = _answer(options.offered), _answer(options.accepted)
    if options.legacy:
        if offered:
            raise UsageError("the legacy interface has no bit 33: it cannot be offered there")
        offered = False
    if generation == Generation.BEFORE:
        if accepted:
            raise UsageError("before the patch no driver took bit 33")
        accepted = False
    if offered is False:
        if accepted:
            raise UsageError("a bit that is not offered cannot be accepted")
        accepted = False
    return Facts(
        offered=True if accepted else offered,
        accepted=accepted,
        front=front,
        xen=xen,
        restricted=restricted,
        version_1=not options.legacy,
        insists=_answer(options.insists),
        hardware=options.hardware,
        generation=Generation(generation),
        payload=Payload(options.payload or Payload.NONE),
    )


def rule_text(facts: Facts, options: argparse.Namespace) -> str:
    """The answer and its chain of reasons; a chain for each case where something is not known."""
    cases = _cases(facts)
    answers = [predict(case) for _, case in cases]
    lines = [
        f"bit 33 offered: {_word(facts.offered)}, accepted: {_word(facts.accepted)}; "
        f"platform: {options.platform or _PLATFORM}; Linux: {facts.generation}"
        + ("" if facts.payload is Payload.NONE else f"; the address is a {facts.payload} inside a request"),
        "",
        f"the driver passes    {_one(answer.address for answer in answers)} addresses, "
        f"by {_one(answer.dma_ops for answer in answers)} DMA ops",
        f"allowed paths        {', '.join(path_order(_paths(answers)))}",
    ]
    if sides := _sides(answers):
        lines.append(f"if mixed             payload {sides.payload}, rings and tables {sides.structures}")
    for (title, _), answer in zip(cases, answers, strict=True):
        lines += ["", title]
        for reason in answer.reasons:
            lines.append(f"  {'yes' if reason.answer else 'no ':3}  {reason.rule}: {reason.text}")
            lines.append(f"       [{reason.citation}]")
    return "\n".join(lines)


def _one(words: Iterable[str]) -> str:
    """The word that all cases agree upon."""
    different = set(words)
    return different.pop() if len(different) == 1 else "unknown"


def _paths(answers: Sequence[Prediction]) -> frozenset[Path]:
    return frozenset().union(*(answer.paths for answer in answers))


def _sides(answers: Sequence[Prediction]) -> Sides | None:
    return next((answer.sides for answer in answers if answer.sides), None)


def _cases(facts: Facts) -> list[tuple[str, Facts]]:
    """The facts, with every possible answer where one is not known."""
    if facts.offered is not None and facts.accepted is not None:
        return [("because", _mapped(facts))]
    cases = {
        "if it is offered and taken": (True, True),
        "if it is offered and not taken": (True, False),
        "if it is not offered": (False, False),
    }
    return [
        (title, _mapped(replace(facts, offered=offered, accepted=accepted)))
        for title, (offered, accepted) in cases.items()
        if facts.offered in (None, offered) and facts.accepted in (None, accepted)
    ]


def _mapped(facts: Facts) -> Facts:
    """A bare physical address is in no table; what a physical device makes of it depends on that."""
    bare = facts.hardware and not facts.accepted
    return replace(facts, mapping=Mapping.UNMAPPED) if bare else facts


def _answer(word: str | None) -> bool | None:
    return _ANSWER[word or "unknown"]


def _word(answer: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[answer]


def _as_json(facts: Facts, options: argparse.Namespace) -> str:
    cases = _cases(facts)
    answers = [predict(case) for _, case in cases]
    sides = _sides(answers)
    return json.dumps(
        {
            "schema": "virtiova/rule/1",
            "offered": facts.offered,
            "accepted": facts.accepted,
            "platform": options.platform or _PLATFORM,
            "generation": facts.generation,
            "payload": facts.payload,
            "address": _one(answer.address for answer in answers),
            "dma_ops": _one(answer.dma_ops for answer in answers),
            "paths": path_order(_paths(answers)),
            "sides": sides and {"payload": sides.payload, "structures": sides.structures},
            "reasons": [
                {"rule": r.rule, "answer": r.answer, "text": r.text, "citation": r.citation}
                for answer in answers
                for r in answer.reasons
            ],
        },
        indent=2,
    )


def _case(case: Case) -> str:
    texts = [case.does, f"Why it matters: {case.why}", f"What a fix looks like: {case.fix}"]
    only = [f"only for  {', '.join(case.kinds)}"] if case.kinds else []
    return "\n\n".join([f"{case.id}: {case.title}", *texts, "\n".join([f"rests on  {case.citation}", *only])])


_IN_GENERAL: Final = {
    "bit": "iommu_platform=on (and disable-legacy=on, where the device could be legacy)",
    "model": "...",
    "device": "the device",
}
"""What a fix names of a device, where there is none."""


def _finding(row: FindingRule) -> str:
    """A rule of `scan`: what it says, why, and what to change in each product."""

    class Named(dict[str, str]):
        """What a fix leaves to the case at hand, in words."""

        def __missing__(self, key: str) -> str:
            return _IN_GENERAL.get(key, key.upper())

    width = max(map(len, row.fix), default=0)
    fixes = [
        textwrap.fill(
            f"  {product.ljust(width)}  {words.format_map(Named())}", 100, subsequent_indent=" " * (width + 4)
        )
        for product, words in row.fix.items()
    ]
    rests = [f"rests on  {row.citation}", *([f"evidence  {row.evidence}"] if row.evidence else [])]
    fix = "\n".join(["What to change:", *fixes]) if fixes else "There is nothing to change."
    return "\n\n".join([f"{row.id}: {row.title} [{row.severity}]", textwrap.fill(row.why, 100), fix, "\n".join(rests)])


def _other(name: str) -> str:
    from virtiova.conformance.cases import CASES
    from virtiova.guest.run import ABOUT, EXPERIMENT
    from virtiova.matrix.negotiate import TITLES
    from virtiova.probe.edu import CONTROL_EXPERIMENT, CONTROL_TITLE, control_outcome
    from virtiova.probe.experiment import EXPERIMENTS, SEVERAL
    from virtiova.scan.rules import BY_ID as FINDINGS

    if (finding := FINDINGS.get(name.upper())) is not None:
        return _finding(finding)
    if name in TITLES:
        return f"{name}: {TITLES[name]}"
    if name == CONTROL_EXPERIMENT:
        return f"{name}: {CONTROL_TITLE}\n\n{' '.join((control_outcome.__doc__ or '').split())}"
    for row in DEPARTURES:
        if row.id == name:
            return f"{row.id}: {row.title}\n\nproduct   {row.product} {row.versions}\nsource    {row.source}"
    if name in EXPERIMENTS or name in SEVERAL:
        found = (EXPERIMENTS | SEVERAL)[name]
        said = " ".join((found.run.__doc__ or "").split())
        return f"{found.id}: {found.title}\n\n{said}\n\nrests on  {found.citation}"
    if name in CASES:
        return _case(CASES[name])
    if name == EXPERIMENT:
        return ABOUT
    if (entry := glossary.explain(name)) is not None:
        return entry
    names = [name for rows in _all().values() for name in rows]
    raise UsageError.unknown(
        "thing to explain", name, names, alike=0.75, otherwise="'virtiova explain' lists what there is"
    )
