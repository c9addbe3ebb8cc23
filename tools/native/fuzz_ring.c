/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device end of a ring, whose driver writes what it likes, whenever it likes. The input says what kind of ring it is,
 * and then what driver and device do. Whatever that is: every piece of a chain is memory that may be used in that way,
 * nothing else is written, and what was refused has left the ring as it was.
 */
#include "driver.h"

#define MOST 64u

static struct vv_chain chain, taken[MOST];
static unsigned count;    /* of taken */
static int all_in_batch;  /* all that is taken and all that is pushed was got in this batch */
static int just_got;      /* the last call was the one that got the last of them */
static uint64_t sum;

/* What VV_HELP and VV_EMPTY leave as it was. */
struct state {
    uint16_t next_avail, next_used;
    uint8_t avail_wrap, used_wrap;
    uint32_t taken, unpublished, unpublished_slots, untold;
    uint64_t counter;
};

static struct state state(void)
{
    struct state now;

    memset(&now, 0, sizeof now);
    now.next_avail = ring.next_avail;
    now.next_used = ring.next_used;
    now.avail_wrap = ring.avail_wrap;
    now.used_wrap = ring.used_wrap;
    now.taken = ring.taken;
    now.unpublished = ring.unpublished;
    now.unpublished_slots = ring.unpublished_slots;
    now.untold = ring.untold;
    now.counter = ring.inflight_counter;
    return now;
}

#define UNCHANGED(before)                                 \
    do {                                                  \
        const struct state now_ = state();                \
        WANT(!memcmp(&now_, &(before), sizeof now_)); \
    } while (0)

static void begin(void)
{
    vv_ring_begin(&ring);
    all_in_batch = !count && !ring.unpublished;
}

/* As a device does with its request. */
static void use(struct vv_chain *it)
{
    uint64_t out = 0, in = 0;
    unsigned at;

    WANT(it->readable <= it->pieces && it->pieces <= VV_MAX_PIECES);
    WANT(it->buffers && it->buffers <= VV_MAX_CHAIN && it->slots && it->slots <= ring.size);
    for (at = 0; at < it->pieces; at++) {
        const struct vv_piece *piece = &it->piece[at];
        const unsigned needed = at < it->readable ? VV_READ : VV_WRITE;

        WANT(piece->length && guest_allows(piece->at, piece->length, needed));
        if (at < it->readable) {
            out += piece->length;
            sum += (unsigned char)piece->at[0] + (unsigned char)piece->at[piece->length - 1];
        } else {
            in += piece->length;
            piece->at[0] = piece->at[piece->length - 1] = (char)0xd5;
        }
    }
    WANT(out == it->out && in == it->in && out + in <= VV_MAX_CHAIN_BYTES);
}

static void publish(void)
{
    const struct state before = state();

    if (vv_ring_publish(&ring) == VV_GOT) {
        WANT(!ring.unpublished && ring.untold == before.untold + before.unpublished_slots);
    } else {
        WANT(!all_in_batch);
        UNCHANGED(before);
    }
}

static void next(void)
{
    struct state before;
    int got;

    /* Which it would do by itself. */
    if (ring.packed && ring.inflight)
        publish();
    before = state();
    got = vv_ring_next(&ring, &chain);
    just_got = got == VV_GOT;
    if (got != VV_GOT) {
        WANT(got == VV_HELP || got == VV_EMPTY);
        UNCHANGED(before);
        return;
    }
    WANT(ring.usable && ring.taken == before.taken + 1 && ring.taken <= ring.size);
    WANT(ring.packed || chain.id < ring.size);
    WANT(!ring.inflight || (ring.packed ? chain.first_note : chain.id) < ring.inflight_entries);
    WANT(!ring.inflight || !ring.packed || chain.last_note < ring.inflight_entries);
    use(&chain);
    if (count == MOST) {
        vv_ring_put_back(&ring, &chain);
        just_got = 0;
        return;
    }
    taken[count].id = chain.id;
    taken[count].slots = chain.slots;
    taken[count].first_note = chain.first_note;
    taken[count].last_note = chain.last_note;
    count++;
}

static void push(struct input *input)
{
    const struct state before = state();
    unsigned at;
    int got;

    if (!count)
        return;
    at = (unsigned)take(input, 1) % count;
    got = vv_ring_push(&ring, &taken[at], (uint32_t)take(input, 4));
    if (got == VV_GOT) {
        taken[at] = taken[--count];
    } else {
        WANT(got == VV_HELP && !all_in_batch);
        UNCHANGED(before);
    }
    just_got = 0;
}

