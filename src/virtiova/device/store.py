# SPDX-License-Identifier: Apache-2.0
"""What a disk is made of: memory, or a file. Bytes are copied in and out; nothing keeps a hold on a guest's memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import time
from typing import Final, Literal, Protocol, Self, runtime_checkable

from virtiova._core import Disk, Mapping, Window, uring_travels
from virtiova.errors import NotPossibleError, UsageError

Uring = Literal["nothing", "waiting", "all"]

_LOCK_SECONDS: Final = 0.5
_ZEROES: Final = 1 << 20
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
"""Modes of ``fallocate`` (Linux, ``include/uapi/linux/falloc.h``)."""
_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL})


def _lock(fd: int, kind: int) -> None:
    """Lock a file. What a process that was killed had under way in the kernel has the lock until it is done."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


class Store(Protocol):
    """What a disk is made of. Offsets and sizes in bytes; an ``OSError`` becomes status IOERR."""

    @property
    def size(self) -> int:
        """Bytes in total; what is left after the last whole sector is not used."""

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, which are within `size`."""

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``, all of it within `size`."""

    def flush(self) -> None:
        """Return when all that was written is on stable storage."""

    def discard(self, offset: int, length: int) -> None:
        """What is there is not wanted any more: may free it, may do nothing."""

    def zero(self, offset: int, length: int, *, free: bool) -> None:
        """Bytes that read as zeroes from now on. ``free``: they need not take room either."""


@runtime_checkable
class Native(Protocol):
    """A store that can be read and written without Python."""

    def disk(self, most: int) -> Disk:
        """An engine for one queue, of which a request moves at most so many bytes. As long-lived as the store."""

    @property
    def how(self) -> str:
        """How the engines that there are get at the bytes, for a log."""


