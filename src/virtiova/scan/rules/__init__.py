# SPDX-License-Identifier: Apache-2.0
"""All rules, by id. One file each for what they are about; ids are stable for ever."""

from __future__ import annotations

from typing import Final

from virtiova.scan.rule import Rule
from virtiova.scan.rules import isolation

RULES: Final[tuple[Rule, ...]] = tuple(sorted(isolation.RULES, key=lambda rule: rule.id))
BY_ID: Final[dict[str, Rule]] = {rule.id: rule for rule in RULES}
assert len(BY_ID) == len(RULES)
