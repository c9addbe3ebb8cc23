/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device end of a packed ring (virtio 1.4, 2.8). ring.h says what holds for it.
 */
#ifndef VIRTIOVA_PACKED_H
#define VIRTIOVA_PACKED_H

#include "chain.h"

#define VV_F_AVAIL 0x80u
#define VV_F_USED 0x8000u
#define VV_EVENT_ENABLE 0u
#define VV_EVENT_DISABLE 1u
#define VV_EVENT_DESC 2u
#define VV_EVENT_FLAGS 3u
#define VV_DESC_ID 12u
#define VV_DESC_FLAGS 14u

/* slots further on, and back: at most one lap. */
static inline void vv_packed_move(const struct vv_ring *ring, uint16_t *index, uint8_t *wrap, uint32_t slots)
{
    uint32_t to = *index + slots;

    if (to >= ring->size) {
        to -= ring->size;
        *wrap ^= 1;
    }
    *index = (uint16_t)to;
}

static inline void vv_packed_back(const struct vv_ring *ring, uint16_t *index, uint8_t *wrap, uint32_t slots)
{
    if (*index < slots) {
        *index = (uint16_t)(*index + ring->size - slots);
        *wrap ^= 1;
    } else {
        *index = (uint16_t)(*index - slots);
    }
}

/* Descriptors that were taken and not given back. */
static inline uint32_t vv_packed_taken(const struct vv_ring *ring)
{
    return ring->next_avail + (ring->avail_wrap == ring->used_wrap ? 0 : ring->size) - ring->next_used;
}

static inline int vv_packed_available(unsigned flags, unsigned wrap)
{
    return (flags & (VV_F_AVAIL | VV_F_USED)) == (wrap ? VV_F_AVAIL : VV_F_USED);
}

/* The descriptor at index: in memory that can be written, too, as used ones go there. */
static inline char *vv_packed_at(struct vv_ring *ring, uint32_t index)
{
    return vv_ring_at(ring, &ring->desc_leaf, ring->desc + (uint64_t)VV_DESC_SIZE * index, VV_DESC_SIZE,
                      VV_READ | VV_WRITE);
}

/* The table's descriptors, in order: of their flags only the one for writing means something (virtio 1.4, 2.8.7). */
static inline int vv_packed_table(struct vv_ring *ring, const struct vv_desc *table, struct vv_chain *chain,
                                  unsigned most)
{
    const uint32_t entries = vv_table_entries(ring, table, table->fourth);
    uint32_t index;

    if (!entries || entries > most)
        return VV_HELP;
    for (index = 0; index < entries; index++) {
        const char *at = vv_ring_at(ring, &ring->table_leaf, table->address + (uint64_t)VV_DESC_SIZE * index,
                                    VV_DESC_SIZE, VV_READ);
        struct vv_desc desc;

        if (vv_unlikely(!at))
            return VV_HELP;
        desc = vv_desc_load(at);
        if (vv_unlikely(!vv_chain_buffer(chain, ring, &desc, desc.fourth, most)))
            return VV_HELP;
    }
    return VV_GOT;
}

/* A list from next_avail on: available, so all of it is visible. Its buffer id is in its last descriptor. */
static inline int vv_packed_walk(struct vv_ring *ring, struct vv_desc desc, struct vv_chain *chain)
{
    const unsigned most = ring->size < VV_MAX_CHAIN ? ring->size : VV_MAX_CHAIN;
    const uint32_t free = ring->size - vv_packed_taken(ring);
    uint16_t index = ring->next_avail;
    uint8_t wrap = ring->avail_wrap;
    const char *at;

    vv_chain_clear(chain);
    if (vv_unlikely(!free))
        return VV_HELP;
    if (ring->listed)
        ring->listed[0] = desc;
    if (desc.fourth & VV_F_INDIRECT) {
        chain->id = desc.third;
        return vv_packed_table(ring, &desc, chain, most);
    }
    for (;;) {
        if (vv_unlikely(desc.fourth & VV_F_INDIRECT || !vv_chain_buffer(chain, ring, &desc, desc.fourth, most)))
            return VV_HELP;
        if (!(desc.fourth & VV_F_NEXT))
            break;
        vv_packed_move(ring, &index, &wrap, 1);
        if (vv_unlikely(++chain->slots > free || !(at = vv_packed_at(ring, index))))
            return VV_HELP;
        desc = vv_desc_load(at);
        if (vv_unlikely(!vv_packed_available(desc.fourth, wrap)))
            return VV_HELP;
        if (ring->listed)
            ring->listed[chain->slots - 1] = desc;
    }
    chain->id = desc.third;
    return VV_GOT;
}

