# SPDX-License-Identifier: Apache-2.0
"""Domains by chance: what we read of each is what the real libvirt makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from libvirt_kit import Libvirt, missing
from test_scan_libvirt_real import BY_LIBVIRT, of_words, of_xml

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(bool(missing()), reason=f"n/a: {missing()}"),
]

MODELS = ["virtio", "virtio-transitional", "virtio-non-transitional"]
OPTIONS = st.sampled_from(
    ["", "<driver iommu='on'/>", "<driver iommu='off' ats='on'/>", "<driver iommu='on' ats='on' packed='on'/>"]
)
ADDRESSES = st.sampled_from(
    ["", "", "", "<address type='pci' slot='0x0b'/>", "<address type='pci' slot='0x0c' function='1'/>",
     "<address type='pci' bus='0x03' slot='0'/>"]
)  # fmt: skip


@pytest.fixture(scope="module")
def real() -> Iterator[Libvirt]:
    with Libvirt() as made:
        yield made


@st.composite
def disks(draw: st.DrawFn, number: int, folder: str) -> str:
    model = draw(st.sampled_from([*MODELS, ""]))
    bus = draw(st.sampled_from(["virtio", "virtio", "scsi", "sata"]))
    said = f"model='{model}'" if model and bus == "virtio" else ""
    driver = "iommu='on'" if draw(st.booleans()) and bus == "virtio" else ""
    dev = {"virtio": "vd", "scsi": "sd", "sata": "sd"}[bus] + "abcdefgh"[number]
    place = draw(ADDRESSES) if bus == "virtio" else ""
    return (
        f"<disk type='file' device='disk' {said}><driver name='qemu' type='raw' {driver}/>"
        f"<source file='{folder}/disk1.img'/><target dev='{dev}' bus='{bus}'/>{place}</disk>"
    )


@st.composite
def others(draw: st.DrawFn, folder: str) -> str:
    model, options, place = draw(st.sampled_from(MODELS)), draw(OPTIONS), draw(ADDRESSES)
    kind = draw(st.integers(0, 8))
    match kind:
        case 0:
            backend = "<backend model='random'>/dev/urandom</backend>"
            return f"<rng model='{model}'>{backend}{options}{place}</rng>"
        case 1:
            return f"<memballoon model='{draw(st.sampled_from([*MODELS, 'none']))}'/>"
        case 2:
            return (
                f"<input type='{draw(st.sampled_from(['keyboard', 'mouse', 'tablet']))}' bus='virtio'>{options}</input>"
            )
        case 3:
            # An export forgets a network card's options, and its address.
            sort = draw(st.sampled_from([*MODELS, "e1000", "rtl8139"]))
            return f"<interface type='user'><model type='{sort}'/></interface>"
        case 4:
            number = draw(st.integers(0, 2))
            sort = draw(st.sampled_from(["virtio-scsi", "virtio-transitional", "virtio-non-transitional", "lsilogic"]))
            options = options if sort != "lsilogic" else ""
            return f"<controller type='scsi' index='{number}' model='{sort}'>{options}</controller>"
        case 5:
            return "<channel type='pty'><target type='virtio' name='a'/></channel>"
        case 6:
            return f"<filesystem type='mount'>{options}<source dir='{folder}'/><target dir='t'/></filesystem>"
        case 7:
            sort = draw(st.sampled_from(["virtio", "vga", "qxl"]))
            return f"<video>{options if sort == 'virtio' else ''}<model type='{sort}'/></video>"
        case _:
            sort = draw(st.sampled_from(["pcie-root-port", "pcie-to-pci-bridge", "pci-bridge", "dmi-to-pci-bridge"]))
            return f"<controller type='pci' model='{sort}'/>"


@st.composite
def domains(draw: st.DrawFn, folder: str) -> str:
    machine = draw(st.sampled_from(["q35", "q35", "pc"]))
    iommu = draw(st.sampled_from(["", "<iommu model='intel'/>", "<iommu model='virtio'/>"])) if machine == "q35" else ""
    inside = [draw(disks(number, folder)) for number in range(draw(st.integers(0, 3)))]
    inside += [draw(others(folder)) for _ in range(draw(st.integers(0, 6)))]
    return (
        "<domain type='qemu'><name>vm</name><uuid>6ba7b820-9dad-11d1-80b4-00c04fd430c8</uuid>"
        "<memory unit='MiB'>256</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='{machine}'>hvm</type></os><features><acpi/></features>"
        f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{iommu}{''.join(inside)}</devices></domain>"
    )


def test_a_domain_by_chance_is_what_libvirt_makes_of_it(real: Libvirt) -> None:
    taken = 0

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(domains(str(real.folder)))
    def check(text: str) -> None:
        nonlocal taken
        path = real.file(text)
        said = real.virsh(
            f"define {path}", "dumpxml --inactive vm", "undefine vm", f"domxml-to-native qemu-argv {path}", fails=True
        )
        written, end, line = said.partition("</domain>")
        # Many are beyond what libvirt takes: a device where no such device may be.
        assume("-device" in line)
        taken += 1
        words = line.strip().encode()
        assert of_xml(written + end) == of_words(words)
        assert of_xml(text, BY_LIBVIRT) == of_words(words, BY_LIBVIRT)

    check()
    assert taken > 40
