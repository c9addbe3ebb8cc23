/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many small requests of a split ring at a time: chains of one buffer that the driver filled, each within one leaf of the
 * table of translations. The same loads, checks and stores as in ring.h, each done for all of them before the next, so that
 * the memory that one waits for is on its way for the others too. What is not of that kind is left to vv_ring_next().
 */
#ifndef VIRTIOVA_BURST_H
#define VIRTIOVA_BURST_H

#include "ring.h"

#define VV_BURST 32u

struct vv_single {
    const char *at;
    uint32_t length;
    uint16_t id;
};

/*
 * How many to look at: where the driver's chains have several buffers, what was looked at behind the first of them was in
 * vain, so that it is one, until it is of the kind again.
 */
static inline void vv_burst_widen(unsigned *width, unsigned looked, unsigned found)
{
    if (vv_unlikely(found < looked))
        *width = found ? found : 1;
    else if (vv_unlikely(*width < VV_BURST))
        *width *= 2;
}

/*
 * Up to most chains of one readable buffer, behind the last one that was taken, not taken yet; how many. width, 1 to
 * VV_BURST, is how many are looked at.
 */
static inline unsigned vv_burst_look(struct vv_ring *ring, struct vv_single one[VV_BURST], unsigned most,
                                     unsigned *width)
{
    const uint32_t slot = ring->next_avail & (ring->size - 1);
    uint64_t address[VV_BURST];
    const char *heads, *table;
    unsigned at, count, looked;

    if (vv_unlikely(!ring->usable || ring->packed || ring->inflight || ring->taken))
        return 0;
    if (ring->next_avail == ring->seen_avail && vv_split_look(ring) != VV_GOT)
        return 0;
    count = (uint16_t)(ring->seen_avail - ring->next_avail);
    if (count > most)
        count = most;
    if (count > *width)
        count = *width;
    if (count > ring->size - slot)
        count = ring->size - slot;
    if (count > ring->size - ring->unpublished_slots)
        count = ring->size - ring->unpublished_slots;
    heads = vv_ring_at(ring, &ring->avail_leaf, ring->avail + 4 + 2 * (uint64_t)slot, 2 * count, VV_READ);
    table = vv_ring_at(ring, &ring->desc_leaf, ring->desc, VV_DESC_SIZE * ring->size, VV_READ);
    if (vv_unlikely(!heads || !table))
        return 0;
    looked = count;
    for (at = 0; at < count; at++) {
        one[at].id = vv_load_relaxed16(heads + 2 * at, 0);
        if (vv_unlikely(one[at].id >= ring->size))
            count = at;
        else
            __builtin_prefetch(table + VV_DESC_SIZE * one[at].id);
    }
    for (at = 0; at < count; at++) {
        const struct vv_desc desc = vv_desc_load(table + VV_DESC_SIZE * one[at].id);

        address[at] = desc.address;
        one[at].length = desc.length;
        if (vv_unlikely(!desc.length || desc.third & (VV_F_NEXT | VV_F_WRITE | VV_F_INDIRECT)))
            count = at;
    }
    for (at = 0; at < count; at++) {
        uint64_t left;

        one[at].at = vv_radix_find(ring->radix, address[at], VV_READ, &left);
        if (vv_unlikely(!one[at].at || left < one[at].length)) {
            count = at;
            break;
        }
        __builtin_prefetch(one[at].at);
        __builtin_prefetch(one[at].at + 64);
    }
    vv_burst_widen(width, looked, count);
    return count;
}

/* Take these and give them back with nothing written into them; how many: fewer if the used ring cannot be reached. */
static inline unsigned vv_burst_room(struct vv_ring *ring, unsigned count)
{
    const uint32_t slot = ring->next_used & (ring->size - 1);

    if (count > ring->size - slot)
        count = ring->size - slot;
    if (vv_unlikely(!vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE) ||
                    !vv_ring_at(ring, &ring->used_leaf, vv_split_element(ring, slot), 8 * count, VV_WRITE)))
        return 0;
    return count;
}

static inline void vv_burst_give(struct vv_ring *ring, const struct vv_single one[VV_BURST], unsigned count)
{
    char *to = vv_ring_at(ring, &ring->used_leaf, vv_split_element(ring, ring->next_used), 8 * count, VV_WRITE);
    unsigned at;

    for (at = 0; at < count; at++, to += 8) {
        vv_store_relaxed32(to, one[at].id, 0);
        vv_store_relaxed32(to + 4, 0, 0);
    }
    ring->next_avail = (uint16_t)(ring->next_avail + count);
    ring->next_used = (uint16_t)(ring->next_used + count);
    ring->unpublished += count;
    ring->unpublished_slots += count;
}

#endif
