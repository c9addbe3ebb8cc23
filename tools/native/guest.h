/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A driver's memory for fuzz targets: pages behind a table of IOVAs, with poison around them, and a driver that writes
 * into them at any time. Everything that the driver writes is written into a shadow, too, so that whatever else has
 * changed in a page that the device may not write is the device's doing.
 */
#ifndef VIRTIOVA_GUEST_H
#define VIRTIOVA_GUEST_H

#include <sanitizer/asan_interface.h>
#include <string.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "meddle.h"
#include "radix.h"

#define PAGE 4096u
/* Two neighbours, one page of poison, and so on. */
#define PAGES 16u
#define BASE ((uint64_t)0x10000)
#define LARGE ((uint64_t)1 << 30)
#define LARGE_SIZE ((size_t)1 << 21)

#define ARENA ((PAGES / 2 * 3 + 1) * (uint64_t)PAGE)

/* A place, or the one that was looked at last: whoever looks there again finds something else. */
struct write {
    uint16_t page, offset;
    int again;
    uint64_t value;
};

struct guest {
    char *arena, *large;
    char shadow[PAGES][PAGE];
    struct vv_radix radix;
    uint8_t allowed[PAGES];
    /* What the driver will write, and before how many loads from now. */
    struct write planned[4];
    unsigned plans, loads;
    const char *looked;
};

static struct guest guest;

static char *page_at(unsigned page)
{
    return guest.arena + (page / 2 * 3 + 1 + page % 2) * (size_t)PAGE;
}

static void driver_writes(unsigned page, unsigned offset, const void *from, unsigned length)
{
    page %= PAGES;
    offset %= PAGE;
    if (length > PAGE - offset)
        length = PAGE - offset;
    memcpy(page_at(page) + offset, from, length);
    memcpy(guest.shadow[page] + offset, from, length);
}

static void vv_meddle(const void *at)
{
    const uint64_t before = (uint64_t)(guest.looked - guest.arena), number = before / PAGE;

    guest.looked = at;
    if (!guest.plans || guest.loads--)
        return;
    const struct write *plan = &guest.planned[--guest.plans];

    guest.loads = plan->value % 3;
    if (!plan->again)
        driver_writes(plan->page, plan->offset, &plan->value, sizeof plan->value);
    else if (before < ARENA && number % 3)
        driver_writes((unsigned)(number / 3 * 2 + number % 3 - 1), (unsigned)(before % PAGE), &plan->value, 8);
}

static void guest_plan(struct input *input)
{
    if (guest.plans < sizeof guest.planned / sizeof *guest.planned) {
        struct write *plan = &guest.planned[guest.plans++];

        plan->page = (uint16_t)take(input, 1);
        plan->again = plan->page & 0x80;
        plan->offset = (uint16_t)(take(input, 2) & ~7u);
        plan->value = take(input, 8);
        guest.loads = (unsigned)take(input, 1) % 16;
    }
}

static void guest_map(unsigned page, unsigned allowed)
{
    const uint64_t iova = BASE + page % PAGES * (uint64_t)PAGE;

    page %= PAGES;
    guest.allowed[page] = (uint8_t)(allowed & 3);
    if (!guest.allowed[page])
        vv_radix_drop(&guest.radix, iova, iova + PAGE - 1);
    else
        WANT(!vv_radix_put(&guest.radix, iova, VV_PAGE_SHIFT, (uint64_t)(uintptr_t)page_at(page) | (allowed & 3)));
    /* What is in there now is the driver's. */
    memcpy(guest.shadow[page], page_at(page), PAGE);
}

static char *fresh(size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    WANT(at != MAP_FAILED);
    return at;
}

/* All pages are zero; two bits of "allowed" for each say what the device may do there. */
static void guest_begin(uint32_t allowed)
{
    unsigned page;

    if (!guest.arena) {
        guest.arena = fresh(ARENA);
        guest.large = fresh(2 * LARGE_SIZE);
        guest.large = (char *)(((uintptr_t)guest.large + LARGE_SIZE - 1) & ~(LARGE_SIZE - 1));
        for (page = 0; page <= PAGES / 2; page++)
            ASAN_POISON_MEMORY_REGION(guest.arena + page * 3 * (size_t)PAGE, PAGE);
    }
    guest.plans = 0;
    guest.looked = NULL;
    memset(&guest.radix, 0, sizeof guest.radix);
    for (page = 0; page < PAGES; page++) {
        memset(page_at(page), 0, PAGE);
        guest_map(page, allowed >> 2 * page & 3);
    }
    WANT(!vv_radix_put(&guest.radix, LARGE, 21, (uint64_t)(uintptr_t)guest.large | VV_READ | VV_WRITE));
}

/* Nothing was changed that the device may not write. */
static void guest_check(void)
{
    unsigned page;

    for (page = 0; page < PAGES; page++)
        if (!(guest.allowed[page] & VV_WRITE))
            WANT(!memcmp(page_at(page), guest.shadow[page], PAGE));
}

static void guest_end(void)
{
    guest_check();
    vv_radix_clear(&guest.radix);
}

/* Whether all bytes are ones that the device may use so. */
static int guest_allows(const char *at, uint32_t length, unsigned needed)
{
    uint64_t offset = (uint64_t)(at - guest.large);

    if (offset < LARGE_SIZE)
        return length <= LARGE_SIZE - offset;
    while (length) {
        const uint64_t place = (uint64_t)(at - guest.arena), number = place / PAGE;
        const uint32_t here = (uint32_t)(PAGE - place % PAGE);
        const unsigned page = (unsigned)(number / 3 * 2 + number % 3 - 1);

        if (place >= ARENA || number % 3 == 0 || page >= PAGES ||
            (guest.allowed[page] & needed) != needed)
            return 0;
        if (length <= here)
            break;
        at += here;
        length -= here;
    }
    return 1;
}

#endif
