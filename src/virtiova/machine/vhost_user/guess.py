# SPDX-License-Identifier: Apache-2.0
"""What kind of device a back end is: vhost-user never says so, so that it has to be guessed."""

from __future__ import annotations

from typing import Final

from virtiova.errors import NotPossibleError

# Device-specific feature bits (virtio 1.4, 5.1.3 and 5.2.3) that the other type has no meaning for.
_NET_ONLY: Final = {
    3: "MTU",
    7: "GUEST_TSO4",
    8: "GUEST_TSO6",
    15: "MRG_RXBUF",
    18: "CTRL_RX",
    19: "CTRL_VLAN",
    20: "CTRL_RX_EXTRA",
    21: "GUEST_ANNOUNCE",
    22: "MQ",
    23: "CTRL_MAC_ADDR",
}
_CONSOLE: Final = 0b111
"""SIZE, MULTIPORT and EMERG_WRITE (5.3.3). A disk with just these bits (BARRIER, SIZE_MAX, SEG_MAX) has one queue: for
more it would have to offer MQ."""
_DEVICE_BITS: Final = (1 << 24) - 1
_SECTOR_LIMIT: Final = 1 << 54


def guess_kind(features: int, queues: int | None, config: bytes | None) -> tuple[str, str]:
    """The likeliest device type (``blk``, ``console``, ``net``, ``rng``) and what speaks for it, in words.

    ``queues`` is GET_QUEUE_NUM, ``config`` the first bytes of the configuration; None where the back end has no
    such message. Raises `NotPossibleError` if nothing fits: then ``--type`` has to say it.
    """
    own = [bit for bit in range(24) if features >> bit & 1]
    net = [name for bit, name in _NET_ONLY.items() if bit in own]
    if net:
        return "net", f"feature bits that only a network device has ({', '.join(net)})"
    if queues == 2 and not features & _DEVICE_BITS & ~_CONSOLE:
        return "console", "two queues, and no feature bits but those of a console"
    if config is not None and len(config) >= 8:
        sectors = int.from_bytes(config[:8], "little")
        if 0 < sectors < _SECTOR_LIMIT:
            return "blk", f"its configuration begins with a number of sectors ({sectors})"
    if not features & _DEVICE_BITS and config is None and queues in (None, 1):
        return "rng", "it has no feature bits of its own, no configuration, and one queue"
    raise NotPossibleError("what kind of device this back end is cannot be guessed; say it with --type")
