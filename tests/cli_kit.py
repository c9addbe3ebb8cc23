# SPDX-License-Identifier: Apache-2.0
"""The command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path as File

import virtiova

SOURCE = str(File(virtiova.__file__).parent.parent)
SECONDS = 60
# What a shell may have set, and would change the answer.
AS_SET_HERE = {"NO_COLOR", "COLUMNS", "FORCE_COLOR", "PYTHONUNBUFFERED"}
HONEST = ("probe", "model", "honest", "--experiment", "device-writes")
LYING = ("probe", "model", "lying", "--experiment", "device-writes")
QUIRKY = ("probe", "model", "quirky", "--experiment", "device-writes")


def environment(**changes: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in AS_SET_HERE}
    path = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH", "")]))
    return plain | {"PYTHONPATH": path} | changes


def virtiova_run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The real thing in a process of its own."""
    command = [sys.executable, "-m", "virtiova", *args]
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=SECONDS, check=False)
