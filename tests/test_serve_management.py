# SPDX-License-Identifier: Apache-2.0
"""Back ends as management software finds and starts them (QEMU, docs/interop/vhost-user.rst and vhost-user.json)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from virtiova import probe
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.cli.serve import CAPABILITIES

SHIPPED = Path(__file__).parent.parent / "share" / "qemu" / "vhost-user"
TYPES = {"blk": "block", "console": "console", "net": "net", "rng": "rng"}
"""Ours, as `VHostUserBackendType` names them."""
PROGRAMS = ("blk", "net", "rng")


def program(kind: str) -> str:
    found = shutil.which(f"vhost-user-{kind}-virtiova", path=sysconfig.get_path("scripts"))
    assert found is not None, "installed with the package"
    return found


def said(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_capabilities(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", kind, "--print-capabilities"]) == exits.OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["type"] == TYPES[kind]
    assert sorted(answer["features"]) == (["blk-file", "read-only"] if kind == "blk" else [])


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_programs_say_their_capabilities_and_ignore_all_else(kind: str) -> None:
    assert json.loads(said(program(kind), "--print-capabilities")) == CAPABILITIES[kind]
    words = ("--frob", "--print-capabilities", "--socket-path=/nowhere/s", "--fd=x")
    assert json.loads(said(program(kind), *words)) == CAPABILITIES[kind]


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_files_are_right_where_they_are_found(kind: str) -> None:
    """Software looks into /usr/share: there, and only there, the program is in /usr/bin."""
    shipped = json.loads((SHIPPED / f"50-virtiova-{kind}.json").read_text())
    here = json.loads(said(program(kind), "--print-descriptor"))
    assert os.access(here["binary"], os.X_OK)
    assert shipped == here | {"binary": f"/usr/bin/{os.path.basename(here['binary'])}"}


def test_there_are_no_more_files_than_programs() -> None:
    assert sorted(path.name for path in SHIPPED.iterdir()) == [f"50-virtiova-{kind}.json" for kind in PROGRAMS]


def test_without_a_program_there_is_no_descriptor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "console", "--print-descriptor"]) == exits.USAGE
    assert "no program vhost-user-console-virtiova" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "rest"), [("blk", "--blk-file={image}"), ("rng", "")])
def test_the_programs_serve_an_open_socket(kind: str, rest: str) -> None:
    spawn = f"{program(kind)} --fd={{fd}} {rest}"
    (cell,) = probe.vhost_user(spawn=spawn, kind=kind, experiments=["device-writes"])
    assert (cell.observed, cell.mismatch) == ("translated", False)
