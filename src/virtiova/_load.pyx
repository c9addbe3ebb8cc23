# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False, autotestdict=False
"""A load generator: the driver end of a ring for benchmarks. Described in ``_load.pyi``."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cdef extern from "load.h" nogil:
    int VL_MAX_SLOTS, VL_PAGE, VL_HEAD, VL_BUCKETS
    int VL_EMPTY, VL_FRAME, VL_READ, VL_WRITE
    int VL_TIME, VL_DONE, VL_LOOK, VL_BAD
    struct vl_entry:
        uint64_t address, page, place
    struct vl_tally:
        uint64_t submitted, done, checked, kicks, calls, sleeps, ticks, nanoseconds
        uint64_t *latency
    struct vl_place:
        uint32_t index
        uint16_t wrap
    struct vl_driver:
        char *desc
        char *avail
        char *used
        char *heads
        char *pages
        uint32_t size
        int event_idx, packed, kind, zeros, kick, call
        vl_place put, take
        int *watch
        uint32_t per, slots, length
        vl_entry *entries
        uint64_t count, next
        uint16_t made, seen
        uint32_t flying
        int sampled
        uint32_t every, until
        int wrong
        uint64_t wrong_value, wrong_wanted
        vl_tally tally
    void vl_paint(char *at, uint64_t page) noexcept
    double vl_middle(uint32_t bucket) noexcept
    void vl_describe(vl_driver *d, uint64_t heads) noexcept
    void vl_forget(vl_driver *d) noexcept
    int vl_run(vl_driver *d, uint32_t depth, uint64_t nanoseconds, uint64_t limit, int sleeping) noexcept
    uint64_t vl_packed_echo(char *desc, char *used, uint32_t size, uint64_t nanoseconds) noexcept
    uint64_t vl_echo(const char *desc, const char *avail, char *used, uint32_t size, uint64_t nanoseconds) noexcept

EMPTY, FRAME, READ, WRITE = VL_EMPTY, VL_FRAME, VL_READ, VL_WRITE
TIME, DONE, LOOK, BAD = VL_TIME, VL_DONE, VL_LOOK, VL_BAD
MAX_SLOTS, HEAD = VL_MAX_SLOTS, VL_HEAD

_WRONG = (
    "",
    "a used index of {0}, where {1} had been taken back and not that many were out",
    "element {0} in the used ring, which is no request that is out",
    "a used element with {0} bytes written, where {1} at most could be",
    "status {0} of a request",
    "0x{0:016x} in the data of a request, where 0x{1:016x} was to be",
    "a broken call descriptor (events 0x{0:x})",
)


cdef class _Memory:
    """Writable memory that stays where it is."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, memory):
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        self.held = True
        if <uintptr_t>self.view.buf % 8:
            raise ValueError("the buffer does not start at a multiple of 8 bytes")

    def __dealloc__(self):
        self.let_go()

    cdef void let_go(self) noexcept:
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    cdef char *span(self, uint64_t at, uint64_t length) except NULL:
        if not self.held:
            raise ValueError("the memory was released")
        if at > <uint64_t>self.view.len or length > <uint64_t>self.view.len - at or at % 16:
            raise IndexError(f"{length:#x} bytes at offset {at:#x} are not inside of {self.view.len:#x} bytes")
        return <char *>self.view.buf + at


cdef int _ring(
    _Memory memory, object ring, bint packed, char **desc, char **avail, char **used, uint32_t *size
) except -1:
    cdef uint64_t entries = ring[0]
    if not 2 <= entries <= 32768 or (entries & (entries - 1) and not packed):
        raise ValueError(f"a ring of {entries} entries")
    size[0] = <uint32_t>entries
    desc[0] = memory.span(ring[1], 16 * entries)
    avail[0] = memory.span(ring[2], 4 if packed else 6 + 2 * entries)
    used[0] = memory.span(ring[3], 4 if packed else 6 + 8 * entries)
    return 0


