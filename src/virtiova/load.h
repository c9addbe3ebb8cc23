/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver end of one ring, split or packed, as a load generator: requests that were prepared before, handed to the device and
 * taken back as fast as it goes, in a loop that polls or that sleeps on the call descriptor. What the other side writes
 * is not believed: a used index, an element or a status byte that makes no sense ends the run and is kept.
 *
 * One thread uses a driver. The other side may write to all of the memory at any time.
 */
#ifndef VIRTIOVA_LOAD_H
#define VIRTIOVA_LOAD_H

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#include "atomics.h"

#define VL_MAX_SLOTS 1024
#define VL_PAGE 4096
/* Header and status byte of a request, each request in a line of its own. */
#define VL_HEAD 64
#define VL_STATUS 16
#define VL_NOT_DONE 0xff
/* 32 buckets for each power of two: 3 % wide. */
#define VL_FINE 5
#define VL_BUCKETS ((64 - VL_FINE + 1) << VL_FINE)
#define VL_NEVER 0x7fff
/* Empty looks at the used index before time and sockets are looked at: some microseconds. */
#define VL_IDLE 256
#define VL_BUSY 64
/* A pause instruction may take as long as a whole answer (150 ns on some processors): not before so many looks. */
#define VL_PATIENT 4096

enum { VL_EMPTY, VL_FRAME, VL_READ, VL_WRITE };
/* Why a run ended: its time is over, all requests are done, a watched descriptor has something, the ring is damaged. */
enum { VL_TIME, VL_DONE, VL_LOOK, VL_BAD };
enum { VL_GOOD, VL_BAD_INDEX, VL_BAD_ID, VL_BAD_LENGTH, VL_BAD_STATUS, VL_BAD_DATA, VL_BAD_CALL };

/*
 * A request's buffer: its address for the device, the page of the memory that is behind it, and the page of the disk that
 * is read into it or written from it. A page of the memory always has the same page of the disk.
 */
struct vl_entry {
    uint64_t address;
    uint64_t page;
    uint64_t place;
};

struct vl_slot {
    uint64_t began;
    uint64_t page, place;
    int flying;
};

/* In a packed ring. */
struct vl_place {
    uint32_t index;
    uint16_t wrap;
};

struct vl_tally {
    uint64_t submitted, done, checked, kicks, calls, sleeps;
    uint64_t ticks, nanoseconds;        /* the same time, by both clocks */
    uint64_t latency[VL_BUCKETS];       /* in ticks */
};

struct vl_driver {
    char *desc, *avail, *used;
    char *heads;                        /* VL_HEAD bytes for each slot */
    char *pages;
    uint32_t size;
    int event_idx, packed;
    struct vl_place put, take;          /* packed: where the next request goes, and the next used one comes */
    uint64_t heads_address;
    int kind, zeros;
    int kick, call, watch[2];
    uint32_t per, slots;                /* descriptors for each request; requests in the ring */
    uint32_t length;
    struct vl_entry *entries;
    uint64_t count, next;
    uint16_t made, seen, rearmed;
    uint32_t flying, spare;
    uint16_t free[VL_MAX_SLOTS];
    struct vl_slot slot[VL_MAX_SLOTS];
    int sampled;                        /* the one slot whose data is looked at; -1: none */
    uint32_t every, until;
    int wrong;
    uint64_t wrong_value, wrong_wanted;
    struct vl_tally tally;
};

static inline uint64_t vl_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t vl_ticks(void)
{
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t now;

    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
    return now;
#else
    return vl_clock();
#endif
}

