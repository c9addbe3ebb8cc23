/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The table of IOVAs against a list of its leaves, which is looked through from end to end. The input is a sequence of
 * operations. What is in the list has to be found, with its permission and no byte more; what is not must not be; and
 * whenever something that was found is not there any more, the generation is another one.
 */
#include <string.h>

#include "fuzz.h"
#include "radix.h"

#define LEAVES 512u

struct leaf {
    uint64_t iova, entry;
    unsigned shift;
};

static struct leaf leaves[LEAVES];
static unsigned used;

static uint64_t last_of(const struct leaf *leaf)
{
    return leaf->iova + (((uint64_t)1 << leaf->shift) - 1);
}

/* Take out all leaves that have a byte from first to last; whether there were any. */
static int forget(uint64_t first, uint64_t last)
{
    unsigned at = 0;
    const unsigned before = used;

    while (at < used) {
        if (first <= last && leaves[at].iova <= last && last_of(&leaves[at]) >= first)
            leaves[at] = leaves[--used];
        else
            at++;
    }
    return used != before;
}

static const struct leaf *listed(uint64_t iova)
{
    unsigned at;

    for (at = 0; at < used; at++)
        if (leaves[at].iova <= iova && iova <= last_of(&leaves[at]))
            return &leaves[at];
    return NULL;
}

/* Around the borders of all levels, mostly. */
static uint64_t address(struct input *input)
{
    static const unsigned shifts[] = {12, 21, 30, 39, 47, 48, 63};
    const uint64_t how = take(input, 1);
    const uint64_t base = (how & 7) == 7 ? take(input, 8) : ((how >> 3) & 3) << shifts[how & 7];

    return base + (uint64_t)(int64_t)(int8_t)take(input, 1) * (how & 0x80 ? 1 : 0x1000);
}

static void find(const struct vv_radix *radix, uint64_t iova, unsigned needed)
{
    const struct leaf *leaf = listed(iova);
    uint64_t left = 0;
    const char *at = vv_radix_find(radix, iova, needed, &left);

    if (!leaf || (leaf->entry & needed) != needed) {
        WANT(at == NULL);
        return;
    }
    WANT(at == (const char *)(uintptr_t)(leaf->entry & ~VV_OFFSET) + (iova - leaf->iova));
    WANT(left == last_of(leaf) - iova + 1);
}

static void put(struct vv_radix *radix, struct input *input)
{
    static const unsigned shifts[] = {12, 12, 21, 30};
    const unsigned shift = shifts[take(input, 1) & 3];
    const uint64_t iova = address(input) & (VV_COVERED - 1) & ~(((uint64_t)1 << shift) - 1);
    const uint64_t allowed = 1 + take(input, 1) % 3;
    const uint64_t entry = ((1 + take(input, 4)) << VV_PAGE_SHIFT) | allowed;
    const uint64_t generation = radix->generation;

    if (used == LEAVES)
        return;
    if (forget(iova, iova + (((uint64_t)1 << shift) - 1)) | !!vv_radix_put(radix, iova, shift, entry))
        WANT(radix->generation != generation);
    leaves[used++] = (struct leaf){iova, entry, shift};
}

static void drop(struct vv_radix *radix, struct input *input)
{
    const uint64_t first = address(input), last = take(input, 1) & 1 ? address(input) : first + take(input, 5);
    const uint64_t generation = radix->generation;

    vv_radix_drop(radix, first, last);
    if (forget(first, last))
        WANT(radix->generation != generation);
}

static void shift(struct input *input)
{
    const uint64_t iova = address(input), first = iova - take(input, 4), last = iova + take(input, 4);
    const unsigned found = first <= iova && iova <= last ? vv_radix_shift(iova, first, last) : 0;
    const uint64_t inside = found ? ((uint64_t)1 << found) - 1 : 0;

    if (found)
        WANT((iova & ~inside) >= first && (iova | inside) <= last);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct vv_radix radix;
    unsigned at;

    memset(&radix, 0, sizeof radix);
    used = 0;
    while (input.left) {
        switch (take(&input, 1) % 6) {
        case 0:
        case 1:
            put(&radix, &input);
            break;
        case 2:
            drop(&radix, &input);
            break;
        case 3:
            shift(&input);
            break;
        case 4:
            find(&radix, address(&input), 1 + (unsigned)take(&input, 1) % 3);
            break;
        default:
            if (take(&input, 1) == 0) {
                vv_radix_clear(&radix);
                used = 0;
                WANT(radix.tables == 0);
            }
        }
        for (at = 0; at < used; at++) {
            find(&radix, leaves[at].iova, VV_READ);
            find(&radix, last_of(&leaves[at]), VV_WRITE);
            find(&radix, last_of(&leaves[at]) + 1, VV_READ);
            find(&radix, leaves[at].iova - 1, VV_READ);
        }
    }
    vv_radix_clear(&radix);
    WANT(radix.tables == 0);
    return 0;
}
