# SPDX-License-Identifier: Apache-2.0
"""The engine: asks the rules in order, and returns the allowed paths with the chain of answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtiova.addr import AddressKind
from virtiova.policy.facts import Facts, Front, Mapping, Payload
from virtiova.policy.rules import RULES, Rules
from virtiova.result import Path, Prediction, Reason, Side, Sides

_PHYSICAL: Final = {
    Payload.PAGE_NUMBER: "page-number-is-physical",
    Payload.BLOCK: "block-is-physical",
    Payload.REGION: "region-is-physical",
    Payload.MAP_TARGET: "map-target-is-physical",
}
"""What the rule about an address inside a request is called, if it says that the address is physical."""
_RING_ONLY: Final = Sides(payload=Side.AROUND, structures=Side.THROUGH)
"""The one way in which `Path.MIXED` is right: what the request names is not behind the IOMMU, its ring is."""


class _Chain:
    """Asks rules about one set of facts, and keeps every answer."""

    def __init__(self, facts: Facts, rules: Rules) -> None:
        self.facts = facts
        self._rules = rules
        self.reasons: list[Reason] = []

    def ask(self, rule_id: str) -> bool:
        rule = self._rules[rule_id]
        answer = rule.ask(self.facts)
        self.reasons.append(Reason(rule.id, answer, rule.yes if answer else rule.no, str(rule.citation)))
        return answer


def predict(facts: Facts, rules: Rules = RULES) -> Prediction:
    """Which paths the rule and the specification allow for one access, which kind of address the driver
    passes, with which DMA ops, and why.

    Where ``offered`` or ``accepted`` is None, everything that either answer would allow is allowed.
    """
    if facts.offered is None:
        return _either(replace(facts, offered=True), replace(facts, offered=False), rules)
    if facts.accepted is None:
        if not facts.offered:
            # Accepted means offered, written and kept: what is not offered is not accepted.
            return predict(replace(facts, accepted=False), rules)
        return _either(replace(facts, accepted=True), replace(facts, accepted=False), rules)
    return _predict(_Chain(facts, rules))


def _either(one: Facts, other: Facts, rules: Rules) -> Prediction:
    """Everything that either of two sets of facts allows."""
    first, second = predict(one, rules), predict(other, rules)
    same = first.address is second.address
    return Prediction(
        first.address if same else AddressKind.UNKNOWN,
        first.paths | second.paths,
        (*first.reasons, *second.reasons),
        first.dma_ops if first.dma_ops == second.dma_ops else "unknown",
        first.sides or second.sides,
    )


def _predict(chain: _Chain) -> Prediction:
    facts = chain.facts
    if facts.payload is Payload.MAP_TARGET:
        return _map_target(chain)
    if facts.declared and not chain.ask("room-for-the-bit"):
        return _refused(chain)
    if facts.restricted and not chain.ask("restricted-memory"):
        return _refused(chain)
    may_refuse = False
    if facts.wrote_unoffered:
        may_refuse = not chain.ask("only-offered-bits")
    bit_taken = chain.ask("bit-taken")
    address, ops = _driver_side(chain)
    physical = _physical_payload(chain)
    if physical:
        # It names memory, and is not made by any DMA ops.
        address, ops = AddressKind.GPA, "direct"
    if facts.carries_on and not chain.ask("driver-ok-first"):
        return Prediction(address, frozenset({Path.BLOCKED}), tuple(chain.reasons), ops)
    if not bit_taken and not facts.carries_on:
        # Without VERSION_1 the refusal is no longer about bit 33 alone, so that the product is known to
        # insist says nothing about it.
        if facts.version_1 and chain.ask("insists"):
            return Prediction(address, frozenset({Path.REFUSED}), tuple(chain.reasons), ops)
        may_refuse = facts.insists is None or not facts.version_1
    paths = _device_side(chain, physical=physical)
    if may_refuse:
        paths |= {Path.REFUSED}
    return Prediction(address, paths, tuple(chain.reasons), ops, _RING_ONLY if Path.MIXED in paths else None)


def _map_target(chain: _Chain) -> Prediction:
    """What virtio-iommu is told to map to. Bit 33 is the IOMMU's own, and nothing asks for it: the bytes are moved by
    another device, of which it is known that it goes through the IOMMU."""
    if not chain.ask("bus-master"):
        return Prediction(AddressKind.GPA, frozenset({Path.BLOCKED}), tuple(chain.reasons))
    if not chain.ask("front-translates"):
        return Prediction(AddressKind.GPA, frozenset({Path.DIRECT}), tuple(chain.reasons))
    if chain.ask(_PHYSICAL[Payload.MAP_TARGET]):
        return Prediction(AddressKind.GPA, frozenset({Path.MIXED}), tuple(chain.reasons), sides=_RING_ONLY)
    return Prediction(AddressKind.IOVA, frozenset({Path.TRANSLATED}), tuple(chain.reasons), "platform")


def _refused(chain: _Chain) -> Prediction:
    return Prediction(AddressKind.UNKNOWN, frozenset({Path.REFUSED}), tuple(chain.reasons))


def _driver_side(chain: _Chain) -> tuple[AddressKind, str]:
    """The kind of address that the driver passes, and the DMA ops that make it (Linux ``vring_use_dma_api``)."""
    facts = chain.facts
    dma_api = chain.ask("no-quirk") or chain.ask("xen-domain")
    if not dma_api:
        return AddressKind.GPA, "direct"
    ops = "bounce" if facts.restricted else "platform"
    if facts.xen:
        # The DMA API of a Xen domain turns pseudo-physical into machine addresses.
        return AddressKind.MACHINE, ops
    if facts.front is Front.TRANSLATING:
        return AddressKind.IOVA, ops
    # The DMA API without an IOMMU gives out the physical address itself.
    return AddressKind.GPA, ops


def _physical_payload(chain: _Chain) -> bool:
    """Does the address travel inside a request, and is it physical there whatever bit 33 is?"""
    payload = chain.facts.payload
    if payload is Payload.BACKING:
        return not chain.ask("backing-is-accessed")
    return payload in _PHYSICAL and chain.ask(_PHYSICAL[payload])


def _device_side(chain: _Chain, *, physical: bool) -> frozenset[Path]:
    """Where a device that keeps to the specification lets the bytes go. ``physical``: the address is one inside a
    request, and physical; the ring that carried the request is the device's to access all the same."""
    facts = chain.facts
    if not chain.ask("bus-master"):
        return frozenset({Path.BLOCKED})
    platform = chain.ask("device-uses-platform")
    if not chain.ask("front-translates"):
        return frozenset({Path.DIRECT})
    if not platform:
        return frozenset({Path.BYPASS})
    if physical:
        # The ring goes through the IOMMU, and what the payload names is not behind it.
        return frozenset({Path.MIXED})
    now = {Path.TRANSLATED} if chain.ask("permitted") else {Path.BLOCKED}
    if facts.mapping is not Mapping.MAPPED and not chain.ask("invalidated"):
        now.add(Path.STALE)
    return frozenset(now)
