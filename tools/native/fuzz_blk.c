/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A disk without Python (blk.h), in memory or in a file, for a driver that writes what it likes, whenever it likes. Whatever
 * that is: nothing is taken and not given back, no byte outside of the disk is moved, none of the disk changes if it may
 * only be read, and none of the driver's that the device may not write.
 */
#include "driver.h"

#include "blk.h"

#define SECTORS 16u
#define DISK (SECTORS * VV_SECTOR)

static struct vv_blk blk;
static char room[3 * PAGE + DISK];
static char *const memory = room + PAGE;
static char kept[DISK];
static int file = -1;

static void disk(char *to)
{
    if (blk.memory)
        memcpy(to, memory, DISK);
    else
        WANT(pread(file, to, DISK, 0) == DISK);
}

static void set_up(struct input *input)
{
    const uint64_t kind = take(input, 1);
    const uint32_t size = 1u << take(input, 1) % 5;
    unsigned at;

    memset(&ring, 0, sizeof ring);
    ring.packed = kind & 1;
    ring.event_idx = kind >> 1 & 1;
    ring.indirect = kind >> 2 & 1;
    vv_ring_init(&ring, &guest.radix, BASE, BASE + PAGE + (take(input, 1) & 0xfc), BASE + 2 * PAGE + (take(input, 2) & 0xffc), size);
    if (!ring.packed)
        ring.next_avail = ring.seen_avail = ring.next_used = (uint16_t)take(input, 2);
    vv_blk_init(&blk);
    if (file < 0) {
        file = memfd_create("disk", MFD_CLOEXEC);
        ASAN_POISON_MEMORY_REGION(room, PAGE);
        ASAN_POISON_MEMORY_REGION(memory + DISK, PAGE);
    }
    for (at = 0; at < DISK; at++)
        kept[at] = (char)(at / VV_SECTOR + 1);
    memcpy(memory, kept, DISK);
    if (kind & 8) {
        WANT(pwrite(file, kept, DISK, 0) == DISK);
        blk.fd = file;
    } else {
        blk.memory = memory;
    }
    blk.sectors = SECTORS;
    blk.most = kind & 16 ? 1024 : 1 << 20;
    blk.may_write = !(kind & 32);
}

/* What is asked for, where a descriptor may lead: mostly something that there is. */
static void header(struct input *input)
{
    const unsigned page = (unsigned)take(input, 1), offset = (unsigned)take(input, 2);
    const uint32_t type = (uint32_t)take(input, 1) % 3;
    const uint64_t how = take(input, 1), sector = how < 0xf0 ? how % (SECTORS + 2) : take(input, 8);

    driver_writes(page, offset % PAGE, &type, 4);
    driver_writes(page, offset % PAGE + 8, &sector, 8);
}

static void work(struct input *input)
{
    static const uint32_t stop;
    struct vv_tally tally = {0};
    const uint16_t before = ring.next_used;
    int got;

    vv_ring_begin(&ring);
    got = blk.engine.work(&blk.engine, &ring, 1 + (unsigned)take(input, 1) % 64, &stop, &tally);
    WANT(got == VV_GOT || got == VV_EMPTY || got == VV_HELP);
    WANT(vv_ring_publish(&ring) == VV_GOT);
    WANT(ring.taken == 0 && ring.unpublished == 0 && blk.engine.begun == 0);
    if (!ring.packed)
        WANT((uint16_t)(ring.next_used - before) == tally.requests);
    WANT(tally.bytes >= 17 * tally.requests);
    vv_ring_wants_call(&ring);
    if (got == VV_EMPTY)
        WANT(vv_ring_arm(&ring) != VV_HELP || !ring.packed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char now[DISK];
    struct input input = {data, size};
    const uint32_t forbidden = (uint32_t)take(&input, 4);

    guest_begin(~forbidden);
    set_up(&input);
    while (input.left) {
        switch (take(&input, 1) % 8) {
        case 0:
        case 1:
            descriptor(&input);
            break;
        case 2:
            offer(&input);
            break;
        case 3:
            header(&input);
            break;
        case 4:
        case 5:
            work(&input);
            break;
        case 6:
            guest_plan(&input);
            break;
        default:
            guest_map((unsigned)take(&input, 1), (unsigned)take(&input, 1));
        }
        guest_check();
    }
    if (!blk.may_write) {
        disk(now);
        WANT(!memcmp(now, kept, DISK));
    }
    guest_end();
    return 0;
}
