# SPDX-License-Identifier: Apache-2.0
"""The native end of a ring (ring.h) for devices in Python: requests come out of it in batches."""

from virtiova.errors import AccessError, ProtocolError

cdef extern from "ring.h" nogil:
    enum:
        VV_EMPTY
        VV_GOT
        VV_HELP
        VV_MAX_PIECES
        VV_INFLIGHT_HEADER
        VV_INFLIGHT_ENTRY
        VV_LISTED_HEADER
        VV_LISTED_ENTRY
    struct vv_piece:
        char *at
        uint32_t length
    struct vv_chain:
        uint16_t id
        uint16_t slots
        uint16_t buffers
        uint16_t readable
        uint16_t pieces
        uint64_t out
        uint64_t into "in"
        uint16_t first_note
        uint16_t last_note
        vv_piece *piece
    struct vv_desc:
        pass
    struct vv_ring:
        uint64_t used
        uint8_t packed
        uint8_t event_idx
        uint8_t indirect
        uint8_t in_order
        uint16_t next_avail
        uint16_t seen_avail
        uint16_t next_used
        uint8_t avail_wrap
        uint8_t used_wrap
        uint32_t untold
        uint32_t size
        uint32_t taken
        uint32_t unpublished
        char *inflight
        uint32_t inflight_entries
        uint64_t inflight_counter
        uint16_t *batch
        vv_desc *listed
    void vv_ring_init(
        vv_ring *ring, const vv_radix *radix, uint64_t desc, uint64_t avail, uint64_t used, uint32_t size
    ) noexcept
    void vv_ring_begin(vv_ring *ring) noexcept
    int vv_ring_next(vv_ring *ring, vv_chain *chain) noexcept
    void vv_ring_put_back(vv_ring *ring, const vv_chain *chain) noexcept
    int vv_ring_push(vv_ring *ring, const vv_chain *chain, uint32_t written) noexcept
    int vv_ring_publish(vv_ring *ring) noexcept
    int vv_ring_wants_call(vv_ring *ring) noexcept
    void vv_ring_quiet(vv_ring *ring) noexcept
    int vv_ring_arm(vv_ring *ring) noexcept

cdef extern from "missing.h" nogil:
    struct vv_want:
        uint64_t address
        uint64_t length
        unsigned needed
    struct vv_missing:
        unsigned count
        unsigned first
        vv_want *want
    int vv_missing_look(vv_missing *missing, const vv_ring *of, unsigned chains) noexcept

cdef enum:
    # What fits into a request without memory of its own: the usual three buffers, in two pages each.
    FEW = 6


cdef struct Cursor:
    # Over pieces: the next byte is that at offset of pieces[at]; left bytes are left.
    vv_piece *pieces
    unsigned at
    uint32_t offset
    uint64_t left


cdef void move(Cursor *cursor, char *ours, uint64_t count, bint out) noexcept nogil:
    """The next count bytes, which are there, to or from our memory; over them, if that is NULL."""
    cdef vv_piece *piece
    cdef uint64_t step
    cursor.left -= count
    while count:
        piece = &cursor.pieces[cursor.at]
        step = piece.length - cursor.offset
        if step > count:
            step = count
        if ours != NULL:
            if out:
                memcpy(piece.at + cursor.offset, ours, step)
            else:
                memcpy(ours, piece.at + cursor.offset, step)
            ours += step
        count -= step
        cursor.offset += <uint32_t>step
        if cursor.offset == piece.length:
            cursor.at += 1
            cursor.offset = 0


