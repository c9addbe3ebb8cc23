# SPDX-License-Identifier: Apache-2.0
"""What calls itself a domain and is none, or one that nobody would make: said clearly, soon, with the line."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtiova.collect import libvirt
from virtiova.collect.facts import View
from virtiova.errors import ProtocolError, VirtiovaError
from virtiova.report import scan_text
from virtiova.scan import scan_views

DATA = Path(__file__).parent / "data/libvirt"
HEAD = b"<domain type='qemu'><os><type arch='x86_64' machine='%s'>hvm</type></os>\n<devices>"
TAIL = b"</devices></domain>"
SECONDS = 10

REFUSED = [
    # Entities, inside and outside.
    (b"<!DOCTYPE l [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;'>]>\n<domain>&b;</domain>", "vm.xml:1: a document type"),
    (b"\n<!DOCTYPE d SYSTEM 'file:///etc/passwd'>\n<domain/>", "vm.xml:2: a document type"),
    (b"<!DOCTYPE d [<!ENTITY % p SYSTEM 'http://x/'> %p;]><domain/>", "vm.xml:1: a document type"),
    (b"<domain>\n&unknown;</domain>", "vm.xml:2: no XML: undefined entity"),
    # Sizes.
    (b"<domain>\n" + b"<a>" * 1_000_000, "vm.xml:2: elements nested more than 64 deep"),
    (HEAD % b"q35" + b"<x/>" * 300_000 + TAIL, "vm.xml:2: more than 200000 elements"),
    (b"<domain>" + b"x" * 50_000_000, "vm.xml: 50000008 bytes"),
    (b"<domain\n" + b" ".join(b"a%d=''" % n for n in range(300_000)) + b"/>", "vm.xml:1: more than 256 attributes"),
    (HEAD % b"q35" + b"<rng model='virtio'/>" * 9_000 + TAIL, "vm.xml: more than 4096 ports"),
    # Bytes.
    (b"<domain type='qemu'>\n<name>\xff\xfe</name></domain>", "vm.xml:2: no XML: not well-formed"),
    (b"<domain type='qemu'>\n\0</domain>", "vm.xml:2: no XML: not well-formed"),
    (b"<domain type='qemu'>\n<name>a\x01</name></domain>", "vm.xml:2: no XML: not well-formed"),
    (b"<domain\ntype='&#1;'/>", "vm.xml:2: no XML: reference to invalid character number"),
    (b"<domain type='a'\ntype='b'/>", "vm.xml:2: no XML: duplicate attribute"),
    (b"<?xml version='1.0' encoding='klingon'?><domain/>", "vm.xml:1: no XML: unknown encoding"),
    (b"<?xml version='1.0' encoding='utf-7'?><domain/>", "vm.xml:1: no XML"),
    (b"<?xml version='1.0' encoding='hex'?><domain/>", "vm.xml:1: no XML"),
    (b"<?xml version='1.0' encoding='utf-16'?><domain/>", "vm.xml:1: no XML: encoding"),
    (b"<domain type='qemu'>\n<qemu:commandline/></domain>", "vm.xml:2: no XML: unbound prefix"),
    (b"<domain type='qemu'><name>cut", "vm.xml:1: no XML: no element found"),
    (b"<domain/>\n<domain/>", "vm.xml:2: no XML: junk after document element"),
]


@pytest.mark.parametrize(("data", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_is_refused_with_the_line(data: bytes, words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ProtocolError, match=re.escape(words)):
        libvirt.collect(data, "vm.xml")
    assert time.monotonic() - begun < SECONDS


CROWDS = {
    "devices-pc": HEAD % b"pc" + b"<rng model='virtio'/>" * 1_500 + TAIL,
    "devices-q35": HEAD % b"q35" + b"<rng model='virtio'/>" * 1_500 + TAIL,
    "same-name": HEAD % b"q35" + b"<rng model='virtio'><alias name='x'/></rng>" * 1_500 + TAIL,
    "transitional": HEAD % b"q35"
    + b"<disk model='virtio-transitional'><target dev='vda' bus='virtio'/></disk>" * 1_500
    + TAIL,
    "elements": HEAD % b"q35" + b"<x y='\n'/>" * 150_000 + TAIL,
    "text": b"<domain type='qemu'><name>" + b"x" * 8_000_000 + b"</name></domain>",
    "attribute": b"<domain type='" + b"\n" * 8_000_000 + b"'/>",
    "bridges": HEAD % b"pc"
    + b"".join(
        b"<controller type='pci' index='%d' model='pci-bridge'><address type='pci' bus='%d' slot='1'/></controller>"
        % (number, number + 1)
        for number in range(1, 3_000)
    )
    + TAIL,
}


@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_is_read_in_bounded_time(name: str) -> None:
    begun = time.monotonic()
    view = libvirt.collect(CROWDS[name], "vm.xml")
    assert time.monotonic() - begun < SECONDS
    assert len(view.problems) < 200
    if name in ("devices-pc", "devices-q35", "same-name", "transitional"):
        assert view.problems == []
        assert len({each.name for each in view.devices}) == 1_501


def test_controllers_that_are_plugged_into_each_other() -> None:
    one = b"<controller type='pci' index='%d' model='pcie-root-port'>\n<address type='pci' bus='%d'/></controller>"
    view = libvirt.collect(HEAD % b"q35" + one % (1, 2) + one % (2, 1) + TAIL, "vm.xml")
    assert "vm.xml:2: controller 1 is plugged into itself" in view.problems


def test_encodings_that_are_what_they_say() -> None:
    text = "<?xml version='1.0' encoding='{}'?>\n<domain type='qemu'>\n<name>\u20ac</name></domain>"
    for encoding in ("utf-8", "utf-16", "cp1252"):
        view = libvirt.collect(text.format(encoding).encode(encoding), "vm.xml")
        assert view.name == "\u20ac"


WORDS = st.sampled_from(
    [
        "on",
        "off",
        "virtio",
        "0x0",
        "0xffffffff",
        "-1",
        "",
        "\u202e",
        "a,b==,,c",
        "x" * 300,
        "{",
        "'",
        "pci",
        "1e9",
        "../..",
    ]
)
TAGS = st.sampled_from(
    ["disk", "interface", "controller", "address", "driver", "iommu", "alias", "target", "model", "x"]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """One of our domains with elements and attributes taken away, doubled, moved and changed."""
    path = draw(st.sampled_from(sorted(DATA.glob("*.xml"))))
    root = ET.fromstring(path.read_text())
    for _ in range(draw(st.integers(1, 8))):
        everywhere = list(root.iter())
        one = everywhere[draw(st.integers(0, len(everywhere) - 1))]
        other = everywhere[draw(st.integers(0, len(everywhere) - 1))]
        match draw(st.integers(0, 5)):
            case 0 if len(one):
                one.remove(one[draw(st.integers(0, len(one) - 1))])
            case 1 if one.attrib:
                one.set(draw(st.sampled_from(sorted(one.attrib))), draw(WORDS))
            case 2 if one.attrib:
                del one.attrib[draw(st.sampled_from(sorted(one.attrib)))]
            case 3:
                one.text = draw(WORDS)
            case 4 if one is not root:
                one.tag = draw(TAGS)
            case _:
                # A copy, since nothing may hold itself.
                other.append(ET.fromstring(ET.tostring(one)) if len(everywhere) < 400 else ET.Element("x"))
    return ET.tostring(root)


def collected(data: bytes) -> View | None:
    """What is read of it; None: it is refused, with the name of the file."""
    said = ""
    try:
        return libvirt.collect(data, "vm.xml")
    except VirtiovaError as error:
        said = str(error)
    assert said.startswith("vm.xml")
    return None


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_mutated_domain_is_read_or_refused(data: bytes) -> None:
    view = collected(data)
    if view is None:
        return
    scan_text.document(scan_views([view]), verbose=True)
    for each in (*view.machine, *(fact for device in view.devices for fact in device.facts)):
        assert each.place.source == "libvirt"
        assert each.place.name == "vm.xml"


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from(sorted(DATA.glob("*.xml")))).read_bytes()
    at = data.draw(st.integers(0, len(good)))
    bad = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"<", b"&amp;", b"]]>", b"<!--", b"\xef\xbb\xbf"]))
    )
    keep = data.draw(st.integers(0, 40))
    collected(good[:at] + bad + good[at + keep :])
