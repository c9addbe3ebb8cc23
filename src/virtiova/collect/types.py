# SPDX-License-Identifier: Apache-2.0
"""Virtio device types by number and by name (virtio 1.4, chapter 5)."""

from __future__ import annotations

from typing import Final

TYPES: Final[dict[int, str]] = {
    1: "net",
    2: "blk",
    3: "console",
    4: "rng",
    5: "balloon",
    6: "iomem",
    7: "rpmsg",
    8: "scsi",
    9: "9p",
    10: "mac80211-wlan",
    11: "rproc-serial",
    12: "caif",
    13: "balloon-new",
    16: "gpu",
    17: "clock",
    18: "input",
    19: "vsock",
    20: "crypto",
    21: "signal-dist",
    22: "pstore",
    23: "iommu",
    24: "mem",
    25: "sound",
    26: "fs",
    27: "pmem",
    28: "rpmb",
    29: "mac80211-hwsim",
    30: "video-encoder",
    31: "video-decoder",
    32: "scmi",
    33: "nitro-sec-mod",
    34: "i2c",
    35: "watchdog",
    36: "can",
    38: "parameter-server",
    39: "audio-policy",
    40: "bluetooth",
    41: "gpio",
    42: "rdma",
    43: "camera",
    44: "ism",
    45: "spi",
}


def type_name(number: int) -> str:
    """The name of a device type; ``type N`` where it has none here."""
    return TYPES.get(number, f"type {number}")
