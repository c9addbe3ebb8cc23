# SPDX-License-Identifier: Apache-2.0
"""Boxes as anybody may have made them: what is not ours, or hostile, is refused with the name of what is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.collect import box as box_module
from virtiova.collect import gathered
from virtiova.collect.box import FILE, HEADER, SCHEMA, read_box
from virtiova.collect.gather import write
from virtiova.collect.gathered import GatheredTree, views
from virtiova.errors import NotPossibleError, ProtocolError
from virtiova.scan import scan_views

ABOUT = json.dumps({"schema": SCHEMA, "host": "made"}).encode()
GOOD = {
    HEADER: ABOUT,
    "links": b"/sys/bus/virtio/devices/virtio0\t../../../devices/pci0000:00/0000:00:02.0/virtio0\n",
    "tree/sys/bus/virtio/devices/virtio0/device": b"0x0002\n",
    "tree/sys/bus/virtio/devices/virtio0/status": b"0x0000000f\n",
    "tree/sys/bus/virtio/devices/virtio0/features": b"0" * 32 + b"11" + b"0" * 30 + b"\n",
    "tree/proc/sys/kernel/hostname": b"made\n",
}


def tar(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A plain tar of members, each a name or all that is said of it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for said, data in members:
            info = tarfile.TarInfo(said) if isinstance(said, str) else said
            info.size = len(data) if isinstance(said, str) else info.size
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def good() -> bytes:
    return tar(GOOD.items())


def at(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "a.box"
    path.write_bytes(data)
    return str(path)


def unpacked(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (tmp_path / "box" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "box" / name).write_bytes(data)
    return tmp_path / "box"


# -- what is taken ---------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[], bytes]] = {
    "plain": good,
    "gzip": lambda: gzip.compress(good()),
    "gzip in two": lambda: gzip.compress(good()[:1000]) + gzip.compress(good()[1000:]),
    "xz": lambda: lzma.compress(good()),
    "pax": lambda: tar(GOOD.items(), tarfile.PAX_FORMAT),
    "ustar": lambda: tar(GOOD.items(), tarfile.USTAR_FORMAT),
    "packed anew": lambda: tar((f"./{name}", data) for name, data in sorted(GOOD.items())),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, tmp_path: Path) -> None:
    path = at(tmp_path, FORMS[form]())
    assert read_box(path).files == GOOD
    view = views(path)[0]
    assert (view.name, view.source, [device.name for device in view.devices]) == ("made", path, ["virtio0"])


def test_a_folder_is_read(tmp_path: Path) -> None:
    path = str(unpacked(tmp_path, GOOD))
    assert read_box(path).files == GOOD
    assert len(views(path)[0].devices) == 1


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names(form: int, tmp_path: Path) -> None:
    """Beyond the 100 characters that a head has room for."""
    name = "tree/sys/" + "/".join(["devices" * 5] * 6)
    longer = [] if form == tarfile.USTAR_FORMAT else [(f"{name}/{'x' * 300}", b"2")]
    found = read_box(at(tmp_path, tar([*GOOD.items(), (f"{name}/x", b"1"), *longer], form))).files
    assert found[f"{name}/x"] == b"1"
    assert len(found) == len(GOOD) + 1 + len(longer)


def test_zstd_where_python_has_it(tmp_path: Path) -> None:
    data = b"\x28\xb5\x2f\xfd" + bytes(100)
    wanted = ProtocolError if sys.version_info >= (3, 14) else NotPossibleError
    with pytest.raises(wanted, match=r"a\.box"):
        read_box(at(tmp_path, data))


# -- what is refused -------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE: dict[str, tuple[tuple[str | tarfile.TarInfo, bytes], str]] = {
    "absolute": (("/etc/passwd", b""), "'/etc/passwd' is an absolute path"),
    "up": (("tree/../../x", b""), "'tree/../../x' is no path inside"),
    "only up": (("..", b""), "'..' is no path inside"),
    "dot inside": (("tree/./x", b""), "'tree/./x' is no path inside"),
    "nothing inside": (("tree//x", b""), "'tree//x' is no path inside"),
    "control": (("tree/\x1b[2Jx", b""), r"'tree/\\x1b\[2Jx'"),
    "newline": (("tree/a\nb", b""), r"'tree/a\\nb'"),
    "right to left": (("tree/\u202ex", b""), "odd characters"),
    "deep": (("a/" * 80 + "x", b""), "is no path inside"),
    "long": (("x" * 2000, b""), "too long, or holds odd characters: 'x{80}'"),
    "symlink": ((special("tree/sys", tarfile.SYMTYPE, "/"), b""), "'tree/sys' is a symbolic link"),
    "hard link": ((special("tree/x", tarfile.LNKTYPE, "links"), b""), "'tree/x' is a hard link"),
    "pipe": ((special("tree/x", tarfile.FIFOTYPE), b""), "'tree/x' is a pipe"),
    "character device": ((special("tree/x", tarfile.CHRTYPE), b""), "'tree/x' is a device"),
    "block device": ((special("tree/x", tarfile.BLKTYPE), b""), "'tree/x' is a device"),
    "unheard of": ((special("tree/x", b"Z"), b""), "'tree/x' is no regular file"),
    "twice": (("links", b""), "'links' is there twice"),
    "twice otherwise": (("./links", b""), "'./links' is there twice"),
    "a file as a folder": ((special("links", tarfile.DIRTYPE), b""), "'links/' is there twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hostile_member_is_named(case: str, form: int, tmp_path: Path) -> None:
    member, words = HOSTILE[case]
    name, data = member
    if isinstance(name, tarfile.TarInfo):
        name = special(name.name, name.type, name.linkname)
    with pytest.raises(ProtocolError, match=words) as refused:
        views(at(tmp_path, tar([*GOOD.items(), (name, data)], form)))
    assert "a.box" in str(refused.value)
    assert str(refused.value).isprintable()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    data = bytearray(good())
    data[0:4] = b"\xff\xfe\xfd\xfc"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    with pytest.raises(ProtocolError, match="no text"):
        read_box(at(tmp_path, bytes(data)))


def test_every_way_to_cut_it_off(tmp_path: Path) -> None:
    """At each block and in its middle: never half an answer."""
    data = good().rstrip(b"\0")
    end = (len(data) + 511) // 512 * 512
    for cut in range(0, end + 1, 256):
        with pytest.raises(ProtocolError, match=r"cut off|no archive|damaged"):
            read_box(at(tmp_path, data.ljust(end, b"\0")[:cut]))
    packed = gzip.compress(good())
    for cut in range(2, len(packed), 7):
        with pytest.raises(ProtocolError, match=r"cut off|damaged"):
            read_box(at(tmp_path, packed[:cut]))


NOT_OURS = {
    "empty": (b"", "cut off, or no archive"),
    "text": (b"<domain type='kvm'/>\n" * 100, "no archive"),
    "zeros": (bytes(10240), HEADER),
    "another packer": (bz2.compress(b"x" * 1000).ljust(600), "no archive"),
    "no header": (tar([("readme", b"")]), f"no {HEADER} in it"),
    "no JSON": (tar([(HEADER, b"{")]), "is no JSON"),
    "deep JSON": (tar([(HEADER, b"[" * 100000)]), "is no JSON"),
    "list": (tar([(HEADER, b"[]")]), "schema None"),
    "newer": (tar([(HEADER, b'{"schema": "virtiova/gather/2"}')]), "virtiova/gather/2.*virtiova/gather/1.* is known"),
    "gzip of nothing": (gzip.compress(b""), "cut off, or no archive"),
    "negative": (good()[:124] + b"-0000000001\0" + good()[136:], "no archive"),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_what_is_not_ours(case: str, tmp_path: Path) -> None:
    data, words = NOT_OURS[case]
    with pytest.raises(ProtocolError, match=words):
        views(at(tmp_path, data))


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much out of little; a file that says it is huge; too many members; and nothing of it in memory first."""
    bomb = zlib.compressobj(9, wbits=31)
    data = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(200)) + bomb.flush()
    with pytest.raises(ProtocolError, match=r"a\.box: .* bytes unpack to .* and more: a bomb"):
        read_box(at(tmp_path, data))
    packer = lzma.LZMACompressor(preset=0)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    with pytest.raises(ProtocolError, match="a bomb"):
        read_box(at(tmp_path, data))
    with pytest.raises(ProtocolError, match=r"'tree/large' is too large"):
        read_box(at(tmp_path, tar([*GOOD.items(), ("tree/large", bytes(FILE + 1))])))
    monkeypatch.setattr(box_module, "MEMBERS", 100)
    with pytest.raises(ProtocolError, match=r"more than 100 members; 'tree/95' is one too many"):
        read_box(at(tmp_path, tar([*GOOD.items(), *((f"tree/{n}", b"") for n in range(200))])))
    monkeypatch.setattr(box_module, "TOTAL", 1 << 20)
    with pytest.raises(ProtocolError, match=r"too large"):
        read_box(at(tmp_path, good().ljust(2 << 20, b"\0")))


