/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pieces of work of the native half, for callgrind to count (tools/instructions.py): each runs a known number of times
 * with counting on, and what it counted is dumped under its name and that number. The driver's part is not counted.
 */
#include "counted.h"

#define TIMES 4096u

/* -- translations */

static void __attribute__((noinline)) look_up(const struct vv_radix *radix, const uint64_t *addresses, unsigned mask)
{
    uint64_t sum = 0, left = 0;
    unsigned at;

    CALLGRIND_TOGGLE_COLLECT;
    for (at = 0; at < TIMES; at++)
        sum += (uint64_t)(uintptr_t)vv_radix_find(radix, addresses[at & mask], VV_READ, &left) + left;
    CALLGRIND_TOGGLE_COLLECT;
    vv_sink = sum;
}

static void translations(const char *name, unsigned shift, unsigned count, uint64_t step)
{
    static uint64_t addresses[TIMES];
    const uint64_t host = (uint64_t)1 << 40; /* nobody goes there */
    struct vv_radix radix = {0};
    uint64_t random = 1;
    unsigned at;

    for (at = 0; at < count; at++)
        if (vv_radix_put(&radix, at * step, shift, (host + ((uint64_t)at << shift)) | VV_READ | VV_WRITE))
            abort();
    for (at = 0; at < TIMES; at++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        addresses[at] = (random >> 33) % count * step + (random >> 20) % PAGE;
    }
    look_up(&radix, addresses, TIMES - 1);
    done(name, TIMES);
    vv_radix_clear(&radix);
}

static void __attribute__((noinline)) renew(struct vv_radix *radix, unsigned count)
{
    unsigned at;

    CALLGRIND_TOGGLE_COLLECT;
    for (at = 0; at < TIMES; at++) {
        const uint64_t iova = (uint64_t)(at * 2654435761u % count) * PAGE;

        vv_radix_drop(radix, iova, iova + PAGE - 1);
        if (vv_radix_put(radix, iova, VV_PAGE_SHIFT, ((uint64_t)1 << 40) | VV_READ))
            abort();
    }
    CALLGRIND_TOGGLE_COLLECT;
}

static void updates(void)
{
    struct vv_radix radix = {0};
    unsigned at;

    for (at = 0; at < 65536; at++)
        if (vv_radix_put(&radix, (uint64_t)at * PAGE, VV_PAGE_SHIFT, ((uint64_t)1 << 40) | VV_READ))
            abort();
    renew(&radix, 65536);
    done("radix: drop and put, 65536 pages", TIMES);
    vv_radix_clear(&radix);
}

/* -- rings */

/* Chains of two buffers: 16 bytes to be read, and a page to be written. In a table each, if "indirect". */
static void split_chains(const struct vv_radix *radix, int indirect)
{
    unsigned at;

    for (at = 0; at < SIZE / 2; at++) {
        const uint64_t header = HEADERS + at * 16u, data = DATA + at * (uint64_t)PAGE, table = TABLES + at * 32u;
        const uint64_t first = indirect ? table : DESC + 32u * at;

        put_desc(radix, first, header, 16, VV_F_NEXT, (uint16_t)(indirect ? 1 : 2 * at + 1));
        put_desc(radix, first + 16, data, PAGE, VV_F_WRITE, 0);
        if (indirect)
            put_desc(radix, DESC + 32u * at, table, 32, VV_F_INDIRECT, 0);
    }
    for (at = 0; at < SIZE; at++) {
        const uint16_t head = (uint16_t)(at * 2 % SIZE);

        memcpy(at_iova(radix, AVAIL + 4 + 2 * at), &head, 2);
    }
}

/* The same, as many as fit, from slot 0 on with a wrap counter. */
static void packed_chains(const struct vv_radix *radix, int indirect, unsigned wrap)
{
    const uint16_t mark = wrap ? VV_F_AVAIL : VV_F_USED;
    unsigned at;

    for (at = 0; at < (indirect ? SIZE : SIZE / 2); at++) {
        const uint64_t header = HEADERS + at % 128 * 16u, data = DATA + at % 128 * (uint64_t)PAGE;
        const uint64_t table = TABLES + at % 128 * 32u;

        if (indirect) {
            put_desc(radix, table, header, 16, 0, 0);
            put_desc(radix, table + 16, data, PAGE, 0, VV_F_WRITE);
            put_desc(radix, DESC + 16u * at, table, 32, (uint16_t)at, mark | VV_F_INDIRECT);
        } else {
            put_desc(radix, DESC + 32u * at, header, 16, (uint16_t)at, mark | VV_F_NEXT);
            put_desc(radix, DESC + 32u * at + 16, data, PAGE, (uint16_t)at, mark | VV_F_WRITE);
        }
    }
}

