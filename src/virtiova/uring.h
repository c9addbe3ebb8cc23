/* SPDX-License-Identifier: Apache-2.0 */
/*
 * io_uring for one file: reads, writes and syncs that the kernel does while we do something else (Linux,
 * include/uapi/linux/io_uring.h). The few calls of it that are needed, without liburing.
 *
 * A ring is made before the sandbox is entered, and restricted for good to these three on the one file that is registered
 * with it: io_uring_enter() is then no way around a filter of system calls. One thread at a time uses it.
 */
#ifndef VIRTIOVA_URING_H
#define VIRTIOVA_URING_H

#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "atomics.h"

struct vv_uring {
    int fd;
    unsigned entries;
    unsigned queued;  /* entries that were written and not submitted */
    unsigned flying;  /* submitted, of which nothing was heard */
    unsigned *sq_head, *sq_tail, *sq_array;
    unsigned *cq_head, *cq_tail;
    unsigned sq_mask, cq_mask;
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
    void *rings;
    size_t rings_bytes, sqe_bytes;
};

struct vv_uring_done {
    uint64_t number;
    int32_t result;
};

static inline int vv_uring_register(const struct vv_uring *uring, unsigned what, void *with, unsigned count)
{
    return (int)syscall(__NR_io_uring_register, uring->fd, what, with, count);
}

