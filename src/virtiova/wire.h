/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a network device's frames go to and come from, natively: nowhere, datagrams, or a tap interface; and the frames
 * that wait for a driver's buffers. Nothing here knows of rings or of guest memory, and nothing waits.
 */
#ifndef VIRTIOVA_WIRE_H
#define VIRTIOVA_WIRE_H

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "engine.h"

/* As in device/net.py. */
#define VV_MAX_FRAME 65550u
/* Frames that are sent, or taken in, at a time. */
#define VV_FRAMES 64u
/* Bytes of frames that wait to be sent: more than one of the largest. */
#define VV_ARENA (1u << 18)
/*
 * Room of a frame that waits: space for the header that the driver gets with it, and one byte more than the largest one
 * has, which shows that there was one that is larger. In whole pages: those that are not used are not there.
 */
#define VV_FRAME_ROOM 69632u
#define VV_HEADROOM 64u

enum vv_wire_kind {
    VV_WIRE_DISCARD,
    VV_WIRE_SOCKET, /* connected datagrams: a call for each frame, which names nobody; a sandbox can see to that */
    VV_WIRE_NAMED,  /* datagrams to a name: a call for many frames */
    VV_WIRE_TAP,
};

struct vv_wire {
    int fd;
    int kind;
    int gone; /* nothing will ever come from it again */
    struct sockaddr_un name;
    socklen_t name_length;
    /* Whoever sends adds, any thread reads. */
    uint64_t frames, bytes, lost;
};

/* Datagrams go to the socket at this path; -1 if no path can be that. */
static int vv_wire_name(struct vv_wire *wire, const char *path, size_t length)
{
    if (length >= sizeof wire->name.sun_path)
        return -1;
    wire->name.sun_family = AF_UNIX;
    memcpy(wire->name.sun_path, path, length);
    wire->name_length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
    return 0;
}

/* -- sending */

/* Frames in memory of ours, not sent yet. */
struct vv_outbox {
    unsigned frames;
    uint32_t used;
    uint32_t length[VV_FRAMES];
    struct iovec part[VV_FRAMES];
    struct mmsghdr message[VV_FRAMES];
    char *arena;
};

static inline void vv_wire_count(struct vv_wire *wire, uint64_t frames, uint64_t bytes, uint64_t lost)
{
    vv_count(&wire->frames, frames);
    vv_count(&wire->bytes, bytes);
    if (lost)
        vv_count(&wire->lost, lost);
}

/* Whether it went; what finds nobody, or no room, is lost. */
static inline int vv_wire_send(const struct vv_wire *wire, const char *frame, size_t length)
{
    ssize_t sent;

    if (wire->kind == VV_WIRE_TAP)
        sent = write(wire->fd, frame, length);
    else
        sent = sendto(wire->fd, frame, length, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0);
    return sent == (ssize_t)length;
}

/* All of them to a name; how many of them went. */
static unsigned vv_wire_send_named(struct vv_wire *wire, struct vv_outbox *box)
{
    unsigned at, done = 0, sent = 0;

    for (at = 0; at < box->frames; at++) {
        memset(&box->message[at], 0, sizeof box->message[at]);
        box->message[at].msg_hdr.msg_name = &wire->name;
        box->message[at].msg_hdr.msg_namelen = wire->name_length;
        box->message[at].msg_hdr.msg_iov = &box->part[at];
        box->message[at].msg_hdr.msg_iovlen = 1;
    }
    while (done < box->frames) {
        const int some = sendmmsg(wire->fd, &box->message[done], box->frames - done, MSG_DONTWAIT | MSG_NOSIGNAL);

        /* The first of the rest cannot be sent: lost. If nobody is there or has room, so are those behind it. */
        if (some <= 0 && (errno == EAGAIN || errno == ECONNREFUSED || errno == ENOENT))
            break;
        done += some > 0 ? (unsigned)some : 1;
        sent += some > 0 ? (unsigned)some : 0;
    }
    return sent;
}

