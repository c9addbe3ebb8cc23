# SPDX-License-Identifier: Apache-2.0
"""The engine of a disk's queue (blk.h)."""

cdef extern from "later.h" nogil:
    int IORING_OP_READ
    struct vv_flight:
        uint16_t head
        uint8_t operation
        uint8_t whole
        uint64_t size
        char *bytes
    struct vv_later:
        uint16_t *left
        unsigned lefts
        vv_flight *flight
    int vv_later_open(vv_later *later, int file) noexcept
    int vv_later_settle(vv_later *later) noexcept
    void vv_later_forget(vv_later *later) noexcept
    void vv_later_close(vv_later *later) noexcept

cdef extern from "uring.h" nogil:
    int vv_uring_travels() noexcept

cdef extern from "blk.h" nogil:
    struct vv_blk:
        vv_engine engine
        char *memory
        int slot
        int fd
        uint64_t sectors
        uint64_t most
        int may_write
        int never_waits
        int always_later
        int here
        vv_later *later
    int vv_file_in_memory(int fd) noexcept
    unsigned VV_SECTOR
    void vv_blk_init(vv_blk *blk) noexcept


def uring_travels():
    cdef int travels = vv_uring_travels()
    if travels < 0:
        raise OSError(errno, strerror(errno).decode("ascii", "replace"))
    return bool(travels)


@cython.final
@cython.no_gc_clear
cdef class Disk(Engine):
    cdef vv_blk *blk
    cdef Window window
    cdef Mapping mapping

    def __cinit__(
        self, uint64_t size, uint64_t most, *, Window window=None, Mapping mapping=None, int fd=-1, bint uring=False
    ):
        self.blk = <vv_blk *>malloc(sizeof(vv_blk))
        if self.blk == NULL:
            raise MemoryError()
        vv_blk_init(self.blk)
        if (window is None) == (fd < 0):
            raise ValueError("a disk is memory or a file")
        if window is not None:
            self.blk.memory = window.span(0, <Py_ssize_t>size, 1)
            window.pins += 1
            self.window = window
        if mapping is not None:
            self.mapping = mapping
            self.blk.slot = mapping.slot
        self.blk.fd = fd
        self.blk.never_waits = fd >= 0 and vv_file_in_memory(fd)
        self.blk.sectors = size // VV_SECTOR
        self.blk.most = most
        self.engine = &self.blk.engine
        if uring and fd >= 0:
            self.open_uring(fd)

    cdef int open_uring(self, int fd) except -1:
        cdef vv_later *later = <vv_later *>malloc(sizeof(vv_later))
        if later == NULL:
            raise MemoryError()
        if vv_later_open(later, fd):
            free(later)
            raise OSError(errno, strerror(errno).decode("ascii", "replace"))
        self.blk.later = later
        return 0

    cdef int settle_uring(self) except -1:
        """What the kernel still writes into is not freed before it is done. A signal's handler may end that."""
        cdef int signal = -1
        while signal:
            with nogil:
                signal = vv_later_settle(self.blk.later)
            if signal and PyErr_CheckSignals():
                return -1
        return 0

    cdef void free_uring(self) noexcept:
        vv_later_close(self.blk.later)
        free(self.blk.later)
        self.blk.later = NULL

    def __dealloc__(self):
        while self.blk != NULL and self.blk.later != NULL:
            try:
                self.settle_uring()
                self.free_uring()
            except BaseException:
                PyErr_WriteUnraisable(None)
        if self.window is not None:
            self.window.pins -= 1
        free(self.blk)

    def serve(self, Drain drain not None, unsigned budget, uint64_t nanoseconds):
        cdef vv_later *later = self.blk.later
        self.blk.later = NULL
        self.blk.here = 1
        try:
            return self.serve_here(drain, budget, nanoseconds)
        finally:
            self.blk.later = later
            self.blk.here = 0

    def left(self):
        cdef vv_later *later = self.blk.later
        cdef vv_flight *flight
        found = []
        for at in range(0 if later == NULL else later.lefts):
            flight = &later.flight[later.left[at]]
            if not flight.whole:
                found.append((flight.head, None))
            elif flight.operation == IORING_OP_READ:
                found.append((flight.head, PyBytes_FromStringAndSize(flight.bytes, <Py_ssize_t>flight.size)))
            else:
                found.append((flight.head, b""))
        if later != NULL:
            vv_later_forget(later)
        return found

    def close(self):
        if self.running:
            raise ValueError("a worker has it")
        if self.blk.later != NULL:
            self.settle_uring()
            self.free_uring()
        self.blk.fd = -1

    @property
    def uring(self):
        return self.blk.later != NULL

    @property
    def always_later(self):
        return bool(self.blk.always_later)

    @always_later.setter
    def always_later(self, bint always):
        self.blk.always_later = always

    @property
    def may_write(self):
        return bool(self.blk.may_write)

    @may_write.setter
    def may_write(self, bint may):
        self.blk.may_write = may
