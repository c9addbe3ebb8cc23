/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A network device's queues as engines (engine.h): what device/net.py does, for what is well-formed.
 *
 * A frame of the driver's is copied once, into memory of ours, before anything is made of it; its buffer goes back at
 * once. One for the driver waits in memory of ours until there are buffers, and goes into one of them, or with
 * MRG_RXBUF into as many as it takes, which the driver sees all at once or not at all.
 */
#ifndef VIRTIOVA_NET_H
#define VIRTIOVA_NET_H

#include "burst.h"
#include "engine.h"
#include "gate.h"
#include "ring.h"
#include "wire.h"

/* struct virtio_net_hdr with num_buffers (virtio 1.4, 5.1.6). */
#define VV_NET_HEADER 12u
#define VV_NUM_BUFFERS 10u
/*
 * A driver that is looked at all the time has its line of the available index taken away with each look: less than half a
 * microsecond later there are some more frames, and a tenth to a fifth more come through.
 */
#define VV_NET_PAUSES 24u
/* Buffers of one frame: with more of them Python does it. */
#define VV_FRAME_CHAINS 48u
/* Frames of several buffers after which it is looked whether there are some of one buffer. */
#define VV_NET_SKIP 15u

static inline int vv_stopped(const uint32_t *stop)
{
    return __atomic_load_n(stop, __ATOMIC_RELAXED) != 0;
}

/* 16 bytes at a time where that is all: the call alone costs as much as a small frame. */
static inline void vv_copy_frame(char *to, const char *from, size_t length)
{
    if (length < 16 || length > 64) {
        memcpy(to, from, length);
        return;
    }
    memcpy(to, from, 16);
    if (length > 32) {
        memcpy(to + 16, from + 16, 16);
        memcpy(to + length - 32, from + length - 32, 16);
    }
    memcpy(to + length - 16, from + length - 16, 16);
}

/* -- queue 1: the driver transmits */

struct vv_transmit {
    struct vv_engine engine; /* first: it is what the worker has */
    struct vv_wire *wire;
    unsigned header;
    unsigned width, skip; /* of a burst; chains before the next look for one */
    uint64_t dropped;
    struct vv_outbox box;
    struct vv_chain chain;
};

/* The bytes behind the header, as many as the caller has counted, to where there is room for them. */
static inline void vv_net_gather(const struct vv_chain *chain, uint32_t skip, char *to)
{
    unsigned at;

    for (at = 0; at < chain->readable; at++) {
        const struct vv_piece *piece = &chain->piece[at];

        if (vv_unlikely(piece->length <= skip)) {
            skip -= piece->length;
            continue;
        }
        vv_copy_frame(to, piece->at + skip, piece->length - skip);
        to += piece->length - skip;
        skip = 0;
    }
}

/* Room for a frame in memory of ours. */
static inline char *vv_transmit_room(struct vv_transmit *net, uint64_t length)
{
    struct vv_outbox *box = &net->box;

    if (vv_unlikely(box->frames == VV_FRAMES || box->used + length > VV_ARENA))
        vv_wire_flush(net->wire, box);
    return box->arena + box->used;
}

static inline void vv_transmit_put(struct vv_transmit *net, char *at, uint32_t length)
{
    struct vv_outbox *box = &net->box;

    box->part[box->frames].iov_base = at;
    box->part[box->frames].iov_len = length;
    box->used += length;
    box->frames++;
}

/* One chain of any form. The bytes that were read of it, which are 0 for a frame that is dropped. */
static inline uint64_t vv_transmit_one(struct vv_transmit *net, const struct vv_chain *chain)
{
    const uint64_t length = chain->out - net->header;
    char *to;

    if (vv_unlikely(length > VV_MAX_FRAME)) {
        vv_count(&net->dropped, 1);
        return 0;
    }
    to = vv_transmit_room(net, length);
    vv_net_gather(chain, net->header, to);
    if (net->wire->kind == VV_WIRE_DISCARD)
        vv_wire_count(net->wire, 1, length, 0);
    else
        vv_transmit_put(net, to, (uint32_t)length);
    return chain->out;
}

