/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Before every atomic access of the headers that are included after this one: perhaps another thread. Which thread waits
 * when, and for how long, is a schedule that one seed states: the nth access of the mth thread always does the same. What
 * the kernel makes of it is the kernel's.
 */
#ifndef VIRTIOVA_POINTS_H
#define VIRTIOVA_POINTS_H

#include <sched.h>
#include <stdint.h>
#include <time.h>

static uint64_t vv_seed = 1;
static uint32_t vv_threads;
static __thread uint64_t vv_state;

static void vv_point(void)
{
    uint64_t mixed;

    /* Numbered as they come here first: the main thread before all others. */
    if (!vv_state)
        vv_state = (vv_seed << 8 | (__atomic_add_fetch(&vv_threads, 1, __ATOMIC_RELAXED) & 0xff)) * 2654435761u | 1;
    vv_state ^= vv_state << 13;
    vv_state ^= vv_state >> 7;
    vv_state ^= vv_state << 17;
    mixed = vv_state * 0x9e3779b97f4a7c15u >> 48;
    if (mixed % 64 == 0)
        sched_yield();
    else if (mixed % 64 == 1)
        for (volatile unsigned turn = 0; turn < mixed / 8; turn++)
            ;
    else if (mixed % 4096 == 2)
        nanosleep(&(struct timespec){0, 20000 + (long)mixed}, NULL);
}

#define __atomic_load_n(at, order) (vv_point(), __atomic_load_n(at, order))
#define __atomic_store_n(at, value, order) (vv_point(), __atomic_store_n(at, value, order))
#define __atomic_thread_fence(order) (vv_point(), __atomic_thread_fence(order))

#endif
