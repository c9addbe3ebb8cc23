# SPDX-License-Identifier: Apache-2.0
"""What guests are made of: the cpio archive, the modules, packages out of the cache, apt's sources."""

from __future__ import annotations

import gzip
import lzma
import multiprocessing
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.errors import NotPossibleError, ProtocolError
from virtiova.guest import initramfs, kernels
from virtiova.packages import apt, store
from virtiova.packages.store import Store, Wanted, one_file

# -- cpio ------------------------------------------------------------------------------------------------------------


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """A reader written apart from the writer, along the kernel's buffer-format document."""
    members: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        field = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = field[1], field[6], field[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        data_at = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return members
        members[name] = (mode, archive[data_at : data_at + size])
        at = (data_at + size + 3) // 4 * 4


names = st.text("abcdefghij/._-", min_size=1, max_size=30).map(lambda name: f"f{name}")


@given(st.dictionaries(names, st.tuples(st.sampled_from([0o644, 0o755]), st.binary(max_size=50)), max_size=8))
def test_what_is_written_is_read(files: dict[str, tuple[int, bytes]]) -> None:
    archive = initramfs.cpio(files)
    assert read_cpio(archive) == {name: (0o100000 | mode, data) for name, (mode, data) in files.items()}
    assert len(archive) % 512 == 0


def test_the_initramfs_is_the_same_every_time_and_whole() -> None:
    modules = {"one": b"first", "two": b"second"}
    made = initramfs.build(b"busy", modules, ["two", "one"])
    assert made == initramfs.build(b"busy", dict(reversed(modules.items())), ["two", "one"])
    members = read_cpio(gzip.decompress(made))
    assert members["bin/busybox"] == (0o100755, b"busy")
    assert members["modules/order"][1] == b"two\none\n"
    assert members["modules/one.ko"][1] == b"first"
    assert members["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert members["dev/console"][0] == 0o020600
    assert members["proc"] == (0o040755, b"")


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio to ask")
def test_the_real_cpio_reads_it() -> None:
    archive = initramfs.cpio({"a/b": (0o644, b"x")}, ["a"])
    said = subprocess.run(["cpio", "-t"], input=archive, capture_output=True, timeout=20, check=True)
    assert said.stdout.decode().split() == ["a", "a/b"]


# -- modules ---------------------------------------------------------------------------------------------------------

DEP = """\
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko.xz: kernel/drivers/virtio/virtio.ko
"""


def test_modules_come_after_what_they_need() -> None:
    needs = kernels.parse_dep(DEP)
    assert kernels.closure(["virtio_pci"], needs) == ["virtio_ring", "virtio", "virtio_pci"]
    assert kernels.closure(["virtio_rng"], needs, ["virtio", "virtio_ring"]) == ["virtio_rng"]


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("abcdefgh"), max_size=3)))
def test_any_order_is_right_or_refused(needs: dict[str, list[str]]) -> None:
    try:
        order = kernels.closure(sorted(needs), needs)
    except NotPossibleError:
        return
    for place, name in enumerate(order):
        assert set(needs[name]) <= set(order[:place])
    assert set(order) == set(needs)


def test_a_circle_and_a_missing_module_are_named() -> None:
    with pytest.raises(NotPossibleError, match="a > b > a"):
        kernels.closure(["a"], {"a": ["b"], "b": ["a"]})
    with pytest.raises(NotPossibleError, match="no module gone"):
        kernels.closure(["a"], {"a": ["gone"]})


def test_a_module_says_what_it_needs() -> None:
    assert kernels.depends(b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0name=x\0") == ["virtio", "virtio_ring"]
    assert kernels.depends(b"\0depends=\0") == []
    assert kernels.depends(b"no such thing") == []


def kernel_tree(root: Path, image: bytes = b"image") -> Path:
    (root / "boot").mkdir(parents=True)
    (root / "boot/vmlinuz-6.1.0-1").write_bytes(image)
    virtio = root / "lib/modules/6.1.0-1/kernel/drivers/virtio"
    virtio.mkdir(parents=True)
    (virtio / "virtio_pci.ko").write_bytes(b"\0depends=virtio,virtio_ring\0")
    (virtio / "virtio.ko.xz").write_bytes(lzma.compress(b"\0depends=virtio_ring\0"))
    (virtio / "virtio_blk.ko").write_bytes(b"\0depends=virtio\0")
    (root / "lib/modules/6.1.0-1/modules.builtin").write_text("kernel/drivers/virtio/virtio_ring.ko\n")
    return root


def test_a_kernel_package_is_picked_from(tmp_path: Path) -> None:
    """Compressed modules are stored unpacked, built-in ones not at all, and one that is nowhere is left out."""
    files = kernels.pick(kernel_tree(tmp_path))
    assert files["order"].split() == [b"virtio", b"virtio_pci", b"virtio_blk"]
    assert files["modules/virtio.ko"] == b"\0depends=virtio_ring\0"
    assert set(files) == {"kernel", "order", *(f"modules/{n}.ko" for n in ("virtio", "virtio_pci", "virtio_blk"))}


def x86_image(payload: bytes) -> bytes:
    head = bytearray(0x400)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 0x20, len(payload))
    return bytes(head) + bytes(0x20) + payload + b"the end"


