# SPDX-License-Identifier: Apache-2.0
"""Programs that serve virtio devices outside of a machine: how they are recognised, and what they do about bit 33."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Product:
    """One program. ``commands`` are its names, with ``*`` and ``?``; ``sockets`` the options that name its sockets,
    ``vduse`` those that name a device of VDUSE's.

    An option of ``nested`` has sub-options, as in ``--vdev net_vhost0,iface=PATH``, and those of ``keys`` name a
    socket. ``switch`` is the sub-option that makes it offer bit 33. ``offers``: what it does without one, None where
    nothing on a command line says it. ``needs`` must be among the words, for names that others have, too.
    """

    name: str
    commands: tuple[str, ...]
    offers: bool | None
    source: str
    sockets: tuple[str, ...] = ()
    vduse: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    switch: str = ""
    needs: tuple[str, ...] = ()
    type: str = ""
    rust: bool = False
    """Built on the vhost-user crates of rust-vmm."""


_RUST: Final = "rust-vmm/vhost#312: the vhost-user half of the crate has no IOTLB"

PRODUCTS: Final[tuple[Product, ...]] = (
    Product(
        "virtiova",
        ("virtiova",),
        True,
        "this project: its back ends offer bit 33",
        sockets=("--socket-path",),
        vduse=("--vduse",),
        needs=("serve",),
    ),
    Product(
        "virtiofsd of QEMU",
        ("virtiofsd",),
        False,
        "observed with QEMU 7.2: refused by QEMU when iommu_platform=on; libvhost-user has no IOTLB",
        sockets=("--socket-path",),
        needs=("-o",),
        type="fs",
    ),
    Product(
        "virtiofsd 1.x",
        ("virtiofsd", "virtiofsd-*"),
        False,
        _RUST,
        sockets=("--socket-path", "--socket"),
        type="fs",
        rust=True,
    ),
    Product(
        "dpdk",
        ("dpdk-testpmd", "testpmd"),
        False,
        'DPDK 002d6a7e5517 ("vhost: add flag to enable IOMMU support"): off unless the application asks for it; '
        "observed with 22.11",
        nested=("--vdev",),
        keys=("iface",),
        switch="iommu-support",
        type="net",
    ),
    Product(
        "dpdk",
        ("dpdk-vhost", "vhost-switch", "dpdk-vhost_blk", "dpdk-vhost_crypto"),
        False,
        "DPDK 26.07: examples/vhost, vhost_blk and vhost_crypto register without RTE_VHOST_USER_IOMMU_SUPPORT",
        sockets=("--socket-file",),
    ),
    Product(
        "ovs-vswitchd",
        ("ovs-vswitchd",),
        None,
        "Open vSwitch 2.9 and newer: other_config:vhost-iommu-support in its database, false by default",
        type="net",
    ),
    Product(
        "spdk",
        ("spdk_tgt", "vhost", "spdk_vhost"),
        False,
        "SPDK registers with DPDK's vhost library without RTE_VHOST_USER_IOMMU_SUPPORT",
        needs=("-m", "-s", "-S", "--cpumask", "--mem-size", "-r", "-c", "--config", "--json"),
    ),
    Product(
        "qemu-storage-daemon",
        ("qemu-storage-daemon",),
        False,
        "observed with 7.2: its features have no bit 33, IOTLB_MSG is an unhandled request",
        nested=("--export",),
        keys=("addr.path",),
        type="blk",
    ),
    Product(
        "vhost_user_block",
        ("vhost_user_block", "vhost_user_blk"),
        False,
        _RUST,
        nested=("--block-backend",),
        keys=("socket",),
        type="blk",
        rust=True,
    ),
    Product(
        "vhost_user_net",
        ("vhost_user_net",),
        False,
        _RUST,
        nested=("--net-backend",),
        keys=("socket",),
        type="net",
        rust=True,
    ),
    Product(
        "vhost-device-*",
        ("vhost-device-*",),
        False,
        _RUST,
        sockets=("--socket", "--socket-path", "-s"),
        nested=("--vm",),
        keys=("socket",),
        rust=True,
    ),
    Product(
        "libvhost-user",
        ("vhost-user-blk", "vhost-user-scsi", "vhost-user-gpu", "vhost-user-input", "vhost-user-bridge"),
        False,
        "contrib/ of QEMU, on libvhost-user, which has no IOTLB",
        sockets=("-s", "--socket-path", "-u", "-p"),
    ),
)

DPDK_ABI: Final[dict[str, str]] = {
    "20.0": "19.11", "20.0.1": "20.02", "20.0.2": "20.05", "20.0.3": "20.08",
    "21.0": "20.11", "21.1": "21.02", "21.2": "21.05", "21.3": "21.08",
    "22.0": "21.11", "22.1": "22.03", "22.2": "22.07", "23.0": "22.11", "23.1": "23.03", "23.2": "23.07",
    "24.0": "23.11", "24.1": "24.03", "24.2": "24.07", "25.0": "24.11", "25.1": "25.03", "25.2": "25.07",
    "26.0": "25.11", "26.1": "26.03", "26.2": "26.07",
}  # fmt: skip
"""The version of the ABI in a library's file name (``librte_vhost.so.23.0``), and the release: DPDK's ABI_VERSION."""
