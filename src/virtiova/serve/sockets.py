# SPDX-License-Identifier: Apache-2.0
"""Sockets with a name: made so that nobody connects too early, and taken over from a dead server only.

Linux takes the mode of a socket's file from the socket itself, and ``bind`` is what makes the file: so it has
its mode from the first moment (``net/unix/af_unix.c``). Nobody can connect before ``listen``, and by then it
belongs to whom it is to belong.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtiova.errors import NotPossibleError, UsageError

LONGEST_PATH: Final = 107
BACKLOG: Final = 8
"""Front ends that may wait; further ones are told to try again."""
_LOCK_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """Who may connect: the file's mode, and its owner and group by number (-1: ours)."""

    mode: int = 0o600
    owner: int = -1
    group: int = -1


Identity = tuple[int, int]
"""Device and inode of a file."""


def listen(path: str, options: SocketOptions) -> tuple[socket.socket, Identity]:
    """A listening socket at ``path``, and which file that is.

    In the place of a socket of ours (or of ``options.owner``) that nobody listens on, such as a server leaves that
    was killed outright. Raises `UsageError` for a path that cannot be one or has something else, `NotPossibleError`
    if somebody serves there, or for what this process may not do.
    """
    if len(os.fsencode(path)) > LONGEST_PATH or "\0" in path:
        raise UsageError(f"{path!r}: no path of a socket, which has {LONGEST_PATH} bytes at most, and no zero")
    # From the first on, so that it does not hang on a later call whether accepting can wait.
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _alone_in(os.path.dirname(path) or "."):
            _remove_stale(path, options)
            bind(listening, path, options.mode)
            try:
                if (options.owner, options.group) != (-1, -1):
                    os.chown(path, options.owner, options.group, follow_symlinks=False)
                listening.listen(BACKLOG)
            except OSError as error:
                os.unlink(path)
                raise NotPossibleError(f"{path}: {error.strerror}") from error
            info = os.lstat(path)
    except BaseException:
        listening.close()
        raise
    return listening, (info.st_dev, info.st_ino)


def bind(sock: socket.socket, path: str, mode: int = 0o600) -> None:
    """Give ``sock`` the name ``path``, with ``mode`` from the first moment. `UsageError` if that cannot be."""
    os.fchmod(sock.fileno(), mode)
    old = os.umask(0)
    try:
        sock.bind(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        os.umask(old)


def remove(path: str, identity: Identity) -> None:
    """Take the name away, if it still is that file's."""
    with contextlib.suppress(OSError):
        info = os.lstat(path)
        if (info.st_dev, info.st_ino) == identity:
            os.unlink(path)


def adopt(fd: int) -> socket.socket:
    """An open socket that somebody handed over. `UsageError` if it is none, or of another kind."""
    try:
        adopted = socket.socket(fileno=fd)
        if adopted.family != socket.AF_UNIX or adopted.type != socket.SOCK_STREAM:
            adopted.detach()
            raise UsageError(f"descriptor {fd} is no Unix stream socket")
    except OSError as error:
        raise UsageError(f"descriptor {fd}: {error.strerror}") from error
    os.set_inheritable(fd, False)
    return adopted


@contextlib.contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """No other server of this kind looks for dead sockets in ``folder`` meanwhile: it might remove what is made here.

    Whoever may read a folder may lock it, so this waits for a while only.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        # What is wrong with it, bind will say. One that cannot be read cannot be locked.
        yield
        return
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str, options: SocketOptions) -> None:
    try:
        info = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise UsageError(f"{path}: there is something else already")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.settimeout(1.0)
        try:
            other.connect(path)
        except ConnectionRefusedError:
            pass
        except BlockingIOError:
            raise NotPossibleError(f"{path}: somebody is serving there, and many wait") from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        else:
            raise NotPossibleError(f"{path}: somebody is serving there")
    if info.st_uid not in {os.geteuid(), options.owner}:
        raise UsageError(f"{path}: a dead socket of user {info.st_uid}, who has to remove it")
    remove(path, (info.st_dev, info.st_ino))
