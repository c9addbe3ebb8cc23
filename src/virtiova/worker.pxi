# SPDX-License-Identifier: Apache-2.0
"""A worker (worker.h) as the main thread has it."""

cdef extern from "worker.h" nogil:
    enum:
        VV_PARKED
        VV_RUN
        VV_ASKS
        VV_END
        VV_WHY_CHAIN
        VV_WHY_KICK
        VV_WHY_FAULT
        VV_WHY_CALL
    uint32_t vv_most_spinners
    struct vv_worker:
        uint32_t busy
        uint32_t turn
        vv_gate *gate
        vv_ring *ring
        vv_engine *engine
        int kick
        int call
        int bell
        unsigned long bell_request
        uint32_t bell_ring
        int wake
        int help
        int polled
        uint64_t spin
        int fixed
        int why
        int problem
        vv_tally tally
        unsigned long faults
        uint64_t idle
        uint64_t average
        int spinning
        int untellable
    int vv_worker_start(vv_worker *worker) noexcept
    int vv_worker_join(vv_worker *worker) noexcept
    void vv_worker_turn(vv_worker *worker, uint32_t turn) noexcept
    uint32_t vv_worker_whose(const vv_worker *worker) noexcept
    uint32_t vv_spinners_here() noexcept

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **out, size_t align, size_t size) noexcept

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC
    int EFD_NONBLOCK
    int eventfd(unsigned start, int flags) noexcept

cdef extern from "<unistd.h>" nogil:
    int close(int fd) noexcept


@cython.final
@cython.no_gc_clear
cdef class Worker:
    cdef vv_worker *worker
    cdef Gate gate
    cdef Drain drain
    cdef Engine engine
    cdef bint alive

    def __cinit__(self, Gate gate not None, int help):
        cdef vv_worker *worker = NULL
        cdef int problem
        if gate.workers >= MAX_WORKERS:
            raise ValueError(f"there are {MAX_WORKERS} workers at this gate")
        if posix_memalign(<void **>&worker, 128, sizeof(vv_worker)):
            raise MemoryError()
        memset(worker, 0, sizeof(vv_worker))
        self.worker = worker
        self.gate = gate
        worker.gate = &gate.gate
        worker.kick = worker.call = worker.bell = -1
        worker.help = help
        worker.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if worker.wake < 0:
            raise OSError(errno, strerror(errno).decode("ascii", "replace"))
        global vv_most_spinners
        vv_most_spinners = vv_spinners_here()
        gate.admit(&worker.busy)
        problem = vv_worker_start(worker)
        if problem:
            gate.dismiss(&worker.busy)
            raise OSError(problem, strerror(problem).decode("ascii", "replace"))
        self.alive = True

    def __dealloc__(self):
        if self.worker != NULL:
            self.end()
            if self.worker.wake >= 0:
                close(self.worker.wake)
            free(self.worker)

    cdef void end(self) noexcept:
        """The thread returns. A gate that is closed is opened for it, while the others stay outside."""
        cdef int depth, others
        if not self.alive:
            return
        self.alive = False
        self.retake()
        vv_worker_turn(self.worker, VV_END)
        vv_signal(self.worker.wake)
        depth = self.gate.depth
        if depth:
            self.gate.depth = 1
            self.gate.let_in()
        vv_worker_join(self.worker)
        self.gate.dismiss(&self.worker.busy)
        if depth:
            self.gate.shut()
            self.gate.depth = depth

    cdef bint retake(self) noexcept:
        """The ring is the main thread's from now on; whether it was not before."""
        if vv_worker_whose(self.worker) == VV_PARKED:
            return False
        self.gate.shut()
        # It may have asked in the meantime: that is as good.
        vv_worker_turn(self.worker, VV_PARKED)
        self.gate.let_in()
        if self.engine is not None:
            self.engine.running = False
        # Where it sleeps, it may do so on a descriptor that is closed next.
        vv_signal(self.worker.wake)
        return True

    def spin(self, uint64_t nanoseconds, bint fixed=False):
        self.take()
        self.worker.spin = nanoseconds
        self.worker.fixed = fixed
        self.worker.average = nanoseconds // 4

    def run(self, Drain drain not None, Engine engine not None, int kick, int call, bint polled=False, *,
            int bell=-1, unsigned long request=0, uint32_t ring=0):
        if not self.alive or engine.engine == NULL:
            raise ValueError("the worker has ended, or the engine is none")
        if vv_worker_whose(self.worker) != VV_PARKED:
            raise ValueError("the worker has a ring")
        self.drain, self.engine = drain, engine
        self.worker.ring = &drain.ring
        self.worker.engine = engine.engine
        if self.worker.call != call:
            self.worker.untellable = 0
        self.worker.kick, self.worker.call, self.worker.polled = kick, call, polled
        self.worker.bell, self.worker.bell_request, self.worker.bell_ring = bell, request, ring
        self.worker.faults = vv_guard_all_faults()
        engine.running = True
        vv_worker_turn(self.worker, VV_RUN)

    def take(self):
        cdef bint running = self.retake()
        # Also what an earlier call has left, which a signal's handler has ended.
        if self.engine is not None:
            self.settle()
        return running

    def left(self):
        return [] if self.engine is None else self.engine.left()

    cdef int settle(self) except -1:
        """Finish what the engine has begun and not given back."""
        cdef vv_engine *engine = self.worker.engine
        cdef uint32_t never = 0
        cdef int signal = 0
        while engine.begun:
            if engine.settle != NULL:
                with nogil:
                    signal = engine.settle(engine)
                if signal:
                    # Who tells a server to end, whose disk does not answer, is heard.
                    if PyErr_CheckSignals():
                        return -1
                    continue
            vv_ring_begin(self.worker.ring)
            engine.work(engine, self.worker.ring, 0, &never, &self.worker.tally)
            vv_ring_publish(self.worker.ring)
        return 0

    @property
    def running(self):
        return vv_worker_whose(self.worker) == VV_RUN

    @property
    def asks(self):
        return self.worker.why if vv_worker_whose(self.worker) == VV_ASKS else 0

    @property
    def problem(self):
        return self.worker.problem

    @property
    def tally(self):
        cdef vv_tally *tally = &self.worker.tally
        return {
            "requests": vv_counted(&tally.requests),
            "bytes": vv_counted(&tally.bytes),
            "kicks": vv_counted(&tally.kicks),
            "calls": vv_counted(&tally.calls),
            "dropped": vv_counted(&tally.dropped),
            "helps": vv_counted(&tally.helps),
            "slept": vv_counted(&tally.slept),
            "spun": vv_counted(&tally.spun),
        }

    def close(self):
        self.end()


WHY_CHAIN = VV_WHY_CHAIN
WHY_KICK = VV_WHY_KICK
WHY_FAULT = VV_WHY_FAULT
WHY_CALL = VV_WHY_CALL
