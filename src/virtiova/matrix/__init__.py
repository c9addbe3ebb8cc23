# SPDX-License-Identifier: Apache-2.0
"""The matrix: every system that the patch names, predicted against observed, as far as it can be had here."""

from virtiova.matrix.plan import Extent, Planned, Selection, boards, plan
from virtiova.matrix.systems import SYSTEMS
from virtiova.matrix.work import answer, run_planned

__all__ = ["SYSTEMS", "Extent", "Planned", "Selection", "answer", "boards", "plan", "run_planned"]
