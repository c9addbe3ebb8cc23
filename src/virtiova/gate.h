/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How one thread keeps several others out while it changes what they use, and knows that none of them is still at it.
 *
 * The main thread changes translations, memory, rings, descriptors and features. The workers use them. One word says
 * that the main thread wants them out (stop), and one word for each worker says that it is in (busy).
 *
 *     a worker                                        the main thread
 *     W0  while (stop) sleep on stop                  M0  stop = 1                       (sequentially consistent)
 *     W1  busy = 1          (sequentially consistent) M1  for each worker: while (busy) sleep on its busy
 *     W2  if (stop)         (sequentially consistent) M2  nobody is in: change anything; acknowledge it
 *             busy = 0; wake busy; go to W0           M3  stop = 0                                  (release)
 *     W3  one batch of work; if (!stop) again         M4  wake all who sleep on stop; outside: back to M0
 *     W4  busy = 0          (sequentially consistent)
 *     W5  if (stop) wake busy                (sequentially consistent); outside: back to W0
 *
 * Safety: never M2 and W3 at a time. W1 and M0 are stores, W2 and M1 loads of the other's word, all sequentially
 * consistent: at least one of the two sees the other. What a worker wrote in W3 is seen in M2, by W4 and M1; what was
 * changed in M2 is seen in W3, by M3 and W0 or W2.
 * Liveness: M1 ends after at most one batch of each worker, since W3 looks at stop. Whoever sleeps on a word sleeps only
 * if the word still says so (the kernel compares it, FUTEX_WAIT), and who changes it wakes him: W4 and W5 against M0 and
 * M1 are the same two pairs once more, so that a worker that leaves sees stop, or M1 sees that it has left.
 *
 * A worker has to be in for every access to guest memory, its rings included, and for every use of a descriptor that
 * the main thread may close, but for waiting on one.
 */
#ifndef VIRTIOVA_GATE_H
#define VIRTIOVA_GATE_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Looks at a busy worker's word before the main thread sleeps on it: a batch is short, a wake-up is not. */
#define VV_GATE_LOOKS 2000

struct vv_gate {
    uint32_t stop;
};

static inline void vv_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#else
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Sleep while *word is what was seen; may come back at any time. Whether it was a signal that came. */
static inline int vv_futex_wait(uint32_t *word, uint32_t seen)
{
    const int kept = errno;
    int signal;

    signal = syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0) && errno == EINTR;
    errno = kept;
    return signal;
}

static inline void vv_futex_wake(uint32_t *word)
{
    const int kept = errno;

    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    errno = kept;
}

/* -- a worker's side */

static inline void vv_gate_leave(struct vv_gate *gate, uint32_t *busy)
{
    __atomic_store_n(busy, 0, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&gate->stop, __ATOMIC_SEQ_CST))
        vv_futex_wake(busy);
}

static inline void vv_gate_enter(struct vv_gate *gate, uint32_t *busy)
{
    for (;;) {
        while (__atomic_load_n(&gate->stop, __ATOMIC_ACQUIRE))
            vv_futex_wait(&gate->stop, 1);
        __atomic_store_n(busy, 1, __ATOMIC_SEQ_CST);
        if (!__atomic_load_n(&gate->stop, __ATOMIC_SEQ_CST))
            return;
        vv_gate_leave(gate, busy);
    }
}

/* Whether somebody wants in: between two batches. */
static inline int vv_gate_wanted(const struct vv_gate *gate)
{
    return __atomic_load_n(&gate->stop, __ATOMIC_RELAXED) != 0;
}

/* -- the main thread's side: close, then await each worker, and open again */

static inline void vv_gate_close(struct vv_gate *gate)
{
    __atomic_store_n(&gate->stop, 1, __ATOMIC_SEQ_CST);
}

/* 0; or -1, to be called again, if a signal came: a worker may be held up for ever by a page that never comes. */
static inline int vv_gate_await(uint32_t *busy)
{
    unsigned looks = 0;

    while (__atomic_load_n(busy, __ATOMIC_SEQ_CST)) {
        if (++looks < VV_GATE_LOOKS)
            vv_relax();
        else if (vv_futex_wait(busy, 1))
            return -1;
    }
    return 0;
}

static inline void vv_gate_open(struct vv_gate *gate)
{
    __atomic_store_n(&gate->stop, 0, __ATOMIC_RELEASE);
    vv_futex_wake(&gate->stop);
}

#endif
