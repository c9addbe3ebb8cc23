# SPDX-License-Identifier: Apache-2.0
"""``virtiova serve`` as a program for each kind of device, as management software wants back ends to be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from virtiova.cli import main


def _entry(kind: str, arguments: Sequence[str]) -> NoReturn:
    if "--print-capabilities" in arguments:
        # The conventions want everything else to be ignored then, known or not.
        arguments = ["--print-capabilities"]
    sys.argv[1:] = ["serve", kind, *arguments]
    main.entry()


def blk_entry() -> NoReturn:
    """``vhost-user-blk-virtiova``."""
    _entry("blk", sys.argv[1:])


def rng_entry() -> NoReturn:
    """``vhost-user-rng-virtiova``."""
    _entry("rng", sys.argv[1:])


def net_entry() -> NoReturn:
    """``vhost-user-net-virtiova``."""
    _entry("net", sys.argv[1:])