def test_a_folder_with_links_and_pipes(tmp_path: Path) -> None:
    box = unpacked(tmp_path, GOOD)
    (box / "tree/etc").symlink_to("/etc")
    with pytest.raises(ProtocolError, match="'tree/etc' is no regular file"):
        read_box(str(box))
    (box / "tree/etc").unlink()
    os.mkfifo(box / "tree/pipe")
    with pytest.raises(ProtocolError, match="'tree/pipe' is no regular file"):
        read_box(str(box))
    with pytest.raises(ProtocolError, match="neither a file nor a folder"):
        read_box(str(box / "tree/pipe"))
    with pytest.raises(ProtocolError, match="No such file"):
        read_box(str(box / "tree/absent"))


LINKS = {
    "no target": b"/sys/x\n",
    "relative": b"sys/x\t/y\n",
    "control": b"/sys/x\t/\x07\n",
    "long": b"/sys/x\t" + b"../" * 1000 + b"\n",
}


@pytest.mark.parametrize("case", LINKS)
def test_links_that_are_none(case: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="'links' line 2"):
        views(at(tmp_path, tar({**GOOD, "links": GOOD["links"] + LINKS[case]}.items())))


def test_links_lead_nowhere_else() -> None:
    """Above the root is the root; a circle leads nowhere; the file system of this machine is not asked."""
    tree = GatheredTree(
        {"/a/file": b"1", "/loop/b": b"2", "/up/etc/passwd": b"3"},
        ["/empty"],
        {
            "/up": "../../../..",
            "/loop": "round",
            "/round": "loop",
            "/etc/hosts": "/../../etc/passwd",
            "/far": "/no/such",
        },
        "x",
    )
    assert tree.read("/up/a/file") == b"1"
    assert tree.read("/etc/passwd") == b"3"
    assert tree.read("/etc/hosts") == b"3"
    assert tree.read("/loop/b") is None
    assert tree.real("/loop") is None
    assert tree.read("/etc/hostname") is None
    assert tree.names("/empty") == []
    assert tree.exists("/empty")
    assert not tree.exists("/absent")
    assert tree.link("/up") == "../../../.."
    assert tree.names("/") == ["a", "empty", "etc", "far", "loop", "no", "round", "up"]


