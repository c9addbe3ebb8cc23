# SPDX-License-Identifier: Apache-2.0
"""The table of mistakes: importing it plants none, but knows all."""

import mutants_bit33
import mutants_hostile
import mutants_invalidation
import mutants_life
import mutants_memory
import mutants_moments
import mutants_negotiation
import mutants_packed
import mutants_protocol
import mutants_rings
import mutants_sizes
import mutants_stream
import mutants_tables
import mutants_timing
import mutants_translations
import mutants_updates
from mutant_kit import MUTANTS

__all__ = [
    "MUTANTS",
    "mutants_bit33",
    "mutants_hostile",
    "mutants_invalidation",
    "mutants_life",
    "mutants_memory",
    "mutants_moments",
    "mutants_negotiation",
    "mutants_packed",
    "mutants_protocol",
    "mutants_rings",
    "mutants_sizes",
    "mutants_stream",
    "mutants_tables",
    "mutants_timing",
    "mutants_translations",
    "mutants_updates",
]
