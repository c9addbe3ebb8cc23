# SPDX-License-Identifier: Apache-2.0
"""Facts in, allowed paths and the chain of reasons out: the patch's rule, as pure functions."""

from virtiova.policy.departures import DEPARTURES, Departure, departure
from virtiova.policy.facts import Facts, Front, Mapping, Payload
from virtiova.policy.predict import predict
from virtiova.policy.rules import RULES, Rule, Rules

__all__ = [
    "DEPARTURES",
    "RULES",
    "Departure",
    "Facts",
    "Front",
    "Mapping",
    "Payload",
    "Rule",
    "Rules",
    "departure",
    "predict",
]