def test_the_kernel_inside_of_an_image_is_found() -> None:
    vmlinux = b"\x7fELF and so on" * 50
    assert kernels.uncompressed(x86_image(lzma.compress(vmlinux) + b"size")) == vmlinux
    for other in (b"", b"HdrS", x86_image(b"\x02\x21\x4c\x18"), x86_image(lzma.compress(b"no ELF"))):
        assert kernels.uncompressed(other) == other


def test_a_damaged_image_is_our_error() -> None:
    with pytest.raises(ProtocolError, match="cut off"):
        kernels.uncompressed(x86_image(lzma.compress(b"\x7fELF" * 500)[:-30]))
    with pytest.raises(ProtocolError, match="more than"):
        kernels.unpack_xz(lzma.compress(bytes(5000)), 4096)


# -- the cache -------------------------------------------------------------------------------------------------------


class FakeApt:
    """Makes a package of one file with the real dpkg-deb, and counts how often it was asked to."""

    fetched = 0

    def __init__(self, folder: Path, architecture: str, *_: object) -> None:
        self._folder = folder

    def download(self, package: str, pattern: str = "") -> Path:
        type(self).fetched += 1
        root = self._folder / "make"
        (root / "DEBIAN").mkdir(parents=True, exist_ok=True)
        (root / "DEBIAN/control").write_text(
            f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: x\n"
        )
        (root / "bin").mkdir(exist_ok=True)
        (root / "bin/tool").write_bytes(b"content of the tool")
        deb = self._folder / f"{package}_1_all.deb"
        subprocess.run(["dpkg-deb", "-b", str(root), str(deb)], capture_output=True, timeout=30, check=True)
        return deb


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
TOOL = Wanted("tool", "tool-static", "all", one_file("bin/tool", "tool"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeApt]:
    FakeApt.fetched = 0
    monkeypatch.setattr("virtiova.packages.store.Apt", FakeApt)
    return FakeApt


@needs_dpkg
def test_what_is_in_the_cache_is_not_fetched_again(tmp_path: Path, fake: type[FakeApt]) -> None:
    cache = Store(tmp_path)
    assert not cache.has(TOOL)
    assert cache.get(TOOL).content == {"tool": b"content of the tool"}
    assert cache.get(TOOL).package == "tool-static_1_all.deb"
    assert Store(tmp_path, offline=True).get(TOOL).content == {"tool": b"content of the tool"}
    assert fake.fetched == 1
    left = sorted(p.name for p in (tmp_path / "guest").iterdir())
    assert left == ["all.lock", "apt-all", "tool-all"], "nothing but the files themselves and apt's lists"


def _flip(folder: Path) -> None:
    (folder / "tool").write_bytes(b"content of the fool")


def _cut(folder: Path) -> None:
    (folder / "tool").write_bytes(b"content")


def _lose(folder: Path) -> None:
    (folder / "tool").unlink()


def _half_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:40])


def _deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)


def _huge_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(bytes(2 << 20))


