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
    from virtiova.testing.device_stand import Ask
    from virtiova.testing.device_suite import check_device, device_checks
    from virtiova.testing.memory import Memory
    from virtiova.testing.raw_rings import RawPackedRing, RawRing
    from virtiova.testing.ring_ends import Begin, DeviceEnd, DriverEnd, Place, Taken, our_device, our_driver
    from virtiova.testing.ring_play import RingPlay
    from virtiova.testing.ring_strategies import chains, ring_histories, rings
    from virtiova.testing.ring_suite import check_ring, ring_checks
    from virtiova.testing.ring_world import Watched, World
    from virtiova.testing.space_strategies import iotlb_histories, memory_maps
    from virtiova.testing.space_suite import address_space_checks, check_address_space
    from virtiova.testing.spaces import Behind, Space, Table, behind, payload

__all__ = [
    "Ask",
    "Begin",
    "Behind",
    "Check",
    "CheckFailed",
    "DeviceEnd",
    "DriverEnd",
    "Memory",
    "NotApplicable",
    "Outcome",
    "Place",
    "RawPackedRing",
    "RawRing",
    "Report",
    "RingPlay",
    "Space",
    "Table",
    "Taken",
    "Watched",
    "World",
    "address_space_checks",
    "behind",
    "chains",
    "check_address_space",
    "check_device",
    "check_ring",
    "device_checks",
    "iotlb_histories",
    "memory_maps",
    "our_device",
    "our_driver",
    "payload",
    "ring_checks",
    "ring_histories",
    "rings",
]

_HOMES: Final = {
    "checks": ("Check", "CheckFailed", "NotApplicable", "Outcome", "Report"),
    "device_stand": ("Ask",),
    "device_suite": ("check_device", "device_checks"),
    "memory": ("Memory",),
    "raw_rings": ("RawPackedRing", "RawRing"),
    "ring_play": ("RingPlay",),
    "ring_world": ("Watched", "World"),
    "ring_suite": ("check_ring", "ring_checks"),
    "ring_strategies": ("chains", "ring_histories", "rings"),
    "ring_ends": ("Begin", "DeviceEnd", "DriverEnd", "Place", "Taken", "our_device", "our_driver"),
    "space_suite": ("address_space_checks", "check_address_space"),
    "space_strategies": ("iotlb_histories", "memory_maps"),
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
