# SPDX-License-Identifier: Apache-2.0
"""All rules, by id. One file each for what they are about; ids are stable for ever."""

from __future__ import annotations

from typing import Final

from virtiova.scan.rule import Rule
from virtiova.scan.rules import backend_bugs, guests, isolation, memory, negotiation, start, topology, views

_PARTS: Final[tuple[tuple[Rule, ...], ...]] = (
    isolation.RULES,
    topology.RULES,
    start.RULES,
    negotiation.RULES,
    guests.RULES,
    backend_bugs.RULES,
    memory.RULES,
    views.RULES,
)
RULES: Final[tuple[Rule, ...]] = tuple(sorted((rule for part in _PARTS for rule in part), key=lambda rule: rule.id))
BY_ID: Final[dict[str, Rule]] = {rule.id: rule for rule in RULES}
assert len(BY_ID) == len(RULES)
