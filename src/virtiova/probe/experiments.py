# SPDX-License-Identifier: Apache-2.0
"""All experiments, in the order in which they are listed: importing them registers them."""

from __future__ import annotations

import importlib
from typing import Final

_MODULES: Final = ("paths", "mappings", "negotiation", "controls", "payloads", "beside")


def load() -> None:
    """Register all experiments."""
    for name in _MODULES:
        importlib.import_module(f"virtiova.probe.{name}")