def test_links_that_are_meant_to_take_long(tmp_path: Path) -> None:
    """Each leads to the next, by a long way, and there are as many as there may be."""
    way = "x/../" * 90
    lines = "".join(f"/l{n}\t{way}l{n + 1}\n" for n in range(5000))
    devices = {f"tree/sys/bus/virtio/devices/virtio{n}/device": b"0x2\n" for n in range(4200)}
    started = time.monotonic()
    view = views(at(tmp_path, tar({**GOOD, **devices, "links": lines.encode()}.items())))[0]
    assert time.monotonic() - started < 60
    assert len(view.devices) == 4096
    assert any("more than 4096 entries" in problem for problem in view.problems)


# -- whatever the bytes are ------------------------------------------------------------------------------------------


def outcome(path: Path, data: bytes) -> None:
    """Views or `ProtocolError`: nothing else comes out."""
    path.write_bytes(data)
    try:
        found = views(str(path))
    except ProtocolError:
        return
    assert found
    assert scan_views(found).machines


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=12)), max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_any_change_of_a_good_box(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], packed: bool, mended: bool
) -> None:
    """Bytes changed anywhere, before or after packing; with the heads' checksums made right again or not."""
    data = bytearray(good())
    if packed:
        data = bytearray(gzip.compress(bytes(data), mtime=0))
    for place, piece in changes:
        start = place % len(data)
        data[start : start + len(piece)] = piece
    if mended and not packed:
        for start in range(0, len(data) - 511, 512):
            head = data[start : start + 512]
            if head[257:262] == b"ustar":
                data[start + 148 : start + 156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 8 * 32)
    outcome(tmp_path_factory.getbasetemp() / "changed.box", bytes(data))


OTHERS = {
    "qemu/1.cmdline": b"qemu-system-x86_64\0-M\0q35\0-device\0virtio-rng-pci\0",
    "backend/2.cmdline": b"virtiofsd\0--socket-path\0/run/x\0",
    "libvirt/a.xml": b"<domain><name>a</name><devices><rng model='virtio'/></devices></domain>",
    "qmp/a.json": b'{"schema": "virtiova/qmp/1", "asked": [{"command": "query-name", "answer": {"name": "a"}}]}',
    "log/a": b"virtio-rng-pci: iommu_platform=true is not supported by the device\n",
    "log/dmesg": b"[    0.1] virtio_blk virtio0: device refuses features: 3\n",
    "tree/proc/cmdline": b"quiet\n",
    "tree/sys/firmware/acpi/tables/DMAR": b"DMAR\x30\0\0\0\1",
}
ALL = {**GOOD, **OTHERS}
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.sampled_from(sorted(ALL.values())), st.integers(0, 100), st.binary(max_size=8)).map(
        lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] :]
    ),
)


def test_what_is_changed_below_is_read() -> None:
    assert {name.split("/")[0] for name in OTHERS} >= set(gathered._COLLECTORS)


@given(st.dictionaries(st.sampled_from(sorted(ALL)), CONTENT), st.binary(max_size=300))
def test_any_content(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes], links: bytes) -> None:
    """A right archive of wrong files."""
    out = io.BytesIO()
    write(out, {**ALL, **contents, HEADER: ABOUT, "links": links})
    outcome(tmp_path_factory.getbasetemp() / "content.box", out.getvalue())
