/* SPDX-License-Identifier: Apache-2.0 */
/*
 * atomics.h, with somebody who writes into memory between two of its loads: before each of them vv_meddle() is called
 * with its address. To be included before any other header of the native half.
 */
#ifndef VIRTIOVA_MEDDLE_H
#define VIRTIOVA_MEDDLE_H

static void vv_meddle(const void *at);

#define vv_load_relaxed16 vv_real_load_relaxed16
#define vv_load_raw64 vv_real_load_raw64
#define vv_load_raw64_acquire vv_real_load_raw64_acquire
#define vv_load_acquire16 vv_real_load_acquire16
#define vv_load_acquire32 vv_real_load_acquire32
#define vv_load_pair vv_real_load_pair
#include "atomics.h"
#undef vv_load_relaxed16
#undef vv_load_raw64
#undef vv_load_raw64_acquire
#undef vv_load_acquire16
#undef vv_load_acquire32
#undef vv_load_pair

static inline uint16_t vv_load_relaxed16(const void *at, int be)
{
    vv_meddle(at);
    return vv_real_load_relaxed16(at, be);
}

static inline uint64_t vv_load_raw64(const void *at)
{
    vv_meddle(at);
    return vv_real_load_raw64(at);
}

static inline uint64_t vv_load_raw64_acquire(const void *at)
{
    vv_meddle(at);
    return vv_real_load_raw64_acquire(at);
}

static inline uint16_t vv_load_acquire16(const void *at, int be)
{
    vv_meddle(at);
    return vv_real_load_acquire16(at, be);
}

static inline uint32_t vv_load_acquire32(const void *at, int be)
{
    vv_meddle(at);
    return vv_real_load_acquire32(at, be);
}

static inline void vv_load_pair(const void *at, char out[16])
{
    vv_meddle(at);
    vv_real_load_pair(at, out);
}

#endif
