# SPDX-License-Identifier: Apache-2.0
"""Cells as JSON, with a versioned schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from virtiova.result import SCHEMA, Cell

_FIELDS = (
    "machine",
    "iommu",
    "device",
    "experiment",
    "offered",
    "accepted",
    "address",
    "predicted",
    "observed",
    "explained",
    "evidence",
)
_OF_SOME = ("neighbours", "inside", "outside")
"""Of the evidence, what only a machine with several devices has, or a booted guest: left out where it is empty."""
_SELDOM = ("disagreements", "sides", "iommu_options", "device_options", "number", "beside")
"""Left out where there is nothing to say."""


def cell_object(cell: Cell) -> dict[str, Any]:
    """A cell as an element of ``cells``."""
    builtins: dict[str, Any] = msgspec.to_builtins(cell)
    for name in _OF_SOME:
        if not builtins["evidence"][name]:
            del builtins["evidence"][name]
    extra = {name: builtins[name] for name in _SELDOM if builtins[name]}
    return {name: builtins[name] for name in _FIELDS} | extra


def document(cells: Sequence[Cell]) -> str:
    """``{"schema": "virtiova/probe/1", "cells": [...]}``."""
    encoded = msgspec.json.encode({"schema": SCHEMA, "cells": [cell_object(cell) for cell in cells]})
    return msgspec.json.format(encoded, indent=2).decode()
