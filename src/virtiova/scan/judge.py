# SPDX-License-Identifier: Apache-2.0
"""From what was collected of a device to its row: declared, predicted by the rule, observed, and what that comes to."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from virtiova.addr import AddressKind
from virtiova.collect import keys as k
from virtiova.collect.facts import Device, Fact, View
from virtiova.policy import Facts, Front, predict
from virtiova.result import Path, Prediction, path_order
from virtiova.result.scan import ScannedDevice, Seen
from virtiova.scan.front import InFront, hardware, in_front, name_of

_FEATURES_OK: Final = 8
# Drivers of Linux that do not take bit 33 from every offer: all others leave it to the ring code, which takes it.
_DECLINES: Final = frozenset({"balloon"})


def judge(view: View, device: Device) -> ScannedDevice:
    """The row of one device."""
    facts = device.facts
    offered, accepted = facts.get(k.OFFERED), facts.get(k.ACCEPTED)
    taken_for, assumes = assumed(view, device)
    front = in_front(view, device)
    paths, address, reasons = _predicted(view, device, *taken_for, front)
    observed, evidence = _observed(device, front, accepted)
    verdict, why = _verdict(paths, observed, front)
    return ScannedDevice(
        name=device.name,
        type=facts.get(k.TYPE) or "unknown",
        address=facts.get(k.ADDRESS) or "",
        machine=view.name,
        offered=offered,
        accepted=accepted,
        backend_offered=facts.get(k.BACKEND_OFFERED),
        backend_accepted=facts.get(k.BACKEND_ACCEPTED),
        dma=_way(address, verdict, front),
        predicted=path_order(paths),
        observed=observed,
        verdict=verdict,
        basis=[*_declared(device), *front.basis, *evidence],
        assumes=[*assumes, *front.assumes],
        reasons=list(reasons.reasons),
        why=why,
        iommu=front.iommu,
        group=facts.get(k.GROUP) or "",
        driver=facts.get(k.DRIVER) or "",
        backend=facts.get(k.BACKEND) or "",
    )


def assumed(view: View, device: Device) -> tuple[tuple[bool | None, bool | None], list[str]]:
    """Bit 33 as offered and accepted, with what is not known taken for what is most likely, and that in words."""
    facts = device.facts
    offered, accepted = facts.get(k.OFFERED), facts.get(k.ACCEPTED)
    assumes: list[str] = []
    if offered is False and accepted is None:
        accepted = False
    if offered is None and accepted is False and _takes_all(view, device):
        offered = False
        assumes.append("the device does not offer bit 33: this driver takes it from every offer")
    if offered and accepted is None and facts.get(k.TYPE) in _DECLINES and view.machine.get(k.OS) in (None, "linux"):
        accepted = False
        assumes.append("the driver is Linux's, which never takes bit 33 of a balloon")
    elif offered and accepted is None:
        accepted = True
        assumes.append("the driver accepts bit 33")
    return (offered, accepted), assumes


def _declared(device: Device) -> list[Seen]:
    """What is said of bit 33, and where."""
    facts = device.facts
    basis: list[Seen] = []
    offer, taken = facts.fact(k.OFFERED), facts.fact(k.ACCEPTED)
    if taken is not None:
        basis.append(taken.seen(f"bit 33 is {'accepted' if taken.value else 'not accepted'}"))
    if offer is not None:
        basis.append(offer.seen(f"bit 33 is {'offered' if offer.value else 'not offered'}"))
    return basis


def _takes_all(view: View, device: Device) -> bool:
    """A Linux driver that leaves bit 33 to the ring code, which takes it (since v4.8)."""
    return (
        view.machine.get(k.KERNEL) is not None
        and bool(device.facts.get(k.DRIVER))
        and device.facts.get(k.TYPE) not in _DECLINES
        and bool(device.facts.get(k.VERSION_1))
    )


def _predicted(
    view: View, device: Device, offered: bool | None, accepted: bool | None, front: InFront
) -> tuple[set[Path], AddressKind, Prediction]:
    """What the rule allows: for each state of the IOMMU, where that is not known."""
    paths: set[Path] = set()
    kinds: set[AddressKind] = set()
    answers = [
        predict(_facts(view, device, offered, accepted, each))
        for each in ([front.front] if front.front is not None else [Front.TRANSLATING, Front.NONE])
    ]
    for answer in answers:
        paths |= answer.paths
        kinds.add(answer.address)
    if (device.facts.get(k.STATUS) or 0) & _FEATURES_OK or device.facts.get(k.STARTED):
        # It was not refused: it is there.
        paths -= {Path.REFUSED}
        if not paths:
            # By the rule it should have been; where it goes is then as if nobody insisted.
            for each in [front.front] if front.front is not None else [Front.TRANSLATING, Front.NONE]:
                facts = _facts(view, device, offered, accepted, each)
                paths |= predict(replace(facts, insists=None, restricted=False)).paths - {Path.REFUSED}
    return paths, kinds.pop() if len(kinds) == 1 else AddressKind.UNKNOWN, answers[0]


def _facts(view: View, device: Device, offered: bool | None, accepted: bool | None, front: Front) -> Facts:
    facts, machine = device.facts, view.machine
    version_1 = facts.get(k.VERSION_1)
    # What is on the vDPA bus is the system's own, whatever runs the system.
    vmm = machine.get(k.VMM) if facts.get(k.TRANSPORT) != "vdpa" else None
    return Facts(
        offered=offered,
        accepted=accepted,
        front=front,
        xen=bool(machine.get(k.XEN_DOMAIN)),
        restricted=bool(machine.get(k.RESTRICTED)) and not machine.get(k.XEN_DOMAIN),
        version_1=version_1 is not False,
        insists=True if vmm == "qemu" else None,
        declared=facts.get(k.CONFIGURED),
        can_be_legacy=bool(facts.get(k.CAN_BE_LEGACY)),
        iommu=name_of(view, device),
        hardware=hardware(view, device),
        bridged=bool(facts.get(k.BRIDGED)),
        vhost=bool(facts.get(k.BACKEND)) and facts.get(k.TRANSPORT) != "vdpa",
        pass_through="pt=on" in (machine.get(k.IOMMU_OPTIONS) or ()),
    )


def _observed(device: Device, front: InFront, accepted: bool | None) -> tuple[Path | None, list[Seen]]:
    """A path that was seen, from outside: where the rings are. None: nobody looked, or it is not certain.

    Rings that are at the device's addresses in memory prove little behind an IOMMU: it may map them to themselves.
    """
    in_ram: Fact[bool] | None = device.facts.fact(k.RINGS_IN_RAM)
    rings = device.facts.fact(k.RING_ADDRESSES)
    if in_ram is None or rings is None:
        return None, []
    where = "are its rings" if in_ram.value else "are not its rings"
    evidence = [rings.seen(), in_ram.seen(f"at these addresses of memory {where}")]
    if not in_ram.value:
        return Path.TRANSLATED, evidence
    if front.front is None:
        return None, evidence
    if front.front is not Front.TRANSLATING:
        return Path.DIRECT, evidence
    # That the IOMMU is programmed at all must have been seen, too.
    return (Path.BYPASS if accepted is False and not front.assumes else None), evidence


def _verdict(paths: set[Path], observed: Path | None, front: InFront) -> tuple[Path, str]:
    if observed is not None:
        return observed, ""
    if len(paths) == 1:
        return next(iter(paths)), ""
    return Path.UNKNOWN, front.why or f"it may be {' or '.join(path_order(paths))}"


def _way(address: AddressKind, verdict: Path, front: InFront) -> str:
    """What the bytes pass, as the table has it."""
    if verdict in (Path.REFUSED, Path.BLOCKED):
        return "-"
    through = f"{front.iommu} > " if verdict is Path.TRANSLATED else ""
    kind = address.value if address is not AddressKind.UNKNOWN else "?"
    return f"{kind} > {through}ram" if verdict is not Path.UNKNOWN else f"{kind} > ?"


def policy_facts(view: View, device: Device) -> Facts:
    """What the rule is asked about this device, with what is not known taken for what is most likely."""
    (offered, accepted), _ = assumed(view, device)
    return _facts(view, device, offered, accepted, in_front(view, device).front or Front.NONE)
