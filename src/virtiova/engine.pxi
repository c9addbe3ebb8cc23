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
        int (*settle)(vv_engine *) noexcept nogil
        int fd
        short events
        uint32_t begun
    enum:
        VV_WAIT
        VV_ARMED
    uint64_t vv_counted(const uint64_t *what) noexcept

cdef extern from "worker.h" nogil:
    uint64_t vv_now() noexcept

EMPTY = VV_EMPTY
GOT = VV_GOT
HELP = VV_HELP
WAIT = VV_WAIT
ARMED = VV_ARMED


cdef class Engine:
    # Part of the subclass's own struct, set by it in __cinit__; NULL: none.
    cdef vv_engine *engine
    # A worker has it, and the main thread keeps its hands off what it uses.
    cdef readonly bint running

    @property
    def begun(self):
        return 0 if self.engine == NULL else self.engine.begun

    @property
    def fd(self):
        return -1 if self.engine == NULL else self.engine.fd

    def left(self):
        return []

    def step(self, Drain drain not None, unsigned budget=64):
        cdef vv_tally tally
        cdef uint32_t never = 0
        cdef int outcome
        if self.engine == NULL:
            raise ValueError("the engine is none")
        memset(&tally, 0, sizeof(vv_tally))
        vv_ring_begin(&drain.ring)
        outcome = self.engine.work(self.engine, &drain.ring, budget, &never, &tally)
        drain.publish()
        return outcome, tally.requests, tally.bytes, tally.dropped

    cdef object serve_here(self, Drain drain, unsigned budget, uint64_t nanoseconds):
        """As Disk.serve, for engines that begin nothing."""
        cdef vv_tally tally
        cdef uint32_t never = 0
        cdef vv_ring *ring = &drain.ring
        cdef int outcome = VV_GOT
        cdef uint64_t end
        cdef unsigned long faults = vv_guard_all_faults()
        if self.engine == NULL or self.running or self.engine.begun:
            raise ValueError("the engine is none, a worker has it, or it has begun something")
        memset(&tally, 0, sizeof(vv_tally))
        with nogil:
            end = vv_now() + nanoseconds
            vv_ring_begin(ring)
            vv_ring_quiet(ring)
            while outcome == VV_GOT and tally.requests < budget:
                # One at a time: nobody who wants something else waits for more.
                outcome = self.engine.work(self.engine, ring, 1, &never, &tally)
                if outcome == VV_EMPTY:
                    vv_ring_publish(ring)
                    outcome = vv_ring_arm(ring)
                    if outcome == VV_GOT:
                        vv_ring_quiet(ring)
                if vv_now() >= end or vv_guard_all_faults() != faults:
                    break
            vv_ring_publish(ring)
        return outcome, tally.requests, tally.bytes
