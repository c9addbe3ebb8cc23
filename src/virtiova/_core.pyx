# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False, autotestdict=False
"""The native half: memory accesses that Python cannot express. Described in ``_core.pyi``."""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize, PyBytes_Size
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strerror

cdef extern from "Python.h":
    Py_ssize_t PyNumber_AsSsize_t(object o, object exc) except? -1

cdef extern from "atomics.h" nogil:
    uint16_t vv_load_acquire16(const void *at, int be) noexcept
    uint32_t vv_load_acquire32(const void *at, int be) noexcept
    void vv_store_release16(void *at, uint16_t value, int be) noexcept
    void vv_store_release32(void *at, uint32_t value, int be) noexcept
    void vv_or8(void *at, uint8_t bits) noexcept
    void vv_load_pair(const void *at, char *out) noexcept
    void vv_fence() noexcept

cdef extern from "radix.h" nogil:
    unsigned VV_READ
    unsigned VV_WRITE
    struct vv_radix:
        unsigned tables
        uint64_t generation
    void vv_radix_clear(vv_radix *radix) noexcept
    char *vv_radix_find(const vv_radix *radix, uint64_t iova, unsigned needed, uint64_t *left) noexcept
    unsigned vv_radix_shift(uint64_t iova, uint64_t first, uint64_t last) noexcept
    unsigned vv_radix_short(uint64_t iova, uint64_t first, uint64_t last) noexcept
    uint64_t VV_SHORT(unsigned bytes) noexcept
    int vv_radix_put(vv_radix *radix, uint64_t iova, unsigned shift, uint64_t entry) noexcept
    void vv_radix_drop(vv_radix *radix, uint64_t first, uint64_t last) noexcept

cdef extern from "guard.h" nogil:
    int vv_guard_add(void *start, size_t length, size_t page) noexcept
    void vv_guard_remove(int at) noexcept
    unsigned long vv_guard_faults(int at) noexcept
    unsigned long vv_guard_all_faults() noexcept

cdef extern from "<sys/mman.h>" nogil:
    int MAP_SHARED
    void *MAP_FAILED
    int PROT_READ
    int PROT_WRITE
    void *mmap(void *at, size_t length, int allowed, int flags, int fd, int64_t offset) noexcept
    int munmap(void *at, size_t length) noexcept


@cython.final
cdef class Window:
    cdef Py_buffer view
    cdef bint held
    cdef int pins

    def __cinit__(self, buffer):
        # A plain writable request, without strides, is granted for C-contiguous memory only.
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        self.held = True
        if <uintptr_t>self.view.buf % 8:
            # An aligned offset would not be an aligned address, and the access not a single one.
            raise ValueError("the buffer does not start at a multiple of 8 bytes")

    def __dealloc__(self):
        self.let_go()

    def __len__(self):
        if not self.held:
            raise ValueError("the window was released")
        return self.view.len

    cdef void let_go(self) noexcept:
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def release(self):
        if self.pins:
            raise BufferError("a radix table leads to this memory")
        self.let_go()

    cdef char *span(self, object offset, Py_ssize_t length, Py_ssize_t align) except NULL:
        """The address of ``length`` bytes at ``offset``, all inside of the buffer and aligned."""
        # First, because an __index__ of somebody else's may release the window.
        cdef Py_ssize_t start = PyNumber_AsSsize_t(offset, IndexError)
        if not self.held:
            raise ValueError("the window was released")
        if start < 0 or length < 0 or length > self.view.len or start > self.view.len - length:
            raise IndexError(f"{length:#x} bytes at offset {start:#x} are not inside of {self.view.len:#x} bytes")
        if start % align:
            raise IndexError(f"offset {start:#x} is not a multiple of {align}")
        return <char *>self.view.buf + start

    def read(self, offset, length):
        cdef Py_ssize_t size = PyNumber_AsSsize_t(length, IndexError)
        return PyBytes_FromStringAndSize(self.span(offset, size, 1), size)

    def write(self, offset, bytes data not None):
        cdef Py_ssize_t size = PyBytes_Size(data)
        memcpy(self.span(offset, size, 1), PyBytes_AsString(data), size)

    def load16(self, offset, bint swap=False):
        return vv_load_acquire16(self.span(offset, 2, 2), swap)

    def load32(self, offset, bint swap=False):
        return vv_load_acquire32(self.span(offset, 4, 4), swap)

    def load_pair(self, offset):
        cdef char pair[16]
        vv_load_pair(self.span(offset, 16, 8), pair)
        return PyBytes_FromStringAndSize(pair, 16)

    def store16(self, offset, uint16_t value, bint swap=False):
        vv_store_release16(self.span(offset, 2, 2), value, swap)

    def store32(self, offset, uint32_t value, bint swap=False):
        vv_store_release32(self.span(offset, 4, 4), value, swap)

    def or8(self, offset, uint8_t bits):
        vv_or8(self.span(offset, 1, 1), bits)


