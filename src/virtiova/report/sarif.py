# SPDX-License-Identifier: Apache-2.0
"""SARIF 2.1.0, which code-scanning pages show: what all our logs have, and conformance cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from virtiova.result import CaseResult, Verdict

_KINDS: Final = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "fail",
    Verdict.UNKNOWN: "open",
    Verdict.NOT_APPLICABLE: "notApplicable",
}
_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def document(
    results: Sequence[CaseResult], help_texts: Mapping[str, str], *, version: str, where: str, uri: str
) -> str:
    """One run, a rule and a result a case. ``help_texts``: by case, what it does, why, and what a fix looks like.
    ``where`` is the back end as it was named; ``uri`` the file that findings are shown at: code-scanning pages want
    one, and the sources of a back end are nothing that is known here."""
    rules = [
        {
            "id": each.case,
            "shortDescription": {"text": each.title},
            "fullDescription": {"text": f"{each.title} ({each.citation})"},
            "help": {"text": help_texts[each.case]},
        }
        for each in results
    ]
    return log(version, rules, [_result(number, each, where, uri) for number, each in enumerate(results)])


def log(version: str, rules: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], **more: object) -> str:
    """A whole log of one run of ours. ``more``: other properties of the run."""
    driver = {"name": "virtiova", "semanticVersion": version, "rules": rules}
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "utf16CodeUnits", **more}
    encoded = msgspec.json.encode({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})
    return msgspec.json.format(encoded, indent=2).decode()


def _result(number: int, each: CaseResult, where: str, uri: str) -> dict[str, Any]:
    seen = "; or: ".join([each.evidence.seen, *each.evidence.readings])
    place = {
        "physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}},
        "logicalLocations": [{"name": each.device or "device", "fullyQualifiedName": where, "kind": "module"}],
    }
    return {
        "ruleId": each.case,
        "ruleIndex": number,
        "kind": _KINDS[each.result],
        "level": "error" if each.result is Verdict.FAIL else "none",
        "message": {"text": f"{each.title}: {seen}"},
        "locations": [place],
        "partialFingerprints": {"case/v1": f"{each.device}/{each.case}"},
    }