/* Frames of one buffer, many at a time; how many. */
static inline unsigned vv_transmit_burst(struct vv_transmit *net, struct vv_ring *ring, unsigned most, uint64_t *bytes)
{
    const int discard = net->wire->kind == VV_WIRE_DISCARD;
    struct vv_single one[VV_BURST];
    unsigned at, count;
    uint64_t all = 0;

    if (net->skip) {
        net->skip--;
        return 0;
    }
    count = vv_burst_look(ring, one, most < VV_BURST ? most : VV_BURST, &net->width);
    if (!count && net->width == 1)
        net->skip = VV_NET_SKIP;
    count = vv_burst_room(ring, count);
    for (at = 0; at < count; at++) {
        const uint32_t length = one[at].length - net->header;
        char *to;

        if (vv_unlikely(one[at].length < net->header || length > VV_MAX_FRAME))
            break;
        to = vv_transmit_room(net, length);
        vv_copy_frame(to, one[at].at + net->header, length);
        if (!discard)
            vv_transmit_put(net, to, length);
        all += length;
    }
    vv_burst_give(ring, one, at);
    if (discard)
        vv_wire_count(net->wire, at, all, 0);
    *bytes += all + (uint64_t)at * net->header;
    return at;
}

static int vv_transmit_work(struct vv_engine *engine, struct vv_ring *ring, unsigned budget, const uint32_t *stop,
                            struct vv_tally *tally)
{
    struct vv_transmit *net = (struct vv_transmit *)engine;
    const uint64_t dropped = net->dropped + net->wire->lost;
    uint64_t bytes = 0;
    unsigned done = 0, pauses;
    int found = VV_GOT;

    while (done < budget && !vv_stopped(stop)) {
        const unsigned some = vv_transmit_burst(net, ring, budget - done, &bytes);

        done += some;
        if (some) {
            /* The driver makes new ones of these while we do the next. */
            vv_ring_publish(ring);
            continue;
        }
        found = vv_ring_next(ring, &net->chain);
        if (found != VV_GOT)
            break;
        if (vv_unlikely(net->chain.out < net->header)) {
            vv_ring_put_back(ring, &net->chain);
            found = VV_HELP;
            break;
        }
        bytes += vv_transmit_one(net, &net->chain);
        vv_ring_push(ring, &net->chain, 0);
        done++;
    }
    vv_wire_flush(net->wire, &net->box);
    if (found == VV_EMPTY)
        for (pauses = 0; pauses < VV_NET_PAUSES; pauses++)
            vv_relax();
    vv_count(&tally->requests, done);
    vv_count(&tally->bytes, bytes);
    vv_count(&tally->dropped, net->dropped + net->wire->lost - dropped);
    return found;
}

static int vv_transmit_init(struct vv_transmit *net, struct vv_wire *wire)
{
    net->wire = wire;
    net->width = VV_BURST;
    net->engine.work = vv_transmit_work;
    net->engine.fd = -1;
    net->box.arena = malloc(VV_ARENA);
    return net->box.arena ? 0 : -1;
}

/* -- queue 0: the driver receives */

struct vv_receive {
    struct vv_engine engine; /* first */
    struct vv_wire *wire;
    struct vv_backlog *log;
    unsigned header;
    int mergeable;
    struct vv_chain *chains; /* VV_FRAME_CHAINS */
};

static void vv_receive_put_back(struct vv_receive *net, struct vv_ring *ring, unsigned count)
{
    while (count)
        vv_ring_put_back(ring, &net->chains[--count]);
}

/*
 * Take the buffers of a frame of which wanted bytes are to go to the driver: one, or with MRG_RXBUF until they have
 * room. VV_GOT with how many; else none is taken: VV_EMPTY, VV_ARMED or VV_HELP.
 */
static int vv_receive_buffers(struct vv_receive *net, struct vv_ring *ring, uint64_t wanted, unsigned *count)
{
    /* With all that a ring can have, and not enough, Python gives the frame up. */
    const unsigned most = ring->size < VV_FRAME_CHAINS ? ring->size : VV_FRAME_CHAINS;
    uint64_t room = 0;

    *count = 0;
    do {
        struct vv_chain *chain = &net->chains[*count];
        int found = *count < most ? vv_ring_next(ring, chain) : VV_HELP;

        /* Those that are there are not enough: what counts is what comes after them. */
        if (found == VV_EMPTY && *count && (found = vv_ring_arm(ring)) == VV_GOT)
            continue;
        if (found == VV_EMPTY && *count)
            found = VV_ARMED;
        if (found == VV_GOT) {
            ++*count;
            room += chain->in;
            if (net->mergeable && !chain->in)
                found = VV_HELP; /* where the device is to write there has to be room */
        }
        if (found != VV_GOT) {
            vv_receive_put_back(net, ring, *count);
            return found;
        }
    } while (net->mergeable && room < wanted);
    return VV_GOT;
}

