# SPDX-License-Identifier: Apache-2.0
"""Marks of a guest whose memory its devices cannot reach: SEV, TDX, protected virtualization of s390x, Arm CCA."""

from __future__ import annotations

from typing import Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Facts
from virtiova.collect.linux.machine import CPU, cpu_flags
from virtiova.collect.linux.read import place, word
from virtiova.collect.tree import Tree

_THERE: Final = (
    ("/sys/class/misc/tdx_guest", "tdx"),
    ("/sys/devices/system/cpu/sev/vmpl", "sev-snp"),
    ("/sys/class/misc/sev-guest", "sev-snp"),
    ("/sys/devices/platform/arm-cca-dev", "arm-cca"),
    ("/sys/kernel/security/coco/efi_secret", "sev"),
    ("/sys/kernel/security/secrets/coco", "sev"),
)
"""Files that only such guests have, surest first."""
_FLAGS: Final = (("tdx_guest", "tdx"), ("sev_snp", "sev-snp"), ("sev_es", "sev-es"), ("sev", "sev"))
"""In /proc/cpuinfo. ``sev`` stands there on a host that has guests of this kind as well: with ``hypervisor`` only."""
UV: Final = "/sys/firmware/uv/prot_virt_guest"


def put(tree: Tree, facts: Facts) -> None:
    """The first mark that is found. That there is none says nothing: Linux hides some (the log may tell)."""
    for path, kind in _THERE:
        if tree.exists(path):
            facts.put(k.RESTRICTED, kind, place(path))
            return
    if word(tree, UV) == "1":
        facts.put(k.RESTRICTED, "s390-pv", place(UV))
        return
    flags = cpu_flags(tree)
    found = next((kind for flag, kind in _FLAGS if flag in flags), None)
    if found is not None and "hypervisor" in flags:
        facts.put(k.RESTRICTED, found, place(CPU))
