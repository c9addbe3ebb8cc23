# SPDX-License-Identifier: Apache-2.0
"""VA901 to VA903: views that contradict each other, states without an explanation, and known departures."""

from __future__ import annotations

from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Key, shown
from virtiova.policy import DEPARTURES, Front
from virtiova.result import Path
from virtiova.result.scan import Seen, Severity
from virtiova.scan.judge import policy_facts
from virtiova.scan.rule import About, Answer, Hit, Input, Look, Open, Rule, by_rule
from virtiova.scan.rules import negotiation
from virtiova.spec import Citation, spec

_FAILED: Final = 0x80
_NEEDS_RESET: Final = 0x40
_STEADY: Final[tuple[Key[Any], ...]] = (k.TYPE, k.TRANSPORT, k.OFFERED, k.ACCEPTED, k.BACKEND)
"""What every look at the same running device must agree on."""


def _contradiction(look: Look) -> Answer:
    for key in _STEADY:
        facts = look.stated(key)
        other = next((fact for fact in facts if fact.value != facts[0].value), None)
        if other is not None:
            return Hit([each.seen(f"{key.name} is {shown(each.value)}") for each in (facts[0], other)])
    # What is not written is off; a running device that offers the bit was started with another configuration.
    running = look.facts.fact(k.OFFERED)
    if running and running.value and running.certainty is Certainty.SEEN:
        for silent in look.facts.all(k.OFFERED):
            if silent.certainty is Certainty.DEFAULT and not silent.value:
                return Hit([silent.seen("bit 33 is not asked for"), running.seen("bit 33 is offered")])
    # A product's default counts here: what was accepted was offered.
    offers, takes = look.facts.fact(k.OFFERED), look.facts.fact(k.ACCEPTED)
    if offers and takes and takes.value and not offers.value:
        return Hit([offers.seen("bit 33 is not offered"), takes.seen("bit 33 is accepted")])
    return None


def _unexplained(look: Look) -> Answer:
    status = look.facts.fact(k.STATUS)
    if status is None or not status.value & (_FAILED | _NEEDS_RESET):
        return None
    if any(isinstance(rule.ask(look), Hit) for rule in negotiation.RULES):
        return None
    which = " and ".join(
        name for bit, name in ((_FAILED, "FAILED"), (_NEEDS_RESET, "DEVICE_NEEDS_RESET")) if status.value & bit
    )
    return Hit([status.seen(f"the status is 0x{status.value:x}: {which}"), *look.seen(k.DRIVER)])


def _departure(look: Look) -> Answer:
    device, row = look.device, look.row
    if look.front is not Front.TRANSLATING:
        return None
    assert device is not None
    assert row is not None
    facts = policy_facts(look.view, device)
    version = look.machine.get(k.VMM_VERSION) or ""
    product = "QEMU" if look.machine.get(k.VMM) == "qemu" else ""
    names = [f"{product} {version}", look.get(k.BACKEND_PRODUCT) or ""]
    for departure in DEPARTURES:
        paths = [path for path in Path if path not in row.predicted and departure.when(facts, path)]
        if not paths:
            continue
        if any(departure.covers(name) for name in names):
            what: list[Seen] = [by_rule(f"{departure.product} {departure.versions}: {departure.title}")]
            return Hit([*look.seen(k.VMM_VERSION, k.IOMMU, k.BACKEND_PRODUCT), *what], {"id": departure.id})
        if departure.product == product and not version:
            return Open(Input.QMP)
    return None


RULES: Final = (
    Rule(
        "VA901",
        "two views of the device contradict each other",
        Severity.WARNING,
        About.DEVICE,
        _contradiction,
        "Both cannot be true of one running device. Either they were taken at different times (the configuration was "
        "changed and the machine not started again), or they are of different machines, or one of them is wrong.",
        {"all": "take both at the same time, of the same machine; after a change of the configuration start it again"},
        spec("2.2.1", "the driver MUST NOT accept a feature which the device did not offer"),
    ),
    Rule(
        "VA902",
        "the device is out of order, and nothing that was given says why",
        Severity.ERROR,
        About.DEVICE,
        _unexplained,
        "FAILED: the driver gave up. DEVICE_NEEDS_RESET: the device met an error that it cannot recover from, such "
        "as an address that leads nowhere.",
        {
            "guest": "its kernel log says more (--log); to start over: the device's name, written to "
            "its driver's files unbind and bind",
        },
        spec("2.1", "FAILED and DEVICE_NEEDS_RESET of the device status"),
    ),
    Rule(
        "VA903",
        "this product is known to do otherwise than the rule says",
        Severity.WARNING,
        About.DEVICE,
        _departure,
        "What the table says is what the rule allows. This version of the product was seen to depart from it here, so "
        "the bytes most likely go another way.",
        {
            "QEMU": "a version that is not concerned, or a machine that avoids it: see what was seen",
            "all": "'virtiova explain {id}' says more; 'virtiova probe' on the same machine shows where the bytes go",
        },
        Citation("virtiova", "known departures", "each was observed, and says on which versions"),
    ),
)
