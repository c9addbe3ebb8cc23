# SPDX-License-Identifier: Apache-2.0
"""Words of command lines: files of several kinds, options as QEMU reads them, and input that is none of it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scan_qemu_kit import said
from virtiova.cli.main import main
from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, View
from virtiova.collect.qemu import words_of
from virtiova.collect.qemu.keyvals import pairs
from virtiova.collect.qemu.options import parse
from virtiova.collect.qemu.words import line_of
from virtiova.errors import ProtocolError, UsageError
from virtiova.result import Path as DmaPath
from virtiova.scan import scan_view

Q35 = ["qemu-system-x86_64", "-M", "q35", "-nodefaults"]
SCRIPT = b"""#!/bin/sh
# qemu-system-arm is not meant
set -e
export LC_ALL=C
exec sudo -u me /usr/bin/qemu-system-x86_64 \\
    -M q35 -name 'guest=a "b",debug-threads=on' \\
    -device intel-iommu \\
    -device virtio-rng-pci,id=r0,"iommu_platform=on",disable-legacy=on\\ ,addr=5 \\
    >/tmp/log 2>&1 -append "a 'b' \\"c\\" \\$d" # the end
echo "$?"
"""
LOG = b"""2026-01-02 03:04:05.678+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.22, hostname: h
LC_ALL=C \\
PATH=/usr/bin \\
/usr/bin/qemu-system-x86_64 \\
-name guest=old \\
-device '{"driver":"virtio-rng-pci","id":"rng0"}' \\
-msg timestamp=on
2026-01-02 03:04:06.000+0000: shutting down, reason=destroyed
2026-01-03 03:04:05.678+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.22, hostname: h
LC_ALL=C \\
/usr/bin/qemu-system-x86_64 \\
-name guest=new \\
-device '{"driver":"virtio-rng-pci","id":"rng0","iommu_platform":true}' \\
-msg timestamp=on
qemu-system-x86_64: can't say it: Property 'x
"""


def fact(view: View, name: str) -> dict[str, object]:
    (device,) = [each for each in view.devices if each.name == name]
    return {each.key: each.value for each in device.facts}


def test_a_script() -> None:
    words = words_of(SCRIPT)
    assert words[0] == "/usr/bin/qemu-system-x86_64"
    assert words[-2:] == ["-append", "a 'b' \"c\" $d"]
    assert [line_of(word) for word in words[:4]] == [5, 6, 6, 6]
    view = said(words)
    assert view.name == 'a "b"'
    device = view.devices[0]
    offered = device.facts.fact(k.OFFERED)
    assert offered is not None
    assert (offered.value, offered.place.line, offered.certainty) == (True, 8, Certainty.SAID)
    # What a shell makes of the backslash is part of the value, and no such value.
    assert any("disable-legacy=on  is neither" in problem for problem in view.problems)


def test_a_log_of_libvirts_is_its_last_start() -> None:
    view = said(words_of(LOG))
    assert (view.name, fact(view, "rng0")["offered"]) == ("new", True)
    assert line_of(words_of(LOG)[0]) == 11
    twice = b"\n".join([b"A=b qemu -M q35", b"", b"kvm-ok; taskset 1 qemu-system-arm"])
    with pytest.raises(UsageError, match=r"2 QEMU commands in it \(lines 1, 3\)"):
        words_of(twice)


def test_words_with_nuls() -> None:
    data = b"\0".join([*map(str.encode, Q35), b"-device", b"virtio-rng-pci,id=a b", b""])
    assert words_of(data) == [*Q35, "-device", "virtio-rng-pci,id=a b"]


def test_options_alone() -> None:
    assert said(words_of(b"-M q35\\\n -device virtio-rng-pci")).machine.get(k.MACHINE_TYPE) == "q35"


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=8), max_size=8))
def test_quoted_words_are_those_of_the_standard_library(words: list[str]) -> None:
    line = shlex.join(["qemu", *words])
    assert words_of(line.encode()) == shlex.split(line)


@given(st.text(st.sampled_from("ab \t\\\"'$`"), max_size=20))
def test_other_text_is_read_as_the_standard_library_does(text: str) -> None:
    try:
        wanted = shlex.split("qemu " + text)
    except ValueError:
        with pytest.raises(ProtocolError, match="that nothing closes"):
            words_of(b"qemu " + text.encode())
        return
    # A shell takes the backslash before these two, too; shlex does not.
    if re.search(r"\\[$`]", text) is None:
        assert words_of(b"qemu " + text.encode()) == wanted


@pytest.mark.parametrize(
    ("text", "first", "wanted"),
    [
        ("a,b=c", "driver", [("driver", "a"), ("b", "c")]),
        ("a,,b,c", "driver", [("driver", "a,b"), ("c", "on")]),
        ("a,nob,no", "driver", [("driver", "a"), ("b", "off"), ("no", "on")]),
        ("b=c=d,,e,", "driver", [("b", "c=d,e")]),
        ("driver=a", "driver", [("driver", "a")]),
        (",,,", "driver", [("driver", ",")]),
        ("", "driver", []),
    ],
)
def test_keys_and_values(text: str, first: str, wanted: list[tuple[str, str]]) -> None:
    assert pairs(text, first) == wanted


@pytest.mark.sweep
def test_the_options_are_those_of_qemu() -> None:
    """Each option that QEMU's own help names is known here, with an argument or without, as QEMU wants it."""
    shown = subprocess.run(["qemu-system-x86_64", "-help"], capture_output=True, text=True, check=True).stdout
    names = sorted(set(re.findall(r"^(-[\w-]+)", shown, re.MULTILINE)) - {"-h"})
    assert len(names) > 90
    for name in names:
        line = parse(["qemu", name, "x", "y"])
        assert not line.unknown, name
        disks = sum(option.name == "hda" and option.text in "xy" for option in line.options)
        assert disks == (2 if bare(name) else 2 if name == "-hda" else 1), name


