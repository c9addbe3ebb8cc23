/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a disk's file cannot do at once: done by io_uring (uring.h) with bytes of ours, while the queue goes on.
 *
 * Of a request that is under way only numbers and bytes of ours are kept. When the kernel is done with it, its chain is
 * looked at once more, from its head, and every buffer of it is translated anew, inside of the gate: a page that was
 * taken away meanwhile is not touched. A chain that is another one by then, or has a page that is not known, is left
 * for Python, with what was read: it asks for the page, and gives the answer then. What is done is not done again, or
 * a later write to the same place would be undone. What the file did not do is Python's to do from the start.
 *
 * Only for a split ring where requests may end in any order: elsewhere the descriptors of one that is under way may be
 * overwritten, or it would have to wait for those before it.
 */
#ifndef VIRTIOVA_LATER_H
#define VIRTIOVA_LATER_H

#include <poll.h>
#include <stdlib.h>

#include "engine.h"
#include "ring.h"
#include "uring.h"

/* Requests under way, and bytes of them, for each queue. */
#define VV_FLIGHTS 128u
#define VV_FLIGHT_BYTES (16u << 20)
/* Bytes that each has without asking for more. */
#define VV_FLIGHT_ROOM 16384u
/* How often the kernel may say "again" of one of them, as it always does of some files that were opened not to wait. */
#define VV_FLIGHT_AGAIN 4u

/* APART: Python's, as soon as it has the ring. LEFT: its, and what was read is kept for it. */
enum vv_flight_state { VV_FLIGHT_FREE, VV_FLIGHT_UP, VV_FLIGHT_LANDED, VV_FLIGHT_APART, VV_FLIGHT_LEFT };

struct vv_flight {
    uint16_t head;
    uint8_t operation;
    uint8_t state;
    uint8_t whole;   /* the file has done all of it */
    uint8_t again;   /* how often it was to be asked again */
    uint64_t number; /* the order in which they were taken */
    uint64_t offset, size, done;
    char *bytes, *own;
};

struct vv_later {
    struct vv_uring uring;
    uint64_t numbers;
    uint64_t bytes; /* of rooms of their own */
    unsigned count; /* that are not free */
    unsigned apart;
    char *rooms;
    uint16_t left[VV_FLIGHTS]; /* those that are left, in the order in which they were taken */
    unsigned lefts;
    struct vv_flight flight[VV_FLIGHTS];
    struct vv_chain chain;
};

enum { VV_LATER_NO, VV_LATER_YES, VV_LATER_FULL };

static int vv_later_open(struct vv_later *later, int file)
{
    unsigned at;

    memset(later, 0, sizeof *later);
    if (vv_uring_open(&later->uring, file, VV_FLIGHTS))
        return -1;
    /* The file may have been opened to go around the cache: buffers have to be aligned then. */
    if (posix_memalign((void **)&later->rooms, 4096, (size_t)VV_FLIGHTS * VV_FLIGHT_ROOM)) {
        vv_uring_close(&later->uring);
        errno = ENOMEM;
        return -1;
    }
    for (at = 0; at < VV_FLIGHTS; at++)
        later->flight[at].bytes = later->flight[at].own = later->rooms + (size_t)at * VV_FLIGHT_ROOM;
    return 0;
}

static inline void vv_flight_free(struct vv_later *later, struct vv_flight *flight)
{
    if (flight->bytes != flight->own) {
        free(flight->bytes);
        later->bytes -= flight->size;
        flight->bytes = flight->own;
    }
    later->count--;
    flight->state = VV_FLIGHT_FREE;
}

/* What was left has been looked at. */
static void vv_later_forget(struct vv_later *later)
{
    while (later->lefts)
        vv_flight_free(later, &later->flight[later->left[--later->lefts]]);
}

/* Nothing is under way. */
static void vv_later_close(struct vv_later *later)
{
    unsigned at;

    for (at = 0; at < VV_FLIGHTS; at++)
        if (later->flight[at].state != VV_FLIGHT_FREE)
            vv_flight_free(later, &later->flight[at]);
    vv_uring_close(&later->uring);
    free(later->rooms);
    later->rooms = NULL;
}

/* -- the kernel's side */

static inline void vv_flight_lose(struct vv_later *later, struct vv_flight *flight)
{
    flight->state = VV_FLIGHT_APART;
    later->apart++;
}

static inline void vv_flight_up(struct vv_later *later, struct vv_flight *flight)
{
    flight->state = VV_FLIGHT_UP;
    vv_uring_put(&later->uring, flight->operation, flight->offset + flight->done, flight->bytes + flight->done,
                 (uint32_t)(flight->size - flight->done), (uint64_t)(flight - later->flight));
}

/* Tell the kernel of all that was put; wait until so many are done. What it does not take is lost. 1: a signal came. */
static int vv_later_submit(struct vv_later *later, unsigned wait)
{
    struct vv_uring *uring = &later->uring;
    unsigned at;
    int how;

    if ((!uring->queued && !wait) || (how = vv_uring_enter(uring, wait)) == 0)
        return 0;
    if (how > 0)
        return 1;
    for (at = 1; at <= uring->queued; at++)
        vv_flight_lose(later, &later->flight[uring->sqe[(*uring->sq_tail - at) & uring->sq_mask].user_data]);
    vv_uring_forget(uring);
    return 0;
}

