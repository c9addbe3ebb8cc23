/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory files can be truncated by whoever shares them with us; an access behind the new end raises SIGBUS. Within a
 * guarded range the handler puts an anonymous page in place of the one that is gone, counts it, and lets the access
 * go on. Any other SIGBUS goes to whoever handled it before.
 *
 * The handler takes no lock and allocates nothing. It reads the table of ranges while another thread may change it:
 * each slot has a sequence number, odd while it is changed. A slot that changes is not one where this thread is in
 * the middle of an access, so it is passed over.
 */
#ifndef VIRTIOVA_GUARD_H
#define VIRTIOVA_GUARD_H

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define VV_RANGES 4096
/*
 * Pages of a range that are replaced one by one; then all from the one that is gone to the end. Each alone can be a
 * mapping of its own, of which a process has 65,530: whoever truncates files could use them up.
 */
#define VV_SINGLE 32

struct vv_range {
    unsigned sequence;
    uintptr_t start;
    uintptr_t end;
    uintptr_t page;
    unsigned long faults;
};

static struct vv_range vv_ranges[VV_RANGES];
/* Slots from here on were never used. */
static int vv_ranges_used;
static unsigned long vv_faults;
/* Who handled SIGBUS before we ever did; and who did when we last came to the front. */
static struct sigaction vv_first;
static struct sigaction vv_previous;
static int vv_installed;
static int vv_passing;

static int vv_replace(struct vv_range *range, uintptr_t at)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    const unsigned before = __atomic_load_n(&range->sequence, __ATOMIC_ACQUIRE);
    const uintptr_t start = __atomic_load_n(&range->start, __ATOMIC_RELAXED);
    const uintptr_t end = __atomic_load_n(&range->end, __ATOMIC_RELAXED);
    const uintptr_t page = __atomic_load_n(&range->page, __ATOMIC_RELAXED);
    unsigned long faults;
    uintptr_t length;

    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (before % 2 || before != __atomic_load_n(&range->sequence, __ATOMIC_RELAXED) || at < start || at >= end)
        return 0;
    at -= (at - start) % page;
    length = end - at;
    /* First counted, then replaced: another thread that finds a page of ours there finds it counted. */
    faults = __atomic_fetch_add(&range->faults, 1, __ATOMIC_SEQ_CST);
    if (length > page && faults < VV_SINGLE)
        length = page;
    if (mmap((void *)at, length, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) {
        __atomic_fetch_sub(&range->faults, 1, __ATOMIC_SEQ_CST);
        return 0;
    }
    __atomic_fetch_add(&vv_faults, 1, __ATOMIC_RELEASE);
    return 1;
}

static void vv_default(int number, const siginfo_t *info)
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    action.sa_handler = SIG_DFL;
    sigaction(number, &action, NULL);
    /* An access that faulted is made again when we return, and one that was sent is not. */
    if (info->si_code <= 0)
        raise(number);
}

static void vv_pass_to(const struct sigaction *to, int number, siginfo_t *info, void *context)
{
    if (to->sa_flags & SA_SIGINFO)
        to->sa_sigaction(number, info, context);
    else if (to->sa_handler == SIG_IGN && info->si_code <= 0)
        ;
    else if (to->sa_handler == SIG_IGN || to->sa_handler == SIG_DFL)
        vv_default(number, info);
    else
        to->sa_handler(number);
}

static void vv_pass_on(int number, siginfo_t *info, void *context)
{
    const int depth = __atomic_fetch_add(&vv_passing, 1, __ATOMIC_RELAXED);

    /*
     * Somebody who came before us since has us as his predecessor, and passes on to us what he does not want: that goes to
     * whoever was there before us both. Whoever comes back a second time would go round with us for ever.
     */
    if (depth == 0)
        vv_pass_to(&vv_previous, number, info, context);
    else if (depth == 1)
        vv_pass_to(&vv_first, number, info, context);
    else
        vv_default(number, info);
    __atomic_fetch_sub(&vv_passing, 1, __ATOMIC_RELAXED);
}

static void vv_on_sigbus(int number, siginfo_t *info, void *context)
{
    const int kept = errno;
    int at, used, done = 0;

    /* BUS_ADRERR: there is nothing behind this address. What kill() sends has no address. */
    if (info->si_code == BUS_ADRERR) {
        used = __atomic_load_n(&vv_ranges_used, __ATOMIC_ACQUIRE);
        for (at = 0; at < used && !done; at++)
            done = vv_replace(&vv_ranges[at], (uintptr_t)info->si_addr);
    }
    if (!done)
        vv_pass_on(number, info, context);
    errno = kept;
}

/* Be the first to hear of SIGBUS, also if somebody came before us since. -1 and errno if that is impossible. */
static int vv_guard_install(void)
{
    struct sigaction now, action;

    if (sigaction(SIGBUS, NULL, &now))
        return -1;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == vv_on_sigbus)
        return 0;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_sigaction = vv_on_sigbus;
    /* NODEFER: a handler that we pass on to may raise it again, to die of it. */
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    if (!vv_installed)
        vv_first = now;
    vv_installed = 1;
    vv_previous = now;
    return sigaction(SIGBUS, &action, NULL);
}

/* The caller is the only one who changes the table. A slot, or -1 and errno. */
static int vv_guard_add(void *start, size_t length, size_t page)
{
    struct vv_range *range;
    int at;

    if (vv_guard_install())
        return -1;
    for (at = 0; at < VV_RANGES && vv_ranges[at].end; at++)
        ;
    if (at == VV_RANGES) {
        errno = ENOSPC;
        return -1;
    }
    range = &vv_ranges[at];
    __atomic_store_n(&range->sequence, range->sequence + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&range->start, (uintptr_t)start, __ATOMIC_RELAXED);
    __atomic_store_n(&range->end, (uintptr_t)start + length, __ATOMIC_RELAXED);
    __atomic_store_n(&range->page, (uintptr_t)page, __ATOMIC_RELAXED);
    __atomic_store_n(&range->faults, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&range->sequence, range->sequence + 1, __ATOMIC_RELEASE);
    if (at >= vv_ranges_used)
        __atomic_store_n(&vv_ranges_used, at + 1, __ATOMIC_RELEASE);
    return at;
}

static void vv_guard_remove(int at)
{
    struct vv_range *range = &vv_ranges[at];

    __atomic_store_n(&range->sequence, range->sequence + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&range->start, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&range->end, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&range->sequence, range->sequence + 1, __ATOMIC_RELEASE);
}

static unsigned long vv_guard_faults(int at)
{
    return __atomic_load_n(&vv_ranges[at].faults, __ATOMIC_RELAXED);
}

static unsigned long vv_guard_all_faults(void)
{
    return __atomic_load_n(&vv_faults, __ATOMIC_ACQUIRE);
}

#endif
