# SPDX-License-Identifier: Apache-2.0
"""VA501, VA502, VA601, VA602: memory that is seen differently, written past its end, too small, or mapped too often."""

from __future__ import annotations

import re
from typing import Final

from virtiova.collect import keys as k
from virtiova.collect import messages as m
from virtiova.policy import Front
from virtiova.result.scan import Severity
from virtiova.scan import history
from virtiova.scan.rule import About, Answer, Hit, Input, Look, Open, Rule
from virtiova.scan.rules.start import lacks_bit
from virtiova.spec import Citation, commit

_SEGMENT: Final = 256 << 10
"""Bytes: the largest piece that swiotlb gives out, 128 slots of 2 KiB."""
_NEARLY: Final = 0.9
_SIZE: Final = re.compile(r"sz: (\d{1,12}) bytes")


def _incoherent(look: Look) -> Answer:
    if look.machine.get(k.ARCH) not in ("aarch64", "arm") or look.facts.get(k.TRANSPORT) != "mmio":
        return None
    mapped = look.facts.get(k.ACCEPTED) or look.machine.get(k.XEN_DOMAIN) or look.machine.get(k.RESTRICTED)
    coherent, said = look.facts.get(k.DMA_COHERENT), look.said(m.NOT_A_HEAD.text)
    if coherent is False and mapped:
        return Hit([*look.seen(k.DMA_COHERENT, k.ACCEPTED), *said])
    if coherent is None and look.facts.get(k.ACCEPTED) is not False and said:
        return Open(Input.GUEST)
    return None


def _premapped(look: Look) -> Answer:
    kernel = look.machine.fact(k.KERNEL)
    if kernel is None or look.facts.get(k.DRIVER) != "virtio_net":
        return None
    if not history.PREMAPPED.has(kernel.value):
        return None
    return Hit([kernel.seen(f"kernel {kernel.value}"), *look.seen(k.DRIVER)])


def _bounce(look: Look) -> Answer:
    full = look.said(m.BOUNCE_FULL.text)
    slots, used = look.machine.fact(k.SWIOTLB_SLOTS), look.machine.fact(k.SWIOTLB_USED)
    seen = look.seen(k.RESTRICTED)
    if full:
        sizes = [int(found[1]) for line in full if (found := _SIZE.search(line.text))]
        large = "; the request was for more than 256 KiB at once, which no pool gives out" * any(
            size > _SEGMENT for size in sizes
        )
        return Hit([*full, *look.seen(k.SWIOTLB_SLOTS, k.SWIOTLB_USED), *seen], _wanted(look) | {"large": large})
    if slots is None or used is None or slots.value <= 0 or used.value < _NEARLY * slots.value:
        return None
    text = f"{used.value} of {slots.value} bounce slots are in use"
    return Hit([used.seen(text), *seen], _wanted(look) | {"large": ""}, Severity.WARNING)


def _wanted(look: Look) -> dict[str, str]:
    """Twice the slots that there are, as the kernel takes them; the default is 64 MiB."""
    slots = look.machine.get(k.SWIOTLB_SLOTS) or 32768
    return {"slots": str(min(2 * slots, 524288))}


def _slow(look: Look) -> Answer:
    """An IOMMU in front that translates, and vhost behind it that asks for each translation."""
    if look.facts.get(k.BACKEND) not in ("vhost", "vhost-user"):
        return None
    if look.facts.get(k.BACKEND_ACCEPTED) is False or look.facts.get(k.BACKEND_OFFERED) is False:
        return None
    if not look.offered or look.facts.get(k.ACCEPTED) is False:
        return None
    if look.front is not Front.TRANSLATING or lacks_bit(look):
        return None
    return Hit([*look.seen(k.BACKEND, k.BACKEND_ACCEPTED), *look.basis()])


RULES: Final = (
    Rule(
        "VA501",
        "the device tree does not say that the device is coherent",
        Severity.ERROR,
        About.DEVICE,
        _incoherent,
        "Without dma-coherent in its node, Linux on Arm maps rings and buffers as non-cacheable, while the machine's "
        "program reads and writes them through its caches: the two see different contents. Only devices whose memory "
        "goes through the DMA API are concerned: bit 33 accepted, Xen, or protected memory.",
        {
            "QEMU": "-M virt writes the property by itself; so does a device tree that it makes (-M dumpdtb=FILE)",
            "Firecracker": "a release with #5538 (November 2025)",
            "guest": "add dma-coherent; to the node of {device} in the device tree that the machine is started with",
        },
        Citation("Devicetree specification 0.4", "2.3.10", "dma-coherent: the device is capable of coherent DMA"),
        "firecracker-microvm/firecracker#5536, #5538",
    ),
    Rule(
        "VA502",
        "virtio_net of this kernel can write past a page of receive buffers",
        Severity.WARNING,
        About.DEVICE,
        _premapped,
        "From v6.10 on virtio_net keeps 16 bytes of its own in front of each fragment of receive buffers, and can "
        "write past its end when that is one page (net.core.high_order_alloc_disable=1, fragmented memory): memory is "
        "corrupted, copies over the network fail, the kernel crashes. It was turned off before v6.11.",
        {
            "guest": "Linux 6.11 or newer; the fix did not apply to 6.10 (which is no longer maintained), unless a "
            "distribution has it. Until then: sysctl net.core.high_order_alloc_disable=0"
        },
        history.PREMAPPED.citation,
        "reverts dc4547fbba87, 38eef112a8e5, 111fc9f517cb; netdev 20240906123137.108741-1-xuanzhuo@linux.alibaba.com; "
        "f9dac92ba908 (in v6.10) began it",
    ),
    Rule(
        "VA601",
        "the bounce buffers are used up",
        Severity.ERROR,
        About.MACHINE,
        _bounce,
        "A guest whose memory is protected copies all that its devices read and write through bounce buffers. When "
        "these are used up, requests fail or wait.",
        {
            "kernel": "swiotlb={slots} (slots of 2 KiB), or a kernel with CONFIG_SWIOTLB_DYNAMIC (v6.6){large}",
            "QEMU": "fewer requests at a time: num-queues= and queue-size= of virtio-blk; num_queues= and "
            "virtqueue_size= of virtio-scsi",
        },
        commit("83ca25948940", "swiotlb: dump used and total slots when swiotlb buffer is full", "v5.2"),
        "AMDESE/AMDSEV#116, #281; coreos/coreos-assembler#3435; microsoft/openvmm#1116",
    ),
    Rule(
        "VA602",
        "vhost behind an IOMMU: every mapping is a round trip",
        Severity.NOTE,
        About.DEVICE,
        _slow,
        "The back end asks the machine for each translation and is told of each that ends. Where the guest maps and "
        "unmaps for every request, that is most of the time spent: a fifth of the throughput was left.",
        {
            "kernel": "iommu=pt (x86) or iommu.passthrough=1 (Arm) where the guest's own drivers need no protection; "
            "else iommu.strict=0, which unmaps lazily",
            "guest": "user-space drivers (DPDK): hugepages, mapped once by vfio",
            "QEMU": "no IOMMU if nothing needs it; or a device that QEMU serves itself (vhost=off): translations are "
            "looked up in place",
        },
        commit("f7ef7e6e3ba6", "vhost: correctly turn on VIRTIO_F_IOMMU_PLATFORM", "QEMU 5.0"),
        "QEMU hw/virtio/vhost.c; observed with QEMU 7.2 and a back end in Python: of 11,800 reads a second 2,300 were "
        "left",
    ),
)