/* Take in what is done. Touches no guest memory. */
static void vv_later_reap(struct vv_later *later)
{
    struct vv_uring_done done;

    while (vv_uring_next(&later->uring, &done)) {
        struct vv_flight *flight = &later->flight[done.number];

        if ((done.result == -EAGAIN || done.result == -EINTR) && flight->again++ < VV_FLIGHT_AGAIN) {
            vv_flight_up(later, flight);
        } else if (done.result < 0 || (!done.result && flight->size)) {
            vv_flight_lose(later, flight); /* an error, or the end of a file that has become shorter */
        } else {
            flight->done += (uint64_t)done.result;
            flight->whole = flight->done >= flight->size;
            if (flight->whole)
                flight->state = VV_FLIGHT_LANDED;
            else
                vv_flight_up(later, flight);
        }
    }
}

static inline int vv_later_flying(const struct vv_later *later)
{
    return later->uring.queued || later->uring.flying;
}

/* Until nothing is under way. Outside of the gate. -1 if a signal came: to be called again. */
static int vv_later_settle(struct vv_later *later)
{
    int signal = 0;

    while (!signal && vv_later_flying(later)) {
        signal = vv_later_submit(later, 1);
        vv_later_reap(later);
    }
    return signal ? -1 : 0;
}

/* -- the ring's side, inside of the gate */

/* Begin a request of "size" bytes whose header was read, with bytes of the driver's for a write. */
static int vv_later_begin(struct vv_later *later, struct vv_ring *ring, const struct vv_chain *chain,
                          unsigned operation, uint64_t offset, uint64_t size, const struct iovec *part, unsigned parts)
{
    struct vv_flight *flight = later->flight;
    unsigned at;
    char *to;

    if (ring->packed || ring->in_order || size > VV_FLIGHT_BYTES)
        return VV_LATER_NO;
    if (later->count == VV_FLIGHTS || (size > VV_FLIGHT_ROOM && later->bytes + size > VV_FLIGHT_BYTES))
        return VV_LATER_FULL;
    while (flight->state != VV_FLIGHT_FREE)
        flight++;
    if (size > VV_FLIGHT_ROOM) {
        if (posix_memalign((void **)&flight->bytes, 4096, size)) {
            flight->bytes = flight->own;
            return VV_LATER_NO;
        }
        later->bytes += size;
    }
    flight->head = chain->id;
    flight->operation = (uint8_t)operation;
    flight->number = later->numbers++;
    flight->offset = offset;
    flight->size = size;
    flight->done = 0;
    flight->whole = flight->again = 0;
    later->count++;
    if (operation == IORING_OP_WRITE)
        for (at = 0, to = flight->bytes; at < parts; to += part[at++].iov_len)
            memcpy(to, part[at].iov_base, part[at].iov_len);
    vv_flight_up(later, flight);
    return VV_LATER_YES;
}

/* Give one back that has landed; 0 if that is Python's to do. */
static int vv_flight_deliver(struct vv_later *later, struct vv_flight *flight, struct vv_ring *ring)
{
    struct vv_chain *chain = &later->chain;
    const int read = flight->operation == IORING_OP_READ;
    const struct vv_piece *piece;
    const char *from = flight->bytes;
    uint64_t left = read ? flight->size : 0;

    if (vv_split_walk(ring, flight->head, chain) != VV_GOT || !chain->in || (read && chain->in - 1 != flight->size))
        return 0;
    for (piece = &chain->piece[chain->readable]; left; piece++) {
        const uint64_t step = piece->length < left ? piece->length : left;

        memcpy(piece->at, from, step);
        from += step;
        left -= step;
    }
    piece = &chain->piece[chain->pieces - 1];
    piece->at[piece->length - 1] = 0; /* VIRTIO_BLK_S_OK */
    return vv_ring_push(ring, chain, read ? (uint32_t)chain->in : chain->in == 1) == VV_GOT;
}

/* Those that are apart, in the order in which they were taken, are Python's from now on. */
static void vv_later_leave(struct vv_later *later, struct vv_ring *ring)
{
    for (; later->apart; later->apart--) {
        struct vv_flight *first = NULL;
        unsigned at;

        for (at = 0; at < VV_FLIGHTS; at++)
            if (later->flight[at].state == VV_FLIGHT_APART && (!first || later->flight[at].number < first->number))
                first = &later->flight[at];
        first->state = VV_FLIGHT_LEFT;
        later->left[later->lefts++] = (uint16_t)(first - later->flight);
        ring->taken--;
    }
}

/* Give back what is done by now; how many bytes, header and status included. VV_HELP if some are Python's. */
static int vv_later_done(struct vv_later *later, struct vv_ring *ring, uint64_t *requests, uint64_t *bytes)
{
    unsigned at;

    vv_later_reap(later);
    for (at = 0; at < VV_FLIGHTS; at++) {
        struct vv_flight *flight = &later->flight[at];

        if (flight->state != VV_FLIGHT_LANDED)
            continue;
        if (!vv_flight_deliver(later, flight, ring)) {
            vv_flight_lose(later, flight);
            continue;
        }
        *bytes += 17 + flight->size;
        ++*requests;
        vv_flight_free(later, flight);
    }
    return later->apart ? VV_HELP : VV_GOT;
}

#endif
