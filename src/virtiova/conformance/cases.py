# SPDX-License-Identifier: Apache-2.0
"""All cases: importing them registers them, and the order here is the order in which they are asked."""

from virtiova.conformance import (
    bit33,
    carry,
    hostile,
    indirect,
    invalidation,
    life,
    memory,
    moments,
    negotiation,
    notices,
    packed,
    protocol,
    rings,
    sizes,
    stream,
    timing,
    translations,
    updates,
)
from virtiova.conformance.case import CASES

__all__ = [
    "CASES",
    "bit33",
    "carry",
    "hostile",
    "indirect",
    "invalidation",
    "life",
    "memory",
    "moments",
    "negotiation",
    "notices",
    "packed",
    "protocol",
    "rings",
    "sizes",
    "stream",
    "timing",
    "translations",
    "updates",
]