def _other_path(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tool":', '"../../../tool":'))


@needs_dpkg
@pytest.mark.parametrize("damage", [_flip, _cut, _lose, _half_manifest, _deep_manifest, _huge_manifest, _other_path])
def test_damage_is_noticed_and_mended(tmp_path: Path, fake: type[FakeApt], damage: Callable[[Path], None]) -> None:
    Store(tmp_path).get(TOOL)
    damage(tmp_path / "guest/tool-all")
    with pytest.raises(NotPossibleError, match=r"^offline, and tool-static \(all\): "):
        Store(tmp_path, offline=True).get(TOOL)
    assert Store(tmp_path).get(TOOL).content == {"tool": b"content of the tool"}
    assert fake.fetched == 2


@needs_dpkg
def test_what_another_kind_of_row_left_is_not_used(tmp_path: Path, fake: type[FakeApt]) -> None:
    Store(tmp_path).get(TOOL)
    Store(tmp_path).get(replace(TOOL, package="tool-dynamic"))
    assert fake.fetched == 2


@needs_dpkg
def test_a_killed_fetch_leaves_nothing_for_long(tmp_path: Path, fake: type[FakeApt]) -> None:
    (tmp_path / "guest/tmp-all-dead").mkdir(parents=True)
    (tmp_path / "guest/tmp-other-alive").mkdir()
    Store(tmp_path).get(TOOL)
    assert not (tmp_path / "guest/tmp-all-dead").exists()
    assert (tmp_path / "guest/tmp-other-alive").exists(), "another architecture's fetch may be under way"


def _fetch_here(root: str, count: multiprocessing.queues.Queue[int]) -> None:
    setattr(store, "Apt", FakeApt)  # noqa: B010 - in a process of its own
    Store(Path(root)).get(TOOL)
    count.put(FakeApt.fetched)


@needs_dpkg
def test_two_processes_fetch_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    count: multiprocessing.queues.Queue[int] = context.Queue()
    both = [context.Process(target=_fetch_here, args=(str(tmp_path), count)) for _ in range(2)]
    for process in both:
        process.start()
    fetched = [count.get(timeout=60) for _ in both]
    for process in both:
        process.join(20)
    assert sum(fetched) == 1
    assert Store(tmp_path, offline=True).has(TOOL)


@needs_dpkg
def test_a_package_that_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rubbish(FakeApt):
        def download(self, package: str, pattern: str = "") -> Path:
            path = self._folder / "rubbish.deb"
            path.write_bytes(b"rubbish")
            return path

    monkeypatch.setattr("virtiova.packages.store.Apt", Rubbish)
    with pytest.raises(NotPossibleError, match=r"rubbish\.deb: dpkg-deb: error"):
        Store(tmp_path).get(TOOL)
    assert not list((tmp_path / "guest").glob("tmp-*"))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "guest").write_text("a file where a folder should be")
    with pytest.raises(NotPossibleError, match="cannot keep tool-static"):
        Store(tmp_path).get(TOOL)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert store.cache_root() == Path("/somewhere/virtiova")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/someone")
    assert store.cache_root() == Path("/home/someone/.cache/virtiova")


# -- apt's sources ---------------------------------------------------------------------------------------------------

ONE_LINE = """\
# deb http://old.example.org/debian trixie main
deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://mirror.example.org/debian trixie main contrib # ours
deb-src http://mirror.example.org/debian trixie main
deb http://vendor.example.org/apt stable vendor
deb http://vendor.example.org/apt cloud-trixie main
deb cdrom:[Debian]/ trixie main
"""
DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example.org/debian
Suites: trixie trixie-updates trixie-backports
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: http://mirror.example.org/debian-security
Suites: trixie-security
Components: main
Enabled: no
"""


def stanzas(files: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(s.uri, s.suite) for s in apt.debian_stanzas(files, "trixie")]


def test_only_debians_own_sources_are_taken() -> None:
    mirror = "http://mirror.example.org/debian"
    assert stanzas({"sources.list": ONE_LINE}) == [(mirror, "trixie")]
    assert stanzas({"debian.sources": DEB822}) == [(mirror, "trixie"), (mirror, "trixie-updates")]
    assert stanzas({"vendor.list": "deb http://vendor.example.org x y"}) == []


def test_a_key_of_several_lines_is_kept() -> None:
    first = apt.debian_stanzas({"debian.sources": DEB822}, "trixie")[0]
    assert next(apt.deb822(str(first)))["signed-by"] == first.signed_by
    assert "BEGIN PGP" in str(first)


def test_the_release() -> None:
    assert apt.release('ID=debian\nVERSION_CODENAME="trixie"\n') == "trixie"
    assert apt.release("ID=ubuntu\nVERSION_CODENAME=noble\n") == ""
    assert apt.release("") == ""


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt here")
def test_no_mirror_is_said_with_apts_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = apt.Stanza(f"file:{tmp_path}/none", "trixie", "")
    monkeypatch.setattr(apt, "machine_sources", lambda: [nowhere])
    with pytest.raises(NotPossibleError, match=r"^apt-get update: .*Release"):
        Store(tmp_path).get(Wanted("tool", "tool-static", "amd64", one_file("bin/tool", "tool")))


def test_other_systems_have_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (tmp_path / "os-release").write_text("ID=fedora\n")
    with pytest.raises(NotPossibleError, match="not a Debian system"):
        apt.machine_sources(tmp_path, tmp_path / "os-release")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotPossibleError, match="apt-get is not installed"):
        apt.machine_sources(tmp_path, tmp_path / "os-release")