@cython.final
@cython.no_gc
cdef class Request:
    cdef Drain drain
    cdef uint64_t generation
    cdef uint64_t done
    cdef uint64_t total
    cdef Cursor source
    cdef Cursor room
    cdef vv_piece few[FEW]
    cdef vv_piece *many
    cdef uint16_t id
    cdef uint16_t slots
    cdef uint16_t buffers
    cdef uint16_t first_note
    cdef uint16_t last_note
    cdef bint gap

    def __dealloc__(self):
        free(self.many)

    cdef int check(self) except -1:
        if self.drain is None:
            raise ValueError("the request was given back")
        if self.generation != self.drain.radix.table.generation:
            raise ValueError("what the request's addresses meant has changed")
        return 0

    @property
    def head(self):
        return self.id

    @property
    def length(self):
        return self.buffers

    @property
    def readable(self):
        return self.source.left

    @property
    def writable(self):
        return self.room.left

    @property
    def written(self):
        return self.done

    @property
    def moved(self):
        return self.total

    def read(self, n=None):
        cdef uint64_t count = self.source.left
        cdef uint64_t wanted
        self.check()
        if n is not None:
            wanted = n if n > 0 else 0
            if wanted < count:
                count = wanted
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>count)
        move(&self.source, PyBytes_AsString(data), count, False)
        self.total += count
        return data

    cdef int has_room(self, uint64_t count, str verb) except -1:
        self.check()
        if count > self.room.left:
            raise ProtocolError(f"the driver has room for 0x{self.room.left:x} bytes, wanted {verb}0x{count:x}")
        return 0

    cdef void advance(self, uint64_t count) noexcept:
        self.total += count
        if not self.gap:
            self.done += count

    def write(self, bytes data not None):
        cdef uint64_t count = <uint64_t>PyBytes_Size(data)
        self.has_room(count, "")
        move(&self.room, PyBytes_AsString(data), count, True)
        self.advance(count)

    def skip(self, n):
        cdef uint64_t count
        if n < 0:
            raise ProtocolError(f"the driver has room for 0x{self.room.left:x} bytes, wanted to skip 0x{n:x}")
        count = n
        self.has_room(count, "to skip ")
        if count:
            self.gap = True
            move(&self.room, NULL, count, True)


