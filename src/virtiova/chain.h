/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Descriptors into a request: each loaded once, checked, and its buffer found in host memory. What is the same for split
 * and packed rings (virtio 1.4, 2.7.5 and 2.8.5); 0 is said of all that is not well-formed or not wholly in the table.
 */
#ifndef VIRTIOVA_CHAIN_H
#define VIRTIOVA_CHAIN_H

#include "ring_state.h"

/* One buffer into pieces of host memory; 0 if it cannot be reached, or is in too many of them. */
static inline int vv_chain_add(struct vv_chain *chain, const struct vv_radix *radix, uint64_t address, uint32_t length,
                               unsigned needed)
{
    unsigned at = chain->pieces;
    uint64_t left;
    char *host;

    host = vv_radix_find(radix, address, needed, &left);
    if (vv_unlikely(!host || at == VV_MAX_PIECES))
        return 0;
    chain->piece[at].at = host;
    while (vv_unlikely(left < length)) {
        const char *end = host + left;

        chain->piece[at].length = (uint32_t)(host + left - chain->piece[at].at);
        address += left;
        length -= (uint32_t)left;
        host = vv_radix_find(radix, address, needed, &left);
        if (!host)
            return 0;
        if (host != end) {
            if (++at == VV_MAX_PIECES)
                return 0;
            chain->piece[at].at = host;
        }
    }
    chain->piece[at].length = (uint32_t)(host + length - chain->piece[at].at);
    chain->pieces = (uint16_t)(at + 1);
    return 1;
}

struct vv_desc {
    uint64_t address;
    uint32_t length;
    uint16_t third, fourth; /* flags and next (split), id and flags (packed) */
};

static inline struct vv_desc vv_desc_of(uint64_t first, uint64_t second)
{
    const uint64_t rest = vv_order64(second, 0);

    return (struct vv_desc){vv_order64(first, 0), (uint32_t)rest, (uint16_t)(rest >> 32), (uint16_t)(rest >> 48)};
}

/* Each half loaded once. */
static inline struct vv_desc vv_desc_load(const char *at)
{
    return vv_desc_of(vv_load_raw64(at), vv_load_raw64(at + 8));
}

/* One descriptor with a buffer. 0: an empty one, one too many, one behind its like, or one that cannot be reached. */
static inline int vv_chain_buffer(struct vv_chain *chain, const struct vv_ring *ring, const struct vv_desc *desc,
                                  unsigned flags, unsigned most)
{
    if (vv_unlikely(!desc->length || chain->buffers == most))
        return 0;
    chain->buffers++;
    if (flags & VV_F_WRITE) {
        chain->in += desc->length;
        if (vv_unlikely(!vv_chain_add(chain, ring->radix, desc->address, desc->length, VV_WRITE)))
            return 0;
    } else {
        if (vv_unlikely(chain->in))
            return 0;
        chain->out += desc->length;
        if (vv_unlikely(!vv_chain_add(chain, ring->radix, desc->address, desc->length, VV_READ)))
            return 0;
        chain->readable = chain->pieces;
    }
    return chain->out + chain->in <= VV_MAX_CHAIN_BYTES;
}

static inline void vv_chain_clear(struct vv_chain *chain)
{
    chain->slots = 1;
    chain->buffers = chain->readable = chain->pieces = 0;
    chain->out = chain->in = 0;
}

/* Whether an indirect table may be here, and how many descriptors it has; 0: no. Its write flag means nothing. */
static inline uint32_t vv_table_entries(const struct vv_ring *ring, const struct vv_desc *desc, unsigned flags)
{
    /* One that is not aligned is copied, not loaded: not here. */
    if (!ring->indirect || flags & VV_F_NEXT || desc->length % VV_DESC_SIZE || desc->address % VV_DESC_SIZE ||
        desc->address >= VV_COVERED)
        return 0;
    return desc->length / VV_DESC_SIZE;
}

#endif
