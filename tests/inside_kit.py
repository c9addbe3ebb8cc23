# SPDX-License-Identifier: Apache-2.0
"""A Debian guest in which this checkout's own Python runs: what it did there, command by command."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from virtiova.cli.main import main
from virtiova.errors import NotPossibleError
from virtiova.guest.inside import Inside, Setting, files
from virtiova.guest.settings import VDUSE, VFIO, VHOST
from virtiova.packages.store import Store

__all__ = ["OFF", "ON", "VDUSE", "VFIO", "VHOST", "run"]

ON, OFF = "0000:01:00.0", "0000:02:00.0"
"""The first two devices of `VFIO`."""


def run(setting: Setting, steps: Sequence[Sequence[str]]) -> list[Mapping[str, Any]]:
    """Boot, do the steps, and what came of each: ``virtiova ...``, ``bind ADDRESS``, or ``run COMMAND``; ``start NAME
    COMMAND`` and ``start NAME virtiova ...`` in the background, ``until NAME TEXT`` it said that, ``stop NAME
    [SIGNAL]``; ``drive NAME DRIVER`` gives a vDPA device to ``virtio_vdpa`` or ``vhost_vdpa``; ``call
    MODULE:FUNCTION WORD...`` is a function whose answer is ``out`` as JSON, and may be started, too. The test
    is skipped, with the reason, where there is no such kernel to be had."""
    try:
        boot = files(setting, Store())
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    with Inside(setting, boot, "inside_kit") as guest:
        assert guest.hear() == {"ready": True}
        answers: list[Mapping[str, Any]] = []
        for step in steps:
            guest.tell(list(step))
            answers.append(guest.hear())
        return answers


# -- in the guest ------------------------------------------------------------------------------------------------


def bind(address: str) -> None:
    """Give a device to vfio-pci: what `virtiova` leaves to its user."""
    at = f"/sys/bus/pci/devices/{address}"
    steps = [(f"{at}/driver_override", "vfio-pci"), (f"{at}/driver/unbind", address)]
    for path, word in [*steps, ("/sys/bus/pci/drivers_probe", address)]:
        if os.path.exists(path):
            with open(path, "w", encoding="ascii") as file:
                file.write(word)


def drive(name: str, driver: str) -> None:
    """Give a vDPA device to a driver: else the module that was loaded first has it."""
    at = f"/sys/bus/vdpa/devices/{name}"
    if os.path.exists(f"{at}/driver"):
        with open(f"{at}/driver/unbind", "w", encoding="ascii") as file:
            file.write(name)
    for path, word in ((f"{at}/driver_override", driver), (f"/sys/bus/vdpa/drivers/{driver}/bind", name)):
        with open(path, "w", encoding="ascii") as file:
            file.write(word)


def call(words: Sequence[str]) -> object:
    """``MODULE:FUNCTION WORD...``; a word of digits only is a number."""
    module, _, function = words[0].partition(":")
    values = [int(word) if word.isdigit() else word for word in words[1:]]
    return getattr(importlib.import_module(module), function)(*values)


_started: dict[str, int] = {}


def _log(name: str) -> str:
    with open(f"/run/{name}.log", encoding="utf-8", errors="replace") as file:
        return file.read()


def start(name: str, words: Sequence[str]) -> None:
    """A program in the background; what it says is kept. Ours is forked from here, where it is imported already."""
    if words[:2] == ["virtiova", "serve"]:
        importlib.import_module("virtiova.cli.serve")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        _started[name] = pid
        return
    code = 127
    try:
        fd = os.open(f"/run/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((null, 0), (fd, 1), (fd, 2)):
            os.dup2(old, new)
        os.setsid()
        if words[0] not in ("virtiova", "call"):
            os.execvp(words[0], list(words))
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        if words[0] == "call":
            print(json.dumps(call(words[1:])))
        code = int(main(list(words[1:])) or 0) if words[0] == "virtiova" else 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def until(name: str, text: str, seconds: float = 60.0) -> int:
    """0 when the program has said ``text``; 1 if it did not in time, or has ended without it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # First, so that what it said last is read.
        ended = name not in _started or os.waitid(os.P_PID, _started[name], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        with contextlib.suppress(FileNotFoundError):
            if text in _log(name):
                return 0
        if ended:
            break
        time.sleep(0.05)
    return 1


def stop(name: str, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
    """End the program by a signal, and its exit status, below 0 for a signal's. What does not end is killed: -99."""
    pid = _started.pop(name)
    os.kill(pid, number)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return -99


def do(words: Sequence[str]) -> dict[str, Any]:
    """One step, in the guest."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    started = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if words[0] == "bind":
                bind(words[1])
            elif words[0] == "drive":
                drive(words[1], words[2])
            elif words[0] == "start":
                start(words[1], words[2:])
            elif words[0] == "until":
                code = until(words[1], words[2])
                err.write(_log(words[1]))
            elif words[0] == "stop":
                code = stop(words[1], *(int(signal.Signals[word]) for word in words[2:3]))
                err.write(_log(words[1]))
            elif words[0] == "call":
                json.dump(call(words[1:]), out)
            elif words[0] == "run":
                ended = subprocess.run(words[1:], capture_output=True, text=True, timeout=60, check=False)
                code = ended.returncode
                out.write(ended.stdout)
                err.write(ended.stderr)
            else:
                code = main(words[1:])
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = traceback.format_exc()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    with open("/proc/sys/kernel/printk", "w", encoding="ascii") as quiet:
        quiet.write("3")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), flush=True)