static inline int vv_packed_next(struct vv_ring *ring, struct vv_chain *chain)
{
    const char *at = vv_packed_at(ring, ring->next_avail);
    uint64_t rest;
    struct vv_desc desc;

    if (vv_unlikely(!at))
        return VV_HELP;
    /* Length, id and flags in one load, the address only after it. */
    rest = vv_load_raw64_acquire(at + 8);
    desc = vv_desc_of(0, rest);
    if (!vv_packed_available(desc.fourth, ring->avail_wrap))
        return vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE) ? VV_EMPTY : VV_HELP;
    desc = vv_desc_of(vv_load_raw64(at), rest);
    if (vv_unlikely(vv_packed_walk(ring, desc, chain) != VV_GOT))
        return VV_HELP;
    vv_packed_move(ring, &ring->next_avail, &ring->avail_wrap, chain->slots);
    return VV_GOT;
}

/* Into the place of the first descriptor that was not given back yet, whosever that was: VV_HELP, out of reach. */
static inline int vv_packed_push(struct vv_ring *ring, const struct vv_chain *chain, uint32_t written)
{
    char *at = vv_packed_at(ring, ring->next_used);
    const uint16_t flags =
        (uint16_t)((ring->used_wrap ? VV_F_AVAIL | VV_F_USED : 0) | (written ? VV_F_WRITE : 0));

    if (vv_unlikely(!at))
        return VV_HELP;
    if (ring->unpublished) {
        vv_store_relaxed64(at + 8, written | (uint64_t)chain->id << 32 | (uint64_t)flags << 48, 0);
    } else {
        /* As soon as the driver sees these flags it goes on with the descriptors behind. */
        vv_store_relaxed32(at + 8, written, 0);
        vv_store_relaxed16(at + VV_DESC_ID, chain->id, 0);
        ring->first_slot = ring->next_used;
        ring->first_flags = flags;
    }
    vv_packed_move(ring, &ring->next_used, &ring->used_wrap, chain->slots);
    return VV_GOT;
}

static inline int vv_packed_publish(struct vv_ring *ring)
{
    char *at = vv_packed_at(ring, ring->first_slot);

    if (vv_unlikely(!at))
        return VV_HELP;
    vv_store_release16(at + VV_DESC_FLAGS, ring->first_flags, 0);
    return VV_GOT;
}

/* Whether the driver wants to hear of it that the last slots descriptors were used. */
static inline int vv_packed_wants_call(struct vv_ring *ring, uint32_t slots)
{
    const char *at = vv_ring_at(ring, &ring->avail_leaf, ring->avail, 4, VV_READ);
    uint16_t wish, event, index;
    uint32_t back;

    if (vv_unlikely(!at))
        return 1; /* once too often does no harm */
    wish = vv_load_acquire16(at + 2, 0) & VV_EVENT_FLAGS;
    if (wish != VV_EVENT_DESC || !ring->event_idx)
        return wish != VV_EVENT_DISABLE;
    event = vv_load_acquire16(at, 0);
    index = event & 0x7fff;
    if (index >= ring->size)
        return 1;
    /* How far back it is from where the next push goes: 1 to a lap, or else it is ahead. */
    back = ring->next_used + ring->size * (event >> 15 == ring->used_wrap ? 2u : 1u) - index;
    if (back >= 2 * ring->size)
        back -= 2 * ring->size;
    return back && back <= slots;
}

static inline int vv_packed_arm(struct vv_ring *ring)
{
    char *at = vv_ring_at(ring, &ring->head_leaf, ring->used, 4, VV_WRITE);

    if (vv_unlikely(!at))
        return VV_HELP;
    if (ring->event_idx) {
        /* The place before the flags that give it a meaning. */
        vv_store_release16(at, (uint16_t)(ring->next_avail | ring->avail_wrap << 15), 0);
        vv_store_release16(at + 2, VV_EVENT_DESC, 0);
    } else {
        vv_store_release16(at + 2, VV_EVENT_ENABLE, 0);
    }
    vv_fence();
    at = vv_packed_at(ring, ring->next_avail);
    if (vv_unlikely(!at))
        return VV_HELP;
    return vv_packed_available(vv_load_acquire16(at + VV_DESC_FLAGS, 0), ring->avail_wrap) ? VV_GOT : VV_EMPTY;
}

#endif