def bare(name: str) -> bool:
    """QEMU itself says whether an option that comes last lacks its argument."""
    asked = ["qemu-system-x86_64", "-M", "none", "-display", "bad", name]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    return "requires an argument" not in answer.stderr


# -- what has no oracle here, since it cannot be started on this machine ----------------------------------------------


@pytest.mark.parametrize("said_as", ["confidential-guest-support", "memory-encryption"])
def test_confidential_guests_offer_the_bit_by_default(said_as: str) -> None:
    guest = ["-object", "sev-guest,id=s0,policy=0x5,cbitpos=47,reduced-phys-bits=1", "-machine", f"{said_as}=s0"]
    view = said([*Q35, *guest, "-device", "virtio-rng-pci,id=a", "-device", "virtio-rng-pci,id=b,iommu_platform=off"])
    assert view.machine.get(k.RESTRICTED) == "sev-es"
    (a, b) = view.devices
    offered = a.facts.fact(k.OFFERED)
    assert offered is not None
    assert (offered.value, a.facts.get(k.CAN_BE_LEGACY), b.facts.get(k.OFFERED)) == (True, False, False)
    inferred = said_as == "memory-encryption"
    assert offered.certainty is (Certainty.INFERRED if inferred else Certainty.DEFAULT)
    rows = {row.name: row.verdict for row in scan_view(view).devices}
    assert rows == {"a": DmaPath.DIRECT, "b": DmaPath.REFUSED}


