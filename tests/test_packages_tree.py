# SPDX-License-Identifier: Apache-2.0
"""Packages that are unpacked to be run in place: checked, mended, of one version; and QEMU out of them by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from newer_qemu import SUITE, newer_qemu, run_qemu
from virtiova.cli import exits, main
from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.qemu import suites
from virtiova.machine.qemu.boards import BOARDS, RISCV_VIRT, VIRT
from virtiova.machine.qemu.installation import Installation
from virtiova.packages import apt
from virtiova.packages.tree import Part, Tree, hold

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
TOOL = Part("tool", ("usr/bin/tool",))
SHARED = Part("tool-data", ("usr/share/**/*",))


class FakeApt:
    """Makes packages with the real dpkg-deb: a program that says its version, a link, and what nobody wants."""

    version = "1"
    fetched: ClassVar[list[str]]
    absent: ClassVar[set[str]]

    def __init__(self, folder: Path, architecture: str, progress: object, stop: object, suite: str) -> None:
        assert (architecture, suite) == ("amd64", SUITE)
        self._folder = folder

    def download(self, package: str) -> Path:
        type(self).fetched.append(package)
        if package in self.absent:
            raise NotPossibleError(f"apt-get download: Unable to locate package {package}")
        root = self._folder / "make"
        shutil.rmtree(root, ignore_errors=True)
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            f"Package: {package}\nVersion: {self.version}\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
            "Description: x\n"
        )
        for name in ("usr/bin/tool", "usr/share/tool/deep/data", "usr/share/doc"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"#!/bin/sh\necho {package} {self.version}\n")
            (root / name).chmod(0o755)
        (root / "usr/share/link").symlink_to("/etc/passwd")
        deb = self._folder / f"{package}_{self.version}_all.deb"
        subprocess.run(["dpkg-deb", "-b", str(root), str(deb)], capture_output=True, timeout=30, check=True)
        return deb


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeApt]:
    monkeypatch.setattr("virtiova.packages.tree.Apt", FakeApt)
    FakeApt.version, FakeApt.fetched, FakeApt.absent = "1", [], set()
    return FakeApt


def tree(root: Path, *, offline: bool = False) -> Tree:
    return Tree(SUITE, "amd64", root=root, offline=offline)


@needs_dpkg
def test_what_is_wanted_can_be_run_and_nothing_else_is_kept(tmp_path: Path, fake: type[FakeApt]) -> None:
    one = tree(tmp_path)
    assert one.get([TOOL, SHARED]) == {}
    said = subprocess.run([one.folder / "usr/bin/tool"], capture_output=True, text=True, timeout=20, check=True)
    assert said.stdout == "tool 1\n"
    files = sorted(str(p.relative_to(one.folder)) for p in one.folder.rglob("*") if not p.is_dir())
    assert files == ["usr/bin/tool", "usr/share/doc", "usr/share/tool/deep/data"]
    assert tree(tmp_path).get([SHARED, TOOL]) == {}
    assert tree(tmp_path, offline=True).get([TOOL]) == {}
    assert fake.fetched == ["tool", "tool-data"]
    left = sorted(path.name for path in (tmp_path / "suites").iterdir())
    assert left == [f"apt-{SUITE}-amd64", f"{SUITE}-amd64", f"{SUITE}-amd64.lock"]


def _flip(folder: Path) -> None:
    (folder / "v1/tree/usr/bin/tool").write_text("#!/bin/sh\necho something else\n")


def _lose(folder: Path) -> None:
    (folder / "v1/tree/usr/bin/tool").unlink()


def _link(folder: Path) -> None:
    path = folder / "v1/tree/usr/bin/tool"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def _half_manifest(folder: Path) -> None:
    manifest = folder / "v1/tool.json"
    manifest.write_bytes(manifest.read_bytes()[:40])


def _other_path(folder: Path) -> None:
    manifest = folder / "v1/tool.json"
    manifest.write_text(manifest.read_text().replace("usr/bin/tool", "../../../tool"))


@needs_dpkg
@pytest.mark.parametrize("damage", [_flip, _lose, _link, _half_manifest, _other_path])
def test_damage_is_noticed_and_mended(tmp_path: Path, fake: type[FakeApt], damage: Callable[[Path], None]) -> None:
    assert tree(tmp_path).get([TOOL, SHARED]) == {}
    damage(tmp_path / f"suites/{SUITE}-amd64")
    missing = tree(tmp_path, offline=True).get([TOOL, SHARED])
    assert list(missing) == ["tool"]
    assert missing["tool"].startswith("offline, and ")
    assert tree(tmp_path).get([TOOL, SHARED]) == {}
    assert fake.fetched == ["tool", "tool-data", "tool"], "only what was damaged is fetched again"


@needs_dpkg
def test_all_parts_are_of_one_version(tmp_path: Path, fake: type[FakeApt]) -> None:
    assert tree(tmp_path).get([SHARED]) == {}
    fake.version = "2"
    new = tree(tmp_path)
    assert new.get([TOOL, SHARED]) == {}
    manifests = list(new.folder.parent.glob("*.json"))
    assert len(manifests) == 2
    assert {json.loads(path.read_text())["package"].split("_")[1] for path in manifests} == {"2"}


RUN_AND_WAIT = """
import subprocess, sys
from pathlib import Path
from virtiova.packages.tree import Part, Tree, hold

