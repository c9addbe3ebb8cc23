/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The main thread's way to look out for work before it sleeps, for rings that Python serves: as a worker does
 * (worker.h), and at its other descriptors now and then.
 */
#ifndef VIRTIOVA_LOOKOUT_H
#define VIRTIOVA_LOOKOUT_H

#include <poll.h>
#include <stdint.h>

#include "ring.h"
#include "worker.h"

/* Looks at the rings between two looks at the descriptors, which are a system call, and at the clock. */
#define VV_LOOKOUT_TURNS 64u
/* Nanoseconds between two looks at the descriptors. */
#define VV_LOOKOUT_POLL 20000u

struct vv_lookout {
    uint64_t spin, idle, average;
    int fixed;
};

enum { VV_LOOKOUT_NOTHING, VV_LOOKOUT_RING, VV_LOOKOUT_OTHER };

/* Whether the driver has made a request available, or something that is not right. The ring stays as it is. */
static inline int vv_ring_peek(struct vv_ring *ring, struct vv_chain *room)
{
    char *inflight = ring->inflight;
    int found;

    /* It is not taken. */
    ring->inflight = NULL;
    found = vv_ring_next(ring, room);
    if (found == VV_GOT)
        vv_ring_put_back(ring, room);
    ring->inflight = inflight;
    return found != VV_EMPTY;
}

/* Something was there: how long it took to come. */
static inline void vv_lookout_came(struct vv_lookout *out)
{
    if (out->idle)
        out->average = vv_averaged(out->average, vv_now() - out->idle, out->spin);
    out->idle = 0;
}

static inline int vv_lookout_look(struct vv_lookout *out, struct vv_ring **ring, unsigned rings, struct pollfd *other,
                                  unsigned others, struct vv_chain *room)
{
    const uint64_t patience = vv_patience(out->average, out->spin, out->fixed);
    uint64_t now = vv_now(), polled = now;
    int found = VV_LOOKOUT_NOTHING;
    unsigned turn, at;

    if (!out->idle)
        out->idle = now;
    if (!patience || !vv_spin_begin())
        return found;
    for (at = 0; at < rings; at++)
        vv_ring_begin(ring[at]);
    for (turn = 1; !found; turn++) {
        for (at = 0; at < rings && !found; at++)
            if (vv_ring_peek(ring[at], room))
                found = VV_LOOKOUT_RING;
        vv_relax();
        if (found || turn % VV_LOOKOUT_TURNS)
            continue;
        now = vv_now();
        if (now - polled >= VV_LOOKOUT_POLL) {
            polled = now;
            if (poll(other, others, 0))
                found = VV_LOOKOUT_OTHER;
        }
        if (now - out->idle >= patience)
            break;
    }
    vv_spin_end();
    if (found == VV_LOOKOUT_RING)
        vv_lookout_came(out);
    return found;
}

#endif
