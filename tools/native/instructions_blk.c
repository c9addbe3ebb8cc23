/* SPDX-License-Identifier: Apache-2.0 */
/* A disk in memory: requests of 4 KiB, as a worker has them done (instructions.c). */
#include "blk.h"
#include "counted.h"

#define REQUESTS 64u
#define SECTORS 1024u

static struct vv_blk blk;

/* A header each, a page of its own, and a status byte behind the header. */
static void requests(const struct vv_radix *radix, uint32_t type)
{
    unsigned at;

    for (at = 0; at < REQUESTS; at++) {
        const uint64_t header = HEADERS + at * 32u, data = DATA + at * (uint64_t)PAGE, first = DESC + at * 64u;
        const uint64_t sector = at * 8u % SECTORS;
        const uint16_t head = (uint16_t)(4 * at), next = (uint16_t)(head + 1);
        const uint16_t write = type ? 0 : VV_F_WRITE;

        memcpy(at_iova(radix, header), &type, 4);
        memcpy(at_iova(radix, header) + 8, &sector, 8);
        put_desc(radix, first, header, 16, VV_F_NEXT, next);
        put_desc(radix, first + 16, data, PAGE, VV_F_NEXT | write, (uint16_t)(next + 1));
        put_desc(radix, first + 32, header + 16, 1, VV_F_WRITE, 0);
        for (unsigned lap = 0; lap < SIZE / REQUESTS; lap++)
            memcpy(at_iova(radix, AVAIL + 4 + 2 * (at + lap * REQUESTS)), &head, 2);
    }
}

static void __attribute__((noinline)) serve(struct vv_ring *ring, unsigned budget)
{
    const uint32_t stop = 0;
    struct vv_tally tally = {0};
    int got;

    CALLGRIND_TOGGLE_COLLECT;
    do {
        vv_ring_begin(ring);
        got = blk.engine.work(&blk.engine, ring, budget, &stop, &tally);
        vv_ring_publish(ring);
        vv_sink = (uint64_t)vv_ring_wants_call(ring);
    } while (got == VV_GOT && tally.requests < REQUESTS);
    CALLGRIND_TOGGLE_COLLECT;
    if (tally.requests != REQUESTS)
        abort();
}

static void blk_of(const char *name, uint32_t type, unsigned budget)
{
    struct vv_radix radix = {0};
    struct vv_ring ring = {0};
    char *ram = memory(4096 * (size_t)PAGE);
    unsigned round;

    map(&radix, ram, 2, DESC);
    map(&radix, ram, 1, AVAIL);
    map(&radix, ram, 1, USED);
    map(&radix, ram, 1, HEADERS);
    map(&radix, ram, REQUESTS, DATA);
    ring.event_idx = 1;
    vv_ring_init(&ring, &radix, DESC, AVAIL, USED, SIZE);
    vv_blk_init(&blk);
    blk.memory = memory(SECTORS * VV_SECTOR);
    blk.sectors = SECTORS;
    blk.most = 1 << 20;
    blk.may_write = 1;
    requests(&radix, type);
    for (round = 1; round <= 16; round++) {
        const uint16_t index = (uint16_t)(round * REQUESTS);

        memcpy(at_iova(&radix, AVAIL + 2), &index, 2);
        serve(&ring, budget);
    }
    done(name, 16 * REQUESTS);
    munmap(blk.memory, SECTORS * VV_SECTOR);
    vv_radix_clear(&radix);
    munmap(ram, 4096 * (size_t)PAGE);
}

void count_blk(void)
{
    blk_of("blk: 4 KiB read from memory, batch of 64", VV_BLK_IN, 64);
    blk_of("blk: 4 KiB read from memory, batch of 1", VV_BLK_IN, 1);
    blk_of("blk: 4 KiB written to memory, batch of 64", VV_BLK_OUT, 64);
}