def test_an_object_that_nobody_names_makes_no_confidential_guest() -> None:
    view = said([*Q35, "-object", "tdx-guest,id=t", "-device", "virtio-rng-pci"])
    assert k.RESTRICTED not in view.machine
    assert view.devices[0].facts.get(k.OFFERED) is False


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        ("-netdev tap,id=n,vhost=on -device virtio-net-pci,netdev=n", "vhost"),
        ("-netdev tap,id=n -device virtio-net-pci,netdev=n", ""),
        ("-netdev tap,id=n,vhostforce=on -device virtio-net-pci,netdev=n", "vhost"),
        ("-netdev tap,id=n,vhostfds=3:4,vhost=off -device virtio-net-pci,netdev=n", ""),
        ("-netdev tap,id=n,fds=5:6,vhostfds=3:4 -device virtio-net-pci,netdev=n", "vhost"),
        (
            "-chardev socket,id=c,path=/s -netdev vhost-user,chardev=c,id=n -device virtio-net-pci,netdev=n",
            "vhost-user",
        ),
        ('-netdev {"type":"vhost-vdpa","id":"n","vhostdev":"/dev/x"} -device virtio-net-pci,netdev=n', "vdpa"),
        ("-nic tap,model=virtio,vhost=on", "vhost"),
        ("-device vhost-vsock-pci,guest-cid=3", "vhost"),
        ("-device vhost-scsi-pci,wwpn=naa.1", "vhost"),
        ("-device vhost-vdpa-device-pci,vhostdev=/dev/x", "vdpa"),
        ("-chardev socket,id=c,path=/s -device vhost-user-fs-pci,chardev=c,tag=t", "vhost-user"),
        ("-object cryptodev-vhost-user,id=y,chardev=c -device virtio-crypto-pci,cryptodev=y", "vhost-user"),
        ("-object cryptodev-backend-builtin,id=y -device virtio-crypto-pci,cryptodev=y", ""),
    ],
)
def test_who_serves_it(words: str, backend: str) -> None:
    (device,) = said([*Q35, *words.split()]).devices
    assert device.facts.get(k.BACKEND) == backend


def test_what_is_not_known_is_kept_and_shown() -> None:
    view = said(
        [
            *Q35,
            *("-frobnicate", "x", "-device", "virtio-frob-pci,iommu_platform=on,id=f", "-device", "frob"),
            *(
                "-device",
                "virtio-rng-pci,id=r",
                "-device",
                "virtio-rng-pci,id=s,addr=9",
                "-device",
                "usb-frob",
                "-what",
            ),
        ]
    )
    assert view.machine.get(k.UNKNOWN_OPTIONS) == ("-frobnicate x", "-what", "-device frob")
    assert [problem.partition(": ")[2] for problem in view.problems] == [
        "-device virtio-frob-pci,iommu_platform=on,id=f: a virtio device of a type that is not known here",
        "-device virtio-rng-pci,id=r: frob is not known here, and may be in the slot before it",
        *(f"{each}: not known here" for each in ("-frobnicate x", "-what", "-device frob")),
    ]
    unknown = fact(view, "f")
    assert unknown["unknown-options"] == ("-device virtio-frob-pci",)
    assert unknown["offered"] is True
    assert "type" not in unknown
    assert "place" not in fact(view, "r"), "the device before it may have taken that slot"
    assert fact(view, "s")["place"] == "pci:00:09.0"


def test_who_the_machine_is() -> None:
    words = "-name web,process=x -uuid 4DEA22B3-1D52-D8F3-2516-782E98AB3FA0 -incoming defer -kernel k -m 1G"
    view = said(["/usr/libexec/qemu-kvm", "-M", "pc-q35-rhel9.2.0", *words.split()])
    found = {each.key: each.value for each in view.machine}
    assert found == {
        "name": "web",
        "uuid": "4dea22b3-1d52-d8f3-2516-782e98ab3fa0",
        "arch": "x86_64",
        "vmm": "qemu",
        "machine-type": "pc-q35-rhel9.2.0",
        "firmware": "direct",
        "migrates": True,
        "iommu": "none",
        "root-buses": ("pcie.0",),
    }


@pytest.mark.parametrize(
    ("words", "iommu", "options"),
    [
        ("-device intel-iommu,device-iotlb,caching-mode=on", "intel", ("device-iotlb=on", "caching-mode=on")),
        ("-device amd-iommu", "amd", ("pt=on",)),
        ("-device amd-iommu,pt=off", "amd", ("pt=off",)),
        ("-device intel-iommu -global intel-iommu.device-iotlb=true", "intel", ("device-iotlb=on",)),
        ("-device virtio-iommu-pci,boot-bypass=false", "virtio", ("boot-bypass=off",)),
        ("-machine iommu=none", "none", None),
    ],
)
def test_the_iommu(words: str, iommu: str, options: tuple[str, ...] | None) -> None:
    machine = said([*Q35, *words.split()]).machine
    assert (machine.get(k.IOMMU), machine.get(k.IOMMU_OPTIONS)) == (iommu, options)


