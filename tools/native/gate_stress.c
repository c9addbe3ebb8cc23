/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Workers (worker.h) that write into a driver's pages as fast as they can, and a main thread that takes pages away under
 * the gate. A page that was taken away is painted and looked at for a while: nobody may change a byte of it any more.
 * Rings are taken away, too, and go on somewhere else.
 *
 * Usage: gate_stress SEED MILLISECONDS WORKERS. Prints what was done as JSON; status 1 and a line if a byte has changed,
 * or if a worker did nothing between two looks at it.
 */
#define _GNU_SOURCE
#include "points.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "worker.h"

#define PAGE 4096u
#define MOST 4u
/* Seconds within which every worker has done something, on any machine. */
#ifndef GIVE_UP
#define GIVE_UP 60u
#endif
#define SIZE 64u
#define DATA_PAGES 8u
#define POOL 64u
/* Pages that were taken away and are looked at, before they are used again. */
#define PAINTED 16u
#define DESC 0x10000u
#define AVAIL 0x11000u
#define USED 0x12000u
#define DATA 0x20000u

struct painted {
    char *page;
    unsigned char with;
};

struct writer {
    struct vv_engine engine; /* first */
    struct vv_chain chain;
    unsigned char mark;
};

/* What one worker serves: a ring and pages of its own, but one table and one gate for all. */
struct served {
    struct vv_worker worker;
    struct vv_ring ring;
    struct writer writer;
    char *page[3 + DATA_PAGES]; /* of the ring's parts, and of the data */
    uint16_t avail;
    uint64_t before;
};

static struct vv_gate gate;
static struct vv_radix radix;
static struct served served[MOST];
static unsigned workers;
static struct painted painted[PAINTED];
static unsigned next_painted;
static char *unused[POOL * MOST];
static unsigned unused_count;
static uint64_t random_state;

static void fail(const char *what)
{
    fprintf(stderr, "gate_stress: %s\n", what);
    _exit(1);
}

static unsigned random_below(unsigned most)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)((random_state >> 33) % most);
}

static uint64_t iova_of(unsigned worker, unsigned which)
{
    const uint64_t base = (uint64_t)worker << 24;

    return base + (which < 3 ? DESC + which * PAGE : DATA + (which - 3) * PAGE);
}

/* -- a device: writes its mark all over every buffer, a byte at a time here and there */

static int writer_work(struct vv_engine *engine, struct vv_ring *ring, unsigned budget, const uint32_t *stop,
                       struct vv_tally *tally)
{
    struct writer *writer = (struct writer *)engine;
    unsigned piece;
    int got = VV_GOT;

    for (; budget && !__atomic_load_n(stop, __ATOMIC_RELAXED); budget--) {
        got = vv_ring_next(ring, &writer->chain);
        if (got != VV_GOT)
            break;
        for (piece = 0; piece < writer->chain.pieces; piece++) {
            char *at = writer->chain.piece[piece].at;
            const uint32_t length = writer->chain.piece[piece].length;

            at[0] = (char)writer->mark;
            vv_point();
            memset(at, writer->mark, length / 2);
            vv_point();
            at[length - 1] = (char)writer->mark;
        }
        if (vv_ring_push(ring, &writer->chain, 1) != VV_GOT)
            fail("a chain cannot be given back in its batch");
        vv_count(&tally->requests, 1);
    }
    return got;
}

/* -- the driver, which is the main thread's too */

static void put(unsigned worker, unsigned which, char *page)
{
    served[worker].page[which] = page;
    if (vv_radix_put(&radix, iova_of(worker, which), VV_PAGE_SHIFT, (uint64_t)(uintptr_t)page | VV_READ | VV_WRITE))
        fail("no memory for the table");
}

static void lay_ring(unsigned worker)
{
    struct served *it = &served[worker];
    unsigned at;

    for (at = 0; at < SIZE; at++) {
        const uint64_t address = iova_of(worker, 3 + at % DATA_PAGES) + at / DATA_PAGES * 512;
        const uint32_t length = 256;
        const uint16_t flags = VV_F_WRITE, head = (uint16_t)at;

        memcpy(it->page[0] + 16 * at, &address, 8);
        memcpy(it->page[0] + 16 * at + 8, &length, 4);
        memcpy(it->page[0] + 16 * at + 12, &flags, 2);
        memcpy(it->page[1] + 4 + 2 * at, &head, 2);
    }
}

/* Offer again what was given back. */
static void drive(unsigned worker)
{
    struct served *it = &served[worker];
    const uint16_t used = vv_load_acquire16(it->page[2] + 2, 0);

    if ((uint16_t)(it->avail - used) > SIZE)
        fail("a used index that jumps");
    it->avail = (uint16_t)(used + SIZE);
    vv_store_release16(it->page[1] + 2, it->avail, 0);
    vv_signal(it->worker.kick);
}

/* -- the main thread */

static void look(const struct painted *it)
{
    unsigned at;

    for (at = 0; it->page && at < PAGE; at++)
        if ((unsigned char)it->page[at] != it->with)
            fail("a page that was taken away has changed");
}

