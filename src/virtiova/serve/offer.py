# SPDX-License-Identifier: Apache-2.0
"""What a served device offers: features of virtio and of the vhost-user protocol."""

from __future__ import annotations

from typing import Final

from virtiova.device.base import Device
from virtiova.features import DeviceId, Feature, mask
from virtiova.serve.session import Offer
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import ProtocolFeature

SLOTS: Final = 64
"""Regions of memory at a time, where they come one by one."""

RING_FEATURES: Final = mask(
    [
        Feature.VERSION_1,
        Feature.ACCESS_PLATFORM,
        Feature.RING_EVENT_IDX,
        Feature.RING_INDIRECT_DESC,
        Feature.RING_PACKED,
        Feature.IN_ORDER,
    ]
)
"""IN_ORDER: whoever serves a ring, its requests are begun, done and given back in the order in which they came."""

_VHOST_FEATURES: Final = 1 << wire.F_PROTOCOL_FEATURES | 1 << wire.F_LOG_ALL
_PROTOCOL: Final = mask(
    [
        ProtocolFeature.MQ,
        ProtocolFeature.LOG_SHMFD,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.STATUS,
    ]
)


def offer_of(device: Device, *, access_platform: bool = True) -> Offer:
    """What is offered for a device: CONFIG if it has a configuration, INFLIGHT_SHMFD for a disk."""
    protocol = _PROTOCOL
    if device.config():
        protocol |= 1 << ProtocolFeature.CONFIG
    if device.device_id == DeviceId.BLOCK:
        protocol |= 1 << ProtocolFeature.INFLIGHT_SHMFD
    features = device.features | RING_FEATURES | _VHOST_FEATURES
    if not access_platform:
        features &= ~(1 << Feature.ACCESS_PLATFORM)
    return Offer(features, protocol, device.queues, SLOTS)
