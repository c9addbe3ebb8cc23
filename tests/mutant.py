# SPDX-License-Identifier: Apache-2.0
"""``mutant.py CASE ARGUMENTS...``: ``virtiova ARGUMENTS...`` with the mistake in it that the case is to find;
``without:CASE``: with all but the mistake."""

from __future__ import annotations

import sys

import mutants
from virtiova.cli.main import main

if __name__ == "__main__":
    name = sys.argv[1].removeprefix("without:")
    row = mutants.MUTANTS[name]
    for what in (row.given, row.plant if name == sys.argv[1] else None):
        if what is not None:
            what()
    sys.exit(main(sys.argv[2:]))
