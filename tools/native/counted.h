/* SPDX-License-Identifier: Apache-2.0 */
/* What pieces of work have in common whose instructions are counted (tools/instructions.py). */
#ifndef VIRTIOVA_COUNTED_H
#define VIRTIOVA_COUNTED_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <valgrind/callgrind.h>

#include "radix.h"
#include "ring.h"

#define PAGE 4096u

/* Where results go, so that no work is left out. */
static volatile uint64_t vv_sink;

static void done(const char *name, unsigned times)
{
    char text[128];

    snprintf(text, sizeof text, "%s/%u", name, times);
    CALLGRIND_DUMP_STATS_AT(text);
}

static char *memory(size_t size)
{
    char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED)
        abort();
    return at;
}

/* -- a ring, and the memory of its driver */

#define SIZE 256u
#define DESC 0x100000u
#define AVAIL 0x200000u
#define USED 0x300000u
#define TABLES 0x400000u
#define HEADERS 0x500000u
#define DATA 0x600000u

/* Every page on its own, and none beside its neighbour, as a guest's strict mappings are. */
static void map(struct vv_radix *radix, char *ram, unsigned pages, uint64_t iova)
{
    static unsigned used;
    unsigned at;

    for (at = 0; at < pages; at++, used++)
        if (vv_radix_put(radix, iova + at * (uint64_t)PAGE, VV_PAGE_SHIFT,
                         (uint64_t)(uintptr_t)(ram + (size_t)(used * 2 + 1) % 4096 * PAGE) | VV_READ | VV_WRITE))
            abort();
}

static char *at_iova(const struct vv_radix *radix, uint64_t iova)
{
    uint64_t left;
    char *at = vv_radix_find(radix, iova, VV_READ, &left);

    if (!at)
        abort();
    return at;
}

static void put_desc(const struct vv_radix *radix, uint64_t where, uint64_t address, uint32_t length, uint16_t third,
                     uint16_t fourth)
{
    char *at = at_iova(radix, where);

    memcpy(at, &address, 8);
    memcpy(at + 8, &length, 4);
    memcpy(at + 12, &third, 2);
    memcpy(at + 14, &fourth, 2);
}

#endif