/* Paint it; what was painted longest ago is looked at for the last time, and used again. */
static void paint(char *page)
{
    struct painted *it = &painted[next_painted++ % PAINTED];

    look(it);
    if (it->page)
        unused[unused_count++] = it->page;
    it->page = page;
    it->with = (unsigned char)(0x80 + random_below(0x40));
    memset(page, it->with, PAGE);
}

static void hold(void)
{
    unsigned at;

    vv_gate_close(&gate);
    for (at = 0; at < workers; at++)
        while (vv_gate_await(&served[at].worker.busy))
            ;
}

/* One mapping, or several at a time, lead elsewhere; a ring's part goes on there with what it had. */
static unsigned take_away(void)
{
    char *gone[4];
    const unsigned count = 1 + random_below(4);
    unsigned at;

    hold();
    for (at = 0; at < count; at++) {
        const unsigned worker = random_below(workers), which = random_below(3 + DATA_PAGES);
        char *page = unused[--unused_count];

        gone[at] = served[worker].page[which];
        if (which < 3)
            memcpy(page, gone[at], PAGE);
        vv_radix_drop(&radix, iova_of(worker, which), iova_of(worker, which) + PAGE - 1);
        put(worker, which, page);
    }
    /* Here it is acknowledged: before anybody is let in again, and as well a while after it. */
    if (random_below(2))
        for (at = 0; at < count; at++)
            paint(gone[at]), gone[at] = NULL;
    vv_gate_open(&gate);
    for (at = 0; at < count; at++)
        if (gone[at])
            paint(gone[at]);
    return count;
}

static void start(unsigned worker)
{
    struct served *it = &served[worker];
    unsigned which;

    for (which = 0; which < 3 + DATA_PAGES; which++)
        put(worker, which, unused[--unused_count]);
    lay_ring(worker);
    it->ring.event_idx = 0;
    vv_ring_init(&it->ring, &radix, iova_of(worker, 0), iova_of(worker, 1), iova_of(worker, 2), SIZE);
    it->writer.engine.work = writer_work;
    it->writer.engine.fd = -1;
    it->writer.mark = (unsigned char)(worker + 1);
    it->worker.gate = &gate;
    it->worker.ring = &it->ring;
    it->worker.engine = &it->writer.engine;
    it->worker.kick = eventfd(0, EFD_NONBLOCK);
    it->worker.call = -1;
    it->worker.wake = eventfd(0, EFD_NONBLOCK);
    it->worker.help = eventfd(0, EFD_NONBLOCK);
    it->worker.spin = worker % 2 ? 20000 : 0;
    if (vv_worker_start(&it->worker))
        fail("no thread");
    vv_worker_turn(&it->worker, VV_RUN);
}

static uint64_t requests(unsigned worker)
{
    return __atomic_load_n(&served[worker].worker.tally.requests, __ATOMIC_RELAXED);
}

/* Every worker comes to its turn again, however often the gate was closed. */
static void run_again(unsigned worker)
{
    const uint64_t since = vv_now();

    while (requests(worker) == served[worker].before) {
        drive(worker);
        sched_yield();
        if (vv_now() - since > GIVE_UP * 1000000000u)
            fail("a worker does nothing any more");
    }
    served[worker].before = requests(worker);
}

static void end(unsigned worker)
{
    hold();
    if (vv_worker_whose(&served[worker].worker) != VV_RUN)
        fail("a worker has asked for help");
    vv_worker_turn(&served[worker].worker, VV_END);
    vv_gate_open(&gate);
    vv_signal(served[worker].worker.wake);
    vv_worker_join(&served[worker].worker);
}

int main(int count, char **words)
{
    uint64_t until, gates = 0, pages = 0, done = 0;
    unsigned at;

    if (count != 4 || (workers = (unsigned)atoi(words[3])) < 1 || workers > MOST)
        return 2;
    vv_seed = random_state = strtoull(words[1], NULL, 0);
    until = vv_now() + strtoull(words[2], NULL, 0) * 1000000;
    vv_most_spinners = 1;
    for (; unused_count < POOL * workers; unused_count++) {
        unused[unused_count] = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (unused[unused_count] == MAP_FAILED)
            fail("no memory");
    }
    for (at = 0; at < workers; at++)
        start(at);
    while (vv_now() < until) {
        for (at = 0; at < workers; at++)
            drive(at);
        for (at = random_below(200); at; at--)
            vv_point();
        pages += take_away();
        gates++;
        for (at = 0; at < PAINTED; at++)
            look(&painted[at]);
        if (gates % 64 == 0)
            for (at = 0; at < workers; at++)
                run_again(at);
    }
    for (at = 0; at < workers; at++) {
        run_again(at);
        end(at);
        done += requests(at);
    }
    for (at = 0; at < PAINTED; at++)
        look(&painted[at]);
    printf("{\"gates\": %llu, \"pages\": %llu, \"requests\": %llu}\n", (unsigned long long)gates,
           (unsigned long long)pages, (unsigned long long)done);
    return 0;
}
