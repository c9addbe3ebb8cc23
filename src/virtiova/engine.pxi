# SPDX-License-Identifier: Apache-2.0
"""What a worker runs for one queue, as Python sees it: nothing but its life."""

cdef extern from "engine.h" nogil:
    struct vv_engine:
        pass


cdef class Engine:
    # Part of the subclass's own struct, set by it in __cinit__; NULL: none.
    cdef vv_engine *engine
