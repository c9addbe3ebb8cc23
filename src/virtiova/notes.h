/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is in flight, noted for whoever comes after us (QEMU, docs/interop/vhost-user.rst, "Inflight I/O tracking"): split
 * rings. serve/inflight.py does the same, and has the layout.
 */
#ifndef VIRTIOVA_NOTES_H
#define VIRTIOVA_NOTES_H

#include "ring_state.h"

#define VV_INFLIGHT_HEADER 16u
#define VV_INFLIGHT_ENTRY 16u
#define VV_INFLIGHT_LAST_HEAD 12u
#define VV_INFLIGHT_USED 14u
#define VV_INFLIGHT_NEXT 6u
#define VV_INFLIGHT_COUNTER 8u

/*
 * Only the order of the stores matters, and only to one who comes after this process has died: relaxed atomics are
 * neither torn nor dropped, and the fences of the compiler keep them in order.
 */
static inline char *vv_inflight_at(const struct vv_ring *ring, uint16_t id)
{
    return ring->inflight + VV_INFLIGHT_HEADER + (size_t)id * VV_INFLIGHT_ENTRY;
}

static inline void vv_inflight_flag(char *entry, uint8_t flag)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n((uint8_t *)entry, flag, __ATOMIC_RELEASE);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* Taken: noted before the device sees it. */
static inline void vv_inflight_take(struct vv_ring *ring, uint16_t id)
{
    char *entry = vv_inflight_at(ring, id);

    if (__atomic_load_n((uint8_t *)entry, __ATOMIC_RELAXED) == 1)
        return; /* by one who died: it keeps its place */
    vv_store_relaxed64(entry + VV_INFLIGHT_COUNTER, ++ring->inflight_counter, 0);
    vv_inflight_flag(entry, 1);
}

/* Pushed: into the list of the batch that is given back next, and that is looked at if we die before it is noted. */
static inline void vv_inflight_give(struct vv_ring *ring, uint16_t id)
{
    char *last = ring->inflight + VV_INFLIGHT_LAST_HEAD;

    vv_store_release16(vv_inflight_at(ring, id) + VV_INFLIGHT_NEXT, vv_load_acquire16(last, 0), 0);
    vv_store_release16(last, id, 0);
}

/* Published. */
static inline void vv_inflight_end(struct vv_ring *ring)
{
    unsigned at;

    for (at = 0; at < ring->unpublished; at++)
        vv_inflight_flag(vv_inflight_at(ring, ring->batch[at]), 0);
    vv_store_release16(ring->inflight + VV_INFLIGHT_USED, ring->next_used, 0);
}

#endif