@cython.final
cdef class Mapping:
    cdef char *start
    cdef size_t length
    cdef int slot
    cdef int exports

    def __cinit__(self, int fd, int64_t offset, Py_ssize_t length, Py_ssize_t page, *, bint writable=True):
        cdef void *start
        cdef int allowed = PROT_READ | PROT_WRITE if writable else PROT_READ
        self.slot = -1
        if length <= 0 or page <= 0:
            raise ValueError("wanted some bytes, in some pages")
        start = mmap(NULL, <size_t>length, allowed, MAP_SHARED, fd, offset)
        if start == MAP_FAILED:
            raise OSError(errno, strerror(errno).decode("ascii", "replace"))
        self.start = <char *>start
        self.length = <size_t>length
        self.slot = vv_guard_add(start, self.length, <size_t>page)
        if self.slot < 0:
            error = OSError(errno, "no guard against a file that shrinks: " + strerror(errno).decode("ascii", "replace"))
            self.unmap()
            raise error

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self) noexcept:
        # Nobody accesses it any more, and as soon as it is gone these addresses may be somebody else's.
        if self.slot >= 0:
            vv_guard_remove(self.slot)
            self.slot = -1
        if self.start != NULL:
            munmap(self.start, self.length)
            self.start = NULL

    def window(self, offset, Py_ssize_t length):
        cdef Py_ssize_t start = PyNumber_AsSsize_t(offset, IndexError)
        if start < 0 or length < 0 or <size_t>length > self.length or <size_t>start > self.length - <size_t>length:
            raise IndexError(f"{length:#x} bytes at offset {start:#x} are not inside of {self.length:#x} bytes")
        return Window(memoryview(self)[start : start + length])

    def close(self):
        if self.exports:
            raise BufferError("a window of it was not released")
        self.unmap()

    @property
    def faults(self):
        return vv_guard_faults(self.slot) if self.slot >= 0 else 0

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.start == NULL:
            raise ValueError("the mapping was closed")
        PyBuffer_FillInfo(buffer, self, self.start, <Py_ssize_t>self.length, False, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1


def faults():
    return vv_guard_all_faults()


cdef bint is_u64(object number, uint64_t *out):
    """Whether ``number`` is one of 64 bits. An address past them is not an error here: it is in no table."""
    try:
        out[0] = number
    except OverflowError:
        return False
    return True


include "gate.pxi"


@cython.final
@cython.no_gc_clear
cdef class Radix:
    cdef vv_radix table
    cdef set windows
    cdef Window latest
    cdef Py_ssize_t limit
    cdef Gate gate

    def __cinit__(self, Py_ssize_t limit):
        self.windows = set()
        self.limit = limit
        self.gate = Gate()

    def behind(self, Gate gate not None):
        self.gate = gate

    def __dealloc__(self):
        self.forget()

    cdef forget(self):
        self.gate.shut()
        vv_radix_clear(&self.table)
        self.gate.let_in()
        for each in self.windows:
            (<Window>each).pins -= 1
        self.windows = set()
        self.latest = None

    cdef hold(self, Window window):
        if window is self.latest:
            return
        if window not in self.windows:
            self.windows.add(window)
            window.pins += 1
        self.latest = window

    def clear(self):
        self.forget()

    def fill(self, uint64_t address, uint64_t first, uint64_t last, Window window not None, offset, unsigned allowed):
        cdef unsigned shift, part = 0
        cdef uintptr_t host
        if not first <= address <= last or last - first >= <uint64_t>1 << 62 or allowed & ~(VV_READ | VV_WRITE):
            raise ValueError("wanted an address within its interval, and no other permissions than these")
        # All of the interval, so that every leaf in it is memory of this window.
        host = <uintptr_t>window.span(offset, <Py_ssize_t>(last - first + 1), 1)
        shift = vv_radix_shift(address, first, last)
        if not shift:
            part = vv_radix_short(address, first, last)
            shift = 12 if part else 0
        if not shift or address >> 48 or not allowed:
            return 0
        host += <uintptr_t>((address >> shift << shift) - first)
        if host & 0xfff or host >> 48:
            return 0
        self.gate.shut()
        try:
            return 1 << shift if self.put(address, shift, <uint64_t>host | allowed | VV_SHORT(part), window) else 0
        finally:
            self.gate.let_in()

    cdef bint put(self, uint64_t address, unsigned shift, uint64_t entry, Window window) except -1:
        self.hold(window)
        if not vv_radix_put(&self.table, address, shift, entry):
            return True
        self.forget()
        self.hold(window)
        return not vv_radix_put(&self.table, address, shift, entry)

    def fill_all(
        self, uint64_t first, uint64_t last, Window window not None, offset, unsigned allowed, unsigned limit
    ):
        if last < first or last - first >= <uint64_t>1 << 62 or allowed & ~(VV_READ | VV_WRITE):
            raise ValueError("wanted an interval, and no other permissions than these")
        return self.enter(first, last, window, offset, allowed, limit)

    cdef unsigned enter(
        self, uint64_t first, uint64_t last, Window window, object offset, unsigned allowed, unsigned limit
    ) except? 0:
        cdef unsigned shift, count = 0, part = 0
        cdef uint64_t at
        cdef uintptr_t host = <uintptr_t>window.span(offset, <Py_ssize_t>(last - first + 1), 1), leaf
        # The first page that is all inside; every leaf begins where the one before ends.
        at = (first + 0xfff) & ~<uint64_t>0xfff
        if not allowed or at < first:
            return 0
        self.hold(window)
        self.gate.shut()
        while count < limit and first <= at <= last and not at >> 48:
            shift = vv_radix_shift(at, first, last)
            leaf = host + <uintptr_t>(at - first)
            if not shift:
                # The last page of it, of which it has only the beginning.
                part = vv_radix_short(at, first, last)
                shift = 12
            if leaf & 0xfff or leaf >> 48:
                break
            if vv_radix_put(&self.table, at, shift, <uint64_t>leaf | allowed | VV_SHORT(part)):
                break
            count += 1
            at += <uint64_t>1 << shift
        self.gate.let_in()
        return count

    def drop(self, uint64_t first, uint64_t last):
        self.gate.shut()
        vv_radix_drop(&self.table, first, last)
        self.gate.let_in()

    @property
    def tables(self):
        return self.table.tables

    cdef char *one(self, object address, unsigned size, unsigned needed) except? NULL:
        """Where an aligned value lies; NULL if it is not aligned, or not in here."""
        cdef uint64_t iova, left
        if not is_u64(address, &iova) or iova % size:
            return NULL
        cdef char *at = vv_radix_find(&self.table, iova, needed, &left)
        return at if at != NULL and left >= size else NULL

    cdef bint all_there(self, uint64_t iova, uint64_t length, unsigned needed) noexcept:
        cdef uint64_t left
        while length:
            if vv_radix_find(&self.table, iova, needed, &left) == NULL:
                return False
            if left >= length:
                return True
            iova += left
            length -= left
        return True

    cdef bint copy(self, uint64_t iova, char *ours, uint64_t length, bint out) noexcept:
        """Copy between our memory and that behind ``iova``, all of which is there."""
        cdef uint64_t left, step
        cdef char *at
        while length:
            at = vv_radix_find(&self.table, iova, VV_WRITE if out else VV_READ, &left)
            if at == NULL:
                return False
            step = left if left < length else length
            if out:
                memcpy(at, ours, step)
            else:
                memcpy(ours, at, step)
            iova += step
            ours += step
            length -= step
        return True

    def covers(self, address, length, unsigned needed):
        cdef uint64_t iova, size
        return is_u64(address, &iova) and is_u64(length, &size) and self.all_there(iova, size, needed)

    def read(self, address, Py_ssize_t length):
        cdef uint64_t iova
        if not is_u64(address, &iova) or not 0 <= length <= self.limit:
            return None
        if not self.all_there(iova, <uint64_t>length, VV_READ):
            return None
        data = PyBytes_FromStringAndSize(NULL, length)
        return data if self.copy(iova, PyBytes_AsString(data), <uint64_t>length, False) else None

    def write(self, address, bytes data not None):
        cdef uint64_t iova
        cdef Py_ssize_t length = PyBytes_Size(data)
        if not is_u64(address, &iova) or length > self.limit:
            return False
        if not self.all_there(iova, <uint64_t>length, VV_WRITE):
            return False
        return self.copy(iova, PyBytes_AsString(data), <uint64_t>length, True)

    def load16(self, address, bint swap=False):
        cdef char *at = self.one(address, 2, VV_READ)
        return None if at == NULL else vv_load_acquire16(at, swap)

    def load_pair(self, address):
        cdef char pair[16]
        cdef char *at = self.one(address, 16, VV_READ)
        if at == NULL:
            return None
        vv_load_pair(at, pair)
        return PyBytes_FromStringAndSize(pair, 16)

    def store16(self, address, uint16_t value, bint swap=False):
        cdef char *at = self.one(address, 2, VV_WRITE)
        if at != NULL:
            vv_store_release16(at, value, swap)
        return at != NULL

    def store32(self, address, uint32_t value, bint swap=False):
        cdef char *at = self.one(address, 4, VV_WRITE)
        if at != NULL:
            vv_store_release32(at, value, swap)
        return at != NULL


def fence():
    vv_fence()


include "drain.pxi"
include "engine.pxi"
include "answers.pxi"
include "worker.pxi"
include "disk.pxi"
include "pump.pxi"
include "lookout.pxi"
include "frames.pxi"
