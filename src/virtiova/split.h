/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device end of a split ring (virtio 1.4, 2.7). ring.h says what holds for it.
 */
#ifndef VIRTIOVA_SPLIT_H
#define VIRTIOVA_SPLIT_H

#include "chain.h"

#define VV_AVAIL_NO_INTERRUPT 1u
#define VV_USED_NO_NOTIFY 1u

static inline uint64_t vv_split_element(const struct vv_ring *ring, uint32_t index)
{
    return ring->used + 4 + 8 * (uint64_t)(index & (ring->size - 1));
}

/* Whether the used element of index, and the used index, can be written: what is taken must be given back. */
static inline int vv_split_room(struct vv_ring *ring, uint32_t index)
{
    const uint64_t element = vv_split_element(ring, index);

    if (vv_unlikely(!vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE)))
        return 0;
    /* An element is aligned to 4 bytes, and may lie in two pages. */
    return vv_likely(vv_ring_at(ring, &ring->used_leaf, element, 8, VV_WRITE) != NULL) ||
           (vv_ring_at(ring, &ring->used_leaf, element, 4, VV_WRITE) &&
            vv_ring_at(ring, &ring->used_leaf, element + 4, 4, VV_WRITE));
}

/* Load the available index once; VV_GOT if it is past next_avail. */
static inline int vv_split_look(struct vv_ring *ring)
{
    const char *at = vv_ring_at(ring, &ring->avail_leaf, ring->avail + 2, 2, VV_READ);
    uint16_t index;

    if (vv_unlikely(!at))
        return VV_HELP;
    index = vv_load_acquire16(at, 0);
    if (vv_unlikely((uint16_t)(index - ring->next_avail) > ring->size))
        return VV_HELP;
    ring->seen_avail = index;
    return index != ring->next_avail ? VV_GOT : VV_EMPTY;
}

static inline uint64_t vv_split_avail_event(const struct vv_ring *ring)
{
    return ring->used + 4 + 8 * (uint64_t)ring->size;
}

/* Follow a chain from head, each descriptor loaded once. */
static inline int vv_split_walk(struct vv_ring *ring, uint16_t head, struct vv_chain *chain)
{
    uint64_t table = ring->desc;
    struct vv_leaf *leaf = &ring->desc_leaf;
    uint32_t entries = ring->size, index = head;
    const unsigned most = ring->size < VV_MAX_CHAIN ? ring->size : VV_MAX_CHAIN;

    vv_chain_clear(chain);
    chain->id = head;
    for (;;) {
        const char *at = vv_ring_at(ring, leaf, table + (uint64_t)VV_DESC_SIZE * index, VV_DESC_SIZE, VV_READ);
        struct vv_desc desc;
        unsigned flags;

        if (vv_unlikely(!at))
            return VV_HELP;
        desc = vv_desc_load(at);
        flags = desc.third;
        if (flags & VV_F_INDIRECT) {
            /* Not in a table. */
            if (leaf != &ring->desc_leaf || !(entries = vv_table_entries(ring, &desc, flags)))
                return VV_HELP;
            table = desc.address;
            leaf = &ring->table_leaf;
            index = 0;
            continue;
        }
        if (vv_unlikely(!vv_chain_buffer(chain, ring, &desc, flags, most)))
            return VV_HELP;
        if (!(flags & VV_F_NEXT))
            return VV_GOT;
        index = desc.fourth;
        if (vv_unlikely(index >= entries))
            return VV_HELP;
        if (leaf == &ring->desc_leaf)
            chain->slots++;
    }
}

static inline int vv_split_next(struct vv_ring *ring, struct vv_chain *chain)
{
    const char *at;
    uint16_t head;

    if (ring->next_avail == ring->seen_avail) {
        const int found = vv_split_look(ring);

        if (found == VV_EMPTY && (!vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE) ||
                                  !vv_ring_at(ring, &ring->used_leaf, vv_split_avail_event(ring), 2, VV_WRITE)))
            return VV_HELP; /* so that it can be armed now */
        if (found != VV_GOT)
            return found;
    }
    at = vv_ring_at(ring, &ring->avail_leaf, ring->avail + 4 + 2 * (uint64_t)(ring->next_avail & (ring->size - 1)), 2,
                    VV_READ);
    if (vv_unlikely(!at || ring->taken >= ring->size || !vv_split_room(ring, ring->next_used + ring->taken)))
        return VV_HELP;
    /* With others still under way it is given back before them: into the next element, wherever that is. */
    if (vv_unlikely(ring->taken && !vv_split_room(ring, ring->next_used)))
        return VV_HELP;
    head = vv_load_relaxed16(at, 0);
    if (vv_unlikely(head >= ring->size || vv_split_walk(ring, head, chain) != VV_GOT))
        return VV_HELP;
    if (ring->inflight && vv_unlikely(head >= ring->inflight_entries))
        return VV_HELP;
    ring->next_avail++;
    return VV_GOT;
}

static inline void vv_split_push(struct vv_ring *ring, uint16_t id, uint32_t written)
{
    const uint64_t element = vv_split_element(ring, ring->next_used);
    char *at = vv_ring_at(ring, &ring->used_leaf, element, 8, VV_WRITE);

    /* The driver looks at them only once it has seen the index, which is a release store. */
    if (vv_likely(at != NULL)) {
        vv_store_relaxed32(at, id, 0);
        vv_store_relaxed32(at + 4, written, 0);
    } else {
        if ((at = vv_ring_at(ring, &ring->used_leaf, element, 4, VV_WRITE)))
            vv_store_relaxed32(at, id, 0);
        if ((at = vv_ring_at(ring, &ring->used_leaf, element + 4, 4, VV_WRITE)))
            vv_store_relaxed32(at, written, 0);
    }
    ring->next_used++;
}

static inline int vv_split_publish(struct vv_ring *ring)
{
    char *at = vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE);

    if (vv_unlikely(!at))
        return VV_HELP;
    vv_store_release16(at + 2, ring->next_used, 0);
    return VV_GOT;
}

/* vring_need_event (virtio 1.4, 2.7.7.2) */
static inline int vv_need_event(uint16_t event, uint16_t new, uint16_t old)
{
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

static inline int vv_split_wants_call(struct vv_ring *ring, uint16_t new, uint32_t moved)
{
    const uint64_t wish = ring->avail + (ring->event_idx ? 4 + 2 * (uint64_t)ring->size : 0);
    const char *at = vv_ring_at(ring, &ring->avail_leaf, wish, 2, VV_READ);
    uint16_t value;

    if (vv_unlikely(!at))
        return 1; /* once too often does no harm */
    value = vv_load_acquire16(at, 0);
    return ring->event_idx ? vv_need_event(value, new, (uint16_t)(new - moved)) : !(value & VV_AVAIL_NO_INTERRUPT);
}

#endif