class MemoryStore:
    """A disk in memory: ``image`` is used in place, not copied."""

    def __init__(self, image: bytearray | mmap.mmap, *, read_only: bool = False) -> None:
        self._image = image
        self.read_only = read_only

    @property
    def size(self) -> int:
        """Bytes in total."""
        return len(self._image)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``."""
        return bytes(self._image[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        self._image[offset : offset + len(data)] = data

    @classmethod
    def empty(cls, size: int, *, read_only: bool = False) -> Self:
        """``size`` bytes of zeroes, in huge pages where the kernel has some."""
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return cls(memory, read_only=read_only)

    def flush(self) -> None:
        """Nothing is more stable than this."""

    def discard(self, offset: int, length: int) -> None:
        """Nothing is freed."""

    def zero(self, offset: int, length: int, *, free: bool) -> None:
        """Put zeroes there."""
        self._image[offset : offset + length] = bytes(length)

    def disk(self, most: int) -> Disk:
        """An engine over the same bytes."""
        return Disk(self.size, most, window=Window(self._image))

    @property
    def how(self) -> str:
        """No file at all."""
        return "in memory"


class FileStore:
    """A disk in a file, or on a block device. Every access is one bounce buffer and one positioned system call.

    The file is locked (``flock``) against a second `FileStore`: shared if read-only. It keeps the size that it has
    now; one that becomes shorter answers with an error, one that grows is not used beyond that. ``uring``: what its
    engines do by io_uring: nothing, what would have to wait, or all. Raises `UsageError` if ``path`` cannot be opened
    so, and `NotPossibleError` if somebody else has it, or if there is no io_uring for all.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, uring: Uring = "nothing") -> None:
        self.read_only = read_only
        self._disks: list[Disk] = []
        self._uring = uring
        self.without = "" if uring != "nothing" else "not asked for"
        """Why engines do without io_uring, if they do."""
        try:
            self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"{os.fspath(path)}: {error.strerror}") from error
        try:
            kind = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise UsageError(f"{os.fspath(path)}: neither a file nor a block device")
            # Only opening it is not to wait, for a pipe's other end. With io_uring this flag would mean: fail instead.
            os.set_blocking(self._fd, True)
            _lock(self._fd, fcntl.LOCK_SH if read_only else fcntl.LOCK_EX)
            self._size = os.lseek(self._fd, 0, os.SEEK_END)
        except BlockingIOError as error:
            self.close()
            raise NotPossibleError(f"{os.fspath(path)}: somebody else serves it, and one of you may write") from error
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes in total, as they were at the start."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; ``OSError`` if the file has become shorter than that."""
        data = os.pread(self._fd, length, offset)
        if len(data) == length:
            return data
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"the file ends at {offset + len(data)}, wanted {offset + length} bytes")
            data += more
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        done = os.pwrite(self._fd, data, offset)
        while done < len(data):
            done += os.pwrite(self._fd, memoryview(data)[done:], offset + done)

    def flush(self) -> None:
        """Return when the file's bytes are on the disk."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole where the file system can."""
        self._allocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def zero(self, offset: int, length: int, *, free: bool) -> None:
        """Zeroes: as a hole or as a zeroed range where the file system can, else written out."""
        if self._allocate((_PUNCH_HOLE if free else _ZERO_RANGE) | _KEEP_SIZE, offset, length):
            return
        for done in range(0, length, _ZEROES):
            self.write(offset + done, bytes(min(_ZEROES, length - done)))

    def disk(self, most: int) -> Disk:
        """An engine that lets the kernel move bytes straight between the file and whoever wants them.

        What would have to wait for the file goes by io_uring, with bytes of our own, where the kernel has that and
        nobody forbids it.
        """
        try:
            if self._uring == "waiting" and not self._disks and uring_travels():
                # What a process may do to its rings it may do to those that come in by a socket.
                self.without, self._uring = "this kernel lets others send rings that nobody restricted", "nothing"
            disk = Disk(self.size, most, fd=self._fd, uring=self._uring != "nothing")
        except OSError as error:
            self.without = error.strerror or str(error)
            if self._uring == "all":
                raise NotPossibleError(f"no io_uring: {self.without}") from error
            self._uring = "nothing"
            disk = Disk(self.size, most, fd=self._fd)
        disk.always_later = self._uring == "all"
        self._disks.append(disk)
        return disk

    @property
    def how(self) -> str:
        """Whether there is io_uring, and why not."""
        if self.without:
            return f"no io_uring ({self.without}): a request that has to wait for the file keeps all queues waiting"
        return f"requests {'' if self._uring == 'all' else 'that have to wait for the file '}go by io_uring"

    def close(self) -> None:
        """Let go of the file, and of its lock. May be called more than once. Not while an engine of it is served."""
        while self._disks:
            # The kernel's half of it has the file, too.
            self._disks.pop().close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # The kernel ends its side when it has time, and the lock is the file's.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """``fallocate``, which Python does not have with a mode; False where it is not supported."""
        import ctypes

        call = ctypes.CDLL(None, use_errno=True).fallocate64
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if call(self._fd, mode, offset, length) == 0:
            return True
        number = ctypes.get_errno()
        if number in _CANNOT:
            return False
        raise OSError(number, os.strerror(number))


class MappedStore(FileStore):
    """A `FileStore` of which the engine works on a mapping of the file: for files in memory, or in the page cache.

    Where the file has become shorter, or its file system is full, the mapping is not used any more, and all goes by
    system calls, which say so. Raises `NotPossibleError` for a file that cannot be mapped.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, uring: Uring = "nothing") -> None:
        super().__init__(path, read_only=read_only, uring=uring)
        self._mapping: Mapping | None = None
        if not self.size:
            return
        # Files of huge pages are mapped by huge pages: such a file names its page as its block size.
        page = max(os.fstat(self._fd).st_blksize, mmap.ALLOCATIONGRANULARITY)
        try:
            self._mapping = Mapping(self._fd, 0, self.size, page, writable=not read_only)
        except OSError as error:
            self.close()
            raise NotPossibleError(f"{os.fspath(path)}: it cannot be mapped: {error.strerror}") from error

    def disk(self, most: int) -> Disk:
        """An engine over the mapping."""
        if self._mapping is None:
            return super().disk(most)
        return Disk(self.size, most, window=self._mapping.window(0, self.size), mapping=self._mapping)

    @property
    def how(self) -> str:
        """As if it were memory."""
        return "the file is mapped"
