# SPDX-License-Identifier: Apache-2.0
"""Experiments on negotiation: the bit declined, carried on without, taken without an offer, taken away by a reset."""

from __future__ import annotations

from virtiova.driver.negotiate import driver_ok
from virtiova.probe.experiment import bring_up, experiment, need_modern, need_offer, need_writes, prove_alive
from virtiova.probe.rig import LENGTH, SILENT_SECONDS, NotApplicableError, Outcome, Rig
from virtiova.spec import spec

_TAKEN = "the same request reached memory once the driver had taken the bit"


def _write(rig: Rig, *, wrote_unoffered: bool = False, silent: bool = False) -> Outcome:
    """Go on with what was negotiated: a refusal is the outcome, else the device writes to X. ``silent``: there are
    devices that then reach nothing at all, and are asked for a sign of life."""
    negotiated = rig.negotiated
    facts = rig.facts(wrote_unoffered=wrote_unoffered)
    if negotiated is None or negotiated.refused:
        return rig.outcome(facts, None, x=rig.data.addr)
    need_writes(rig)
    rig.start()
    watched = rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
    live = prove_alive(rig, watched, lambda: None, said=_TAKEN) if silent else ""
    return rig.outcome(facts, watched, live=live, x=rig.data.addr)


@experiment(
    "not-taken",
    "the driver does not take an offered bit 33",
    spec("6.2", "a device MAY fail to operate further if VIRTIO_F_ACCESS_PLATFORM is not accepted"),
)
def not_taken(rig: Rig) -> Outcome:
    """FEATURES_OK is read back; if the device keeps it, the next bytes show what it made of the answer."""
    need_modern(rig)
    rig.enable_iommu()
    rig.negotiate(take=False)
    need_offer(rig)
    return _write(rig)


@experiment(
    "carry-on",
    "the driver uses the queues although FEATURES_OK was refused",
    spec("2.1.2", "the device MUST NOT consume buffers before DRIVER_OK"),
)
def carry_on(rig: Rig) -> Outcome:
    """DRIVER_OK is written all the same, and the queue kicked: is the refusal more than a word?"""
    need_modern(rig)
    rig.enable_iommu()
    negotiated = rig.negotiate(take=False)
    need_offer(rig)
    if not negotiated.refused:
        raise NotApplicableError("the device did not refuse the driver")
    need_writes(rig)
    facts = rig.facts(carries_on=True)
    rig.start(ok=False)
    driver_ok(rig.transport)
    request = rig.driver.make_device_write([(rig.data.addr, LENGTH)])
    watches = rig.paint_data()
    watched = rig.observe(request, watches, seconds=SILENT_SECONDS)
    live = prove_alive(rig, watched, lambda: None, said=_TAKEN)
    return rig.outcome(facts, watched, live=live, x=rig.data.addr)


@experiment(
    "never-offered",
    "the driver takes bit 33 although it was never offered",
    spec("2.2.1", "the driver MUST NOT accept a feature which the device did not offer"),
)
def never_offered(rig: Rig) -> Outcome:
    """The device may refuse the set or ignore the bit; it must not start to translate."""
    need_modern(rig)
    rig.enable_iommu()
    rig.negotiate(take_unoffered=True)
    need_offer(rig, offered=False)
    return _write(rig, wrote_unoffered=True)


@experiment(
    "no-version-1",
    "the driver takes neither VERSION_1 nor an offered bit 33, on the modern interface",
    spec("6.2", "a device MAY fail to operate further if VIRTIO_F_VERSION_1 is not accepted"),
)
def no_version_1(rig: Rig) -> Outcome:
    """An old driver through new registers: refused, or served with physical addresses."""
    need_modern(rig)
    rig.enable_iommu()
    rig.negotiate(take=False, version_1=False)
    need_offer(rig)
    return _write(rig, silent=True)


@experiment(
    "renegotiate",
    "after use with the bit: a reset, then negotiation without it (firmware to kernel)",
    spec("2.4", "a reset ends everything that was negotiated"),
)
def renegotiate(rig: Rig) -> Outcome:
    """The second driver's answer counts, not the first one's."""
    need_modern(rig)
    bring_up(rig)
    rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
    rig.negotiate(take=False)
    return _write(rig)