static void put_back(void)
{
    if (!just_got)
        return;
    vv_ring_put_back(&ring, &chain);
    count--;
    just_got = 0;
}

static void remap(struct input *input)
{
    guest_map((unsigned)take(input, 1), (unsigned)take(input, 1));
    begin();
    just_got = 0;
}

/* -- one ring */

/* One byte more than they have room for would be another's. */
static char *notes;
static size_t notes_size;
static uint16_t batch[32768];
static struct vv_desc listed[32768];

/* The front end's memory: all free. */
static void make_notes(uint32_t entries)
{
    const size_t header = ring.packed ? VV_LISTED_HEADER : VV_INFLIGHT_HEADER;
    const size_t entry = ring.packed ? VV_LISTED_ENTRY : VV_INFLIGHT_ENTRY;
    uint32_t at;

    free(notes);
    notes_size = header + entry * entries;
    notes = calloc(1, notes_size);
    ring.inflight = notes;
    ring.inflight_entries = entries;
    ring.batch = batch;
    if (!ring.packed)
        return;
    ring.listed = listed;
    for (at = 0; at < entries; at++)
        vv_store_relaxed16(notes + header + entry * at + VV_LISTED_NEXT, (uint16_t)(at + 1), 0);
}

/* Which may write there what it likes. */
static void scribble(struct input *input)
{
    const size_t at = (size_t)take(input, 2) * 2;

    if (ring.inflight && at + 2 <= notes_size)
        vv_store_relaxed16(notes + at, (uint16_t)take(input, 1), 0);
}

static void set_up(struct input *input)
{
    static const uint16_t sizes[] = {1, 2, 4, 8, 64, 256, 3, 7, 0, 32768};
    const uint64_t kind = take(input, 1), how = take(input, 1);
    const uint32_t size = sizes[take(input, 1) % 10];
    uint64_t desc, avail, used;

    memset(&ring, 0, sizeof ring);
    ring.packed = kind & 1;
    ring.event_idx = kind >> 1 & 1;
    ring.indirect = kind >> 2 & 1;
    ring.in_order = kind >> 3 & 1;
    desc = BASE + take(input, 2) % (PAGES * PAGE);
    avail = BASE + take(input, 2) % (PAGES * PAGE);
    used = BASE + take(input, 2) % (PAGES * PAGE);
    if (how & 0x7f) {
        desc &= ~(uint64_t)15;
        avail &= ~(uint64_t)3;
        used &= ~(uint64_t)3;
    }
    vv_ring_init(&ring, &guest.radix, desc, avail, used, size);
    if (ring.packed) {
        ring.next_avail = ring.next_used = (uint16_t)(size ? take(input, 2) % size : 0);
    } else {
        ring.next_avail = ring.seen_avail = (uint16_t)take(input, 2);
        ring.next_used = ring.next_avail;
    }
    if (how & 0x80)
        make_notes(size - (kind >> 4 & 1 && size));
    count = 0;
    just_got = 0;
    begin();
}

static void step(struct input *input)
{
    const struct state before = state();

    switch (take(input, 1) % 17) {
    case 0:
    case 1:
    case 2:
        descriptor(input);
        break;
    case 3:
    case 4:
        offer(input);
        break;
    case 5:
    case 6:
    case 7:
        next();
        break;
    case 8:
        push(input);
        break;
    case 9:
        publish();
        break;
    case 10:
        sum += (uint64_t)vv_ring_wants_call(&ring);
        WANT(ring.untold == 0 || !ring.usable);
        break;
    case 11:
        vv_ring_quiet(&ring);
        UNCHANGED(before);
        break;
    case 12:
        sum += (uint64_t)vv_ring_arm(&ring);
        UNCHANGED(before);
        break;
    case 13:
        put_back();
        break;
    case 14:
        guest_plan(input);
        break;
    case 16:
        scribble(input);
        break;
    default:
        remap(input);
    }
    guest_check();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    const uint32_t forbidden = (uint32_t)take(&input, 4);

    /* Everything, but for what the input takes away: most rings are to work. */
    guest_begin(~forbidden);
    set_up(&input);
    while (input.left)
        step(&input);
    guest_end();
    return 0;
}
