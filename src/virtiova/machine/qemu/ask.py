# SPDX-License-Identifier: Apache-2.0
"""A program that is asked something and ends: within bounds, whatever kind of program a user named.

It says what it says into anonymous memory of a fixed size, so that neither much of it nor a child that it leaves
behind costs more than that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.errors import NotPossibleError
from virtiova.machine.qemu.process import sealed_file

SECONDS: Final = 10.0
"""How long an answer may take."""
LIMIT: Final = 1 << 20
"""Bytes of an answer on standard output, and as many on standard error. QEMU's longest is a fiftieth of it."""
_ROOM: Final = 1 << 16
"""Bytes beyond the limit, which show that there is more: a write that does not fit as a whole may be refused as one."""
_LINE: Final = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """How a program ended (negative: the signal), and what it said. What is not UTF-8 is U+FFFD in it."""

    status: int
    out: str
    err: str

    @property
    def why(self) -> str:
        """Its last words on standard error, fit to be printed; its status if it had none."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        if not lines:
            return f"exit status {self.status}"
        return "".join(c if c.isprintable() else "\ufffd" for c in lines[-1].strip()[:_LINE])


def ask(
    argv: Sequence[str], environment: Mapping[str, str] | None = None, *, seconds: float = SECONDS, limit: int = LIMIT
) -> Answer:
    """Run it to its end. `NotPossibleError` if it does not start, does not end in ``seconds``, or has more to say than
    ``limit`` bytes; it is killed then, with all that it started."""
    with contextlib.ExitStack() as cleanup:
        out, err = (sealed_file(f"virtiova-{name}", limit + _ROOM) for name in ("out", "err"))
        cleanup.callback(os.close, out)
        cleanup.callback(os.close, err)
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                # A group of its own, so that what it started ends with it.
                start_new_session=True,
            )
        except OSError as error:
            raise NotPossibleError(f"{argv[0]} cannot be started: {error.strerror}") from error
        try:
            _wait(process.pid, seconds)
        except TimeoutError:
            raise NotPossibleError(f"{argv[0]} did not end within {seconds:g} s") from None
        finally:
            # It has not been waited for yet, so that the number is still its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Answer(process.returncode, _said(argv[0], out, limit), _said(argv[0], err, limit))


def _wait(pid: int, seconds: float) -> None:
    """Until it has ended, but leave it to be waited for. Raises `TimeoutError`."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise TimeoutError
    finally:
        os.close(fd)


def _said(program: str, fd: int, limit: int) -> str:
    # The program moved the place where we stand, too; it may also have moved it to and fro.
    size = os.lseek(fd, 0, os.SEEK_CUR)
    if size > limit:
        raise NotPossibleError(f"{program} says more than {limit} bytes")
    return os.pread(fd, size, 0).decode("utf-8", "replace")
