# SPDX-License-Identifier: Apache-2.0
"""Feature bits, their names in the kernel and the specification, and what a driver keeps of an offer.

Sources: virtio 1.4, chapter 6 and 2.1-2.2; Linux ``include/uapi/linux/virtio_config.h`` and
``drivers/virtio/virtio_ring.c`` before and after commit 1a937693993f ("virtio: new feature to detect
IOMMU device quirk") (in v4.8).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Final


class DeviceId(enum.IntEnum):
    """Virtio device types that this project has a driver or a device for (virtio 1.4, chapter 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5
    GPU = 16
    VSOCK = 19
    IOMMU = 23
    MEMORY = 24
    FS = 26
    PMEM = 27


class Feature(enum.IntEnum):
    """Bit numbers of the transport range (virtio 1.4, chapter 6)."""

    NOTIFY_ON_EMPTY = 24
    ANY_LAYOUT = 27
    RING_INDIRECT_DESC = 28
    RING_EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43


VIRTIO_F_VERSION_1: Final = 32
VIRTIO_F_IOMMU_PLATFORM: Final = 33
"""The name of 2016. Clear: the device has the quirk. Set: its addresses are the platform's."""
VIRTIO_F_ACCESS_PLATFORM: Final = VIRTIO_F_IOMMU_PLATFORM
"""The name since 2018 (specification) and 2020 (Linux)."""
VIRTIO_F_ORDER_PLATFORM: Final = 36

VIRTIO_F_IOMMU_PASSTHROUGH: Final = "VIRTIO_F_IOMMU_PASSTHROUGH"
"""A hint that the patch clears. No source gives it a number, so it is known by name only."""

VIRTIO_TRANSPORT_F_START: Final = 28
VIRTIO_TRANSPORT_F_END_BEFORE: Final = 33
"""Exclusive end of the transport range before the patch: bit 33 was outside, so never accepted."""
VIRTIO_TRANSPORT_F_END: Final = 34
"""Exclusive end of the transport range with the patch."""
VIRTIO_TRANSPORT_F_END_TODAY: Final = 42

LEGACY_FEATURE_BITS: Final = 32
"""The legacy interface has no room for bit 33 (virtio 1.4, 2.2.3)."""


class Status(enum.IntFlag):
    """Device status bits (virtio 1.4, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


class Generation(enum.StrEnum):
    """Whose rule: the driver's side of the story at a point of its history."""

    BEFORE = "before"
    """Linux before the patch: Xen or not is all that counts."""
    PATCH = "patch"
    """Version 3 of the patch as mailed: tests the bit itself, clears the PASSTHROUGH hint by name."""
    MAINLINE = "mainline"
    """As merged in v4.8: through ``virtio_has_iommu_quirk()``."""
    TODAY = "today"
    """Today's Linux: ``vring_use_map_api()``, and restricted memory checked before FEATURES_OK."""


_KEPT: Final[dict[Generation, frozenset[int]]] = {
    Generation.BEFORE: frozenset({28, 29, 32}),
    Generation.PATCH: frozenset({28, 29, 32, 33}),
    Generation.MAINLINE: frozenset({28, 29, 32, 33}),
    Generation.TODAY: frozenset({28, 29, 32, 33, 34, 35, 36, 38}),
}
_END: Final[dict[Generation, int]] = {
    Generation.BEFORE: VIRTIO_TRANSPORT_F_END_BEFORE,
    Generation.PATCH: VIRTIO_TRANSPORT_F_END,
    Generation.MAINLINE: VIRTIO_TRANSPORT_F_END,
    Generation.TODAY: VIRTIO_TRANSPORT_F_END_TODAY,
}


def mask(bits: Iterable[int]) -> int:
    """Bit numbers as a feature word."""
    word = 0
    for bit in bits:
        word |= 1 << bit
    return word


def has(word: int, bit: int) -> bool:
    """Is ``bit`` set in the feature word?"""
    return bool(word >> bit & 1)


def names(word: int, own: Mapping[int, str] | None = None) -> list[str]:
    """The bits of a feature word by name: transport bits, and those of a device that ``own`` names; others as
    ``bit N``."""
    known = {f.value: f.name for f in Feature} | dict(own or {})
    return [known.get(bit, f"bit {bit}") for bit in range(128) if has(word, bit)]


def vring_transport_features(word: int, generation: Generation = Generation.TODAY) -> int:
    """What is left of a feature word after the ring code cleared the transport bits that it does not know.

    Bits outside of ``VIRTIO_TRANSPORT_F_START <= bit < VIRTIO_TRANSPORT_F_END`` are left as they are. In
    the patch as mailed the PASSTHROUGH hint is cleared as well: having no number, it needs no code.
    """
    for bit in range(VIRTIO_TRANSPORT_F_START, _END[generation]):
        if bit not in _KEPT[generation]:
            word &= ~(1 << bit)
    return word


def transport_hints(hints: Iterable[str], generation: Generation) -> frozenset[str]:
    """The hints, by name, that a driver acts upon. The patch obeys the kernel's configuration instead."""
    if generation is Generation.PATCH:
        return frozenset(hints) - {VIRTIO_F_IOMMU_PASSTHROUGH}
    return frozenset()


def driver_features(
    offered: int, table: int, *, legacy: bool = False, generation: Generation = Generation.TODAY
) -> int:
    """What a Linux driver with the feature ``table`` writes for an offer (``virtio_dev_probe``).

    Transport bits are taken from the offer without asking the driver's table, then filtered by the ring code;
    all other bits need the table. A legacy device shows 32 bits only.
    """
    if legacy:
        offered &= (1 << LEGACY_FEATURE_BITS) - 1
    transport = mask(range(VIRTIO_TRANSPORT_F_START, _END[generation]))
    return vring_transport_features(offered & (table | transport), generation)


def virtio_has_iommu_quirk(features: int) -> bool:
    """Mainline's test on the negotiated features: clear bit 33 means quirk (``virtio_has_dma_quirk`` since v5.9)."""
    return not has(features, VIRTIO_F_IOMMU_PLATFORM)


def vring_use_dma_api(features: int, *, xen_domain: bool, generation: Generation = Generation.TODAY) -> bool:
    """Does the driver take its addresses from the DMA API?

    Before the patch: on a Xen domain only. Since: if the device has no quirk; else on a Xen domain ("left to
    guess"); else no. ``features`` are the negotiated ones.
    """
    if generation is Generation.BEFORE:
        return xen_domain
    if not virtio_has_iommu_quirk(features):
        return True
    return xen_domain
