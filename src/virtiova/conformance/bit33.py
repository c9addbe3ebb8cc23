# SPDX-License-Identifier: Apache-2.0
"""Cases on bit 33 itself: offered, taken, left alone, and what the addresses are then."""

from __future__ import annotations

from virtiova.conformance.case import case, vhost_user
from virtiova.conformance.stand import Stand
from virtiova.driver.open import driver_class
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, has
from virtiova.spec import spec
from virtiova.wire.vhost_user import ProtocolFeature


@case(
    "bit33-offered",
    "the back end offers bit 33",
    spec("6", "a device that takes platform addresses says so by VIRTIO_F_ACCESS_PLATFORM"),
    why="A back end that does not offer the bit cannot be used behind an IOMMU: QEMU refuses iommu_platform=on, and "
    "some of its devices go on without it, around the IOMMU.",
    fix="Offer bit 33 in GET_FEATURES, and with it the protocol features BACKEND_REQ and REPLY_ACK.",
)
def bit33_offered(stand: Stand) -> str:
    """Look at GET_FEATURES, and at the protocol features that the bit needs."""
    if not has(stand.vhost.offered, VIRTIO_F_ACCESS_PLATFORM):
        stand.unclear(
            f"GET_FEATURES is 0x{stand.vhost.offered:x}: bit 33 is not offered",
            "a back end need not know of IOMMUs: then it takes guest-physical addresses",
            "one that is to serve a machine with an IOMMU has to offer the bit",
        )
    stand.asking = True
    if not stand.front.speaks(ProtocolFeature.BACKEND_REQ):
        stand.fail("bit 33 is offered without BACKEND_REQ: it could not ask for a translation")
    if not stand.acknowledges:
        stand.unclear(
            "bit 33 is offered without REPLY_ACK",
            "a back end may do without acknowledgements, and wait for the UPDATE alone",
            "front ends such as QEMU need them to know when a translation is no longer used, and refuse the bit",
        )
    return f"GET_FEATURES is 0x{stand.vhost.offered:x}, with BACKEND_REQ and REPLY_ACK"


@case(
    "translate",
    "with bit 33 a request lands where the mapping points, not at the bare address",
    vhost_user("IOMMU support", "with VIRTIO_F_ACCESS_PLATFORM, addresses in rings and descriptors are I/O addresses"),
    why="Bytes at the bare address are somebody else's memory: the guest's IOMMU protects nothing any more.",
    fix="Translate every address that comes from a ring or a descriptor through the IOTLB before it is used.",
)
def translate(stand: Stand) -> str:
    """Let the device write to X, which is mapped to page A; page B lies at guest-physical X."""
    stand.translating(start=False)
    stand.asking = True
    stand.start()
    watched = stand.write()
    stand.must_land(watched, "A", "a buffer at X")
    if "B" in stand.pages(watched, "ring"):
        stand.fail("the used ring was written at the bare address")
    if not stand.misses(stand.data.addr):
        stand.fail(f"the back end never asked for 0x{stand.data.addr:x}, and reached it all the same")
    return f"page A, after {stand.front.counters.misses} misses"


@case(
    "bit33-declined",
    "without bit 33 addresses are guest-physical, and nothing is asked",
    spec(
        "6.1",
        "a driver should take VIRTIO_F_ACCESS_PLATFORM if it is offered; where it does not, addresses are physical",
    ),
    why="A back end that asks for translations that nobody gave it the right to ask for hangs the guest's disk.",
    fix="Translate only if bit 33 is in the last SET_FEATURES, not if it is merely offered.",
)
def bit33_declined(stand: Stand) -> str:
    """Negotiate all but bit 33, with the IOMMU on, and let the device write to X: page B is at guest-physical X."""
    if not driver_class(stand.transport.device_id).writes:
        stand.skip("this device fills no buffer of the driver's choice")
    stand.enable_iommu()
    if stand.negotiate(take=False).refused:
        return f"refused: without bit 33 it does not operate; {stand.still_there()}"
    stand.start()
    stand.asking = True
    stand.must_land(stand.write(), "B", "a buffer at guest-physical X")
    if stand.front.counters.misses:
        stand.fail(f"it asked {stand.front.counters.misses} times for a translation, without bit 33")
    return "page B, and no miss"
