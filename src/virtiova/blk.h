/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A disk's queue (virtio 1.4, 5.2) without Python: reads and writes that go well. Whatever else is asked for, and
 * whatever goes wrong, is Python's to do once more from its start, and to answer (device/blk.py).
 *
 * The disk is memory, a file that is mapped, or a file that is read and written by the kernel straight from and to the
 * guest's pieces: under the gate, so that nobody takes them away meanwhile. What would have to wait for a slow disk is
 * left to "later", if there is somebody, and else to Python, whose bytes are its own while it waits.
 */
#ifndef VIRTIOVA_BLK_H
#define VIRTIOVA_BLK_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/vfs.h>

#include "engine.h"
#include "guard.h"
#include "later.h"
#include "ring.h"

#define VV_SECTOR 512u
#define VV_BLK_HEADER 16u
#define VV_BLK_IN 0u
#define VV_BLK_OUT 1u
#define VV_BLK_FLUSH 4u
#define VV_BLK_OK 0
/* Bytes from which on a string instruction is worth its start. */
#define VV_BLK_STRING 2048u
/* Requests after which the driver may see them. */
#ifndef VV_BLK_GIVE
#define VV_BLK_GIVE 4
#endif

struct vv_blk {
    struct vv_engine engine; /* first */
    /* The disk: memory of "sectors", or NULL and a file. */
    char *memory;
    int slot; /* of the guard, if that memory is a file; else -1 */
    int fd;
    uint64_t sectors;
    uint64_t most;   /* bytes of data in a request */
    int may_write;   /* and a write is done when it is in the cache */
    int wait_read;   /* the file cannot be read without waiting, or cannot say so */
    int wait_write;
    int never_waits; /* it is in memory, whatever it says */
    /* May be NULL: what would have to wait is done later, by bytes of our own. */
    struct vv_later *later;
    int always_later; /* also what would not have to wait */
    int here;         /* the main thread does it: nothing is waited for, nor begun */
    struct vv_chain chain;
    struct iovec parts[VV_MAX_PIECES];
};

enum { VV_BLK_DONE, VV_BLK_PYTHON, VV_BLK_LATER, VV_BLK_FULL };

/* -- pieces as one row of bytes */

/* Copy out the first count bytes, of pieces that have as many. */
static inline void vv_pieces_read(const struct vv_piece *piece, char *to, uint64_t count)
{
    while (count) {
        const uint64_t step = piece->length < count ? piece->length : count;

        memcpy(to, piece->at, step);
        to += step;
        count -= step;
        piece++;
    }
}

/* Past the first skip bytes: parts for count bytes; how many. */
static inline unsigned vv_pieces_parts(const struct vv_piece *piece, uint64_t skip, uint64_t count, struct iovec *parts)
{
    unsigned found = 0;

    while (skip >= piece->length) {
        skip -= piece->length;
        piece++;
    }
    while (count) {
        const uint64_t left = piece->length - skip;
        const uint64_t step = left < count ? left : count;

        parts[found].iov_base = piece->at + skip;
        parts[found].iov_len = step;
        found++;
        skip = 0;
        count -= step;
        piece++;
    }
    return found;
}

/* -- the disk */

