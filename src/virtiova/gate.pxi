# SPDX-License-Identifier: Apache-2.0
"""The gate (gate.h) as the main thread has it: closed while what the workers use is changed."""

cdef extern from "Python.h":
    int PyErr_CheckSignals()
    void PyErr_WriteUnraisable(object o)

cdef extern from "gate.h" nogil:
    struct vv_gate:
        pass
    void vv_gate_close(vv_gate *gate) noexcept
    int vv_gate_await(uint32_t *busy) noexcept
    void vv_gate_open(vv_gate *gate) noexcept

cdef extern from "notify.h" nogil:
    void vv_watch_begin() noexcept
    void vv_watch_end() noexcept
    int vv_signal(int fd) noexcept
    int vv_take_kicks(int fd) noexcept

cdef extern from "worker.h" nogil:
    void vv_worker_nudge(uint32_t *busy) noexcept
    int vv_worker_leaves(const uint32_t *busy) noexcept

cdef enum:
    MAX_WORKERS = 1024


@cython.final
cdef class Gate:
    cdef vv_gate gate
    cdef uint32_t *busy[MAX_WORKERS]
    cdef int workers
    cdef int depth

    cdef void shut(self) noexcept:
        """Keep the workers out; may be called again before it is opened as often."""
        cdef int at
        cdef bint watched = False
        self.depth += 1
        if self.depth > 1 or not self.workers:
            return
        vv_gate_close(&self.gate)
        for at in range(self.workers):
            if not watched and not vv_worker_leaves(self.busy[at]):
                watched = True
                vv_watch_begin()
            while vv_gate_await(self.busy[at]):
                # Also by each tick: the worker may wait for a driver that does not read what it is told.
                vv_worker_nudge(self.busy[at])
                # So that whoever tells a server a second time to end can end it.
                if PyErr_CheckSignals():
                    PyErr_WriteUnraisable(self)
        if watched:
            vv_watch_end()

    cdef void let_in(self) noexcept:
        self.depth -= 1
        if not self.depth and self.workers:
            vv_gate_open(&self.gate)

    cdef void admit(self, uint32_t *busy) noexcept:
        """A worker more, of which the thread is not there yet."""
        self.busy[self.workers] = busy
        self.workers += 1
        if self.depth:
            vv_gate_close(&self.gate)

    cdef void dismiss(self, uint32_t *busy) noexcept:
        """A worker less, of which the thread is gone."""
        cdef int at
        for at in range(self.workers):
            if self.busy[at] == busy:
                self.workers -= 1
                self.busy[at] = self.busy[self.workers]
                break

    @property
    def closed(self):
        return self.depth > 0

    def __enter__(self):
        self.shut()
        return self

    def __exit__(self, *exc):
        self.let_in()


def tell(int fd):
    cdef int told
    with nogil:
        vv_watch_begin()
        told = vv_signal(fd)
        vv_watch_end()
    return bool(told)


def hear(int fd):
    cdef int kicks, problem
    with nogil:
        vv_watch_begin()
        kicks = vv_take_kicks(fd)
        problem = errno
        vv_watch_end()
    if kicks < 0 and problem:
        raise OSError(problem, strerror(problem).decode("ascii", "replace"))
    return kicks
