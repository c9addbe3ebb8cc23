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

    /* What is in flight, for whoever comes after us; NULL: nobody wants to know. serve/inflight.py has the layout. */
    char *inflight;
    uint32_t inflight_entries;
    uint64_t inflight_counter;
    uint16_t *batch; /* ids that are not published yet, size of them; needed with inflight */

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
    return leaf->size - inside >= length ? leaf->host + inside : NULL;
}

/* -- a chain's buffers */

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

/* -- what is in flight (QEMU, docs/interop/vhost-user.rst, "Inflight I/O tracking") */

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

/* -- the split ring */

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

/* -- the packed ring */

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

/* -- both rings */

/*
 * The next chain: VV_GOT, it is noted as taken and must be pushed, or put back at once; VV_EMPTY, the driver has made
 * none available; VV_HELP, see above.
 */
static inline int vv_ring_next(struct vv_ring *ring, struct vv_chain *chain)
{
    int found;

    if (vv_unlikely(!ring->usable))
        return VV_HELP;
    found = ring->packed ? vv_packed_next(ring, chain) : vv_split_next(ring, chain);
    if (found == VV_GOT) {
        ring->taken++;
        if (ring->inflight)
            vv_inflight_take(ring, chain->id);
    }
    return found;
}

/* Forget that chain, the last one that was got, was taken: somebody else will take it. */
static inline void vv_ring_put_back(struct vv_ring *ring, const struct vv_chain *chain)
{
    if (ring->packed)
        vv_packed_back(ring, &ring->next_avail, &ring->avail_wrap, chain->slots);
    else
        ring->next_avail--;
    ring->taken--;
    if (ring->inflight)
        vv_inflight_flag(vv_inflight_at(ring, chain->id), 0);
}

/* All that was pushed becomes visible to the driver. VV_GOT; VV_HELP only if not in the batch of the push. */
static inline int vv_ring_publish(struct vv_ring *ring)
{
    if (!ring->unpublished)
        return VV_GOT;
    if (vv_unlikely((ring->packed ? vv_packed_publish(ring) : vv_split_publish(ring)) != VV_GOT))
        return VV_HELP;
    if (ring->inflight)
        vv_inflight_end(ring);
    ring->untold += ring->unpublished_slots;
    ring->unpublished = ring->unpublished_slots = 0;
    return VV_GOT;
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
