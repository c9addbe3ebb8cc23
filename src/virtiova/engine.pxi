# SPDX-License-Identifier: Apache-2.0
"""What a worker runs for one queue, as Python sees it: nothing but its life."""

cdef extern from "engine.h" nogil:
    struct vv_tally:
        uint64_t requests
        uint64_t bytes
        uint64_t kicks
        uint64_t calls
        uint64_t dropped
        uint64_t helps
        uint64_t slept
        uint64_t spun
    struct vv_engine:
        int (*work)(vv_engine *, vv_ring *, unsigned, const uint32_t *, vv_tally *) noexcept nogil
        int (*peek)(vv_engine *) noexcept nogil
        void (*settle)(vv_engine *) noexcept nogil
        int fd
        short events
        uint32_t begun
    uint64_t vv_counted(const uint64_t *what) noexcept


cdef class Engine:
    # Part of the subclass's own struct, set by it in __cinit__; NULL: none.
    cdef vv_engine *engine
