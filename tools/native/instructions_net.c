/* SPDX-License-Identifier: Apache-2.0 */
/* A network device's transmit queue, to nowhere: frames of 64 bytes, as a worker has them done (instructions.c). */
#include "net.h"

#include "counted.h"

#define FRAMES 64u
#define FRAME (VV_NET_HEADER + 64u)

static struct vv_transmit net;
static struct vv_wire wire;

static void __attribute__((noinline)) transmit(struct vv_ring *ring, unsigned budget)
{
    const uint32_t stop = 0;
    struct vv_tally tally = {0};
    int got;

    CALLGRIND_TOGGLE_COLLECT;
    do {
        vv_ring_begin(ring);
        got = net.engine.work(&net.engine, ring, budget, &stop, &tally);
        vv_ring_publish(ring);
        vv_sink = (uint64_t)vv_ring_wants_call(ring);
    } while (got == VV_GOT && tally.requests < FRAMES);
    CALLGRIND_TOGGLE_COLLECT;
    if (tally.requests != FRAMES || tally.dropped)
        abort();
}

/* Header and frame in one buffer, in a page of its own each; or in two. */
static void frames(const struct vv_radix *radix, int two)
{
    unsigned at;

    for (at = 0; at < SIZE; at++) {
        const uint64_t data = DATA + at % FRAMES * (uint64_t)PAGE, first = DESC + at % (SIZE / 2) * 32u;
        const uint16_t head = (uint16_t)(2 * (at % (SIZE / 2)));

        put_desc(radix, first, data, two ? VV_NET_HEADER : FRAME, two ? VV_F_NEXT : 0, (uint16_t)(head + 1));
        put_desc(radix, first + 16, data + VV_NET_HEADER, FRAME - VV_NET_HEADER, 0, 0);
        memcpy(at_iova(radix, AVAIL + 4 + 2 * at), &head, 2);
    }
}

static void net_of(const char *name, int two, unsigned budget)
{
    struct vv_radix radix = {0};
    struct vv_ring ring = {0};
    char *ram = memory(4096 * (size_t)PAGE);
    unsigned round;

    map(&radix, ram, 1, DESC);
    map(&radix, ram, 1, AVAIL);
    map(&radix, ram, 1, USED);
    map(&radix, ram, FRAMES, DATA);
    ring.event_idx = 1;
    vv_ring_init(&ring, &radix, DESC, AVAIL, USED, SIZE);
    memset(&net, 0, sizeof net);
    memset(&wire, 0, sizeof wire);
    wire.fd = -1;
    wire.kind = VV_WIRE_DISCARD;
    if (vv_transmit_init(&net, &wire))
        abort();
    net.header = VV_NET_HEADER;
    frames(&radix, two);
    for (round = 1; round <= 16; round++) {
        const uint16_t index = (uint16_t)(round * FRAMES);

        memcpy(at_iova(&radix, AVAIL + 2), &index, 2);
        transmit(&ring, budget);
    }
    done(name, 16 * FRAMES);
    free(net.box.arena);
    vv_radix_clear(&radix);
    munmap(ram, 4096 * (size_t)PAGE);
}

void count_net(void)
{
    net_of("net: 64 bytes transmitted, batch of 64", 0, 64);
    net_of("net: 64 bytes transmitted, batch of 1", 0, 1);
    net_of("net: 64 bytes transmitted, in two buffers, batch of 64", 1, 64);
}
