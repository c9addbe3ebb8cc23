# SPDX-License-Identifier: Apache-2.0
"""The register of experiments: each written once, against the ports, and run on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from virtiova.driver.blk import F_RO
from virtiova.driver.open import driver_class
from virtiova.errors import UsageError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, DeviceId, has
from virtiova.probe.rig import LENGTH, FeaturesRefusedError, NotApplicableError, Outcome, Rig, Watched
from virtiova.spec import Citation

Run = Callable[[Rig], Outcome]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question to a device. ``id`` is stable for ever. ``kinds`` are the kinds of device that it can be put to
    (``blk``, ``gpu``, as in their names); empty: to all. Nobody can have an ``iommu`` under test: what is asked
    of one is asked by name, with another device behind it."""

    id: str
    title: str
    citation: Citation
    run: Run
    kinds: tuple[str, ...] = ()


EXPERIMENTS: Final[dict[str, Experiment]] = {}
"""With one device."""
SEVERAL: Final[dict[str, Experiment]] = {}
"""Which make sense only beside other devices in the same machine."""


def experiment(name: str, title: str, citation: Citation, *kinds: str, several: bool = False) -> Callable[[Run], Run]:
    """Register a function as an experiment, for devices of these kinds only if any are named; ``several``: one that
    wants more than one device in the machine."""

    def register(run: Run) -> Run:
        if name in EXPERIMENTS or name in SEVERAL:
            raise ValueError(f"two experiments are called {name}")
        (SEVERAL if several else EXPERIMENTS)[name] = Experiment(name, title, citation, run, kinds)
        return run

    return register


def find(name: str) -> Experiment:
    """The experiment of that name; `UsageError` with the nearest one if there is none."""
    try:
        return (EXPERIMENTS | SEVERAL)[name]
    except KeyError:
        raise UsageError.unknown("experiment", name, EXPERIMENTS | SEVERAL) from None


# -- what experiments need, said once ----------------------------------------------------------------------------


def need_iommu(rig: Rig) -> None:
    """The question is about an IOMMU's tables."""
    if not rig.iommu.in_front:
        raise NotApplicableError("no IOMMU is in front of the device")


def need_writes(rig: Rig) -> None:
    """The question is about a payload that the device writes."""
    if not driver_class(rig.transport.device_id).writes:
        raise NotApplicableError("this device fills no buffer of the driver's choice")


def need_type(rig: Rig, device_id: DeviceId) -> None:
    """The question is about requests that only this type of device has."""
    if rig.transport.device_id != device_id:
        raise NotApplicableError(f"only {device_id.name.lower()} devices have such requests")


def need_reads(rig: Rig) -> None:
    """The question is about a payload that the device reads."""
    driver = driver_class(rig.transport.device_id)
    if not driver.reads:
        raise NotApplicableError("this device reads no payload")
    if rig.machine.peer.reach == "none":
        raise NotApplicableError(driver.out_of_reach)
    if rig.machine.peer.reach == "echo" and rig.transport.device_id == DeviceId.BLOCK and rig.offers(F_RO):
        raise NotApplicableError("the disk may only be read (VIRTIO_BLK_F_RO)")


def need_modern(rig: Rig) -> None:
    """The question is about FEATURES_OK."""
    if rig.transport.legacy:
        raise NotApplicableError("the legacy interface has no FEATURES_OK and no bit 33")


def need_offer(rig: Rig, *, offered: bool = True) -> None:
    """The question is about an offered bit 33 (or about one that is not)."""
    negotiated = rig.negotiated
    if negotiated is None or has(negotiated.offered, VIRTIO_F_ACCESS_PLATFORM) is not offered:
        raise NotApplicableError("bit 33 is not offered" if offered else "bit 33 is offered")


def bring_up(rig: Rig) -> None:
    """IOMMU on, negotiated, started: the way most experiments begin."""
    need_writes(rig)
    bring_up_any(rig)


def bring_up_any(rig: Rig) -> None:
    """The same with a device that may have no payload but what its requests name."""
    rig.enable_iommu()
    if rig.negotiate().refused:
        raise FeaturesRefusedError
    rig.start()


REPEATED = "the same request reached memory once the page was mapped and the ring restarted"


def prove_alive(
    rig: Rig,
    watched: Watched,
    mend: Callable[[], None],
    again: Callable[[], Watched] | None = None,
    said: str = REPEATED,
) -> str:
    """What shows that a device that reached nothing was able to: its fault, or the same request completing once
    ``mend`` has put right what was in its way, and the ring was restarted; ``said`` says so in words.

    ``again`` makes that request; without it the device writes to the rig's payload. Many an IOMMU records no
    faults, so that every experiment which may end with silence needs this.
    """
    if rig.fault_proof(watched) or watched.reached or watched.gave_up:
        return ""
    negotiated = rig.negotiated
    mend()
    rig.restart()
    repeat = again or (lambda: rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data()))
    reached = repeat().reached
    rig.negotiated = negotiated
    return said if reached else ""
