/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Accesses to memory that another party writes at the same time: each function is exactly one machine
 * access (vv_load_pair: two), with the order that its name says. The compiler may neither split nor repeat
 * them, which it may do to a plain dereference. All pointers are naturally aligned: the caller checks.
 *
 * "be" says how the value lies in memory: 0 little-endian, 1 big-endian, on hosts of either order.
 */
#ifndef VIRTIOVA_ATOMICS_H
#define VIRTIOVA_ATOMICS_H

#include <stdint.h>
#include <string.h>

/* may_alias: the memory belongs to nobody's C type. */
typedef uint16_t __attribute__((may_alias)) vv_u16;
typedef uint32_t __attribute__((may_alias)) vv_u32;
typedef uint64_t __attribute__((may_alias)) vv_u64;

#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define VV_HOST_IS_BE 1
#elif __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define VV_HOST_IS_BE 0
#else
#error "neither a little-endian nor a big-endian host"
#endif

static inline uint16_t vv_order16(uint16_t value, int be)
{
    return (be != 0) == VV_HOST_IS_BE ? value : __builtin_bswap16(value);
}

static inline uint32_t vv_order32(uint32_t value, int be)
{
    return (be != 0) == VV_HOST_IS_BE ? value : __builtin_bswap32(value);
}

static inline uint64_t vv_order64(uint64_t value, int be)
{
    return (be != 0) == VV_HOST_IS_BE ? value : __builtin_bswap64(value);
}

static inline uint16_t vv_load_relaxed16(const void *at, int be)
{
    return vv_order16(__atomic_load_n((const vv_u16 *)at, __ATOMIC_RELAXED), be);
}

/* As the bytes lie in memory. */
static inline uint64_t vv_load_raw64(const void *at)
{
    return __atomic_load_n((const vv_u64 *)at, __ATOMIC_RELAXED);
}

static inline uint64_t vv_load_raw64_acquire(const void *at)
{
    return __atomic_load_n((const vv_u64 *)at, __ATOMIC_ACQUIRE);
}

static inline void vv_store_relaxed16(void *at, uint16_t value, int be)
{
    __atomic_store_n((vv_u16 *)at, vv_order16(value, be), __ATOMIC_RELAXED);
}

static inline void vv_store_relaxed32(void *at, uint32_t value, int be)
{
    __atomic_store_n((vv_u32 *)at, vv_order32(value, be), __ATOMIC_RELAXED);
}

static inline void vv_store_relaxed64(void *at, uint64_t value, int be)
{
    __atomic_store_n((vv_u64 *)at, vv_order64(value, be), __ATOMIC_RELAXED);
}

static inline uint16_t vv_load_acquire16(const void *at, int be)
{
    return vv_order16(__atomic_load_n((const vv_u16 *)at, __ATOMIC_ACQUIRE), be);
}

static inline uint32_t vv_load_acquire32(const void *at, int be)
{
    return vv_order32(__atomic_load_n((const vv_u32 *)at, __ATOMIC_ACQUIRE), be);
}

static inline void vv_store_release16(void *at, uint16_t value, int be)
{
    __atomic_store_n((vv_u16 *)at, vv_order16(value, be), __ATOMIC_RELEASE);
}

static inline void vv_store_release32(void *at, uint32_t value, int be)
{
    __atomic_store_n((vv_u32 *)at, vv_order32(value, be), __ATOMIC_RELEASE);
}

/* Sets bits of a byte that others set and clear bits of, too; the writes before it are visible to who sees them. */
static inline void vv_or8(void *at, uint8_t bits)
{
    __atomic_fetch_or((uint8_t *)at, bits, __ATOMIC_SEQ_CST);
}

/* Acquire on the first half keeps the second load behind it; the bytes stay in the order they lie in. */
static inline void vv_load_pair(const void *at, char out[16])
{
    const vv_u64 *half = (const vv_u64 *)at;
    const uint64_t first = __atomic_load_n(&half[0], __ATOMIC_ACQUIRE);
    const uint64_t second = __atomic_load_n(&half[1], __ATOMIC_RELAXED);

    memcpy(out, &first, sizeof first);
    memcpy(out + sizeof first, &second, sizeof second);
}

static inline void vv_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#endif