def test_domains_of_their_own() -> None:
    line = "qemu-system-ppc64 -M pseries -nodefaults -device spapr-pci-host-bridge,index=1,id=p -device "
    line += "virtio-rng-pci,id=a,bus=p.0 -device virtio-rng-pci,id=b -device virtio-rng-pci,id=c,bus=pci.0"
    view = said(line.split())
    assert places(view) == ["pci:0001:00:00.0", "pci:0001:00:01.0", "pci:00:00.0"]
    assert [row.verdict for row in scan_view(view).devices] == [DmaPath.BYPASS] * 3
    assert view.problems == []


def test_functions_of_s390x_are_known_by_their_uid() -> None:
    """As QEMU gives them out: the lowest that is free, also before one that is said later."""
    line = (
        "qemu-system-s390x -nodefaults -device zpci,uid=2,target=b -device virtio-rng-pci -device virtio-rng-pci,id=c"
    )
    line += " -device virtio-rng-pci,id=b -device zpci,target=d -device virtio-rng-pci,id=d"
    assert places(said(line.split())) == [f"pci:000{uid}:00:00.0" for uid in (1, 3, 2, 4)]


def places(view: View) -> list[str | None]:
    """The places of all devices, in their order."""
    return [device.facts.get(k.PLACE) for device in view.devices]


def test_the_uuid_of_smbios() -> None:
    one, other = (f"{digit * 8}-1111-2222-3333-444444444444" for digit in "ab")
    assert said([*Q35, "-uuid", one, "-smbios", f"type=1,uuid={other}"]).machine.get(k.UUID) == other
    assert said([*Q35, "-uuid", one, "-smbios", "type=1,serial=1"]).machine.get(k.UUID) == one
    assert said([*Q35, "-uuid", "x"]).problems == ["command line: -uuid x: no UUID"]


def test_help_is_no_device() -> None:
    assert k.UNKNOWN_OPTIONS not in said([*Q35, "-device", "help", "-device", "virtio-net-pci,help"]).machine


@pytest.mark.parametrize(
    ("words", "firmware"),
    [
        ("", "seabios"),
        ("-bios /usr/share/seabios/bios.bin", "bios.bin"),
        ("-bios /usr/share/ovmf/OVMF.fd", "edk2"),
        ("-drive if=pflash,file=/usr/share/OVMF/OVMF_CODE_4M.fd", "edk2"),
        ("-drive if=none,id=d,file=/images/edk2.img", "seabios"),
        ('-blockdev {"driver":"file","filename":"/usr/share/OVMF/OVMF_CODE.fd","node-name":"libvirt-pflash0"}', "edk2"),
        ('-blockdev {"driver":"file","filename":"/images/edk2.img","node-name":"n"}', "seabios"),
        ("-kernel vmlinuz -bios x", "direct"),
    ],
)
def test_what_boots(words: str, firmware: str) -> None:
    assert said([*Q35, *words.split()]).machine.get(k.FIRMWARE) == firmware


def test_the_iommu_itself_goes_around_nothing() -> None:
    view = said([*Q35, "-device", "virtio-iommu-pci", "-device", "virtio-rng-pci"])
    scan = scan_view(view)
    assert {row.type: row.verdict for row in scan.devices} == {"iommu": DmaPath.DIRECT, "rng": DmaPath.BYPASS}
    assert [each.device for each in scan.findings] == ["virtio-rng-pci"]


def test_a_config_file_is_read_where_the_command_would_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.cfg").write_text('[device "rng0"]\n driver = "virtio-rng-pci"\n')
    (tmp_path / "a.sh").write_text("qemu-system-x86_64 -M q35 -readconfig r.cfg")
    monkeypatch.chdir(tmp_path)
    line = ["qemu-system-x86_64", "-M", "q35", "-readconfig"]
    assert main(["scan", "--", *line, "r.cfg"]) == 0
    assert "rng0" in capsys.readouterr().out
    for name in ("none", "/dev/zero", "."):
        main(["scan", "--", *line, name])
        assert f"-readconfig {name}: what it says is not known here" in capsys.readouterr().out
    # A file may be of another machine: so are those that it names.
    main(["scan", "--cmdline", "a.sh"])
    assert "-readconfig r.cfg: what it says is not known here" in capsys.readouterr().out