static inline void vl_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* What an image holds: each 8 bytes are their own place in it, mixed (the finalizer of SplitMix64). */
static inline uint64_t vl_word(uint64_t place)
{
    uint64_t mixed = place + UINT64_C(0x9e3779b97f4a7c15);

    mixed = (mixed ^ (mixed >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    mixed = (mixed ^ (mixed >> 27)) * UINT64_C(0x94d049bb133111eb);
    return mixed ^ (mixed >> 31);
}

static void vl_paint(char *at, uint64_t page)
{
    for (uint64_t i = 0; i < VL_PAGE / 8; i++) {
        const uint64_t word = vl_word(page * (VL_PAGE / 8) + i);

        memcpy(at + 8 * i, &word, 8);
    }
}

static inline uint32_t vl_bucket(uint64_t value)
{
    uint32_t shift;

    if (value < (1u << VL_FINE))
        return (uint32_t)value;
    shift = 63 - (uint32_t)__builtin_clzll(value) - VL_FINE;
    return ((shift + 1) << VL_FINE) + (uint32_t)((value >> shift) & ((1u << VL_FINE) - 1));
}

/* The middle of a bucket. */
static inline double vl_middle(uint32_t bucket)
{
    const uint32_t shift = bucket >> VL_FINE;
    const uint64_t low = bucket & ((1u << VL_FINE) - 1);

    if (!shift)
        return (double)low;
    return ((double)(low + (1u << VL_FINE)) + 0.5) * (double)(UINT64_C(1) << (shift - 1));
}

static int vl_is_wrong(struct vl_driver *d, int what, uint64_t value, uint64_t wanted)
{
    d->wrong = what;
    d->wrong_value = value;
    d->wrong_wanted = wanted;
    return -1;
}

static inline void vl_store64(char *at, uint64_t value)
{
    __atomic_store_n((vv_u64 *)at, value, __ATOMIC_RELAXED);
}

static int vl_look(struct vl_driver *d, uint32_t slot)
{
    const struct vl_slot *s = &d->slot[slot];
    const char *at = d->pages + s->page * VL_PAGE;

    d->sampled = -1;
    d->tally.checked++;
    for (uint64_t i = 0; i < VL_PAGE / 8; i++) {
        const uint64_t wanted = d->zeros ? 0 : vl_word(s->place * (VL_PAGE / 8) + i);
        uint64_t found;

        memcpy(&found, at + 8 * i, 8);
        if (found != wanted)
            return vl_is_wrong(d, VL_BAD_DATA, found, wanted);
    }
    return 0;
}

/* A request that is out is done, with so many bytes written; -1 if that is not so. */
static inline int vl_back(struct vl_driver *d, uint32_t slot, uint32_t length, uint64_t now)
{
    if (d->kind >= VL_READ) {
        const unsigned char status =
            (unsigned char)__atomic_load_n(d->heads + slot * VL_HEAD + VL_STATUS, __ATOMIC_RELAXED);
        const uint32_t most = 1 + (d->kind == VL_READ ? d->length : 0);

        if (status)
            return vl_is_wrong(d, VL_BAD_STATUS, status, 0);
        if (length > most)
            return vl_is_wrong(d, VL_BAD_LENGTH, length, most);
        if (d->sampled == (int)slot && vl_look(d, slot))
            return -1;
    }
    d->tally.latency[vl_bucket(now - d->slot[slot].began)]++;
    d->slot[slot].flying = 0;
    d->free[d->spare++] = (uint16_t)slot;
    d->flying--;
    d->tally.done++;
    return 0;
}

#include "load_packed.h"

/* Descriptors that stay as they are; only the address of the data changes from one request to the next. */
static void vl_describe(struct vl_driver *d, uint64_t heads)
{
    d->heads_address = heads;
    for (uint32_t slot = 0; slot < d->slots; slot++) {
        const uint32_t first = slot * d->per;
        const int disk = d->kind >= VL_READ;

        for (uint32_t i = 0; !d->packed && i < d->per; i++) {
            char *at = d->desc + 16 * (first + i);
            uint64_t address = 0;
            uint32_t length = d->length;
            uint16_t flags = i + 1 < d->per, next = (uint16_t)(first + i + 1);

            if (disk && i != 1) {
                address = heads + slot * VL_HEAD + (i ? VL_STATUS : 0);
                length = i ? 1 : 16;
            }
            if (disk && (i == 2 || (i == 1 && d->kind == VL_READ)))
                flags |= 2;
            if (d->kind == VL_EMPTY)
                address = heads + slot * VL_HEAD;
            memcpy(at, &address, 8);
            memcpy(at + 8, &length, 4);
            memcpy(at + 12, &flags, 2);
            memcpy(at + 14, &next, 2);
        }
        memset(d->heads + slot * VL_HEAD, 0, VL_HEAD);
        if (disk) {
            const uint32_t type = d->kind == VL_WRITE;

            memcpy(d->heads + slot * VL_HEAD, &type, 4);
        }
        d->slot[slot].flying = 0;
        d->free[d->slots - 1 - slot] = (uint16_t)slot;
    }
    d->spare = d->slots;
}

static inline void vl_submit(struct vl_driver *d, uint64_t now)
{
    const uint16_t slot = d->free[--d->spare];
    const uint32_t first = slot * d->per;
    struct vl_slot *s = &d->slot[slot];
    uint64_t address = d->heads_address + slot * VL_HEAD;

    if (d->kind != VL_EMPTY) {
        const struct vl_entry *e = &d->entries[d->next];

        if (++d->next == d->count)
            d->next = 0;
        s->page = e->page;
        s->place = e->place;
        address = e->address;
        if (!d->packed)
            vl_store64(d->desc + 16 * (first + (d->kind >= VL_READ)), address);
        if (d->kind >= VL_READ) {
            char *head = d->heads + slot * VL_HEAD;

            vl_store64(head + 8, e->place * (VL_PAGE / 512));
            __atomic_store_n(head + VL_STATUS, (char)VL_NOT_DONE, __ATOMIC_RELAXED);
        }
        if (d->kind == VL_READ && d->sampled < 0 && !d->until--) {
            /* Only one is looked at at a time: whatever else reads into its page brings the same bytes. */
            memset(d->pages + e->page * VL_PAGE, 0xdb, VL_PAGE);
            d->sampled = slot;
            d->until = d->every;
        }
    }
    s->began = now;
    s->flying = 1;
    if (d->packed)
        vl_packed_put(d, slot, address);
    else
        __atomic_store_n((vv_u16 *)(d->avail + 4 + 2 * (d->made & (d->size - 1))), vv_order16((uint16_t)first, 0),
                         __ATOMIC_RELAXED);
    d->made++;
    d->flying++;
    d->tally.submitted++;
}

/* The other side has everything from here on. 0, or -1 for a descriptor that cannot be told. */
static inline void vl_publish(struct vl_driver *d, uint16_t old)
{
    int wanted;

    if (!d->packed)
        vv_store_release16(d->avail + 2, d->made, 0);
    vv_fence();
    if (d->packed) {
        wanted = vl_packed_wanted(d, (uint16_t)(d->made - old) * d->per);
    } else if (d->event_idx) {
        const uint16_t event = vv_load_acquire16(d->used + 4 + 8 * (uint64_t)d->size, 0);

        wanted = (uint16_t)(d->made - event - 1) < (uint16_t)(d->made - old);
    } else {
        wanted = !(vv_load_acquire16(d->used, 0) & 1);
    }
    if (wanted) {
        const uint64_t one = 1;

        d->tally.kicks++;
        if (write(d->kick, &one, 8) < 0) {
            /* Full: it has been told, and has not looked yet. */
        }
    }
}

static inline int vl_split_reap(struct vl_driver *d, uint64_t now)
{
    const uint16_t index = vv_load_acquire16(d->used + 2, 0);
    const uint16_t count = (uint16_t)(index - d->seen);

    if (!count)
        return 0;
    if (count > d->flying)
        return vl_is_wrong(d, VL_BAD_INDEX, index, d->seen);
    for (uint16_t i = 0; i < count; i++, d->seen++) {
        const char *element = d->used + 4 + 8 * (uint64_t)(d->seen & (d->size - 1));
        const uint32_t id = vv_order32(__atomic_load_n((const vv_u32 *)element, __ATOMIC_RELAXED), 0);
        const uint32_t length = vv_order32(__atomic_load_n((const vv_u32 *)(element + 4), __ATOMIC_RELAXED), 0);
        const uint32_t slot = d->per == 1 ? id : id / 3;

        if (slot >= d->slots || id != slot * d->per || !d->slot[slot].flying)
            return vl_is_wrong(d, VL_BAD_ID, id, d->slots * d->per);
        if (vl_back(d, slot, length, now))
            return -1;
    }
    return count;
}

/* Takes back what is done: how many, or -1 for what cannot be. */
static inline int vl_reap(struct vl_driver *d, uint64_t now)
{
    return d->packed ? vl_packed_reap(d, now) : vl_split_reap(d, now);
}

/* Whether the device is to call for what it does next: used_event, or the flag. */
static inline void vl_calls(struct vl_driver *d, int wanted)
{
    if (d->packed) {
        vl_packed_calls(d, wanted);
    } else if (d->event_idx) {
        const uint16_t event = wanted ? d->seen : (uint16_t)(d->seen + VL_NEVER);

        vv_store_release16(d->avail + 4 + 2 * (uint64_t)d->size, event, 0);
    } else {
        vv_store_release16(d->avail, !wanted, 0);
    }
    d->rearmed = d->seen;
}

static int vl_watched(struct vl_driver *d, int call, int milliseconds)
{
    struct pollfd fds[3];
    nfds_t count = 0;
    int found;

    for (int i = 0; i < 2; i++)
        if (d->watch[i] >= 0)
            fds[count++] = (struct pollfd){.fd = d->watch[i], .events = POLLIN};
    if (call)
        fds[count++] = (struct pollfd){.fd = d->call, .events = POLLIN};
    found = poll(fds, count, milliseconds);
    if (found <= 0)
        return 0;
    if (call && fds[count - 1].revents) {
        uint64_t value;

        if (fds[count - 1].revents & POLLIN && read(d->call, &value, 8) == 8)
            d->tally.calls++;
        else if (errno != EAGAIN && errno != EINTR)
            return vl_is_wrong(d, VL_BAD_CALL, (uint64_t)fds[count - 1].revents, 0);
        found--;
    }
    return found > 0;
}

/* Waits for the next call: 1 if a watched descriptor has something, -1 if the call descriptor is broken. */
static int vl_sleep(struct vl_driver *d, uint64_t nanoseconds)
{
    vl_calls(d, 1);
    vv_fence();
    if (d->packed ? d->flying && vl_packed_is_used(d) : vv_load_acquire16(d->used + 2, 0) != d->seen)
        return 0;
    d->tally.sleeps++;
    return vl_watched(d, 1, (int)(nanoseconds / 1000000 + 1));
}

static void vl_forget(struct vl_driver *d)
{
    memset(&d->tally, 0, sizeof d->tally);
}

/*
 * Keeps "depth" requests with the device for so long, or until "limit" have been submitted and are done (0: no limit).
 * A depth of 0 takes back what is out. Requests that are out at the end stay out, and the next run goes on with them.
 */
static int vl_run(struct vl_driver *d, uint32_t depth, uint64_t nanoseconds, uint64_t limit, int sleeping)
{
    const uint64_t from = vl_clock(), from_ticks = vl_ticks();
    uint32_t idle = 0, busy = 0;
    int why = VL_TIME;

    vl_calls(d, 0);
    for (;;) {
        uint64_t now = vl_ticks();
        const uint16_t old = d->made;
        const int got = vl_reap(d, now);

        if (got < 0) {
            why = VL_BAD;
            break;
        }
        while (d->flying < depth && d->spare && (!limit || d->tally.submitted < limit))
            vl_submit(d, now);
        if (d->made != old)
            vl_publish(d, old);
        if (!d->flying && (!depth || limit)) {
            why = VL_DONE;
            break;
        }
        if (got || d->made != old) {
            idle = 0;
            if ((uint16_t)(d->seen - d->rearmed) > VL_NEVER / 2)
                vl_calls(d, 0);
            if (++busy < VL_BUSY)
                continue;
            busy = 0;
        } else if (!sleeping) {
            if (++idle > VL_PATIENT)
                vl_relax();
            if (idle % VL_IDLE)
                continue;
        }
        now = vl_clock();
        if (now - from >= nanoseconds)
            break;
        if (got || d->made != old)
            continue;
        {
            const int seen = sleeping ? vl_sleep(d, nanoseconds - (now - from)) : vl_watched(d, 0, 0);

            if (seen) {
                why = seen < 0 ? VL_BAD : VL_LOOK;
                break;
            }
        }
    }
    d->tally.ticks += vl_ticks() - from_ticks;
    d->tally.nanoseconds += vl_clock() - from;
    return why;
}

/* The smallest device there is: gives back what it finds, with each first descriptor looked at. How many. */
static uint64_t vl_echo(const char *desc, const char *avail, char *used, uint32_t size, uint64_t nanoseconds)
{
    const uint64_t from = vl_clock();
    uint16_t done = vv_load_acquire16(used + 2, 0);
    uint64_t count = 0;
    uint32_t turns = 0, idle = 0;

    for (;;) {
        const uint16_t index = vv_load_acquire16(avail + 2, 0);

        if (done == index) {
            if (++idle > VL_PATIENT)
                vl_relax();
            if (idle % VL_IDLE == 0 && vl_clock() - from >= nanoseconds)
                return count;
            continue;
        }
        idle = 0;
        for (; done != index; done++, count++) {
            const uint16_t head =
                vv_order16(__atomic_load_n((const vv_u16 *)(avail + 4 + 2 * (done & (size - 1))), __ATOMIC_RELAXED), 0);
            char *element = used + 4 + 8 * (uint64_t)(done & (size - 1));
            char descriptor[16];

            vv_load_pair(desc + 16 * (uint64_t)(head & (size - 1)), descriptor);
            __atomic_store_n((vv_u32 *)element, vv_order32(head, 0), __ATOMIC_RELAXED);
            __atomic_store_n((vv_u32 *)(element + 4), descriptor[15] & 0x80 ? 1 : 0, __ATOMIC_RELAXED);
        }
        vv_store_release16(used + 2, done, 0);
        if (++turns % VL_BUSY == 0 && vl_clock() - from >= nanoseconds)
            return count;
    }
}

#endif
