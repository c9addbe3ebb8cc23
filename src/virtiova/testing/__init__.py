# SPDX-License-Identifier: Apache-2.0
"""A kit to test your own address spaces, devices and rings with. No QEMU, no privilege.

`check_address_space`, `check_device` and `check_ring` return what they checked, or raise `CheckFailed` (an
``AssertionError``) with the shortest history that shows what is wrong. ``docs/testing.md`` is the tutorial.

It needs Hypothesis (``pip install 'virtiova[testing]'``), which is imported with the first name that is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from virtiova.testing.checks import Check, CheckFailed, NotApplicable, Outcome, Report
    from virtiova.testing.memory import Memory
    from virtiova.testing.space_checks import address_space_checks, check_address_space
    from virtiova.testing.space_histories import iotlb_histories
    from virtiova.testing.spaces import Behind, Space, Table, behind, payload

__all__ = [
    "Behind",
    "Check",
    "CheckFailed",
    "Memory",
    "NotApplicable",
    "Outcome",
    "Report",
    "Space",
    "Table",
    "address_space_checks",
    "behind",
    "check_address_space",
    "iotlb_histories",
    "payload",
]

_HOMES: Final = {
    "checks": ("Check", "CheckFailed", "NotApplicable", "Outcome", "Report"),
    "memory": ("Memory",),
    "space_checks": ("address_space_checks", "check_address_space"),
    "space_histories": ("iotlb_histories",),
    "spaces": ("Behind", "Space", "Table", "behind", "payload"),
}
_MODULE_OF: Final = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Names come with their first use: a module beside these needs no Hypothesis."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    except ModuleNotFoundError as missing:
        if missing.name != "hypothesis":
            raise
        words = "virtiova.testing makes its histories with Hypothesis: pip install 'virtiova[testing]'"
        raise ModuleNotFoundError(words, name=missing.name) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
