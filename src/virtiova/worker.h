/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A thread that serves one ring by an engine (engine.h), without Python, and asks the main thread for help.
 *
 * The ring belongs to whom "turn" says:
 *
 *     PARKED  the main thread. It sets the fields of this struct, does requests in Python, or has none to serve.
 *     RUN     the worker. It uses ring, engine and descriptors while it is in the gate (gate.h), and else nothing.
 *     HELP    the main thread; the worker gave it away, and said why.
 *     END     the main thread, for good; the thread returns.
 *
 *     main thread   PARKED -> RUN, PARKED -> END      at any time
 *                   RUN -> PARKED                     inside of the gate, so that the worker is not at it
 *                   HELP -> PARKED                    at any time
 *     worker        RUN -> HELP                       inside of the gate, and then nothing but leave it and tell
 *
 * A worker that sleeps in poll() holds nothing: when it wakes up it enters the gate and looks at everything anew. Who
 * has changed a descriptor wakes it up by "wake", since it may sleep on one that was closed.
 *
 * It looks for work for a while before it sleeps, since to be woken up takes tens of microseconds: as long as it
 * usually takes until something comes, if that is not longer than "spin". No more threads of this process do so at a
 * time than there are processors but one.
 */
#ifndef VIRTIOVA_WORKER_H
#define VIRTIOVA_WORKER_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "gate.h"
#include "guard.h"
#include "notify.h"
#include "ring.h"

enum { VV_PARKED, VV_RUN, VV_ASKS, VV_END };

/* Why the main thread is asked. */
enum {
    VV_WHY_CHAIN = 1, /* the next chain is for Python */
    VV_WHY_KICK,      /* no kicks come any more; "problem" is errno, or 0 at the end of the file */
    VV_WHY_FAULT,     /* somebody's file has become shorter; what was done is published */
    VV_WHY_CALL,      /* the driver could not be told; said once */
};

#define VV_BUDGET 64u
/* Nanoseconds between looks at a ring of which no kicks come. */
#define VV_POLLED_NS 1000000
/* Looks for work before the clock is looked at. */
#define VV_LOOKS 16u
/* How many times the usual wait it looks for work. */
#define VV_PATIENCE 3

struct vv_worker {
    uint32_t busy __attribute__((aligned(128))); /* the gate's */
    uint32_t turn __attribute__((aligned(128)));
    uint32_t up; /* the thread runs our code: it has done what the C library does first */
    /* Set while PARKED. */
    struct vv_gate *gate;
    struct vv_ring *ring;
    struct vv_engine *engine;
    int kick, call; /* -1: none */
    int bell;       /* a descriptor that tells the driver by bell_request with the ring's number; -1: call does */
    unsigned long bell_request;
    uint32_t bell_ring;
    int wake, help; /* eventfds, ours; set once */
    int polled;     /* no kicks come: look every millisecond */
    uint64_t spin;  /* nanoseconds, at most; 0: sleep at once */
    int fixed;      /* always as long as "spin" */
    /* Set by the worker with HELP. */
    int why, problem;
    /* The worker's own. */
    struct vv_tally tally __attribute__((aligned(128)));
    unsigned long faults;
    uint64_t idle;    /* since when, in nanoseconds; 0: it is not */
    uint64_t average; /* of the time until something came, at most 4 * spin each */
    unsigned looks;
    int spinning, untellable;
    pthread_t thread;
};

/* How many look for work now, and how many may. */
static uint32_t vv_spinners;
static uint32_t vv_most_spinners;

static inline uint64_t vv_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline int vv_spin_begin(void)
{
    if (__atomic_fetch_add(&vv_spinners, 1, __ATOMIC_RELAXED) < vv_most_spinners)
        return 1;
    __atomic_fetch_sub(&vv_spinners, 1, __ATOMIC_RELAXED);
    return 0;
}

static inline void vv_spin_end(void)
{
    __atomic_fetch_sub(&vv_spinners, 1, __ATOMIC_RELAXED);
}

/*
 * How long to look for work before sleeping, where it usually takes "average" until some comes: not at all if that is
 * longer than may be, and else not much less than what it costs to be woken up, or it would not pay to try.
 */
static inline uint64_t vv_patience(uint64_t average, uint64_t spin, int fixed)
{
    const uint64_t wanted = average * VV_PATIENCE, least = spin / 4;

    if (fixed || wanted > spin)
        return fixed || average <= spin ? spin : 0;
    return wanted > least ? wanted : least;
}

static inline uint64_t vv_averaged(uint64_t average, uint64_t waited, uint64_t spin)
{
    const uint64_t most = 4 * spin;

    if (waited > most)
        waited = most;
    return average - average / 8 + waited / 8;
}

/* -- inside of the gate */

enum { VV_NEXT_AGAIN, VV_NEXT_SLEEP, VV_NEXT_TOLD };

