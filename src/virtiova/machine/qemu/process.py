# SPDX-License-Identifier: Apache-2.0
"""A QEMU process that leaves nothing behind: sockets, RAM and images are inherited descriptors, never files.

Nothing has a name in a file system, so nothing is left there however this process ends. QEMU itself is killed by
`QemuProcess.close`, by `kill_all` on a signal, and by the kernel if this process is killed outright.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from virtiova.errors import MachineError

STDERR_LIMIT = 64 * 1024
"""Bytes of QEMU's words that are looked at: the last ones."""
_STDERR_ROOM = 1024 * 1024
"""Bytes of QEMU's words that are kept: the first ones. What a broken QEMU says beyond that is lost."""

_live: set[subprocess.Popen[bytes]] = set()
_lock = threading.RLock()
# Reentrant: a signal handler runs in the main thread, whatever that holds.
_stopping = False

_Make = Callable[[], subprocess.Popen[bytes]]


class _Child:
    """A started process that ends with the last reference to it: an interrupt may strike anywhere between its start
    and the moment when somebody is there to close it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def __del__(self) -> None:
        _end(self.process)


class _Spawner:
    """Starts every child from one thread that lives as long as this process.

    The parent-death signal is sent when the *thread* that forked ends, so a worker of a pool must not fork.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[_Make, Future[_Child]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, make: _Make) -> _Child:
        """Run ``make`` there. Whoever is interrupted while waiting leaves no child behind."""
        with _lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="virtiova-spawner", daemon=True)
                self._thread.start()
        future: Future[_Child] = Future()
        self._work.put((make, future))
        return future.result()

    def _run(self) -> None:
        while True:
            self._start_one(*self._work.get())

    def _start_one(self, make: _Make, future: Future[_Child]) -> None:
        # A function of its own, so that nothing here keeps the child once it has been handed over.
        try:
            process = make()
            with _lock:
                _live.add(process)
            future.set_result(_Child(process))
        except BaseException as error:  # handed to the caller, who is waiting for it
            future.set_exception(error)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    with _lock:
        _live.discard(process)


_spawner = _Spawner()


def _after_fork() -> None:
    """A forked child has neither the spawner's thread nor the parent's machines, and is nobody's guard."""
    global _spawner, _lock
    _spawner, _lock = _Spawner(), threading.RLock()
    _live.clear()
    _guard.cache_clear()


os.register_at_fork(after_in_child=_after_fork)

# Run by the child once the kernel would kill it with us: had we died before that, it would be nobody's.
_NOT_AN_ORPHAN = '[ "$PPID" = "$0" ] && exec "$@"'


@functools.cache
def _guard() -> tuple[str, ...]:
    """The command prefix that lets the kernel kill QEMU when this process dies; empty where there is none.

    util-linux has it; other setprivs may lack the option, which is tried once.
    """
    path, shell = shutil.which("setpriv"), shutil.which("sh")
    if path is None or shell is None:
        return ()
    guard = (path, "--pdeathsig", "KILL", "--", shell, "-c", _NOT_AN_ORPHAN, str(os.getpid()))
    try:
        tried = subprocess.run([*guard, "true"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return guard if tried.returncode == 0 else ()


def memory_file(name: str, size: int) -> int:
    """A descriptor of anonymous memory of ``size`` bytes, to be inherited by QEMU."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def sealed_file(name: str, size: int) -> int:
    """Anonymous memory of a size that can never change: whoever writes past the end gets an error."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


class QemuProcess:
    """A running QEMU. ``inherit`` are the descriptors that it gets under their own numbers; ``environment`` replaces
    ours if it is given."""

    def __init__(
        self, argv: Sequence[str], inherit: Sequence[int], environment: Mapping[str, str] | None = None
    ) -> None:
        self._stderr = sealed_file("virtiova-stderr", _STDERR_ROOM)
        command = [*_guard(), *argv]

        def make() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=tuple(inherit),
                env=environment,
                # A Ctrl-C on the terminal is ours to handle: QEMU must not die before its words are read.
                start_new_session=True,
            )

        try:
            self._child = _spawner.start(make)
        except BaseException as error:
            os.close(self._stderr)
            self._stderr = -1
            if isinstance(error, OSError):
                raise MachineError(f"cannot start {argv[0]}: {error.strerror}") from error
            raise
        self._process = self._child.process
        if _stopping:
            self.close()
            raise MachineError("stopping: no machine is started any more")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def exit_code(self, seconds: float = 0.0) -> int | None:
        """How it ended, waiting up to ``seconds`` for it; None while it runs. Negative: the signal."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stderr(self) -> str:
        """What it printed so far, the last 64 KiB of it."""
        if self._stderr < 0:
            return ""
        said = os.pread(self._stderr, _STDERR_ROOM, 0).rstrip(b"\0")
        return said[-STDERR_LIMIT:].decode("utf-8", "replace")

    def kill(self) -> None:
        """End it at once. It holds nothing that would need an orderly end."""
        self._process.kill()

    def close(self) -> None:
        """End it, wait for it, forget it."""
        _end(self._process)
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1


def kill_all() -> None:
    """End every QEMU that this process started, and start no more. For signal handlers' use at the very end."""
    global _stopping  # noqa: PLW0603 - the process is ending, and every thread has to know
    with _lock:
        _stopping = True
        processes = list(_live)
    for process in processes:
        process.kill()


atexit.register(kill_all)
