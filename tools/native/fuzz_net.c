/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A network device's queues without Python (net.h, burst.h), for a driver that writes what it likes, whenever it likes, and
 * frames of any length that wait for its buffers. Whatever that is: what was taken is given back or put back, all that is
 * counted was moved, a frame that is given has its bytes in the driver's memory, and nothing is written that may not be.
 */
#include "driver.h"

#include "net.h"

#define LIMIT 4u

static struct vv_transmit out;
static struct vv_receive in;
static struct vv_wire wire;
static struct vv_backlog backlog;
static int receives;

static void set_up(struct input *input)
{
    static const unsigned headers[] = {10, VV_NET_HEADER};
    const uint64_t kind = take(input, 1);
    const uint32_t size = 1u << take(input, 1) % 7;

    memset(&ring, 0, sizeof ring);
    ring.packed = kind & 1;
    ring.event_idx = kind >> 1 & 1;
    ring.indirect = kind >> 2 & 1;
    vv_ring_init(&ring, &guest.radix, BASE + (take(input, 2) & 0xff0), BASE + 2 * PAGE + (take(input, 1) & 0xfc),
                 BASE + 4 * PAGE + (take(input, 2) & 0xffc), size);
    if (!ring.packed)
        ring.next_avail = ring.seen_avail = ring.next_used = (uint16_t)take(input, 2);
    receives = kind >> 3 & 1;
    memset(&wire, 0, sizeof wire);
    wire.fd = -1;
    wire.gone = 1;
    wire.kind = kind & 16 ? VV_WIRE_SOCKET : VV_WIRE_DISCARD;
    if (!out.box.arena) {
        WANT(!vv_transmit_init(&out, &wire));
        WANT(!vv_backlog_init(&backlog, LIMIT));
        WANT(!vv_receive_init(&in, &wire, &backlog));
    }
    WANT(!out.box.frames && !out.box.used);
    out.dropped = backlog.dropped = 0;
    vv_backlog_clear(&backlog);
    in.header = out.header = headers[kind >> 5 & 1];
    in.mergeable = in.header == VV_NET_HEADER && kind >> 6 & 1;
}

/* One comes, of bytes that say where they are; its header's room is not clean. */
static void frame(struct input *input)
{
    static const uint32_t usual[] = {1, 2, 60, 63, 64, 65, 1514, 4084, 4096, 9000, VV_MAX_FRAME, VV_MAX_FRAME + 1, 0};
    const uint32_t how = (uint32_t)take(input, 1), length = how < 0xe0 ? usual[how % 13] : (uint32_t)take(input, 2);
    char *room = vv_backlog_frame(&backlog, vv_backlog_at(&backlog, vv_backlog_count(&backlog)));
    const uint64_t dropped = backlog.dropped;
    const uint32_t before = vv_backlog_count(&backlog);
    uint32_t at;

    if (before == LIMIT)
        return;
    memset(room - VV_NET_HEADER, 0xee, VV_NET_HEADER);
    for (at = 0; at < length; at++)
        room[at] = (char)(at * 7 + 1);
    vv_backlog_keep(&backlog, length);
    WANT(vv_backlog_count(&backlog) == before + (length && length <= VV_MAX_FRAME));
    WANT(backlog.dropped == dropped + (length > VV_MAX_FRAME));
}

static void counted(struct vv_tally *tally, int got)
{
    (void)got;
    if (receives) {
        WANT(tally->bytes <= tally->requests * (uint64_t)(VV_MAX_FRAME + VV_NET_HEADER));
    } else {
        /* A frame that is too long is dropped, and counts no bytes. */
        WANT(tally->dropped == out.dropped + wire.lost);
        WANT(tally->requests == wire.frames + out.dropped);
        WANT(tally->bytes == wire.bytes + wire.frames * out.header);
        WANT(!out.box.frames && !out.box.used);
    }
}

static void work(struct input *input)
{
    static const uint32_t stop;
    struct vv_engine *engine = receives ? &in.engine : &out.engine;
    const uint32_t frames = vv_backlog_count(&backlog);
    const uint16_t before = ring.next_used, avail = ring.next_avail;
    struct vv_tally tally = {0};
    int got;

    wire.frames = wire.bytes = wire.lost = out.dropped = 0;
    vv_ring_begin(&ring);
    got = engine->work(engine, &ring, 1 + (unsigned)take(input, 1) % 128, &stop, &tally);
    WANT(got == VV_GOT || got == VV_EMPTY || got == VV_HELP || (receives && (got == VV_ARMED || got == VV_WAIT)));
    WANT(vv_ring_publish(&ring) == VV_GOT);
    WANT(ring.taken == 0 && ring.unpublished == 0);
    if (!ring.packed) {
        WANT((uint16_t)(ring.next_used - before) == (uint16_t)tally.requests);
        WANT((uint16_t)(ring.next_avail - avail) == (uint16_t)tally.requests);
    } else {
        WANT(ring.next_avail == ring.next_used && ring.avail_wrap == ring.used_wrap);
    }
    if (receives)
        WANT(frames - vv_backlog_count(&backlog) <= tally.requests);
    counted(&tally, got);
    vv_ring_wants_call(&ring);
    if (got == VV_EMPTY)
        WANT(vv_ring_arm(&ring) != VV_HELP || !ring.packed);
}

/* A ring full of buffers of one kind, as drivers have them; more than a burst. */
static void many(struct input *input)
{
    const uint64_t first = place(input);
    const uint32_t size = length(input);
    const uint16_t flags = (uint16_t)(take(input, 1) & 3), index = (uint16_t)(ring.next_avail + ring.size);
    const uint32_t step = (uint32_t)take(input, 1) * 16;
    uint32_t at;

    if (ring.packed)
        return;
    for (at = 0; at < ring.size; at++) {
        const uint64_t address = first + (uint64_t)at * step, iova = ring.desc + 16 * (uint64_t)at;
        const uint16_t rest[] = {flags & 2, 0};
        char bytes[16];

        memcpy(bytes, &address, 8);
        memcpy(bytes + 8, &size, 4);
        memcpy(bytes + 12, rest, 4);
        if (iova - BASE < PAGES * (uint64_t)PAGE)
            driver_writes((unsigned)((iova - BASE) / PAGE), (unsigned)(iova % PAGE), bytes, 16);
        put16(ring.avail + 4 + 2 * (uint64_t)at, (uint16_t)at);
    }
    put16(ring.avail + 2, index);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    const uint32_t forbidden = (uint32_t)take(&input, 4);

    guest_begin(~forbidden);
    set_up(&input);
    while (input.left) {
        switch (take(&input, 1) % 9) {
        case 0:
        case 1:
            descriptor(&input);
            break;
        case 2:
            offer(&input);
            break;
        case 3:
            many(&input);
            break;
        case 4:
            frame(&input);
            break;
        case 5:
        case 6:
            work(&input);
            break;
        case 7:
            guest_plan(&input);
            break;
        default:
            guest_map((unsigned)take(&input, 1), (unsigned)take(&input, 1));
        }
        guest_check();
    }
    guest_end();
    return 0;
}