static void vv_wire_flush(struct vv_wire *wire, struct vv_outbox *box)
{
    unsigned at, sent = 0;

    if (!box->frames)
        return;
    if (wire->kind == VV_WIRE_NAMED)
        sent = vv_wire_send_named(wire, box);
    else
        for (at = 0; at < box->frames; at++)
            sent += (unsigned)vv_wire_send(wire, box->part[at].iov_base, box->part[at].iov_len);
    vv_wire_count(wire, box->frames, box->used, box->frames - sent);
    box->frames = 0;
    box->used = 0;
}

/* -- what has come and waits for the driver's buffers */

struct vv_backlog {
    char *rooms; /* VV_FRAME_ROOM each */
    uint32_t *length;
    uint32_t limit, first, count; /* count: one thread at a time changes it, any reads it */
    uint64_t dropped;
};

static int vv_backlog_init(struct vv_backlog *log, uint32_t limit)
{
    /* Large: the system's own zero pages, of which only those that are touched take memory. */
    log->rooms = calloc(limit, VV_FRAME_ROOM);
    log->length = calloc(limit, sizeof *log->length);
    log->limit = limit;
    return log->rooms && log->length ? 0 : -1;
}

static void vv_backlog_free(struct vv_backlog *log)
{
    free(log->rooms);
    free(log->length);
    log->rooms = NULL;
    log->length = NULL;
}

static inline uint32_t vv_backlog_count(const struct vv_backlog *log)
{
    return __atomic_load_n(&log->count, __ATOMIC_RELAXED);
}

static inline void vv_backlog_set(struct vv_backlog *log, uint32_t count)
{
    if (!count)
        log->first = 0; /* the rooms that are in the cache first */
    __atomic_store_n(&log->count, count, __ATOMIC_RELAXED);
}

/* Where the number-th frame behind the first is, by its room. */
static inline uint32_t vv_backlog_at(const struct vv_backlog *log, uint32_t number)
{
    const uint32_t at = log->first + number;

    return at < log->limit ? at : at - log->limit;
}

static inline char *vv_backlog_frame(const struct vv_backlog *log, uint32_t at)
{
    return log->rooms + (size_t)at * VV_FRAME_ROOM + VV_HEADROOM;
}

static inline void vv_backlog_pop(struct vv_backlog *log)
{
    log->first = vv_backlog_at(log, 1);
    vv_backlog_set(log, vv_backlog_count(log) - 1);
}

static inline void vv_backlog_clear(struct vv_backlog *log)
{
    vv_backlog_set(log, 0);
}

static inline void vv_backlog_drop(struct vv_backlog *log)
{
    vv_count(&log->dropped, 1);
}

/* length bytes lie in the first free room: keep them. An empty frame is none; one that is too large is dropped. */
static inline void vv_backlog_keep(struct vv_backlog *log, size_t length)
{
    const uint32_t count = vv_backlog_count(log);

    if (length > VV_MAX_FRAME) {
        vv_backlog_drop(log);
    } else if (length) {
        log->length[vv_backlog_at(log, count)] = (uint32_t)length;
        vv_backlog_set(log, count + 1);
    }
}

/* -- taking in */

/* Whether errno says that nothing will come any more; anything else may pass. */
static inline int vv_wire_ended(void)
{
    return errno == EBADF || errno == EBADFD || errno == ECONNRESET || errno == ENOTCONN || errno == EPIPE;
}

/* As many frames as are there now and have room, up to most; how many. */
static unsigned vv_wire_take(struct vv_wire *wire, struct vv_backlog *log, unsigned most)
{
    unsigned taken = 0;

    while (taken < most && vv_backlog_count(log) < log->limit && !wire->gone) {
        char *room = vv_backlog_frame(log, vv_backlog_at(log, vv_backlog_count(log)));
        const ssize_t length = wire->kind == VV_WIRE_TAP ? read(wire->fd, room, VV_MAX_FRAME + 1)
                                                         : recv(wire->fd, room, VV_MAX_FRAME + 1, MSG_DONTWAIT);

        if (length < 0) {
            wire->gone = vv_wire_ended();
            break;
        }
        vv_backlog_keep(log, (size_t)length);
        taken++;
    }
    return taken;
}

/* Whether something has come. */
static int vv_wire_ready(const struct vv_wire *wire)
{
    struct pollfd one = {.fd = wire->fd, .events = POLLIN};

    return !wire->gone && wire->kind != VV_WIRE_DISCARD && poll(&one, 1, 0) > 0;
}

#endif
