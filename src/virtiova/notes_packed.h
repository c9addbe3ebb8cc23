/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is in flight of a packed ring, noted for whoever comes after us (QEMU, docs/interop/vhost-user.rst, "Inflight I/O
 * tracking"). serve/inflight_packed.py does the same, and has the layout.
 *
 * A used descriptor overwrites what the driver wrote, so a request's descriptors are copied, into entries of a list of free
 * ones. The list has two heads, the present and the old one: an entry that was taken is one only when it is behind both,
 * and one that was given back is free only when it is behind both. So nothing is taken between a push and its publishing.
 *
 * The memory is the front end's, who may write it: an entry's number is loaded once and checked; what a request has
 * noted is known without it.
 */
#ifndef VIRTIOVA_NOTES_PACKED_H
#define VIRTIOVA_NOTES_PACKED_H

#include "chain.h"
#include "packed.h"

#define VV_LISTED_HEADER 32u
#define VV_LISTED_ENTRY 32u
/* In the header. */
#define VV_LISTED_FREE 12u
#define VV_LISTED_OLD_FREE 14u
#define VV_LISTED_USED 16u
#define VV_LISTED_OLD_USED 18u
#define VV_LISTED_WRAP 20u
#define VV_LISTED_OLD_WRAP 21u
/* In an entry: whether it is in flight comes first. */
#define VV_LISTED_NEXT 2u
#define VV_LISTED_LAST 4u
#define VV_LISTED_NUM 6u
#define VV_LISTED_COUNTER 8u
#define VV_LISTED_ID 16u
#define VV_LISTED_FLAGS 18u
#define VV_LISTED_LENGTH 20u
#define VV_LISTED_ADDRESS 24u

/* Stores stay in order, as one who comes after this process has died sees them: see notes.h. */
static inline void vv_listed_8(char *at, uint8_t value)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n((uint8_t *)at, value, __ATOMIC_RELEASE);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static inline void vv_listed_16(char *at, uint16_t value)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    vv_store_release16(at, value, 0);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static inline char *vv_listed_at(const struct vv_ring *ring, uint16_t entry)
{
    return ring->inflight + VV_LISTED_HEADER + (size_t)entry * VV_LISTED_ENTRY;
}

/*
 * Taken: its descriptors, ring->listed, are noted before the device sees it. VV_HELP if the list of free entries makes no
 * sense: then nothing was taken.
 */
static inline int vv_listed_take(struct vv_ring *ring, struct vv_chain *chain)
{
    const uint16_t first = vv_load_acquire16(ring->inflight + VV_LISTED_OLD_FREE, 0);
    uint16_t free = first, last = first;
    unsigned number;
    char *at;

    for (number = 0; number < chain->slots; number++) {
        const struct vv_desc *desc = &ring->listed[number];

        if (vv_unlikely(free >= ring->inflight_entries))
            return VV_HELP;
        at = vv_listed_at(ring, free);
        vv_store_relaxed16(at + VV_LISTED_ID, desc->third, 0);
        vv_store_relaxed16(at + VV_LISTED_FLAGS, desc->fourth, 0);
        vv_store_relaxed32(at + VV_LISTED_LENGTH, desc->length, 0);
        vv_store_relaxed64(at + VV_LISTED_ADDRESS, desc->address, 0);
        last = free;
        free = vv_load_acquire16(at + VV_LISTED_NEXT, 0);
    }
    at = vv_listed_at(ring, first);
    vv_store_relaxed16(at + VV_LISTED_LAST, last, 0);
    vv_store_relaxed16(at + VV_LISTED_NUM, chain->slots, 0);
    vv_store_relaxed64(at + VV_LISTED_COUNTER, ++ring->inflight_counter, 0);
    vv_listed_8(at, 1);
    vv_listed_16(ring->inflight + VV_LISTED_FREE, free);
    /* Until here whoever comes after us puts it back: its entries are still in the old list. */
    vv_listed_16(ring->inflight + VV_LISTED_OLD_FREE, free);
    chain->first_note = first;
    chain->last_note = last;
    return VV_GOT;
}

/* Not taken after all. Nothing is pushed and not published. */
static inline void vv_listed_put_back(struct vv_ring *ring, const struct vv_chain *chain)
{
    char *header = ring->inflight;

    vv_listed_16(vv_listed_at(ring, chain->last_note) + VV_LISTED_NEXT, vv_load_acquire16(header + VV_LISTED_FREE, 0));
    /* What is in the old list was not taken, whatever its entry says. */
    vv_listed_16(header + VV_LISTED_OLD_FREE, chain->first_note);
    vv_listed_16(header + VV_LISTED_FREE, chain->first_note);
    vv_listed_8(vv_listed_at(ring, chain->first_note), 0);
}

/* About to be pushed: what the next batch leaves behind, which nobody looks at until the driver can see the batch. */
static inline void vv_listed_give(struct vv_ring *ring, const struct vv_chain *chain)
{
    char *header = ring->inflight;
    uint16_t used = ring->next_used;
    uint8_t wrap = ring->used_wrap;

    vv_packed_move(ring, &used, &wrap, chain->slots);
    vv_listed_16(vv_listed_at(ring, chain->last_note) + VV_LISTED_NEXT, vv_load_acquire16(header + VV_LISTED_FREE, 0));
    vv_listed_16(header + VV_LISTED_FREE, chain->first_note);
    vv_listed_16(header + VV_LISTED_USED, used);
    vv_listed_8(header + VV_LISTED_WRAP, wrap);
    ring->batch[ring->unpublished] = chain->first_note;
}

/* Published: the present is the past. */
static inline void vv_listed_end(struct vv_ring *ring)
{
    char *header = ring->inflight;
    unsigned at;

    for (at = 0; at < ring->unpublished; at++)
        vv_listed_8(vv_listed_at(ring, ring->batch[at]), 0);
    vv_listed_16(header + VV_LISTED_OLD_FREE, vv_load_acquire16(header + VV_LISTED_FREE, 0));
    vv_listed_16(header + VV_LISTED_OLD_USED, ring->next_used);
    vv_listed_8(header + VV_LISTED_OLD_WRAP, ring->used_wrap);
}

#endif
