/* SPDX-License-Identifier: Apache-2.0 */
/* A hostile driver of the ring under test (guest.h has its memory): descriptors, heads and indices, as the input says. */
#ifndef VIRTIOVA_DRIVER_H
#define VIRTIOVA_DRIVER_H

#include "guest.h"
#include "ring.h"

static struct vv_ring ring;

static uint64_t place(struct input *input)
{
    const uint64_t how = take(input, 1);

    switch (how >> 6) {
    case 3:
        return how & 1 ? take(input, 8) : LARGE + (take(input, 3) & (LARGE_SIZE - 1));
    default:
        return BASE + (how % (PAGES + 1)) * PAGE + take(input, 2) % PAGE;
    }
}

static uint32_t length(struct input *input)
{
    static const uint32_t usual[] = {0, 1, 16, 32, 48, 64, 512, 4095, 4096, 4097, 8192, 8193, 1 << 21, 0x80000000, 0xffffffff};
    const uint64_t how = take(input, 1);

    return how < 0xf0 ? usual[how % (sizeof usual / sizeof *usual)] : (uint32_t)take(input, 4);
}

/* Into the descriptor ring, or behind it, or into a page where a table may be. */
static void descriptor(struct input *input)
{
    const uint64_t which = take(input, 1), address = place(input);
    const uint32_t size = length(input);
    const uint16_t third = (uint16_t)take(input, 1), fourth = (uint16_t)take(input, 1);
    const uint64_t table = BASE + (PAGES - 2) * PAGE, at = which & 0x80 ? table : ring.desc;
    const uint64_t iova = at + 16 * (which & 0x7f);
    /* Packed: the flags are last, with the marks of a wrap counter. */
    const uint16_t marks = (uint16_t)((fourth & 0x10 ? 0x80 : 0) | (fourth & 0x20 ? 0x8000 : 0));
    char bytes[16];

    memcpy(bytes, &address, 8);
    memcpy(bytes + 8, &size, 4);
    memcpy(bytes + 12, &third, 2);
    if (ring.packed) {
        const uint16_t flags = (uint16_t)((fourth & 7) | marks);

        memcpy(bytes + 14, &flags, 2);
    } else {
        memcpy(bytes + 14, &fourth, 2);
    }
    if (iova - BASE < PAGES * (uint64_t)PAGE)
        driver_writes((unsigned)((iova - BASE) / PAGE), (unsigned)(iova % PAGE), bytes, 16);
}

static void put16(uint64_t iova, uint16_t value)
{
    if (iova - BASE < PAGES * (uint64_t)PAGE)
        driver_writes((unsigned)((iova - BASE) / PAGE), (unsigned)(iova % PAGE), &value, 2);
}

/* Split: a head, and the index one further. */
static void offer(struct input *input)
{
    static uint16_t index;
    const uint64_t how = take(input, 1);

    if (how & 0x80)
        index = (uint16_t)take(input, 2);
    else
        index = (uint16_t)(ring.next_avail + 1 + how % 3);
    put16(ring.avail + 4 + 2 * (uint64_t)((uint16_t)(index - 1) % (ring.size ? ring.size : 1)), (uint16_t)take(input, 1));
    put16(ring.avail + 2, index);
}

#endif
