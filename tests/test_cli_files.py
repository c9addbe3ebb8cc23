# SPDX-License-Identifier: Apache-2.0
"""``-o``: that a file can be written is known before the run, and one that is cut short leaves what was there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from virtiova.cli import exits, main

MATRIX = ["matrix", "--only", "xen"]
PROBE = ["probe", "model", "honest", "--device", "rng", "--experiment", "device-writes"]
COLLECTS = {"matrix": "virtiova.cli.matrix.collect", "probe": "virtiova.cli.probe._collect"}
BOTH = pytest.mark.parametrize("words", [MATRIX, PROBE], ids=COLLECTS)


class NotReachedError(Exception):
    """It ran, though it could not have written what came of it."""


@pytest.fixture
def runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(*_: object) -> None:
        raise NotReachedError

    for name in COLLECTS.values():
        monkeypatch.setattr(name, collect)


@BOTH
@pytest.mark.usefixtures("runs_nothing")
def test_what_cannot_be_written_is_said_before_anything_runs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    good = tmp_path / "good.json"
    for name, why in (
        ("nothing/x.json", "No such file or directory"),
        ("folder.json", "Is a directory"),
        ("file/x.json", "Not a directory"),
    ):
        assert main.main([*words, "-o", str(good), "-o", str(tmp_path / name)]) == exits.USAGE
        assert f"{tmp_path / name}: cannot be written: {why}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


@BOTH
@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_what_may_not_be_written_is_not_replaced_either(words: list[str], tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    target.chmod(0o400)
    assert main.main([*words, "-o", str(target)]) == exits.USAGE
    assert target.read_text() == "old"


@BOTH
@pytest.mark.parametrize("error", [NotReachedError, KeyboardInterrupt])
def test_a_run_that_is_cut_short_leaves_what_was_there(
    words: list[str], error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")

    def collect(*_: object) -> None:
        assert target.read_text() == "old"
        raise error

    monkeypatch.setattr(COLLECTS[words[0]], collect)
    if error is KeyboardInterrupt:
        assert main.main([*words, "-o", str(target)]) == exits.INTERRUPTED
    else:
        with pytest.raises(NotReachedError):
            main.main([*words, "-o", str(target)])
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@BOTH
def test_what_was_there_is_replaced_as_a_whole(words: list[str], tmp_path: Path) -> None:
    target, link, new = tmp_path / "x.json", tmp_path / "link.json", tmp_path / "new.txt"
    target.write_text("old" * 100_000)
    target.chmod(0o640)
    link.symlink_to(target)
    mask = os.umask(0o027)
    try:
        assert main.main([*words, "-q", "-o", str(link), "-o", str(new)]) == exits.OK
    finally:
        os.umask(mask)
    assert target.read_text().startswith("{")
    assert "oldold" not in target.read_text()
    assert link.is_symlink()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (target, new)] == [0o640, 0o640]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "new.txt", "x.json"]


@BOTH
def test_what_is_no_file_is_written_to_as_it_is(words: list[str], tmp_path: Path) -> None:
    pipe = tmp_path / "x.json"
    os.mkfifo(pipe)
    fd = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        assert main.main([*words, "-q", "-o", str(pipe)]) == exits.OK
        assert os.read(fd, 1) == b"{"
    finally:
        os.close(fd)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@BOTH
def test_a_full_disk_is_said_and_leaves_nothing_half(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")

    def replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("virtiova.cli.outputs.os.replace", replace)
    assert main.main([*words, "-q", "-o", str(target)]) == exits.COULD_NOT_LOOK
    assert "No space left" in capsys.readouterr().err
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
