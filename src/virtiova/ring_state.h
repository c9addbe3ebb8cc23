/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the device end of a ring (ring.h) knows of it, and a request as it comes out: host memory, in pieces. Where the
 * parts of the ring are in host memory is looked up in a table of translations (radix.h), and remembered for a batch.
 */
#ifndef VIRTIOVA_RING_STATE_H
#define VIRTIOVA_RING_STATE_H

#include <stdint.h>
#include <string.h>

#include "atomics.h"
#include "radix.h"

#define VV_MAX_PIECES 512
/* Buffers in a chain, and bytes: as in ring/split_device.py. */
#define VV_MAX_CHAIN 1024u
#define VV_MAX_CHAIN_BYTES ((uint64_t)1 << 32)

#define VV_DESC_SIZE 16u
#define VV_F_NEXT 1u
#define VV_F_WRITE 2u
#define VV_F_INDIRECT 4u

#define vv_likely(x) __builtin_expect(!!(x), 1)
#define vv_unlikely(x) __builtin_expect(!!(x), 0)

enum { VV_EMPTY, VV_GOT, VV_HELP };

struct vv_piece {
    char *at; /* host memory */
    uint32_t length;
};

/* A request. The readable pieces come first. */
struct vv_chain {
    uint16_t id;       /* head (split) or buffer id (packed): what the used ring says */
    uint16_t slots;    /* entries of the descriptor ring that it takes; an indirect table takes one */
    uint16_t buffers;  /* descriptors with a buffer */
    uint16_t readable; /* of its pieces */
    uint16_t pieces;
    uint64_t out, in; /* bytes that the device may read, and may write */
    uint16_t first_note, last_note; /* packed: entries where it is noted as in flight, if somebody wants to know */
    struct vv_piece piece[VV_MAX_PIECES];
};

/* A leaf that was found: size bytes at first, of which all are at host. */
struct vv_leaf {
    uint64_t first, size;
    char *host;
};

struct vv_ring {
    const struct vv_radix *radix;
    uint64_t desc, avail, used; /* packed: descriptor ring, driver's and device's event suppression */
    uint32_t size;
    uint8_t packed, event_idx, indirect, in_order;
    uint8_t usable; /* else nothing but VV_HELP */

    /* Split: free-running. Packed: indices into the descriptor ring. */
    uint16_t next_avail;
    uint16_t seen_avail;           /* split: the driver's available index, as it was when it was looked at */
    uint16_t next_used;            /* where the next push goes */
    uint8_t avail_wrap, used_wrap; /* packed: the wrap counters there */
    uint32_t untold;               /* entries of the used ring that were published since the driver was last told */
    uint32_t taken;                /* chains that were got and not pushed */
    uint32_t unpublished;          /* chains that were pushed and not published */
    uint32_t unpublished_slots;
    uint16_t first_slot, first_flags; /* packed: of the first of them, which the driver is to see last */

    /* What is in flight, for whoever comes after us; NULL: nobody wants to know. notes.h, notes_packed.h. */
    char *inflight;
    uint32_t inflight_entries;
    uint64_t inflight_counter;
    uint16_t *batch;        /* ids, or first notes, that are not published yet; size of them, needed with inflight */
    struct vv_desc *listed; /* packed: descriptors of the chain that was walked last; size of them, needed with it */

    struct vv_leaf desc_leaf, avail_leaf, used_leaf, head_leaf, table_leaf;
};

/* -- set-up, batches */

/*
 * Set what the driver chose. Before, zero the structure, and set "packed", "event_idx", "indirect" and "in_order";
 * afterwards the state, next_avail to untold, if the ring was in use.
 */
static inline void vv_ring_init(struct vv_ring *ring, const struct vv_radix *radix, uint64_t desc, uint64_t avail,
                                uint64_t used, uint32_t size)
{
    ring->radix = radix;
    ring->desc = desc;
    ring->avail = avail;
    ring->used = used;
    ring->size = size;
    /* Far enough from 2**64 that no address within a part wraps. */
    ring->usable = desc < VV_COVERED && avail < VV_COVERED && used < VV_COVERED && !(desc % 16) && size &&
                   size <= 32768 && !(used % 4) && !(avail % (ring->packed ? 4 : 2)) &&
                   (ring->packed || !(size & (size - 1)));
    ring->avail_wrap = ring->used_wrap = 1;
}

/* A new batch: what was translated before may be gone. */
static inline void vv_ring_begin(struct vv_ring *ring)
{
    ring->desc_leaf.size = ring->avail_leaf.size = ring->used_leaf.size = 0;
    ring->head_leaf.size = ring->table_leaf.size = 0;
}

/* length bytes at address, in one leaf; looks for the leaf if it is not the one that is remembered. */
static inline char *vv_ring_at(const struct vv_ring *ring, struct vv_leaf *leaf, uint64_t address, unsigned length,
                               unsigned needed)
{
    uint64_t inside = address - leaf->first;
    const uint64_t page = address & ~VV_OFFSET;

    if (vv_likely(inside < leaf->size && leaf->size - inside >= length))
        return leaf->host + inside;
    leaf->host = vv_radix_find(ring->radix, page, needed, &leaf->size);
    if (!leaf->host) {
        leaf->size = 0;
        return NULL;
    }
    leaf->first = page;
    inside = address - page;
    return inside < leaf->size && leaf->size - inside >= length ? leaf->host + inside : NULL;
}

#endif
