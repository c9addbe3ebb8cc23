# SPDX-License-Identifier: Apache-2.0
"""What a serving process gives up before it listens to anybody: system calls, new programs, core dumps.

A server that is taken over is a process with guest memory, a disk and a few sockets. With the filter it
stays that: it opens no file, makes no socket, starts no program, and makes no memory executable. The filter
is libseccomp's, which knows the numbers of system calls on every architecture; it is called by ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import resource
import signal
import sys
import termios
from collections.abc import Sequence
from typing import Final

from virtiova.errors import NotPossibleError

MODES: Final = ("auto", "on", "off")
"""``auto``: on where libseccomp and the kernel can, else said and gone without."""

_ALLOWED: Final = (
    # sockets and descriptors that are there already
    *("read", "write", "readv", "writev", "preadv", "preadv2", "pwritev", "pwritev2", "pread64", "pwrite64"),
    *("recvmsg", "recvfrom", "send", "accept", "accept4", "getsockname", "getpeername", "getsockopt"),
    *("shutdown", "poll", "ppoll", "ppoll_time64", "close", "dup"),
    # the disk
    *("lseek", "_llseek", "fallocate", "fdatasync", "fsync", "fstat", "fstat64"),
    # what is in flight: memory that has no name
    *("memfd_create", "ftruncate", "ftruncate64"),
    # our own memory
    *("brk", "munmap", "mremap", "madvise", "membarrier"),
    # the name of the socket, at the end
    *("unlink", "unlinkat", "lstat", "lstat64", "newfstatat", "fstatat64", "statx"),
    # time, locks, signals, the end
    *("clock_gettime", "clock_gettime64", "clock_nanosleep", "clock_nanosleep_time64", "nanosleep", "gettimeofday"),
    *("futex", "futex_time64", "sched_yield", "getrandom", "getpid", "gettid", "restart_syscall", "rseq"),
    # what ends a notification that somebody makes wait
    *("timer_create", "timer_settime", "timer_settime64"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigreturn", "sigaltstack", "exit", "exit_group"),
)
_MAP: Final = ("mmap", "mmap2", "mprotect", "pkey_mprotect")
"""Allowed if nothing becomes executable: third argument without PROT_EXEC."""
_CONTROLS: Final = (termios.FIONBIO, termios.FIONREAD, termios.TCGETS)
"""What ``ioctl`` is good for: not to wait, and whether something is a terminal. Not to send signals (FIOASYNC)."""
_COMMANDS: Final = (fcntl.F_GETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC)
"""What ``fcntl`` is good for. Its F_SETOWN, F_SETSIG and F_SETFL with O_ASYNC let the kernel signal whom we name."""
_PATHS: Final = ("open", "openat", "openat2", "stat", "stat64", "access", "faccessat", "faccessat2", "readlink")
"""Fail as on a file that may not be read: a traceback looks for the lines of its source, and does without."""

_TRAP: Final = 0x00030000
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_EQUAL: Final = 4
_MASKED_EQUAL: Final = 7
_SYNC: Final = 4
"""libseccomp, ``include/seccomp.h``: actions, comparisons, and the attribute that all threads get the filter."""

SPARE_FILES: Final = 64
"""Descriptors beyond those of a device's rings: disk, sockets, standard streams, and those on their way."""


class _Compare(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def enter(
    mode: str,
    queues: int,
    *,
    descriptors: bool = True,
    addresses: bool = False,
    uring: bool = False,
    controls: Sequence[int] = (),
) -> str:
    """Give up what is not needed to serve a device of ``queues`` rings, for good; a line for the log.

    ``descriptors``: some are sent to the front end, as for what a disk has in flight. ``addresses``: datagrams go to
    sockets by their names. With either, a datagram socket, if there is one, reaches any other: an address in memory is
    nothing that a filter can look at. ``uring``: rings of io_uring that were made before, and restricted, may be used.
    ``controls``: further numbers of ``ioctl`` that are needed.

    From here on a system call that is not in the list ends the process by SIGSYS, with the stack that asked for it
    on standard error. All modules have to be imported by now. Raises `NotPossibleError` for ``on`` where it cannot be.
    """
    if mode == "off":
        return "sandbox: off, as asked for"
    _limit(queues)
    try:
        more = (*(["sendmsg"] if descriptors else []), *(["sendmmsg"] if addresses else []))
        count = _filter((*more, *(["io_uring_enter"] if uring else [])), controls, addresses=addresses)
    except OSError as error:
        if mode == "on":
            raise NotPossibleError(f"--sandbox on: {error.strerror}") from error
        return f"sandbox: none, {error.strerror}"
    return f"sandbox: {count} system calls are allowed; any other ends this process by SIGSYS, and its stack is shown"


def _limit(queues: int) -> None:
    """No core file, which would have the guest's memory; no more descriptors than a front end may fill."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Those that we were started with are there in any case.
    try:
        highest = max(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        return
    wanted = highest + SPARE_FILES + 3 * queues
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted if hard == resource.RLIM_INFINITY else hard))


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError as error:
        raise OSError(errno.ENOENT, "libseccomp.so.2 is not installed") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Compare),
    ]
    return library


def _filter(more: Sequence[str], controls: Sequence[int], *, addresses: bool) -> int:
    """Load the filter, with ``more`` and ``controls`` in it; how many system calls it allows. With it goes
    ``no_new_privs``."""
    library = _library()
    context = library.seccomp_init(_TRAP)
    if not context:
        raise OSError(errno.ENOMEM, "libseccomp cannot make a filter")
    names: set[str] = set()

    def rule(action: int, name: str, *compare: _Compare) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            # Not of this architecture, or newer than the library.
            return
        array = (_Compare * len(compare))(*compare)
        problem = library.seccomp_rule_add_array(context, action, number, len(compare), array)
        # A system call of another architecture has a number below zero here, and no rule.
        if problem and number >= 0:
            raise OSError(-problem, f"libseccomp: {name}: {os.strerror(-problem)}")
        if not problem and action == _ALLOW and number >= 0:
            names.add(name)

    try:
        for name in (*_ALLOWED, *more):
            rule(_ALLOW, name)
        for name in _MAP:
            rule(_ALLOW, name, _Compare(2, _MASKED_EQUAL, mmap.PROT_EXEC, 0))
        for control in (*_CONTROLS, *controls):
            rule(_ALLOW, "ioctl", _Compare(1, _EQUAL, control, 0))
        for command in _COMMANDS:
            for name in ("fcntl", "fcntl64"):
                rule(_ALLOW, name, _Compare(1, _EQUAL, command, 0))
        rule(_ALLOW, "sendto", *([] if addresses else [_Compare(4, _EQUAL, 0, 0)]))
        # Of ourselves only: what a signal that ends us is raised by.
        rule(_ALLOW, "tgkill", _Compare(0, _EQUAL, os.getpid(), 0))
        for name in _PATHS:
            rule(_ERRNO | errno.EACCES, name)
        library.seccomp_attr_set(context, _SYNC, 1)
        if sys.stderr is not None:
            faulthandler.register(signal.SIGSYS, file=sys.stderr, all_threads=False, chain=True)
        if problem := library.seccomp_load(context):
            raise OSError(-problem, f"the kernel takes no filter: {os.strerror(-problem)}")
    finally:
        library.seccomp_release(context)
    return len(names)
