# SPDX-License-Identifier: Apache-2.0
"""``mutant.py CASE ARGUMENTS...``: ``virtiova ARGUMENTS...`` with the mistake in it that the case is to find."""

from __future__ import annotations

import sys

import mutants
from virtiova.cli.main import main

if __name__ == "__main__":
    mutants.MUTANTS[sys.argv[1]].plant()
    sys.exit(main(sys.argv[2:]))
