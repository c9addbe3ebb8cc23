# SPDX-License-Identifier: Apache-2.0
"""Input that is no command line, or a very large one: a clear word, in bounded time, and never a traceback."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scan_qemu_kit import said
from virtiova.collect import keys as k
from virtiova.collect.qemu import words_of
from virtiova.errors import ProtocolError, UsageError
from virtiova.scan import scan_view

Q35 = ["qemu-system-x86_64", "-M", "q35", "-nodefaults"]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"x" * (10 << 20), ProtocolError, "10485760 bytes are no command line"),
        (b"qemu " * 200_000, ProtocolError, "more than 131072 words"),
        (b"qemu\0" * 200_000, ProtocolError, "more than 131072 words"),
        (b"qemu -name 'a", ProtocolError, "line 1: a ' that nothing closes"),
        (b'qemu \\\n -name "a', ProtocolError, 'line 2: a " that nothing closes'),
        (b"qemu \\", ProtocolError, "that nothing closes"),
        (b"", UsageError, "no QEMU command in it"),
        (b"\0", UsageError, "no QEMU command line"),
        (b"\xff\xfe\x00", UsageError, "no QEMU command line"),
        (b"firefox --new-window", UsageError, "no QEMU command in it"),
        (b"firefox\0-P\0", UsageError, "'firefox' is no qemu-system"),
        (b"\x7fELF" + bytes(range(1, 256)) * 9, UsageError, "no QEMU command in it"),
    ],
)
def test_what_is_no_command_line(data: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        words_of(data)


@pytest.mark.parametrize(
    "argument",
    [
        "{" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"a":' * 100 + "1" + "}" * 100,
        '{"driver":1e',
        "{}{}",
        '{"driver":' + "9" * 5000 + "}",
    ],
)
def test_json_that_no_qemu_takes(argument: str) -> None:
    with pytest.raises(ProtocolError, match="no JSON that QEMU would take"):
        said([*Q35, "-device", argument])


def test_config_files_that_are_none(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"[device", b'driver = "x"', b'[device "a"]\nnonsense', b"[x]\n" + b"y" * 10):
        with pytest.raises(ProtocolError, match=r"r:\d: neither a section nor an entry"):
            said([*Q35, "-readconfig", "r"], read=lambda _, content=content: content)
    with pytest.raises(ProtocolError, match="more than"):
        said([*Q35, "-readconfig", "r"], read=lambda _: bytes(2 << 20))
    assert said([*Q35, "-readconfig", "r"]).problems == ["-readconfig r: what it says is not known here"]


LARGE = {
    "devices": [*Q35, *["-device", "virtio-rng-pci"] * 5_000],
    "one name": [*Q35, *["-device", "virtio-rng-pci,id=a"] * 5_000],
    "bridges behind bridges": [
        *Q35,
        *(word for n in range(5_000) for word in ("-device", f"pci-bridge,id=b{n},bus=b{n - 1}")),
    ],
    "globals": [*Q35, *["-global", "virtio-device.iommu_platform=on"] * 5_000, *["-device", "virtio-net"] * 2500],
    "options in one": [*Q35, "-device", "virtio-rng-pci" + ",a=b" * 4000],
    "machines": [*Q35, *["-M", "q35,a=b"] * 5_000],
    "set": [*Q35, "-device", "virtio-rng-pci,id=a", *["-set", "device.a.x=y"] * 5_000],
    "quotes": words_of(b"qemu " + b'"\'"' * 300_000),
    "commas": [*Q35, "-device", "," * 1_000_000],
    "network devices": [*Q35, *["-netdev", "tap,id=n", "-device", "virtio-net,netdev=n"] * 2500],
    "drives": ["qemu-system-aarch64", "-M", "virt", *["x"] * 5_000],
    "JSON": [*Q35, *["-device", json.dumps({"driver": "virtio-net-pci", "id": "x#2"})] * 5_000],
    "channels": ["qemu-system-s390x", *["-device", "virtio-rng-ccw"] * 5_000],
}


@pytest.mark.parametrize("name", LARGE)
def test_large_lines_take_no_long_time(name: str) -> None:
    words = LARGE[name]
    began = time.monotonic()
    view = said(words)
    # What grows with the square of that many takes far longer.
    assert time.monotonic() - began < 5
    assert len({device.name for device in view.devices}) == len(view.devices)
    assert len(view.problems) < 100


def _one_of(names: str) -> st.SearchStrategy[str]:
    return st.sampled_from(names.split())


_KEY = _one_of(
    "id bus addr driver iommu_platform disable-legacy disable-modern ats netdev chardev type if drive bus_nr qom-type "
    "bypass_iommu iommu model vhost devno property value policy"
)
_VALUE = st.text(max_size=6) | _one_of(
    "on off auto a b 1 0x1f.7 ff -1 pcie.0 pci.0 virtio-rng-pci pxb-pcie pxb pcie-root-port virtio-mmio-bus.31 "
    "virtio-mmio-bus.99 fe.0.0001 9.9.9 none smmuv3 tap virtio q35 s0"
)
_NAME = _one_of(
    "device machine M global netdev nic net drive object set readconfig name uuid virtfs balloon vga usb nodefaults "
    "watchdog kernel bios incoming nonsense chardev blockdev hda"
)
_DRIVER = _one_of(
    "virtio-rng-pci virtio-net virtio-blk-device vhost-user-fs-pci pcie-root-port pxb-pcie pxb pci-bridge intel-iommu "
    "virtio-iommu-pci virtio-vga amd-iommu x3130-upstream edu scsi-hd q35 virt pseries s390-ccw-virtio microvm"
)
_ARGUMENT = (
    st.builds(lambda driver, keys: ",".join([driver, *(f"{a}={b}" for a, b in keys)]), _DRIVER, st.lists(
        st.tuples(_KEY, _VALUE), max_size=4))
    | st.builds(lambda keys: json.dumps(dict(keys)), st.lists(st.tuples(_KEY, _VALUE | st.integers() | st.booleans()
                                                                        | st.none()), max_size=4))
    | st.text(max_size=12)
)  # fmt: skip
_BINARY = _one_of(
    "qemu-system-x86_64 qemu-system-aarch64 qemu-system-s390x qemu-system-ppc64 qemu-system-sparc64 qemu-kvm "
    "qemu-system-riscv64 qemu-system-mips"
)


@given(_BINARY, st.lists(st.tuples(_NAME, _ARGUMENT), max_size=10), st.binary(max_size=60))
def test_any_options(binary: str, options: list[tuple[str, str]], config: bytes) -> None:
    words = [binary, *(word for name, argument in options for word in (f"-{name}", argument))]
    try:
        view = said(words, read=lambda _: config)
    except (UsageError, ProtocolError):
        return
    names = [device.name for device in view.devices]
    assert len(set(names)) == len(names)
    places = [place for device in view.devices if (place := device.facts.get(k.PLACE))]
    # Powernv has several segments, and its devices one root port each.
    assert len(set(places)) == len(places) or "powernv" in " ".join(words)
    assert len(scan_view(view).devices) == len(names)


@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"qemu", b" -device ", b"'", b'"', b"\\\n", b";", b"x", b"\0"
                                                          ]), max_size=20).map(b"".join))  # fmt: skip
def test_any_file(data: bytes) -> None:
    try:
        words = words_of(data)
        said(words)
    except (UsageError, ProtocolError):
        return
    assert words