@cython.final
@cython.no_gc
cdef class Drain:
    cdef vv_ring ring
    cdef vv_chain chain
    cdef readonly Radix radix
    cdef uint64_t generation
    cdef Window notes
    cdef int stopped

    def __cinit__(
        self,
        Radix radix not None,
        uint64_t desc,
        uint64_t avail,
        uint64_t used,
        uint32_t size,
        *,
        bint packed=False,
        bint event_idx,
        bint indirect,
        bint in_order=False,
    ):
        self.radix = radix
        self.ring.packed = packed
        self.ring.event_idx = event_idx
        self.ring.indirect = indirect
        self.ring.in_order = in_order
        vv_ring_init(&self.ring, &radix.table, desc, avail, used, size)
        self.generation = radix.table.generation
        self.stopped = VV_EMPTY

    def __dealloc__(self):
        self.forget_notes()

    cdef void enter(self) noexcept:
        """Before anything else: what was found may not be so any more."""
        if self.generation != self.radix.table.generation:
            self.generation = self.radix.table.generation
            vv_ring_begin(&self.ring)

    cdef void forget_notes(self) noexcept:
        self.ring.inflight = NULL
        free(self.ring.batch)
        self.ring.batch = NULL
        free(self.ring.listed)
        self.ring.listed = NULL
        if self.notes is not None:
            self.notes.pins -= 1
            self.notes = None

    @property
    def state(self):
        cdef vv_ring *ring = &self.ring
        if ring.packed:
            return (
                ring.next_avail | ring.avail_wrap << 15,
                ring.next_used | ring.used_wrap << 15,
                min(ring.untold, ring.size),
            )
        return ring.next_avail, ring.next_used, <uint16_t>ring.untold

    @state.setter
    def state(self, state):
        cdef uint16_t avail, used
        cdef uint32_t untold
        cdef int taken
        cdef vv_ring *ring = &self.ring
        avail, used, untold = state
        if ring.unpublished:
            raise ValueError("something was pushed and not published")
        if ring.packed:
            if (avail & 0x7fff) >= ring.size or (used & 0x7fff) >= ring.size:
                raise ValueError("not a place in this ring")
            taken = (avail & 0x7fff) - (used & 0x7fff) + (<int>ring.size if (avail ^ used) >> 15 else 0)
            if not 0 <= taken <= <int>ring.size:
                raise ValueError("places more than a lap apart")
            ring.avail_wrap = avail >> 15
            ring.used_wrap = used >> 15
            avail &= 0x7fff
            used &= 0x7fff
        ring.next_avail = ring.seen_avail = avail
        ring.next_used = used
        ring.untold = untold

    @property
    def taken(self):
        return self.ring.taken

    @property
    def needs_help(self):
        return self.stopped == VV_HELP

    def note_in(self, Window window, offset=0, uint32_t entries=0, uint64_t counter=0):
        cdef char *at
        self.forget_notes()
        if window is None:
            return
        if self.ring.packed:
            at = window.span(offset, VV_LISTED_HEADER + VV_LISTED_ENTRY * <Py_ssize_t>entries, 8)
        else:
            at = window.span(offset, VV_INFLIGHT_HEADER + VV_INFLIGHT_ENTRY * <Py_ssize_t>entries, 8)
        self.ring.batch = <uint16_t *>calloc(self.ring.size, sizeof(uint16_t))
        if self.ring.batch == NULL:
            raise MemoryError()
        if self.ring.packed:
            self.ring.listed = <vv_desc *>calloc(self.ring.size, sizeof(vv_desc))
            if self.ring.listed == NULL:
                self.forget_notes()
                raise MemoryError()
        self.ring.inflight = at
        self.ring.inflight_entries = entries
        self.ring.inflight_counter = counter
        self.notes = window
        window.pins += 1

    @property
    def counter(self):
        return self.ring.inflight_counter

    @counter.setter
    def counter(self, uint64_t counter):
        self.ring.inflight_counter = counter

    cdef Request request(self):
        """Of the chain that was got."""
        cdef Request request = Request.__new__(Request)
        cdef vv_chain *chain = &self.chain
        cdef vv_piece *pieces = request.few
        if chain.pieces > FEW:
            pieces = request.many = <vv_piece *>malloc(chain.pieces * sizeof(vv_piece))
            if pieces == NULL:
                raise MemoryError()
        memcpy(pieces, chain.piece, chain.pieces * sizeof(vv_piece))
        request.drain = self
        request.generation = self.generation
        request.source.pieces = pieces
        request.source.left = chain.out
        request.room.pieces = pieces + chain.readable
        request.room.left = chain.into
        request.id = chain.id
        request.slots = chain.slots
        request.buffers = chain.buffers
        request.first_note = chain.first_note
        request.last_note = chain.last_note
        return request

    def pop(self, Py_ssize_t limit):
        cdef list requests = []
        cdef Py_ssize_t count = 0
        self.enter()
        self.stopped = VV_GOT
        while count < limit:
            self.stopped = vv_ring_next(&self.ring, &self.chain)
            if self.stopped != VV_GOT:
                break
            if <uint64_t>self.radix.limit < self.chain.out or <uint64_t>self.radix.limit < self.chain.into:
                vv_ring_put_back(&self.ring, &self.chain)
                self.stopped = VV_HELP
                break
            requests.append(self.request())
            count += 1
        return requests

    cdef int end(self, Request request) except -1:
        """The request is over: its numbers as a chain."""
        if request.drain is not self:
            raise ValueError("not a request of this ring, or given back before")
        self.chain.id = request.id
        self.chain.slots = request.slots
        self.chain.first_note = request.first_note
        self.chain.last_note = request.last_note
        request.drain = None
        return 0

    def put_back(self, list requests not None):
        for each in reversed(requests):
            self.end(<Request?>each)
            vv_ring_put_back(&self.ring, &self.chain)

    cdef int lay(self, Request request, uint64_t count) except -1:
        self.enter()
        self.end(request)
        if vv_ring_push(&self.ring, &self.chain, <uint32_t>count if count <= 0xffffffff else 0xffffffff) != VV_GOT:
            request.drain = self
            raise AccessError(self.ring.used, 4, "the used ring is out of reach")
        return 0

    cdef int publish(self) except -1:
        if vv_ring_publish(&self.ring) != VV_GOT:
            raise AccessError(self.ring.used, 4, "the used ring is out of reach")
        return 0

    def give(self, Request request not None):
        cdef uint64_t moved = request.total
        self.lay(request, request.done)
        self.publish()
        return moved

    def push(self, Request request not None, written):
        self.lay(request, written)
        self.publish()

    def push_all(self, requests):
        for request, written in requests:
            self.lay(<Request?>request, written)
        self.publish()

    def needs_interrupt(self):
        self.enter()
        return bool(vv_ring_wants_call(&self.ring))

    def disable_notify(self):
        self.enter()
        vv_ring_quiet(&self.ring)

    def enable_notify(self):
        self.enter()
        self.stopped = vv_ring_arm(&self.ring)
        return self.stopped != VV_EMPTY

    def missing(self, unsigned chains):
        cdef vv_missing *missing
        cdef unsigned at
        cdef unsigned first = 0
        cdef list wants = []
        missing = <vv_missing *>malloc(sizeof(vv_missing))
        if missing == NULL:
            raise MemoryError()
        if vv_missing_look(missing, &self.ring, chains):
            first = missing.first
            for at in range(missing.count):
                wants.append((missing.want[at].address, missing.want[at].length, missing.want[at].needed))
        free(missing)
        return first, wants
