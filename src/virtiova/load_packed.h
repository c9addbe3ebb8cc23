/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver end of a packed ring as a load generator: what load.h does with a split one, which includes this. A request
 * takes its descriptors wherever it comes in the ring, so that all of them are written each time.
 */
#ifndef VIRTIOVA_LOAD_PACKED_H
#define VIRTIOVA_LOAD_PACKED_H

#define VL_F_AVAIL 0x80u
#define VL_F_USED 0x8000u
#define VL_EVENT_ENABLE 0u
#define VL_EVENT_DISABLE 1u
#define VL_EVENT_DESC 2u

static inline void vl_packed_move(const struct vl_driver *d, struct vl_place *place, uint32_t count)
{
    place->index += count;
    if (place->index >= d->size) {
        place->index -= d->size;
        place->wrap ^= 1;
    }
}

static inline void vl_packed_put(struct vl_driver *d, uint32_t slot, uint64_t address)
{
    const uint64_t heads = d->heads_address + slot * VL_HEAD;
    const int disk = d->kind >= VL_READ;
    char *first = d->desc + 16 * (uint64_t)d->put.index;
    uint64_t first_rest = 0;

    for (uint32_t i = 0; i < d->per; i++) {
        char *at = d->desc + 16 * (uint64_t)d->put.index;
        const int data = !disk || i == 1;
        const uint32_t length = data ? d->length : i ? 1 : 16;
        uint64_t flags = d->put.wrap ? VL_F_AVAIL : VL_F_USED, rest;

        flags |= (uint64_t)(i + 1 < d->per) | (disk && (i == 2 || (i == 1 && d->kind == VL_READ)) ? 2 : 0);
        rest = length | (uint64_t)slot << 32 | flags << 48;
        vl_store64(at, vv_order64(data ? address : heads + (i ? VL_STATUS : 0), 0));
        if (i)
            vl_store64(at + 8, vv_order64(rest, 0));
        else
            first_rest = rest;
        vl_packed_move(d, &d->put, 1);
    }
    /* With these flags the device may go on to those behind. */
    __atomic_store_n((vv_u64 *)(first + 8), vv_order64(first_rest, 0), __ATOMIC_RELEASE);
}

/* Whether the device wants to hear of the last descriptors, so many (virtio 1.4, 2.8.10). */
static inline int vl_packed_wanted(const struct vl_driver *d, uint32_t count)
{
    const uint16_t wish = vv_load_acquire16(d->used + 2, 0) & 3;
    uint16_t event;
    uint32_t back;

    if (wish != VL_EVENT_DESC || !d->event_idx)
        return wish != VL_EVENT_DISABLE;
    event = vv_load_acquire16(d->used, 0);
    /* How far back it is: 1 to a lap, or else ahead. */
    back = d->put.index + d->size * (event >> 15 == d->put.wrap ? 2u : 1u) - (event & 0x7fff);
    if (back >= 2 * d->size)
        back -= 2 * d->size;
    return back && back <= count;
}

static inline int vl_packed_is_used(const struct vl_driver *d)
{
    const uint16_t flags = vv_load_acquire16(d->desc + 16 * (uint64_t)d->take.index + 14, 0);

    return (flags & (VL_F_AVAIL | VL_F_USED)) == (d->take.wrap ? VL_F_AVAIL | VL_F_USED : 0);
}

static inline int vl_packed_reap(struct vl_driver *d, uint64_t now)
{
    const uint32_t most = d->flying;
    uint32_t count;

    for (count = 0; count < most && vl_packed_is_used(d); count++) {
        const uint64_t rest =
            vv_order64(__atomic_load_n((const vv_u64 *)(d->desc + 16 * (uint64_t)d->take.index + 8), __ATOMIC_RELAXED), 0);
        const uint32_t slot = (uint16_t)(rest >> 32);

        if (slot >= d->slots || !d->slot[slot].flying)
            return vl_is_wrong(d, VL_BAD_ID, slot, d->slots);
        if (vl_back(d, slot, (uint32_t)rest, now))
            return -1;
        vl_packed_move(d, &d->take, d->per);
    }
    d->seen = (uint16_t)(d->seen + count);
    return (int)count;
}

static inline void vl_packed_calls(struct vl_driver *d, int wanted)
{
    if (wanted && d->event_idx) {
        /* The place before the flags that give it a meaning. */
        vv_store_release16(d->avail, (uint16_t)(d->take.index | (uint32_t)d->take.wrap << 15), 0);
        vv_store_release16(d->avail + 2, VL_EVENT_DESC, 0);
    } else {
        vv_store_release16(d->avail + 2, wanted ? VL_EVENT_ENABLE : VL_EVENT_DISABLE, 0);
    }
}

/* vl_echo, from the start of a fresh ring of requests of one descriptor. */
static uint64_t vl_packed_echo(char *desc, char *used, uint32_t size, uint64_t nanoseconds)
{
    const uint64_t from = vl_clock();
    uint32_t index = 0, wrap = 1, turns = 0, idle = 0;
    uint64_t count = 0;

    vv_store_release16(used + 2, VL_EVENT_DISABLE, 0);
    for (;;) {
        char *at = desc + 16 * (uint64_t)index;
        const uint16_t flags = vv_load_acquire16(at + 14, 0);
        uint64_t rest;

        if ((flags & (VL_F_AVAIL | VL_F_USED)) != (wrap ? VL_F_AVAIL : VL_F_USED)) {
            if (++idle > VL_PATIENT)
                vl_relax();
            if (idle % VL_IDLE == 0 && vl_clock() - from >= nanoseconds)
                return count;
            continue;
        }
        idle = 0;
        rest = vv_order64(__atomic_load_n((const vv_u64 *)(at + 8), __ATOMIC_RELAXED), 0);
        rest = (rest & UINT64_C(0xffff00000000)) | (wrap ? (uint64_t)(VL_F_AVAIL | VL_F_USED) << 48 : 0);
        __atomic_store_n((vv_u64 *)(at + 8), vv_order64(rest, 0), __ATOMIC_RELEASE);
        count++;
        if (++index == size) {
            index = 0;
            wrap ^= 1;
        }
        if (++turns % (VL_BUSY * VL_BUSY) == 0 && vl_clock() - from >= nanoseconds)
            return count;
    }
}

#endif
