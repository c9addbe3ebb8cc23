/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device end of a virtqueue (virtio 1.4, 2.7 and 2.8), over a table of translations (radix.h): an accelerator.
 * It does what is well-formed and wholly in the table, with the permission that is needed. At anything else it says
 * VV_HELP, with the state as it was: the same ring's end in Python then asks for what is missing, does what is odd,
 * or says what is wrong. Numbers are little-endian.
 *
 * Every index, flag and descriptor that the driver can write is loaded once, into a value; the value is checked; and
 * only the checked value is used.
 *
 * A batch is what lies between two vv_ring_begin: translations cannot change within it, so the leaves that the parts
 * of the ring are in are remembered, and the pieces of a chain are valid, until then. No locks: one thread at a time.
 */
#ifndef VIRTIOVA_RING_H
#define VIRTIOVA_RING_H

#include "notes.h"
#include "notes_packed.h"
#include "packed.h"
#include "split.h"

/* All that was pushed becomes visible to the driver. VV_GOT; VV_HELP only if not in the batch of the push. */
static inline int vv_ring_publish(struct vv_ring *ring)
{
    if (!ring->unpublished)
        return VV_GOT;
    if (vv_unlikely((ring->packed ? vv_packed_publish(ring) : vv_split_publish(ring)) != VV_GOT))
        return VV_HELP;
    if (ring->inflight && ring->packed)
        vv_listed_end(ring);
    else if (ring->inflight)
        vv_inflight_end(ring);
    ring->untold += ring->unpublished_slots;
    ring->unpublished = ring->unpublished_slots = 0;
    return VV_GOT;
}

/* Note that the chain that was got is taken; VV_HELP, as if it was not got. */
static inline int vv_ring_note(struct vv_ring *ring, struct vv_chain *chain)
{
    if (!ring->packed) {
        vv_inflight_take(ring, chain->id);
        return VV_GOT;
    }
    if (vv_likely(vv_listed_take(ring, chain) == VV_GOT))
        return VV_GOT;
    vv_packed_back(ring, &ring->next_avail, &ring->avail_wrap, chain->slots);
    return VV_HELP;
}

/*
 * The next chain: VV_GOT, it is noted as taken and must be pushed, or put back at once; VV_EMPTY, the driver has made
 * none available; VV_HELP, see above. Where a packed ring's requests are noted, what was pushed is published before.
 */
static inline int vv_ring_next(struct vv_ring *ring, struct vv_chain *chain)
{
    int found;

    if (vv_unlikely(!ring->usable))
        return VV_HELP;
    if (ring->packed && ring->inflight && vv_unlikely(vv_ring_publish(ring) != VV_GOT))
        return VV_HELP;
    found = ring->packed ? vv_packed_next(ring, chain) : vv_split_next(ring, chain);
    if (found == VV_GOT && ring->inflight)
        found = vv_ring_note(ring, chain);
    if (found == VV_GOT)
        ring->taken++;
    return found;
}

/* Forget that chain, the last one that was got, was taken, before anything is pushed: somebody else will take it. */
static inline void vv_ring_put_back(struct vv_ring *ring, const struct vv_chain *chain)
{
    if (ring->inflight && ring->packed)
        vv_listed_put_back(ring, chain);
    else if (ring->inflight)
        vv_inflight_flag(vv_inflight_at(ring, chain->id), 0);
    if (ring->packed)
        vv_packed_back(ring, &ring->next_avail, &ring->avail_wrap, chain->slots);
    else
        ring->next_avail--;
    ring->taken--;
}

/*
 * Give a chain back of which the first written bytes of room were written; the driver does not see it yet. VV_GOT, or
 * VV_HELP with nothing changed if the used ring is not in the table: never in the batch in which the chain was got.
 */
static inline int vv_ring_push(struct vv_ring *ring, const struct vv_chain *chain, uint32_t written)
{
    const uint32_t slots = ring->packed ? chain->slots : 1;

    if (vv_unlikely(!ring->usable))
        return VV_HELP;
    /* More than a lap would write over the first of them. */
    if (vv_unlikely(ring->unpublished_slots + slots > ring->size) && vv_ring_publish(ring) != VV_GOT)
        return VV_HELP;
    if (ring->packed) {
        if (ring->inflight && vv_likely(vv_packed_at(ring, ring->next_used) != NULL))
            vv_listed_give(ring, chain);
        if (vv_unlikely(vv_packed_push(ring, chain, written) != VV_GOT))
            return VV_HELP;
    } else {
        if (vv_unlikely(!vv_split_room(ring, ring->next_used)))
            return VV_HELP;
        if (ring->inflight) {
            vv_inflight_give(ring, chain->id);
            ring->batch[ring->unpublished] = chain->id;
        }
        vv_split_push(ring, chain->id, written);
    }
    ring->unpublished++;
    ring->unpublished_slots += slots;
    ring->taken--;
    return VV_GOT;
}

/* Whether the driver wants to hear of what was published since the last call (virtio 1.4, 2.7.7.2 and 2.8.10). */
static inline int vv_ring_wants_call(struct vv_ring *ring)
{
    /* Free-running indices have 16 bits; nobody waits for what lies more than a lap back. */
    const uint32_t told = ring->packed ? (ring->untold < ring->size ? ring->untold : ring->size)
                                       : (uint16_t)ring->untold;

    if (!told)
        return 0;
    ring->untold = 0;
    /* The driver's wish must not be loaded before what was published is visible: it may sleep in between. */
    vv_fence();
    return ring->packed ? vv_packed_wants_call(ring, told) : vv_split_wants_call(ring, ring->next_used, told);
}

/* Ask the driver not to kick while we are looking anyway. A hint only. */
static inline void vv_ring_quiet(struct vv_ring *ring)
{
    char *at;

    if (!ring->usable || (ring->event_idx && !ring->packed))
        return;
    at = vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE);
    if (at)
        vv_store_release16(at + (ring->packed ? 2 : 0), ring->packed ? VV_EVENT_DISABLE : VV_USED_NO_NOTIFY, 0);
}

/*
 * Ask for a kick with the next chain, then look once more. VV_EMPTY: sleep; VV_GOT: there is more, do not. VV_HELP:
 * neither could be done; not in a batch in which vv_ring_next said VV_EMPTY, unless the available index is odd.
 */
static inline int vv_ring_arm(struct vv_ring *ring)
{
    char *at;

    if (vv_unlikely(!ring->usable))
        return VV_HELP;
    if (ring->packed)
        return vv_packed_arm(ring);
    at = ring->event_idx ? vv_ring_at(ring, &ring->used_leaf, vv_split_avail_event(ring), 2, VV_WRITE)
                         : vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE);
    if (vv_unlikely(!at))
        return VV_HELP;
    vv_store_release16(at, ring->event_idx ? ring->next_avail : 0, 0);
    vv_fence();
    return vv_split_look(ring);
}

#endif