static inline int vv_blk_damaged(const struct vv_blk *blk)
{
    if (blk->slot < 0)
        return 0;
    /* Not before the copy that may have been of a page that is gone. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return vv_guard_faults(blk->slot) != 0;
}

/*
 * Between guest and disk, one of which is in nobody's cache: processors write whole lines by string instructions without
 * reading them first. A fifth of the time of 4 KiB, where memcpy() does not do so by itself.
 */
static inline void vv_blk_move(char *to, const char *from, size_t length)
{
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
    if (length >= VV_BLK_STRING && !(length % 8)) {
        length /= 8;
        __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
        return;
    }
#endif
    memcpy(to, from, length);
}

static inline int vv_blk_copy(struct vv_blk *blk, const struct iovec *part, unsigned count, int write, uint64_t offset)
{
    char *disk = blk->memory + offset;
    unsigned at;

    for (at = 0; at < count; at++) {
        if (write)
            vv_blk_move(disk, part[at].iov_base, part[at].iov_len);
        else
            vv_blk_move(part[at].iov_base, disk, part[at].iov_len);
        disk += part[at].iov_len;
    }
    return vv_blk_damaged(blk) ? VV_BLK_PYTHON : VV_BLK_DONE;
}

/* Take done bytes off the front of the parts. */
static inline void vv_parts_advance(struct iovec **part, unsigned *count, size_t done)
{
    while (*count && done >= (*part)->iov_len) {
        done -= (*part)->iov_len;
        (*part)++;
        (*count)--;
    }
    if (done) {
        (*part)->iov_base = (char *)(*part)->iov_base + done;
        (*part)->iov_len -= done;
    }
}

static inline int vv_blk_file(struct vv_blk *blk, struct iovec *part, unsigned count, int write, uint64_t offset)
{
    int *wait = write ? &blk->wait_write : &blk->wait_read;

    if (blk->always_later && blk->later)
        return VV_BLK_LATER;
    while (count) {
        /* What has to be waited for is not waited for under the gate, if there is another way. */
        if (*wait && (blk->later || blk->here) && !blk->never_waits)
            return VV_BLK_LATER;
        const int flags = *wait ? 0 : RWF_NOWAIT;
        const ssize_t done = write ? pwritev2(blk->fd, part, (int)count, (off_t)offset, flags)
                                   : preadv2(blk->fd, part, (int)count, (off_t)offset, flags);

        if (done > 0) {
            offset += (uint64_t)done;
            vv_parts_advance(&part, &count, (size_t)done);
        } else if (done < 0 && errno == EINTR) {
            continue;
        } else if (done < 0 && errno == EAGAIN && flags) {
            return VV_BLK_LATER;
        } else if (done < 0 && (errno == EOPNOTSUPP || errno == ENOSYS) && flags) {
            *wait = 1;
        } else {
            return VV_BLK_PYTHON; /* an error, or the end of a file that has become shorter */
        }
    }
    return VV_BLK_DONE;
}

/* -- a request */

static inline uint64_t vv_blk_le(const unsigned char *at, unsigned bytes)
{
    uint64_t value = 0;

    while (bytes--)
        value = value << 8 | at[bytes];
    return value;
}

/* Whole sectors, none past the last one, and no more than a request may move. */
static inline int vv_blk_within(const struct vv_blk *blk, uint64_t sector, uint64_t size)
{
    return !(size % VV_SECTOR) && size <= blk->most && sector <= blk->sectors &&
           size / VV_SECTOR <= blk->sectors - sector;
}

/* Begin what would have to wait: nobody who wants in at the gate waits for the disk. */
static inline int vv_blk_later(struct vv_blk *blk, struct vv_ring *ring, unsigned operation, uint64_t offset,
                               uint64_t size)
{
    const struct vv_chain *chain = &blk->chain;
    unsigned parts = 0;

    if (!blk->later)
        return VV_BLK_PYTHON;
    if (operation == IORING_OP_WRITE)
        parts = vv_pieces_parts(chain->piece, VV_BLK_HEADER, size, blk->parts);
    switch (vv_later_begin(blk->later, ring, chain, operation, offset, size, blk->parts, parts)) {
    case VV_LATER_YES:
        return VV_BLK_LATER;
    case VV_LATER_FULL:
        return VV_BLK_FULL;
    default:
        return VV_BLK_PYTHON;
    }
}

/* Do it; of what is done, used is what the used ring says and moved what is counted. */
static inline int vv_blk_request(struct vv_blk *blk, struct vv_ring *ring, uint32_t *used, uint64_t *moved)
{
    const struct vv_chain *chain = &blk->chain;
    unsigned char header[VV_BLK_HEADER];
    const struct vv_piece *piece;
    struct iovec *part = blk->parts;
    uint64_t size, sector, skip;
    unsigned count, type;
    int write, how;

    if (vv_unlikely(chain->out < VV_BLK_HEADER || !chain->in))
        return VV_BLK_PYTHON;
    vv_pieces_read(chain->piece, (char *)header, VV_BLK_HEADER);
    type = (unsigned)vv_blk_le(header, 4);
    if (type == VV_BLK_FLUSH && blk->may_write)
        return vv_blk_later(blk, ring, IORING_OP_FSYNC, 0, 0);
    write = type == VV_BLK_OUT;
    if (vv_unlikely(!write && type != VV_BLK_IN))
        return VV_BLK_PYTHON;
    sector = vv_blk_le(header + 8, 8);
    size = write ? chain->out - VV_BLK_HEADER : chain->in - 1;
    if (vv_unlikely((write && !blk->may_write) || !vv_blk_within(blk, sector, size)))
        return VV_BLK_PYTHON;
    piece = write ? chain->piece : chain->piece + chain->readable;
    skip = write ? VV_BLK_HEADER : 0;
    count = size ? vv_pieces_parts(piece, skip, size, part) : 0;
    if (blk->memory)
        how = vv_blk_copy(blk, part, count, write, sector * VV_SECTOR);
    else
        how = vv_blk_file(blk, part, count, write, sector * VV_SECTOR);
    if (vv_unlikely(how == VV_BLK_LATER))
        return vv_blk_later(blk, ring, write ? IORING_OP_WRITE : IORING_OP_READ, sector * VV_SECTOR, size);
    if (vv_unlikely(how != VV_BLK_DONE))
        return how;
    /* The status is the last byte of all; what is skipped before it counts for nothing (virtio 1.4, 2.7.8.2). */
    piece = &chain->piece[chain->pieces - 1];
    piece->at[piece->length - 1] = VV_BLK_OK;
    *used = write ? chain->in == 1 : (uint32_t)chain->in;
    *moved = VV_BLK_HEADER + size + 1;
    return how;
}

/*
 * At the end of some work: what was begun is the kernel's now. Python gets the ring only once nothing of it is under way:
 * else the main thread, and with it everybody, would wait for the file.
 */
static inline int vv_blk_leave(struct vv_blk *blk, struct vv_ring *ring, int last, int got)
{
    struct vv_later *later = blk->later;

    vv_later_submit(later, 0);
    if (last) {
        vv_later_leave(later, ring);
        got = VV_GOT;
    } else if (later->apart) {
        got = VV_HELP;
    }
    blk->engine.begun = later->count - later->lefts;
    blk->engine.fd = blk->engine.begun ? later->uring.fd : -1;
    return got == VV_HELP && vv_later_flying(later) ? VV_WAIT : got;
}

static int vv_blk_peek(struct vv_engine *engine)
{
    const struct vv_blk *blk = (const struct vv_blk *)engine;

    return blk->later && vv_uring_ready(&blk->later->uring);
}

/* Outside of the gate, while nobody else uses the engine. */
static int vv_blk_settle(struct vv_engine *engine)
{
    const struct vv_blk *blk = (const struct vv_blk *)engine;

    return blk->later ? vv_later_settle(blk->later) : 0;
}

static int vv_blk_work(struct vv_engine *engine, struct vv_ring *ring, unsigned budget, const uint32_t *stop,
                       struct vv_tally *tally)
{
    struct vv_blk *blk = (struct vv_blk *)engine;
    const int last = !budget;
    uint64_t requests = 0, bytes = 0, moved = 0;
    uint32_t used = 0;
    int got;

    got = blk->later && blk->later->count ? vv_later_done(blk->later, ring, &requests, &bytes) : VV_GOT;
    for (; got == VV_GOT && budget && !__atomic_load_n(stop, __ATOMIC_RELAXED); budget--) {
        int how;

        got = vv_ring_next(ring, &blk->chain);
        if (got != VV_GOT)
            break;
        how = vv_blk_damaged(blk) ? VV_BLK_PYTHON : vv_blk_request(blk, ring, &used, &moved);
        if (vv_unlikely(how == VV_BLK_LATER))
            continue;
        if (vv_unlikely(how != VV_BLK_DONE || vv_ring_push(ring, &blk->chain, used) != VV_GOT)) {
            vv_ring_put_back(ring, &blk->chain);
            got = how == VV_BLK_FULL ? VV_WAIT : VV_HELP;
            break;
        }
        /* The driver need not wait for those behind it: it works on these while we do the next ones. */
        if (++requests % VV_BLK_GIVE == 0)
            vv_ring_publish(ring);
        bytes += moved;
    }
    if (blk->later)
        got = vv_blk_leave(blk, ring, last, got);
    if (requests) {
        vv_count(&tally->requests, requests);
        vv_count(&tally->bytes, bytes);
    }
    return got;
}

/*
 * Whether a file is memory, and never waits for a disk: file systems in memory say of RWF_NOWAIT that they do not know it
 * (include/uapi/linux/magic.h: tmpfs, ramfs, hugetlbfs).
 */
static inline int vv_file_in_memory(int fd)
{
    struct statfs about;

    return !fstatfs(fd, &about) && ((uint32_t)about.f_type == 0x01021994u || (uint32_t)about.f_type == 0x858458f6u ||
                                    (uint32_t)about.f_type == 0x958458f6u);
}

static inline void vv_blk_init(struct vv_blk *blk)
{
    memset(blk, 0, sizeof *blk);
    blk->engine.work = vv_blk_work;
    blk->engine.peek = vv_blk_peek;
    blk->engine.settle = vv_blk_settle;
    blk->engine.events = POLLIN;
    blk->engine.fd = -1;
    blk->slot = -1;
    blk->fd = -1;
}

#endif