static void __attribute__((noinline)) drain(struct vv_ring *ring, struct vv_chain *chain, unsigned chains,
                                            unsigned batch, const char *source)
{
    unsigned at, done = 0;

    CALLGRIND_TOGGLE_COLLECT;
    while (done < chains) {
        vv_ring_begin(ring);
        for (at = 0; at < batch; at++, done++) {
            unsigned piece;

            if (vv_ring_next(ring, chain) != VV_GOT)
                abort();
            if (source)
                for (piece = chain->readable; piece < chain->pieces; piece++)
                    memcpy(chain->piece[piece].at, source, chain->piece[piece].length);
            if (vv_ring_push(ring, chain, PAGE) != VV_GOT)
                abort();
        }
        if (vv_ring_publish(ring) != VV_GOT)
            abort();
        vv_sink = (uint64_t)vv_ring_wants_call(ring);
    }
    CALLGRIND_TOGGLE_COLLECT;
}

struct ring_case {
    const char *name;
    int packed, indirect, event_idx;
    unsigned batch;
    int copy;
};

static void ring_of(const struct ring_case *this)
{
    static struct vv_chain chain;
    static char source[PAGE];
    struct vv_radix radix = {0};
    struct vv_ring ring = {0};
    char *ram = memory(4096 * (size_t)PAGE);
    const unsigned chains = 128;
    unsigned round;

    map(&radix, ram, 2, DESC);
    map(&radix, ram, 1, AVAIL);
    map(&radix, ram, 1, USED);
    map(&radix, ram, 1, TABLES);
    map(&radix, ram, 1, HEADERS);
    map(&radix, ram, 128, DATA);
    ring.packed = (uint8_t)this->packed;
    ring.indirect = (uint8_t)this->indirect;
    ring.event_idx = (uint8_t)this->event_idx;
    vv_ring_init(&ring, &radix, DESC, AVAIL, USED, SIZE);
    if (!this->packed)
        split_chains(&radix, this->indirect);
    for (round = 1; round <= 8; round++) {
        const uint16_t index = (uint16_t)(round * chains);

        if (this->packed && (!this->indirect || round % 2))
            packed_chains(&radix, this->indirect, ring.avail_wrap);
        else if (!this->packed)
            memcpy(at_iova(&radix, AVAIL + 2), &index, 2);
        drain(&ring, &chain, chains, this->batch, this->copy ? source : NULL);
    }
    done(this->name, 8 * chains);
    vv_radix_clear(&radix);
    munmap(ram, 4096 * (size_t)PAGE);
}

static const struct ring_case cases[] = {
    {"split: chain of 2, batch of 64", 0, 0, 1, 64, 0},
    {"split: chain of 2, batch of 1", 0, 0, 1, 1, 0},
    {"split: indirect table of 2, batch of 64", 0, 1, 1, 64, 0},
    {"split: chain of 2, batch of 64, 4 KiB copied", 0, 0, 1, 64, 1},
    {"packed: chain of 2, batch of 64", 1, 0, 1, 64, 0},
    {"packed: chain of 2, batch of 1", 1, 0, 1, 1, 0},
    {"packed: indirect table of 2, batch of 64", 1, 1, 1, 64, 0},
    {"packed: chain of 2, batch of 64, 4 KiB copied", 1, 0, 1, 64, 1},
};

void count_blk(void);
void count_net(void);

int main(void)
{
    unsigned at;

    translations("radix: look-up, 1 page", VV_PAGE_SHIFT, 1, PAGE);
    translations("radix: look-up, 65536 pages", VV_PAGE_SHIFT, 65536, 2 * PAGE);
    translations("radix: look-up, 1024 leaves of 2 MiB", 21, 1024, (uint64_t)1 << 21);
    translations("radix: look-up, 64 leaves of 1 GiB", 30, 64, (uint64_t)1 << 30);
    updates();
    for (at = 0; at < sizeof cases / sizeof *cases; at++)
        ring_of(&cases[at]);
    count_blk();
    count_net();
    return 0;
}
