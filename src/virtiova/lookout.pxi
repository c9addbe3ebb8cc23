# SPDX-License-Identifier: Apache-2.0
"""Looking out for work of rings that Python serves (lookout.h)."""

cdef extern from "<poll.h>" nogil:
    short POLLIN
    struct pollfd:
        int fd
        short events
        short revents

cdef extern from "lookout.h" nogil:
    enum:
        VV_LOOKOUT_RING
    struct vv_lookout:
        uint64_t spin
        uint64_t idle
        uint64_t average
        int fixed
    void vv_lookout_came(vv_lookout *out) noexcept
    int vv_lookout_look(
        vv_lookout *out, vv_ring **ring, unsigned rings, pollfd *other, unsigned others, vv_chain *room
    ) noexcept

cdef enum:
    # At a time; who has more of them sleeps at once.
    LOOKOUT_RINGS = 64
    LOOKOUT_FDS = 256


@cython.final
cdef class Lookout:
    cdef vv_lookout out
    cdef vv_chain room

    def __cinit__(self, uint64_t nanoseconds, bint fixed=False):
        global vv_most_spinners
        vv_most_spinners = vv_spinners_here()
        self.out.spin = nanoseconds
        self.out.fixed = fixed
        self.out.average = nanoseconds // 4

    def look(self, list drains not None, list fds not None):
        cdef vv_ring *rings[LOOKOUT_RINGS]
        cdef pollfd other[LOOKOUT_FDS]
        cdef unsigned count = <unsigned>len(drains), others = <unsigned>len(fds)
        cdef unsigned at
        cdef Drain drain
        cdef int found
        if count > LOOKOUT_RINGS or others > LOOKOUT_FDS:
            return False
        for at in range(count):
            drain = drains[at]
            rings[at] = &drain.ring
        for at in range(others):
            other[at].fd = fds[at]
            other[at].events = POLLIN
            other[at].revents = 0
        with nogil:
            found = vv_lookout_look(&self.out, rings, count, other, others, &self.room)
        return found == VV_LOOKOUT_RING

    def came(self):
        vv_lookout_came(&self.out)
