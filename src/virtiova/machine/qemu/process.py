# SPDX-License-Identifier: Apache-2.0
"""A QEMU process that leaves nothing behind: sockets, RAM and images are inherited descriptors, never files.

Nothing has a name in a file system, so nothing is left there however this process ends. QEMU itself is killed by
`QemuProcess.close`, by `kill_all` on a signal, and by the kernel if this process is killed outright.
"""

from __future__ import annotations

import atexit
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

_live: set[QemuProcess] = set()
_lock = threading.Lock()
_stopping = False


class _Spawner:
    """Starts every child from one thread that lives as long as this process.

    The parent-death signal is sent when the *thread* that forked ends, so a worker of a pool must not fork.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]]
        self._work = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, make: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with _lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="virtiova-spawner", daemon=True)
                self._thread.start()
        future: Future[subprocess.Popen[bytes]] = Future()
        self._work.put((make, future))
        return future.result()

    def _run(self) -> None:
        while True:
            make, future = self._work.get()
            try:
                future.set_result(make())
            except BaseException as error:  # handed to the caller, who is waiting for it
                future.set_exception(error)


_spawner = _Spawner()


@functools.cache
def _guard() -> tuple[str, ...]:
    """The command prefix that lets the kernel kill QEMU when this process dies; empty where there is none.

    util-linux has it; other setprivs may lack the option, which is tried once.
    """
    path = shutil.which("setpriv")
    if path is None:
        return ()
    guard = (path, "--pdeathsig", "KILL", "--")
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


class QemuProcess:
    """A running QEMU. ``inherit`` are the descriptors that it gets under their own numbers; ``environment`` replaces
    ours if it is given."""

    def __init__(
        self, argv: Sequence[str], inherit: Sequence[int], environment: Mapping[str, str] | None = None
    ) -> None:
        self._stderr = memory_file("virtiova-stderr", 0)
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
            self._process = _spawner.start(make)
        except OSError as error:
            os.close(self._stderr)
            raise MachineError(f"cannot start {argv[0]}: {error.strerror}") from error
        with _lock:
            _live.add(self)
            late = _stopping
        if late:
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
        size = os.fstat(self._stderr).st_size
        start = max(0, size - STDERR_LIMIT)
        return os.pread(self._stderr, STDERR_LIMIT, start).decode("utf-8", "replace")

    def kill(self) -> None:
        """End it at once. It holds nothing that would need an orderly end."""
        self._process.kill()

    def close(self) -> None:
        """End it, wait for it, forget it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        with _lock:
            _live.discard(self)
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
