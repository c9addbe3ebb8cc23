# SPDX-License-Identifier: Apache-2.0
"""The engine of a disk's queue (blk.h)."""

cdef extern from "blk.h" nogil:
    struct vv_blk:
        vv_engine engine
        char *memory
        int slot
        int fd
        uint64_t sectors
        uint64_t most
        int may_write
    unsigned VV_SECTOR
    void vv_blk_init(vv_blk *blk) noexcept


@cython.final
@cython.no_gc_clear
cdef class Disk(Engine):
    cdef vv_blk *blk
    cdef Window window
    cdef Mapping mapping

    def __cinit__(self, uint64_t size, uint64_t most, *, Window window=None, Mapping mapping=None, int fd=-1):
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
        self.blk.sectors = size // VV_SECTOR
        self.blk.most = most
        self.engine = &self.blk.engine

    def __dealloc__(self):
        if self.window is not None:
            self.window.pins -= 1
        free(self.blk)

    @property
    def may_write(self):
        return bool(self.blk.may_write)

    @may_write.setter
    def may_write(self, bint may):
        self.blk.may_write = may
