# SPDX-License-Identifier: Apache-2.0
"""``virtiova explain``: the rule for given facts, an experiment, or a known departure. Works offline."""

from __future__ import annotations

import argparse
import json
from typing import Final

from virtiova.cli import exits
from virtiova.errors import UsageError
from virtiova.features import Generation
from virtiova.policy import DEPARTURES, Facts, Front, predict
from virtiova.result import Prediction, path_order

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


def run(options: argparse.Namespace) -> int:
    """The command; the exit status."""
    if options.what == "rule":
        facts = facts_of(options)
        prediction = predict(facts)
        print(_as_json(options, prediction) if options.json else rule_text(options, prediction))
        return exits.OK
    print(_other(options.what))
    return exits.OK


def facts_of(options: argparse.Namespace) -> Facts:
    """The facts that were named on the command line."""
    if options.platform not in PLATFORMS:
        raise UsageError.unknown("platform", options.platform, PLATFORMS)
    if options.generation not in list(Generation):
        raise UsageError.unknown("generation", options.generation, Generation)
    front, xen, restricted = PLATFORMS[options.platform]
    offered, accepted = _ANSWER[options.offered], _ANSWER[options.accepted]
    if offered is False:
        if accepted:
            raise UsageError("a bit that is not offered cannot be accepted")
        accepted = False
    return Facts(
        offered=offered,
        accepted=accepted,
        front=front,
        xen=xen,
        restricted=restricted,
        version_1=not options.legacy,
        insists=_ANSWER[options.insists],
        hardware=options.hardware,
        generation=Generation(options.generation),
    )


def rule_text(options: argparse.Namespace, prediction: Prediction) -> str:
    """The answer and its chain of reasons."""
    lines = [
        f"bit 33 offered: {options.offered}, accepted: {options.accepted}; platform: {options.platform}; "
        f"Linux: {options.generation}",
        "",
        f"the driver passes    {prediction.address} addresses, by {prediction.dma_ops} DMA ops",
        f"allowed paths        {', '.join(path_order(prediction.paths))}",
        "",
        "because",
    ]
    for reason in prediction.reasons:
        lines.append(f"  {'yes' if reason.answer else 'no ':3}  {reason.rule}: {reason.text}")
        lines.append(f"       [{reason.citation}]")
    return "\n".join(lines)


def _as_json(options: argparse.Namespace, prediction: Prediction) -> str:
    return json.dumps(
        {
            "schema": "virtiova/rule/1",
            "offered": _ANSWER[options.offered],
            "accepted": _ANSWER[options.accepted],
            "platform": options.platform,
            "generation": options.generation,
            "address": prediction.address,
            "dma_ops": prediction.dma_ops,
            "paths": path_order(prediction.paths),
            "reasons": [
                {"rule": r.rule, "answer": r.answer, "text": r.text, "citation": r.citation} for r in prediction.reasons
            ],
        },
        indent=2,
    )


def _other(name: str) -> str:
    from virtiova.guest.run import ABOUT, EXPERIMENT
    from virtiova.probe.experiment import EXPERIMENTS

    for row in DEPARTURES:
        if row.id == name:
            return f"{row.id}: {row.title}\n\nproduct   {row.product} {row.versions}\nsource    {row.source}"
    if name in EXPERIMENTS:
        found = EXPERIMENTS[name]
        said = " ".join((found.run.__doc__ or "").split())
        return f"{found.id}: {found.title}\n\n{said}\n\nrests on  {found.citation}"
    if name == EXPERIMENT:
        return ABOUT
    raise UsageError.unknown(
        "thing to explain", name, ["rule", *EXPERIMENTS, EXPERIMENT, *(row.id for row in DEPARTURES)]
    )
