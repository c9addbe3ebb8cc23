# SPDX-License-Identifier: Apache-2.0
"""All experiments, in the order in which they are listed: importing them registers them."""

from __future__ import annotations

from virtiova.probe import (
    controls,
    mappings,
    negotiation,
    paths,
)

__all__ = ["controls", "load", "mappings", "negotiation", "paths"]


def load() -> None:
    """Make sure that all experiments are registered (importing this module did it)."""
