# SPDX-License-Identifier: Apache-2.0
"""Kata Containers' configuration: what it will ask of the machines that it starts."""

from __future__ import annotations

import tomllib
from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, View, ViewKind
from virtiova.result.scan import Place

LIMIT: Final = 1 << 20
_HYPERVISORS: Final = {"qemu": "qemu", "clh": "cloud-hypervisor", "cloud-hypervisor": "cloud-hypervisor"}
_MARKS: Final = (b"[hypervisor.", b"enable_iommu", b"[runtime]")


def is_configuration(data: bytes) -> bool:
    """Does this look like Kata's ``configuration.toml``?"""
    return sum(mark in data[:LIMIT] for mark in _MARKS) >= 2


def collect(data: bytes, name: str) -> View:
    """What a ``configuration.toml`` says of the machines of its sandboxes."""
    view = View(ViewKind.CONFIGURATION, name, name)
    try:
        found = tomllib.loads(data[:LIMIT].decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        view.problems.append(f"{name}: no TOML: {error}")
        view.empty = True
        return view
    sections = found.get("hypervisor")
    kinds = [each for each in sections if isinstance(sections[each], dict)] if isinstance(sections, dict) else []
    if not isinstance(sections, dict) or not kinds:
        view.problems.append(f"{name}: no [hypervisor.*] section")
        view.empty = True
        return view
    lines = data[:LIMIT].decode("utf-8").splitlines()
    _machine(view, kinds[0], sections[kinds[0]], lines)
    if len(kinds) > 1:
        view.problems.append(f"{name}: only the first of {len(kinds)} [hypervisor.*] sections was looked at")
    return view


def _machine(view: View, kind: str, section: dict[str, Any], lines: list[str]) -> None:
    put = view.machine.put

    def at(key: str) -> Place:
        number = next((n for n, line in enumerate(lines, 1) if line.split("=")[0].strip() == key), 0)
        return Place("kata", view.source, number)

    put(k.KATA, True, at("path"), Certainty.SAID)
    if kind in _HYPERVISORS:
        put(k.VMM, _HYPERVISORS[kind], at("path"), Certainty.SAID)
    machine = section.get("machine_type")
    if isinstance(machine, str):
        put(k.MACHINE_TYPE, machine[:200], at("machine_type"), Certainty.SAID)
    wanted = section.get("enable_iommu_platform", False)
    sure = Certainty.SAID if "enable_iommu_platform" in section else Certainty.DEFAULT
    if isinstance(wanted, bool):
        put(k.KATA_IOMMU_PLATFORM, wanted, at("enable_iommu_platform"), sure)
    iommu = section.get("enable_iommu", False)
    if iommu is True:
        put(k.IOMMU, "intel" if machine == "q35" else "unknown", at("enable_iommu"), Certainty.SAID)
    elif "enable_iommu" in section:
        put(k.IOMMU, "none", at("enable_iommu"), Certainty.SAID)
    if section.get("confidential_guest") is True:
        kinds = {"s390-ccw-virtio": "s390-pv", "pseries": "pef"}
        restricted = kinds.get(str(machine), "sev-snp" if section.get("sev_snp_guest") is True else "confidential")
        put(k.RESTRICTED, restricted, at("confidential_guest"), Certainty.SAID)