static inline int vv_worker_ask(struct vv_worker *worker, int why, int problem)
{
    uint32_t run = VV_RUN;

    worker->why = why;
    worker->problem = problem;
    worker->idle = 0;
    vv_count(&worker->tally.helps, 1);
    /* It is RUN: nobody else changes that while we are in. */
    __atomic_compare_exchange_n(&worker->turn, &run, VV_ASKS, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    return VV_NEXT_TOLD;
}

/* Something was there: how long it took to come. */
static inline void vv_worker_found(struct vv_worker *worker)
{
    if (!worker->idle)
        return;
    worker->average = vv_averaged(worker->average, vv_now() - worker->idle, worker->spin);
    vv_count(&worker->tally.spun, (uint64_t)worker->spinning);
    worker->idle = 0;
}

static inline void vv_worker_rest(struct vv_worker *worker)
{
    if (worker->spinning) {
        worker->spinning = 0;
        vv_spin_end();
    }
}

/*
 * Nothing was there. 1: look again. To look is to let the engine work, which costs one load of the ring's index if
 * there is nothing, or to ask it if it waits for something else.
 */
static inline int vv_worker_looks(struct vv_worker *worker, int waits)
{
    struct vv_engine *engine = worker->engine;

    if (!worker->idle) {
        worker->idle = vv_now();
        worker->looks = 0;
        if (worker->spin && vv_patience(worker->average, worker->spin, worker->fixed))
            worker->spinning = worker->spinning || vv_spin_begin();
    }
    if (!worker->spinning)
        return 0;
    do {
        if (++worker->looks % VV_LOOKS == 0 &&
            vv_now() - worker->idle >= vv_patience(worker->average, worker->spin, worker->fixed)) {
            vv_worker_rest(worker);
            return 0;
        }
        vv_relax();
    } while (waits && engine->peek && !engine->peek(engine) && !vv_gate_wanted(worker->gate));
    return 1;
}

/*
 * Whether the driver could be told. Where it cannot be told by the bell now, whoever reads the call's eventfd tries again
 * later: the kernel refuses until the driver's DRIVER_OK has arrived.
 */
static inline int vv_worker_tell(const struct vv_worker *worker)
{
    if (worker->bell >= 0 && ioctl(worker->bell, worker->bell_request, &worker->bell_ring) >= 0)
        return 1;
    return vv_signal(worker->call);
}

/* Serve the ring until there is nothing to do, somebody wants in, or Python has to help. */
static inline int vv_worker_serve(struct vv_worker *worker)
{
    struct vv_ring *ring = worker->ring;
    struct vv_engine *engine = worker->engine;
    const uint32_t *stop = &worker->gate->stop;
    uint64_t before;
    unsigned long faults;
    int got;

    vv_ring_begin(ring);
    vv_ring_quiet(ring);
    for (;;) {
        before = worker->tally.requests;
        got = engine->work(engine, ring, VV_BUDGET, stop, &worker->tally);
        vv_ring_publish(ring);
        if (worker->tally.requests != before)
            vv_worker_found(worker);
        if (vv_ring_wants_call(ring)) {
            vv_count(&worker->tally.calls, worker->call >= 0);
            if (!vv_worker_tell(worker) && !worker->untellable) {
                worker->untellable = 1;
                return vv_worker_ask(worker, VV_WHY_CALL, errno);
            }
        }
        faults = vv_guard_all_faults();
        if (faults != worker->faults) {
            worker->faults = faults;
            return vv_worker_ask(worker, VV_WHY_FAULT, 0);
        }
        if (got == VV_HELP)
            return vv_worker_ask(worker, VV_WHY_CHAIN, 0);
        if (__atomic_load_n(stop, __ATOMIC_RELAXED))
            return VV_NEXT_AGAIN;
        if (got == VV_GOT || vv_worker_looks(worker, got == VV_WAIT))
            continue;
        if (got == VV_WAIT || got == VV_ARMED)
            return VV_NEXT_SLEEP;
        got = vv_ring_arm(ring);
        if (got == VV_EMPTY)
            return VV_NEXT_SLEEP;
        if (got == VV_HELP)
            return vv_worker_ask(worker, VV_WHY_CHAIN, 0);
        vv_ring_quiet(ring);
    }
}

/* -- the thread */

/* What to sleep on; the numbers may mean something else by the time that it wakes up. */
struct vv_bed {
    struct pollfd on[3];
    struct timespec longest;
    int forever;
};

static inline void vv_worker_bed(const struct vv_worker *worker, struct vv_bed *bed, int got)
{
    const struct vv_engine *engine = worker->engine;

    bed->on[0] = (struct pollfd){worker->wake, POLLIN, 0};
    bed->on[1] = (struct pollfd){got == VV_NEXT_SLEEP ? worker->kick : -1, POLLIN, 0};
    bed->on[2] = (struct pollfd){engine->fd, engine->events, 0};
    bed->longest = (struct timespec){0, VV_POLLED_NS};
    bed->forever = !worker->polled;
}

static inline void vv_worker_sleep(struct vv_worker *worker, struct vv_bed *bed)
{
    if (ppoll(bed->on, 3, bed->forever ? NULL : &bed->longest, NULL) < 0)
        return;
    if (bed->on[0].revents)
        vv_drain_wake(worker->wake);
}

/* One stay in the gate. */
static inline int vv_worker_stay(struct vv_worker *worker, struct vv_bed *bed, int woken)
{
    int next = VV_NEXT_AGAIN;

    if (__atomic_load_n(&worker->turn, __ATOMIC_ACQUIRE) != VV_RUN)
        return next;
    if (woken && worker->kick >= 0) {
        const int kicks = vv_take_kicks(worker->kick);

        if (kicks < 0)
            return vv_worker_ask(worker, VV_WHY_KICK, errno);
        vv_count(&worker->tally.kicks, (uint64_t)kicks);
    }
    next = vv_worker_serve(worker);
    if (next == VV_NEXT_SLEEP)
        vv_worker_bed(worker, bed, next);
    return next;
}

static void *vv_worker_main(void *argument)
{
    struct vv_worker *worker = argument;
    struct vv_bed bed;
    int woken = 1;

    __atomic_store_n(&worker->up, 1, __ATOMIC_RELEASE);
    vv_futex_wake(&worker->up);
    for (;;) {
        const uint32_t turn = __atomic_load_n(&worker->turn, __ATOMIC_ACQUIRE);
        int next;

        if (turn != VV_RUN)
            vv_worker_rest(worker);
        if (turn == VV_END)
            return NULL;
        if (turn != VV_RUN) {
            vv_futex_wait(&worker->turn, turn);
            woken = 1;
            continue;
        }
        vv_gate_enter(worker->gate, &worker->busy);
        next = vv_worker_stay(worker, &bed, woken);
        vv_gate_leave(worker->gate, &worker->busy);
        if (next != VV_NEXT_AGAIN)
            vv_worker_rest(worker);
        woken = next == VV_NEXT_SLEEP;
        if (next == VV_NEXT_SLEEP) {
            vv_count(&worker->tally.slept, 1);
            vv_worker_sleep(worker, &bed);
        } else if (next == VV_NEXT_TOLD) {
            vv_signal(worker->help);
        }
    }
}

/* -- the main thread's side */

/* 0, or an errno. No signal is delivered to it but those that it raises itself, and the one that ends its waiting. */
static inline int vv_worker_start(struct vv_worker *worker)
{
    static const int own[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGSYS, SIGABRT, SIGTRAP};
    pthread_attr_t attributes;
    sigset_t all, before;
    unsigned at;
    int problem;

    sigfillset(&all);
    for (at = 0; at < sizeof own / sizeof *own; at++)
        sigdelset(&all, own[at]);
    if (!vv_interrupt_install())
        sigdelset(&all, vv_interrupt_number);
    if ((problem = pthread_attr_init(&attributes)))
        return problem;
    pthread_attr_setstacksize(&attributes, 256 << 10);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    problem = pthread_create(&worker->thread, &attributes, vv_worker_main, worker);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    /* So that what may be asked of the kernel can be cut down to what it does from here on. */
    while (!problem && !__atomic_load_n(&worker->up, __ATOMIC_ACQUIRE))
        vv_futex_wait(&worker->up, 0);
    return problem;
}

/* Whose word this is has been in the gate for long: it may wait where nothing else would end that. */
static inline void vv_worker_nudge(uint32_t *busy)
{
    struct vv_worker *worker = (struct vv_worker *)busy; /* its first field */

    if (__atomic_load_n(&worker->up, __ATOMIC_ACQUIRE))
        vv_interrupt(worker->thread);
}

/* Whether it leaves soon, for which a timer need not be set. */
static inline int vv_worker_leaves(const uint32_t *busy)
{
    unsigned looks;

    for (looks = 0; looks < VV_GATE_LOOKS && __atomic_load_n(busy, __ATOMIC_RELAXED); looks++)
        vv_relax();
    return looks < VV_GATE_LOOKS;
}

static inline int vv_worker_join(struct vv_worker *worker)
{
    return pthread_join(worker->thread, NULL);
}

static inline uint32_t vv_worker_whose(const struct vv_worker *worker)
{
    return __atomic_load_n(&worker->turn, __ATOMIC_ACQUIRE);
}

/* How many threads may look out for work: one processor is for whoever brings it, if that may be another one at all. */
static inline uint32_t vv_spinners_here(void)
{
    cpu_set_t set;
    int ours;

    if (sysconf(_SC_NPROCESSORS_ONLN) < 2 || sched_getaffinity(0, sizeof set, &set))
        return 0;
    ours = CPU_COUNT(&set);
    return ours > 1 ? (uint32_t)ours - 1 : 1;
}

static inline void vv_worker_turn(struct vv_worker *worker, uint32_t turn)
{
    __atomic_store_n(&worker->turn, turn, __ATOMIC_RELEASE);
    vv_futex_wake(&worker->turn);
}

#endif