one = Tree(sys.argv[1], "amd64", root=Path(sys.argv[2]), offline=True)
assert one.get([Part("tool", ("usr/bin/tool",))]) == {}
print("holding", flush=True)
sys.stdin.readline()
print(subprocess.run([one.folder / "usr/bin/tool"], capture_output=True, text=True, timeout=20, check=True).stdout)
"""


@needs_dpkg
def test_who_runs_an_older_version_goes_on(
    tmp_path: Path, fake: type[FakeApt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite that moves on while another run executes programs from the folder takes nothing away from it."""
    monkeypatch.setattr("virtiova.packages.tree._held", {})
    versions = tmp_path / f"suites/{SUITE}-amd64"

    def there() -> set[str]:
        return {path.name for path in versions.iterdir()}

    # What this process is given, it holds; the other process is to be the only one.
    monkeypatch.setattr("virtiova.packages.tree.hold", lambda folder: folder.is_dir())
    assert tree(tmp_path).get([TOOL]) == {}
    command = [sys.executable, "-c", RUN_AND_WAIT, SUITE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holding\n"
        fake.version = "2"
        new = tree(tmp_path)
        assert new.get([TOOL, SHARED]) == {}
        assert (there(), new.folder.parent.name) == ({"v1", "v2", "current"}, "v2")
        said, _ = other.communicate("go on\n", timeout=20)
    assert (other.returncode, said) == (0, "tool 1\n\n")
    fake.version = "3"
    assert tree(tmp_path).get([TOOL, SHARED, Part("more", ("usr/bin/tool",))]) == {}
    assert there() == {"v3", "current"}, "nobody held the others"


@needs_dpkg
def test_what_was_given_out_is_held_and_what_is_gone_is_not(tmp_path: Path, fake: type[FakeApt]) -> None:
    one = tree(tmp_path)
    assert one.get([TOOL]) == {}
    fake.version = "2"
    assert tree(tmp_path).get([TOOL, SHARED]) == {}
    assert (one.folder / "usr/bin/tool").exists(), "it was given to this very process"
    assert not hold(tmp_path / "nothing")
    (versions,) = (tmp_path / "suites").glob("*-amd64/current")
    versions.unlink()
    versions.symlink_to("../../elsewhere")
    assert tree(tmp_path, offline=True).get([TOOL]) == {"tool": "offline, and not in the cache"}


@needs_dpkg
def test_one_package_that_cannot_be_had_does_not_cost_the_others(tmp_path: Path, fake: type[FakeApt]) -> None:
    fake.absent = {"tool"}
    assert tree(tmp_path).get([TOOL, SHARED]) == {"tool": "apt-get download: Unable to locate package tool"}
    assert tree(tmp_path, offline=True).get([SHARED]) == {}
    empty = Part("tool-more", ("usr/lib/nothing",))
    assert "holds nothing like usr/lib/nothing" in tree(tmp_path).get([empty])["tool-more"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "suites").write_text("a file where a folder should be")
    (reason,) = tree(tmp_path).get([TOOL]).values()
    assert str(tmp_path) in reason


def test_another_suite_of_the_same_mirror() -> None:
    mirror = apt.Stanza("http://mirror.example.org/debian", "bookworm", "/k.gpg")
    others = [apt.Stanza("http://mirror.example.org/debian-security", "bookworm-security", "")]
    assert apt.of_suite([mirror, *others], SUITE) == [apt.Stanza(mirror.uri, SUITE, mirror.signed_by)]


# -- QEMU by the name of a suite -----------------------------------------------------------------------------------


def test_a_suite_that_is_not_in_the_cache_is_said_for_each_board(tmp_path: Path) -> None:
    found = suites.named(SUITE, BOARDS.values(), root=tmp_path, offline=True)
    for board in BOARDS.values():
        with pytest.raises(NotPossibleError, match=f"no {board.package} of {SUITE}: offline, and not in the cache"):
            found.binary(board)


@pytest.mark.parametrize("name", ["/nonexistent", "Bookworm", "../bookworm", "bookworm_backports", ""])
def test_neither_a_directory_nor_a_suite(name: str) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        suites.named(name, BOARDS.values(), offline=True)


@needs_dpkg
def test_a_binary_that_does_not_start_here_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeApt):
        def download(self, package: str) -> Path:
            root = self._folder / "make"
            shutil.rmtree(root, ignore_errors=True)
            (root / "DEBIAN").mkdir(parents=True)
            (root / "DEBIAN/control").write_text(
                f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: x\n"
            )
            for name in (f"usr/bin/{RISCV_VIRT.binary}", "usr/share/qemu/x", "usr/lib/triplet/qemu/x.so"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text("#!/bin/sh\necho libold.so.1: cannot open >&2\nexit 127\n")
                (root / name).chmod(0o755)
            deb = self._folder / f"{package}_1_all.deb"
            subprocess.run(["dpkg-deb", "-b", str(root), str(deb)], capture_output=True, timeout=30, check=True)
            return deb

    monkeypatch.setattr("virtiova.packages.tree.Apt", Broken)
    monkeypatch.setattr(suites, "own_architecture", lambda: "amd64")
    found = suites.named(SUITE, [RISCV_VIRT], root=tmp_path)
    with pytest.raises(NotPossibleError, match="it does not start here: libold"):
        found.binary(RISCV_VIRT)


@pytest.mark.qemu
def test_an_old_qemu_lacks_what_newer_ones_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Installation, "binary", lambda self, board: board.binary)
    monkeypatch.setattr("virtiova.machine.qemu.installation.qemu_version", lambda binary: "7.2.22")
    monkeypatch.setattr("virtiova.machine.qemu.installation._help", lambda *_: "  bus_num=<uint8>")
    old = Installation("/old")
    old.check(VIRT, VIRT.iommu("smmuv3"))
    for board, iommu, word in ((VIRT, "smmuv3,stage=2", "stage"), (RISCV_VIRT, "riscv", "iommu-sys")):
        with pytest.raises(NotPossibleError, match=rf"7\.2\.22 is too old: .* has no {word} .*--qemu {SUITE}"):
            old.check(board, board.iommu(iommu))


@pytest.mark.qemu
def test_the_real_one_runs_in_place(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    installation = newer_qemu(pytestconfig)
    assert "version 1" in run_qemu(installation, "--version").stdout
    words = ["probe", "qemu", "--qemu", SUITE, "--offline", "--machine", "riscv-virt"]
    words += ["--device", "virtio-rng-pci,iommu_platform=on", "--experiment", "device-writes"]
    assert main.main(words) == exits.OK
    assert "translated  translated" in capsys.readouterr().out
    assert main.main([*words, "--script"]) == exits.OK
    assert f"qemu={installation.directory!r}" in capsys.readouterr().out
    listed = run_qemu(installation, "-M", "none", "-device", "help")
    assert listed.returncode == 0, "modules of another build are in the way"