/* Only these, on the registered file, and nothing else is registered any more. */
static int vv_uring_restrict(struct vv_uring *uring, int file)
{
    static const uint8_t allowed[] = {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC};
    struct io_uring_restriction list[sizeof allowed + 2];
    unsigned at;

    memset(list, 0, sizeof list);
    for (at = 0; at < sizeof allowed; at++) {
        list[at].opcode = IORING_RESTRICTION_SQE_OP;
        list[at].sqe_op = allowed[at];
    }
    list[at].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
    list[at++].sqe_flags = IOSQE_FIXED_FILE;
    list[at].opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED;
    list[at++].sqe_flags = IOSQE_FIXED_FILE;
    if (vv_uring_register(uring, IORING_REGISTER_FILES, &file, 1) ||
        vv_uring_register(uring, IORING_REGISTER_RESTRICTIONS, list, at))
        return -1;
    return vv_uring_register(uring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

static int vv_uring_map(struct vv_uring *uring, const struct io_uring_params *made)
{
    const size_t sq = made->sq_off.array + made->sq_entries * sizeof(unsigned);
    const size_t cq = made->cq_off.cqes + made->cq_entries * sizeof(struct io_uring_cqe);
    char *rings;

    uring->rings_bytes = sq > cq ? sq : cq;
    uring->sqe_bytes = made->sq_entries * sizeof(struct io_uring_sqe);
    rings = mmap(NULL, uring->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, uring->fd, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED)
        return -1;
    uring->rings = rings;
    uring->sqe = mmap(NULL, uring->sqe_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, uring->fd, IORING_OFF_SQES);
    if (uring->sqe == MAP_FAILED) {
        uring->sqe = NULL;
        return -1;
    }
    uring->sq_head = (unsigned *)(rings + made->sq_off.head);
    uring->sq_tail = (unsigned *)(rings + made->sq_off.tail);
    uring->sq_array = (unsigned *)(rings + made->sq_off.array);
    uring->sq_mask = *(unsigned *)(rings + made->sq_off.ring_mask);
    uring->cq_head = (unsigned *)(rings + made->cq_off.head);
    uring->cq_tail = (unsigned *)(rings + made->cq_off.tail);
    uring->cq_mask = *(unsigned *)(rings + made->cq_off.ring_mask);
    uring->cqe = (struct io_uring_cqe *)(rings + made->cq_off.cqes);
    uring->entries = made->sq_entries;
    return 0;
}

static void vv_uring_close(struct vv_uring *uring)
{
    if (uring->sqe)
        munmap(uring->sqe, uring->sqe_bytes);
    if (uring->rings)
        munmap(uring->rings, uring->rings_bytes);
    if (uring->fd >= 0)
        close(uring->fd);
    memset(uring, 0, sizeof *uring);
    uring->fd = -1;
}

/* -1 and errno where there is none, where it is forbidden, or where it cannot be restricted. */
static int vv_uring_open(struct vv_uring *uring, int file, unsigned entries)
{
    struct io_uring_params made;
    int kept;

    memset(uring, 0, sizeof *uring);
    memset(&made, 0, sizeof made);
    made.flags = IORING_SETUP_R_DISABLED;
    uring->fd = (int)syscall(__NR_io_uring_setup, entries, &made);
    if (uring->fd < 0)
        return -1;
    errno = ENOSYS;
    /* One mapping for both rings, and no completion that is lost when there are many: Linux 5.5. */
    if ((made.features & IORING_FEAT_SINGLE_MMAP) && (made.features & IORING_FEAT_NODROP) &&
        !vv_uring_map(uring, &made) && !vv_uring_restrict(uring, file))
        return 0;
    kept = errno;
    vv_uring_close(uring);
    errno = kept;
    return -1;
}

/*
 * Whether a ring can be sent over a socket: then a front end can hand one over that nobody has restricted. Linux does not
 * let it since commit 705318a99a13 ("io_uring/af_unix: disable sending io_uring over sockets", v6.7). -1 and errno
 * where there is no io_uring.
 */
static int vv_uring_travels(void)
{
    struct io_uring_params made;
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    char byte = 0;
    struct iovec part = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int pair[2], fd, travels;

    memset(&made, 0, sizeof made);
    memset(&control, 0, sizeof control);
    made.flags = IORING_SETUP_R_DISABLED;
    fd = (int)syscall(__NR_io_uring_setup, 1, &made);
    if (fd < 0)
        return -1;
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    /* Where there is no socket to try it with, it is as if it did. */
    travels = 1;
    if (!socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, pair)) {
        travels = sendmsg(pair[0], &message, MSG_DONTWAIT) >= 0 || errno != EINVAL;
        close(pair[0]);
        close(pair[1]);
    }
    close(fd);
    return travels;
}

/* -- use */

static inline int vv_uring_full(const struct vv_uring *uring)
{
    return uring->queued + uring->flying >= uring->entries;
}

/* One more, of which the result comes with this number. Not if it is full. */
static inline void vv_uring_put(struct vv_uring *uring, unsigned operation, uint64_t offset, void *at, uint32_t length,
                                uint64_t number)
{
    const unsigned tail = *uring->sq_tail; /* ours alone */
    const unsigned slot = tail & uring->sq_mask;
    struct io_uring_sqe *sqe = &uring->sqe[slot];

    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = (uint8_t)operation;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->fd = 0; /* its number among those registered */
    sqe->user_data = number;
    if (operation == IORING_OP_FSYNC) {
        sqe->fsync_flags = IORING_FSYNC_DATASYNC;
    } else {
        sqe->off = offset;
        sqe->addr = (uintptr_t)at;
        sqe->len = length;
    }
    uring->sq_array[slot] = slot;
    __atomic_store_n(uring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    uring->queued++;
}

/*
 * Submit what was put; wait until so many results are there. 0; 1 if a signal came while it waited, and it is to be
 * called again; -1 and errno if some was not taken.
 */
static inline int vv_uring_enter(struct vv_uring *uring, unsigned wait)
{
    do {
        const int taken = (int)syscall(__NR_io_uring_enter, uring->fd, uring->queued, wait,
                                       wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);

        if (taken < 0 && errno == EINTR && wait)
            return 1;
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0)
            return -1;
        uring->queued -= (unsigned)taken;
        uring->flying += (unsigned)taken;
        if (!taken)
            break;
    } while (uring->queued);
    return uring->queued ? -1 : 0;
}

/* Take back what was put and not taken by the kernel. */
static inline void vv_uring_forget(struct vv_uring *uring)
{
    __atomic_store_n(uring->sq_tail, *uring->sq_tail - uring->queued, __ATOMIC_RELEASE);
    uring->queued = 0;
}

/* Whether there is a result. */
static inline int vv_uring_ready(const struct vv_uring *uring)
{
    return *uring->cq_head != __atomic_load_n(uring->cq_tail, __ATOMIC_ACQUIRE);
}

/* The next result; 0 if there is none. */
static inline int vv_uring_next(struct vv_uring *uring, struct vv_uring_done *done)
{
    const unsigned head = *uring->cq_head;
    const struct io_uring_cqe *cqe = &uring->cqe[head & uring->cq_mask];

    if (!vv_uring_ready(uring))
        return 0;
    done->number = cqe->user_data;
    done->result = cqe->res;
    __atomic_store_n(uring->cq_head, head + 1, __ATOMIC_RELEASE);
    uring->flying--;
    return 1;
}

#endif