@cython.final
cdef class Driver:
    cdef vl_driver *d
    cdef _Memory memory

    def __cinit__(self, memory, ring, *, int kick, int call, watch=(), bint event_idx=True, bint packed=False):
        self.d = <vl_driver *>calloc(1, sizeof(vl_driver))
        if self.d is NULL:
            raise MemoryError
        self.memory = _Memory(memory)
        self.d.packed = packed
        self.d.put.wrap = self.d.take.wrap = 1
        _ring(self.memory, ring, packed, &self.d.desc, &self.d.avail, &self.d.used, &self.d.size)
        self.d.event_idx, self.d.kick, self.d.call = event_idx, kick, call
        self.d.watch[0] = self.d.watch[1] = -1
        if len(watch) > 2:
            raise ValueError("at most two descriptors can be watched")
        for number, fd in enumerate(watch):
            self.d.watch[number] = fd
        self.d.sampled = -1

    def __dealloc__(self):
        if self.d is not NULL:
            free(self.d.entries)
            free(self.d)

    def prepare(
        self, int kind, *, uint64_t heads=0, uint64_t heads_address=0, entries=None, uint64_t pages=0,
        uint32_t length=1, bint zeros=False, uint32_t every=255,
    ):
        cdef Py_buffer view
        cdef vl_entry *made
        cdef uint64_t count, highest = 0, number
        if self.d.flying:
            raise ValueError("there are requests with the device")
        if not VL_EMPTY <= kind <= VL_WRITE:
            raise ValueError(f"kind {kind}")
        if kind >= VL_READ and length != <uint32_t>VL_PAGE:
            raise ValueError("a request of a disk moves a page")
        self.d.per = 3 if kind >= VL_READ else 1
        self.d.slots = min(self.d.size // self.d.per, <uint32_t>VL_MAX_SLOTS)
        self.d.heads = self.memory.span(heads, self.d.slots * <uint64_t>VL_HEAD)
        if kind != VL_EMPTY:
            PyObject_GetBuffer(entries, &view, PyBUF_SIMPLE)
            try:
                count = view.len // sizeof(vl_entry)
                if not count:
                    raise ValueError("no buffers")
                made = <vl_entry *>calloc(count, sizeof(vl_entry))
                if made is NULL:
                    raise MemoryError
                memcpy(made, view.buf, count * sizeof(vl_entry))
            finally:
                PyBuffer_Release(&view)
            free(self.d.entries)
            self.d.entries, self.d.count, self.d.next = made, count, 0
            for number in range(count):
                highest = max(highest, made[number].page)
            # Before it is multiplied: nobody has that many.
            if highest >> 40:
                raise IndexError(f"page {highest}")
            self.d.pages = self.memory.span(pages, (highest + 1) * <uint64_t>VL_PAGE)
        self.d.kind, self.d.length, self.d.zeros, self.d.every, self.d.until = kind, length, zeros, every, 0
        self.d.sampled = -1
        vl_describe(self.d, heads_address)

    def run(self, uint32_t depth, double seconds, *, uint64_t limit=0, bint sleeping=False):
        if not self.d.slots or not self.memory.held:
            raise ValueError("no requests are prepared")
        if self.d.wrong:
            return BAD
        cdef uint64_t nanoseconds = <uint64_t>(max(0.0, min(seconds, 1e6)) * 1e9)
        cdef int why
        with nogil:
            why = vl_run(self.d, depth, nanoseconds, limit, sleeping)
        return why

    def forget(self):
        vl_forget(self.d)

    def release(self):
        self.memory.let_go()

    @property
    def flying(self):
        return self.d.flying

    @property
    def slots(self):
        return self.d.slots

    @property
    def wrong(self):
        return _WRONG[self.d.wrong].format(self.d.wrong_value, self.d.wrong_wanted)

    def tally(self):
        cdef vl_tally *t = &self.d.tally
        return {
            "submitted": t.submitted, "done": t.done, "checked": t.checked, "kicks": t.kicks, "calls": t.calls,
            "sleeps": t.sleeps, "nanoseconds": t.nanoseconds,
        }

    def latency(self, double part):
        cdef vl_tally *t = &self.d.tally
        cdef uint64_t total = 0, sum = 0
        cdef uint32_t bucket
        for bucket in range(<uint32_t>VL_BUCKETS):
            total += t.latency[bucket]
        if not total or not t.ticks:
            return 0.0
        for bucket in range(<uint32_t>VL_BUCKETS):
            sum += t.latency[bucket]
            if sum and sum >= part * total:
                break
        return vl_middle(bucket) * (<double>t.nanoseconds / <double>t.ticks)


def echo(memory, ring, double seconds, *, bint packed=False):
    cdef _Memory held = _Memory(memory)
    cdef char *desc
    cdef char *avail
    cdef char *used
    cdef uint32_t size
    cdef uint64_t nanoseconds = <uint64_t>(max(0.0, min(seconds, 1e6)) * 1e9)
    cdef uint64_t count
    _ring(held, ring, packed, &desc, &avail, &used, &size)
    with nogil:
        if packed:
            count = vl_packed_echo(desc, used, size, nanoseconds)
        else:
            count = vl_echo(desc, avail, used, size, nanoseconds)
    return count


def paint(memory, uint64_t at, uint64_t page, uint64_t count):
    cdef _Memory held = _Memory(memory)
    if count >> 40:
        raise IndexError(f"{count} pages")
    cdef char *start = held.span(at, count * <uint64_t>VL_PAGE)
    cdef uint64_t number
    with nogil:
        for number in range(count):
            vl_paint(start + number * <uint64_t>VL_PAGE, page + number)
