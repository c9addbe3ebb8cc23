/* SPDX-License-Identifier: Apache-2.0 */
/*
 * IOVA -> host address and permission, in one 64-bit entry a leaf: four levels of 512 entries cover 48 bits, with
 * leaves of 4 KiB, 2 MiB and 1 GiB. A cache: it may lack anything, and forget anything at any time. Taking a
 * mapping back is a store of 0.
 *
 * Entry: 0 empty; VV_TABLE | pointer to the next level; else host address of the leaf's first byte, a multiple of
 * 4096 whatever the size of the leaf, | VV_READ | VV_WRITE; in a leaf of 4 KiB also VV_SHORT(bytes), if only so many from
 * its first byte on are mapped. The caller keeps the memory there while it is in here.
 */
#ifndef VIRTIOVA_RADIX_H
#define VIRTIOVA_RADIX_H

#include <stdint.h>
#include <stdlib.h>

#define VV_READ 1u
#define VV_WRITE 2u
#define VV_TABLE 4u
/* Above any address of a process's (47 bits), so that a whole leaf has none of it. */
#define VV_SHORT_SHIFT 48
#define VV_SHORT(bytes) ((uint64_t)(bytes) << VV_SHORT_SHIFT)
#define VV_BITS 9
#define VV_FANOUT (1u << VV_BITS)
#define VV_PAGE_SHIFT 12
#define VV_ROOT_SHIFT 39
#define VV_LARGEST_SHIFT 30
#define VV_COVERED ((uint64_t)1 << 48)
#define VV_OFFSET (((uint64_t)1 << VV_PAGE_SHIFT) - 1)
/* 4 KiB each: 16 MiB, or 8 GiB of IOVAs in 4 KiB leaves. */
#define VV_MAX_TABLES 4096u

struct vv_radix {
    uint64_t *root;
    uint64_t generation; /* another one as soon as anything that was found may not be so any more */
    unsigned tables;
};

static inline uint64_t *vv_next(uint64_t entry)
{
    return (uint64_t *)(uintptr_t)(entry & ~(uint64_t)VV_TABLE);
}

static inline uint64_t *vv_new_table(struct vv_radix *radix)
{
    uint64_t *table;

    if (radix->tables >= VV_MAX_TABLES)
        return NULL;
    table = calloc(VV_FANOUT, sizeof *table);
    radix->tables += table != NULL;
    return table;
}

/* At most four levels deep. */
static void vv_free_table(struct vv_radix *radix, uint64_t *table)
{
    unsigned at;

    for (at = 0; at < VV_FANOUT; at++)
        if (table[at] & VV_TABLE)
            vv_free_table(radix, vv_next(table[at]));
    free(table);
    radix->tables--;
}

static inline void vv_radix_clear(struct vv_radix *radix)
{
    if (radix->root)
        vv_free_table(radix, radix->root);
    radix->root = NULL;
    radix->generation++;
}

/* The host address of iova if the leaf there allows all that is needed, and how many bytes of it are left. */
static inline char *vv_radix_find(const struct vv_radix *radix, uint64_t iova, unsigned needed, uint64_t *left)
{
    const uint64_t *table = radix->root;
    unsigned shift = VV_ROOT_SHIFT;
    uint64_t entry, inside;

    if (!table || iova >= VV_COVERED)
        return NULL;
    for (;;) {
        entry = table[(iova >> shift) & (VV_FANOUT - 1)];
        if (!(entry & VV_TABLE))
            break;
        table = vv_next(entry);
        shift -= VV_BITS;
    }
    if (!entry || (entry & needed) != needed)
        return NULL;
    inside = iova & (((uint64_t)1 << shift) - 1);
    *left = ((uint64_t)1 << shift) - inside;
    if (__builtin_expect(entry >> VV_SHORT_SHIFT != 0, 0)) {
        const uint64_t bytes = entry >> VV_SHORT_SHIFT;

        if (inside >= bytes)
            return NULL;
        *left = bytes - inside;
        entry &= VV_SHORT(1) - 1;
    }
    return (char *)(uintptr_t)(entry & ~VV_OFFSET) + inside;
}

/* The largest leaf around iova of which all bytes are from first to last, both included; 0 if there is none. */
static inline unsigned vv_radix_shift(uint64_t iova, uint64_t first, uint64_t last)
{
    unsigned shift;

    for (shift = VV_LARGEST_SHIFT; shift >= VV_PAGE_SHIFT; shift -= VV_BITS) {
        const uint64_t inside = ((uint64_t)1 << shift) - 1;

        if ((iova & ~inside) >= first && (iova | inside) <= last)
            return shift;
    }
    return 0;
}

/* How many bytes of the page around iova are from first to last if they begin with it and do not end with it; or 0. */
static inline unsigned vv_radix_short(uint64_t iova, uint64_t first, uint64_t last)
{
    const uint64_t page = iova & ~VV_OFFSET;

    return page >= first && last >= page && last < (page | VV_OFFSET) ? (unsigned)(last - page + 1) : 0;
}

/* Put a leaf in, in place of what is there; -1 without memory, or with too many tables. */
static inline int vv_radix_put(struct vv_radix *radix, uint64_t iova, unsigned shift, uint64_t entry)
{
    unsigned level;
    uint64_t *table, *at;

    if (!radix->root && !(radix->root = vv_new_table(radix)))
        return -1;
    table = radix->root;
    for (level = VV_ROOT_SHIFT;; level -= VV_BITS) {
        at = &table[(iova >> level) & (VV_FANOUT - 1)];
        if (level == shift)
            break;
        if (!(*at & VV_TABLE)) {
            /* Instead of a larger leaf, perhaps. */
            uint64_t *fresh = vv_new_table(radix);

            if (!fresh)
                return -1;
            radix->generation += *at != 0;
            *at = (uint64_t)(uintptr_t)fresh | VV_TABLE;
        }
        table = vv_next(*at);
    }
    if (*at & VV_TABLE)
        vv_free_table(radix, vv_next(*at));
    radix->generation += *at != 0;
    *at = entry;
    return 0;
}

/* Empty all leaves that have a byte from first to last; both lie below this table. */
static void vv_drop(struct vv_radix *radix, uint64_t *table, unsigned shift, uint64_t first, uint64_t last)
{
    const uint64_t inside = ((uint64_t)1 << shift) - 1;
    const unsigned end = (last >> shift) & (VV_FANOUT - 1);
    unsigned at;

    for (at = (first >> shift) & (VV_FANOUT - 1); at <= end; at++) {
        if (table[at] & VV_TABLE) {
            const uint64_t from = at == ((first >> shift) & (VV_FANOUT - 1)) ? first & inside : 0;
            const uint64_t to = at == end ? last & inside : inside;

            if (from || to != inside) {
                vv_drop(radix, vv_next(table[at]), shift - VV_BITS, from, to);
                continue;
            }
            vv_free_table(radix, vv_next(table[at]));
        }
        table[at] = 0;
    }
}

static inline void vv_radix_drop(struct vv_radix *radix, uint64_t first, uint64_t last)
{
    if (!radix->root || first > last || first >= VV_COVERED)
        return;
    radix->generation++;
    vv_drop(radix, radix->root, VV_ROOT_SHIFT, first, last < VV_COVERED ? last : VV_COVERED - 1);
}

#endif
