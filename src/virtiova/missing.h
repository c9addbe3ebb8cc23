/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What of a ring's next chains is not in the table of translations (ring.h, radix.h), so that all of it can be asked for
 * at once. Nothing is taken: the ring stays as it is, and each descriptor that is looked at is loaded once and then
 * forgotten. What is found is a guess, as the table may lack what somebody knows, and the driver may change its mind.
 */
#ifndef VIRTIOVA_MISSING_H
#define VIRTIOVA_MISSING_H

#include <stdint.h>

#include "radix.h"
#include "ring.h"

#define VV_MAX_WANTS 512u
/* Descriptors looked at, after which no further chain is; and bytes of their buffers. */
#define VV_MAX_LOOKED 4096u
#define VV_MAX_PROBED ((uint64_t)1 << 25)

/* A buffer, or a table, of which not all is there. */
struct vv_want {
    uint64_t address, length;
    unsigned needed;
};

struct vv_missing {
    unsigned count, looked;
    unsigned first; /* of them, those of the first chain */
    uint64_t probed;
    uint64_t out, in; /* of the chain that is looked at */
    struct vv_want want[VV_MAX_WANTS];
};

/* Whether all of it is in the table; noted if not. */
static inline int vv_missing_note(struct vv_missing *missing, const struct vv_radix *radix, uint64_t address,
                                  uint64_t length, unsigned needed)
{
    uint64_t at = address, rest = length, left;

    while (vv_radix_find(radix, at, needed, &left)) {
        if (left >= rest)
            return 1;
        at += left;
        rest -= left;
        if ((missing->probed += left) > VV_MAX_PROBED)
            return 1;
    }
    if (missing->count < VV_MAX_WANTS)
        missing->want[missing->count++] = (struct vv_want){address, length, needed};
    return 0;
}

/* A descriptor with a buffer. 0: it is not for us to say what is wrong with it. */
static inline int vv_missing_buffer(struct vv_missing *missing, const struct vv_ring *ring, const struct vv_desc *desc,
                                    unsigned flags)
{
    if (!desc->length || (missing->in && !(flags & VV_F_WRITE)))
        return 0;
    *(flags & VV_F_WRITE ? &missing->in : &missing->out) += desc->length;
    vv_missing_note(missing, ring->radix, desc->address, desc->length, flags & VV_F_WRITE ? VV_WRITE : VV_READ);
    return missing->out + missing->in <= VV_MAX_CHAIN_BYTES;
}

/* The descriptors in a table, if it can be reached. Split: they are chained; packed: one behind the other. */
static inline int vv_missing_table(struct vv_missing *missing, struct vv_ring *ring, const struct vv_desc *table,
                                   unsigned flags, unsigned most)
{
    const uint32_t entries = vv_table_entries(ring, table, flags);
    uint32_t index = 0;
    unsigned hops;

    if (!entries)
        return 0;
    if (!vv_missing_note(missing, ring->radix, table->address, table->length, VV_READ))
        return 1;
    for (hops = 0; hops < most; hops++) {
        const char *at = vv_ring_at(ring, &ring->table_leaf, table->address + (uint64_t)VV_DESC_SIZE * index,
                                    VV_DESC_SIZE, VV_READ);
        struct vv_desc desc;
        unsigned how;

        if (!at)
            return 0;
        desc = vv_desc_load(at);
        missing->looked++;
        how = ring->packed ? desc.fourth & VV_F_WRITE : desc.third;
        if (how & VV_F_INDIRECT || !vv_missing_buffer(missing, ring, &desc, how))
            return 0;
        if (ring->packed ? index + 1 == entries : !(how & VV_F_NEXT))
            return 1;
        index = ring->packed ? index + 1 : desc.fourth;
        if (index >= entries)
            return 0;
    }
    return 0;
}

static inline int vv_missing_split(struct vv_missing *missing, struct vv_ring *ring, unsigned most)
{
    const char *at = vv_ring_at(ring, &ring->avail_leaf,
                                ring->avail + 4 + 2 * (uint64_t)(ring->next_avail & (ring->size - 1)), 2, VV_READ);
    uint32_t index = at ? vv_load_relaxed16(at, 0) : ring->size;
    unsigned hops;

    ring->next_avail++;
    for (hops = 0; hops < most && index < ring->size; hops++) {
        struct vv_desc desc;

        at = vv_ring_at(ring, &ring->desc_leaf, ring->desc + (uint64_t)VV_DESC_SIZE * index, VV_DESC_SIZE, VV_READ);
        if (!at)
            return 0;
        desc = vv_desc_load(at);
        missing->looked++;
        if (desc.third & VV_F_INDIRECT)
            return vv_missing_table(missing, ring, &desc, desc.third, most);
        if (!vv_missing_buffer(missing, ring, &desc, desc.third))
            return 0;
        if (!(desc.third & VV_F_NEXT))
            return 1;
        index = desc.fourth;
    }
    return 0;
}

static inline int vv_missing_packed(struct vv_missing *missing, struct vv_ring *ring, unsigned most)
{
    unsigned hops;

    for (hops = 0; hops < most; hops++) {
        const char *at = vv_packed_at(ring, ring->next_avail);
        struct vv_desc desc;

        /* Not into what was taken, nor into what was looked at. */
        if (!at || vv_packed_taken(ring) >= ring->size)
            return 0;
        desc = vv_desc_load(at);
        if (!vv_packed_available(desc.fourth, ring->avail_wrap))
            return 0;
        missing->looked++;
        vv_packed_move(ring, &ring->next_avail, &ring->avail_wrap, 1);
        if (desc.fourth & VV_F_INDIRECT)
            return !hops && vv_missing_table(missing, ring, &desc, desc.fourth, most);
        if (!vv_missing_buffer(missing, ring, &desc, desc.fourth))
            return 0;
        if (!(desc.fourth & VV_F_NEXT))
            return 1;
    }
    return 0;
}

/* Whether there is another chain; the driver's word for it is looked at anew. */
static inline int vv_missing_more(struct vv_ring *ring)
{
    const char *at;

    if (!ring->packed)
        return ring->next_avail != ring->seen_avail || vv_split_look(ring) == VV_GOT;
    at = vv_packed_taken(ring) < ring->size ? vv_packed_at(ring, ring->next_avail) : NULL;
    /* The rest of it is loaded after that. */
    return at && vv_packed_available(vv_load_acquire16(at + VV_DESC_FLAGS, 0), ring->avail_wrap);
}

/*
 * Look at the next chain, and at as many further ones as are there, up to chains in all. 0: the first of them is one
 * for Python, or nothing of it is missing; what was noted is of no use then.
 */
static inline int vv_missing_look(struct vv_missing *missing, const struct vv_ring *of, unsigned chains)
{
    struct vv_ring ring = *of;
    const unsigned most = ring.size < VV_MAX_CHAIN ? ring.size : VV_MAX_CHAIN;
    unsigned done, before;

    missing->count = missing->looked = 0;
    missing->probed = 0;
    vv_ring_begin(&ring);
    if (!ring.usable)
        return 0;
    for (done = 0; done < chains && vv_missing_more(&ring); done++) {
        if (missing->looked >= VV_MAX_LOOKED || missing->count == VV_MAX_WANTS || missing->probed > VV_MAX_PROBED)
            break;
        before = missing->count;
        missing->out = missing->in = 0;
        if (!(ring.packed ? vv_missing_packed(missing, &ring, most) : vv_missing_split(missing, &ring, most))) {
            missing->count = before;
            break;
        }
        if (!done)
            missing->first = missing->count;
        if (!missing->count)
            break;
    }
    return done && missing->count;
}

#endif
