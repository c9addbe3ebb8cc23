# SPDX-License-Identifier: Apache-2.0
"""The engines of a network device's queues (net.h), the wire that they are on, and the frames that wait."""

cdef extern from "net.h" nogil:
    enum:
        VV_MAX_FRAME
        VV_NET_HEADER
        VV_ARENA
        VV_FRAME_CHAINS
        VV_WIRE_DISCARD
        VV_WIRE_SOCKET
        VV_WIRE_NAMED
        VV_WIRE_TAP
    struct sockaddr_un:
        unsigned short sun_family
        char *sun_path
    struct vv_wire:
        int fd
        int kind
        int gone
        sockaddr_un name
        unsigned name_length
        uint64_t frames
        uint64_t bytes
        uint64_t lost
    struct vv_outbox:
        char *arena
    struct vv_backlog:
        uint32_t *length
        uint32_t limit
        uint64_t dropped
    struct vv_transmit:
        vv_engine engine
        vv_wire *wire
        unsigned header
        uint64_t dropped
        vv_outbox box
    struct vv_receive:
        vv_engine engine
        vv_wire *wire
        vv_backlog *log
        unsigned header
        int mergeable
        vv_chain *chains
    int vv_wire_name(vv_wire *wire, const char *path, size_t length) noexcept
    int vv_backlog_init(vv_backlog *log, uint32_t limit) noexcept
    void vv_backlog_free(vv_backlog *log) noexcept
    uint32_t vv_backlog_count(const vv_backlog *log) noexcept
    uint32_t vv_backlog_at(const vv_backlog *log, uint32_t number) noexcept
    char *vv_backlog_frame(const vv_backlog *log, uint32_t at) noexcept
    void vv_backlog_pop(vv_backlog *log) noexcept
    void vv_backlog_clear(vv_backlog *log) noexcept
    void vv_backlog_drop(vv_backlog *log) noexcept
    void vv_backlog_keep(vv_backlog *log, size_t length) noexcept
    int vv_transmit_init(vv_transmit *net, vv_wire *wire) noexcept
    int vv_receive_init(vv_receive *net, vv_wire *wire, vv_backlog *log) noexcept


@cython.final
cdef class Backlog:
    cdef vv_backlog log

    def __cinit__(self, uint32_t limit):
        if not 0 < limit <= 1 << 16:
            raise ValueError("wanted room for 1 to 65536 frames")
        if vv_backlog_init(&self.log, limit):
            raise MemoryError()

    def __dealloc__(self):
        vv_backlog_free(&self.log)

    def __len__(self):
        return vv_backlog_count(&self.log)

    def append(self, bytes frame not None):
        cdef Py_ssize_t length = PyBytes_Size(frame)
        cdef uint32_t count = vv_backlog_count(&self.log)
        if count >= self.log.limit or length > VV_MAX_FRAME:
            vv_backlog_drop(&self.log)
            return False
        memcpy(vv_backlog_frame(&self.log, vv_backlog_at(&self.log, count)), PyBytes_AsString(frame), <size_t>length)
        vv_backlog_keep(&self.log, <size_t>length)
        return True

    @property
    def first(self):
        return self.log.length[vv_backlog_at(&self.log, 0)] if vv_backlog_count(&self.log) else 0

    def popleft(self):
        cdef uint32_t at = vv_backlog_at(&self.log, 0)
        if not vv_backlog_count(&self.log):
            raise IndexError("no frame waits")
        frame = PyBytes_FromStringAndSize(vv_backlog_frame(&self.log, at), <Py_ssize_t>self.log.length[at])
        vv_backlog_pop(&self.log)
        return frame

    def clear(self):
        vv_backlog_clear(&self.log)

    def drop(self):
        vv_backlog_drop(&self.log)

    @property
    def limit(self):
        return self.log.limit

    @property
    def dropped(self):
        return vv_counted(&self.log.dropped)


@cython.final
cdef class Wire:
    cdef vv_wire wire

    DISCARD = VV_WIRE_DISCARD
    SOCKET = VV_WIRE_SOCKET
    NAMED = VV_WIRE_NAMED
    TAP = VV_WIRE_TAP

    def __cinit__(self, int kind, int fd=-1, bytes name=b""):
        self.wire.kind = kind
        self.wire.fd = fd
        self.wire.gone = kind == VV_WIRE_DISCARD
        if not VV_WIRE_DISCARD <= kind <= VV_WIRE_TAP or (fd < 0) != (kind == VV_WIRE_DISCARD):
            raise ValueError("no such wire")
        if (not name) != (kind != VV_WIRE_NAMED) or vv_wire_name(&self.wire, name, <size_t>PyBytes_Size(name)):
            raise ValueError("no path of a socket")

    def close(self):
        self.wire.fd = -1
        self.wire.gone = True

    @property
    def frames(self):
        return vv_counted(&self.wire.frames)

    @property
    def bytes(self):
        return vv_counted(&self.wire.bytes)

    @property
    def lost(self):
        return vv_counted(&self.wire.lost)


@cython.final
cdef class Transmit(Engine):
    cdef vv_transmit *net
    cdef Wire wire

    def __cinit__(self, Wire wire not None):
        self.net = <vv_transmit *>calloc(1, sizeof(vv_transmit))
        if self.net == NULL or vv_transmit_init(self.net, &wire.wire):
            raise MemoryError()
        self.wire = wire
        self.engine = &self.net.engine

    def __dealloc__(self):
        if self.net != NULL:
            free(self.net.box.arena)
            free(self.net)

    def set_up(self, unsigned header):
        if header > VV_NET_HEADER:
            raise ValueError(f"a header of {header} bytes")
        self.net.header = header

    @property
    def dropped(self):
        return vv_counted(&self.net.dropped)


@cython.final
cdef class Receive(Engine):
    cdef vv_receive *net
    cdef Wire wire
    cdef Backlog log

    def __cinit__(self, Wire wire not None, Backlog log not None):
        self.net = <vv_receive *>calloc(1, sizeof(vv_receive))
        if self.net == NULL or vv_receive_init(self.net, &wire.wire, &log.log):
            raise MemoryError()
        self.wire, self.log = wire, log
        self.engine = &self.net.engine

    def __dealloc__(self):
        if self.net != NULL:
            free(self.net.chains)
            free(self.net)

    def set_up(self, unsigned header, bint mergeable):
        if header > VV_NET_HEADER:
            raise ValueError(f"a header of {header} bytes")
        self.net.header = header
        self.net.mergeable = mergeable
