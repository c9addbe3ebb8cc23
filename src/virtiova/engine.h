/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a device does with its queue without Python: an engine, one for each queue, called by that queue's worker
 * (worker.h) and by nobody else at the same time.
 *
 * work() runs inside of the gate (gate.h). While it runs no translation changes, no memory is unmapped and no ring is
 * set up; between two calls all of that may have happened. So it keeps no pointer into guest memory, no vv_piece and
 * no vv_chain: of a request that it leaves unfinished it keeps the numbers (head, id, what was asked for) and bytes of
 * its own, and looks the pieces up again when it goes on. It never waits: what would is done later, by way of "fd".
 *
 * It does what is well-formed and whose every byte is known, and nothing else. At the first chain that is not it
 * returns VV_HELP with the ring as it was before that chain: Python does that one, with all that has to be said of it.
 * An engine has no messages of its own. The driver must see the same bytes and the same used elements as from Python.
 */
#ifndef VIRTIOVA_ENGINE_H
#define VIRTIOVA_ENGINE_H

#include <stdint.h>

struct vv_ring;

/* Besides VV_EMPTY, VV_GOT and VV_HELP of ring.h. */
enum {
    /* Nothing to do before "fd" says so, whatever is in the ring: no kicks are wanted. */
    VV_WAIT = 3,
    /* The ring has chains, but not as many as are wanted; the driver was asked for a kick with the next one after them. */
    VV_ARMED = 4,
};

/* What was done. One thread adds, any thread reads. */
struct vv_tally {
    uint64_t requests; /* chains given back */
    uint64_t bytes;    /* of their buffers, read or written */
    uint64_t kicks;    /* taken by the worker */
    uint64_t calls;    /* made by the worker */
    uint64_t dropped;  /* frames */
    uint64_t helps;    /* times that Python was asked */
    uint64_t slept;    /* times that the worker waited in the kernel */
    uint64_t spun;     /* times that something came while it looked for it */
};

/* By the only thread that adds. */
static inline void vv_count(uint64_t *what, uint64_t more)
{
    __atomic_store_n(what, __atomic_load_n(what, __ATOMIC_RELAXED) + more, __ATOMIC_RELAXED);
}

/* By anybody. */
static inline uint64_t vv_counted(const uint64_t *what)
{
    return __atomic_load_n(what, __ATOMIC_RELAXED);
}

struct vv_engine {
    /*
     * Up to budget chains: takes them by vv_ring_next(), gives them back by vv_ring_push(). The worker has called
     * vv_ring_begin() before, and calls vv_ring_publish() afterwards. Returns
     *   VV_GOT    budget used up, or "stop" seen: call again, there may be more
     *   VV_EMPTY  the ring has none left: sleep on the kick, and on "fd" if there is one
     *   VV_ARMED  the same, and vv_ring_arm() was called, with those taken that are not enough
     *   VV_WAIT   sleep on "fd" only
     *   VV_HELP   Python is to do the next chain
     * Nothing is begun once *stop is not 0 (a relaxed load before each chain is enough): somebody waits for the gate.
     * With a budget of 0 nothing is begun, and what was begun before and is done by now is given back.
     */
    int (*work)(struct vv_engine *, struct vv_ring *, unsigned budget, const uint32_t *stop, struct vv_tally *);
    /*
     * May be NULL. While the worker looks out for work instead of sleeping, now and then, outside of the gate: whether
     * there is something that "fd" would tell of. Touches no guest memory and does not wait.
     */
    int (*peek)(struct vv_engine *);
    /*
     * May be NULL. Called outside of the gate, at the end or before the ring goes to Python for good: returns 0 when
     * nothing that was begun is under way in the kernel any more, or -1 if a signal came, to be called again. work() with
     * a budget of 0 gives back what was begun after that.
     */
    int (*settle)(struct vv_engine *);
    /* Set by work() before it returns, looked at before the worker sleeps: poll(2) for these events; fd -1: for none. */
    int fd;
    short events;
    /* Chains that were taken and not given back. The ring is not taken away from the worker before this is 0. */
    uint32_t begun;
};

#endif