/* Into the room of one chain, from its start. */
static void vv_receive_write(const struct vv_chain *chain, const char *from, uint32_t length)
{
    unsigned at;

    for (at = chain->readable; length; at++) {
        const struct vv_piece *piece = &chain->piece[at];
        const uint32_t step = piece->length < length ? piece->length : length;

        vv_copy_frame(piece->at, from, step);
        from += step;
        length -= step;
    }
}

/* The first frame that waits, with its header, into these chains, all but the last of them full; the bytes. */
static uint64_t vv_receive_give(struct vv_receive *net, struct vv_ring *ring, unsigned count)
{
    const uint32_t first = vv_backlog_at(net->log, 0);
    uint32_t left = net->header + net->log->length[first];
    const uint64_t all = left;
    char *from = vv_backlog_frame(net->log, first) - net->header;
    unsigned at;

    memset(from, 0, net->header);
    if (net->header > VV_NUM_BUFFERS)
        from[VV_NUM_BUFFERS] = (char)count;
    for (at = 0; at < count; at++) {
        const struct vv_chain *chain = &net->chains[at];
        const uint32_t step = chain->in < left ? (uint32_t)chain->in : left;

        vv_receive_write(chain, from, step);
        vv_ring_push(ring, chain, step);
        from += step;
        left -= step;
    }
    return all;
}

/* One frame to the driver, if it has buffers for it; how many it took. */
static int vv_receive_one(struct vv_receive *net, struct vv_ring *ring, unsigned *count, uint64_t *bytes)
{
    const uint64_t wanted = net->header + (uint64_t)net->log->length[vv_backlog_at(net->log, 0)];
    const int found = vv_receive_buffers(net, ring, wanted, count);

    if (found != VV_GOT)
        return found;
    if (vv_unlikely(net->chains[0].in < wanted && !net->mergeable)) {
        vv_backlog_drop(net->log);
        vv_ring_push(ring, &net->chains[0], 0);
    } else {
        *bytes += vv_receive_give(net, ring, *count);
    }
    vv_backlog_pop(net->log);
    return VV_GOT;
}

/* Nothing more to be done now: what to sleep on. As long as there is room, frames are taken in. */
static int vv_receive_sleep(struct vv_receive *net, int found)
{
    const int room = vv_backlog_count(net->log) < net->log->limit;

    net->engine.fd = room && !net->wire->gone ? net->wire->fd : -1;
    net->engine.events = POLLIN;
    return found;
}

static int vv_receive_work(struct vv_engine *engine, struct vv_ring *ring, unsigned budget, const uint32_t *stop,
                           struct vv_tally *tally)
{
    struct vv_receive *net = (struct vv_receive *)engine;
    const uint64_t dropped = net->log->dropped;
    unsigned done = 0, taken = 0, count;
    uint64_t bytes = 0;
    int found = VV_GOT;

    while (done < budget && !vv_stopped(stop)) {
        if (!vv_backlog_count(net->log)) {
            /* A flood of frames that nobody can take is looked at for so long, too. */
            const unsigned some = taken < 2 * VV_FRAMES ? vv_wire_take(net->wire, net->log, VV_FRAMES) : 0;

            if (!some && taken < 2 * VV_FRAMES)
                found = vv_receive_sleep(net, VV_WAIT);
            if (!some)
                break;
            taken += some;
            continue;
        }
        found = vv_receive_one(net, ring, &count, &bytes);
        if (found != VV_GOT)
            break;
        done += count;
    }
    if (found == VV_EMPTY || found == VV_ARMED) {
        vv_wire_take(net->wire, net->log, VV_FRAMES);
        vv_receive_sleep(net, found);
    }
    vv_count(&tally->requests, done);
    vv_count(&tally->bytes, bytes);
    vv_count(&tally->dropped, net->log->dropped - dropped);
    return found;
}

static int vv_receive_peek(struct vv_engine *engine)
{
    const struct vv_receive *net = (const struct vv_receive *)engine;

    return vv_backlog_count(net->log) < net->log->limit && vv_wire_ready(net->wire);
}

static int vv_receive_init(struct vv_receive *net, struct vv_wire *wire, struct vv_backlog *log)
{
    net->wire = wire;
    net->log = log;
    net->engine.work = vv_receive_work;
    net->engine.peek = vv_receive_peek;
    net->engine.fd = -1;
    net->chains = calloc(VV_FRAME_CHAINS, sizeof *net->chains);
    return net->chains ? 0 : -1;
}

#endif
