# SPDX-License-Identifier: Apache-2.0
"""Waiting for anything at all, with plain IOTLB messages done on the way (answers.pxi)."""

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        int msg_flags
    int MSG_PEEK
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int MSG_CTRUNC
    Py_ssize_t recvmsg(int fd, msghdr *message, int flags) noexcept
    Py_ssize_t sendto(int fd, const void *data, size_t size, int flags, void *address, unsigned length) noexcept

cdef extern from "<poll.h>" nogil:
    short POLLIN
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int milliseconds) noexcept

cdef extern from "Python.h":
    int check_signals "PyErr_CheckSignals"() except -1

from libc.errno cimport EINTR

cdef packed struct vv_done:
    uint32_t request, flags, length
    uint64_t value

cdef enum:
    PUMP_FDS = 512
    # 1489 messages, for which a millisecond is enough; and as many acknowledgements.
    PUMP_ROOM = 1 << 16
    DONE = 20
    # Version 1, a reply.
    DONE_FLAGS = 5
    # Runs after which others have waited for long enough.
    PUMP_RUNS = 16


cdef Py_ssize_t look_in(int fd, char *room, size_t size, int flags) noexcept nogil:
    """What is in a socket; -1 for none, or if a descriptor comes with it."""
    cdef iovec into
    cdef msghdr message
    cdef Py_ssize_t found
    memset(&message, 0, sizeof(msghdr))
    into.iov_base = room
    into.iov_len = size
    message.msg_iov = &into
    message.msg_iovlen = 1
    found = recvmsg(fd, &message, flags | MSG_DONTWAIT)
    return -1 if message.msg_flags & MSG_CTRUNC else found


@cython.final
cdef class Pump:
    cdef char *room
    cdef vv_done *done
    cdef pollfd polled[PUMP_FDS]
    cdef readonly unsigned updates
    cdef readonly unsigned invalidates
    cdef readonly uint64_t longest
    cdef readonly bytes unsent

    def __cinit__(self):
        cdef Py_ssize_t at
        self.room = <char *>malloc(PUMP_ROOM)
        self.done = <vv_done *>malloc(PUMP_ROOM // ANSWER * sizeof(vv_done))
        if self.room == NULL or self.done == NULL:
            raise MemoryError()
        for at in range(PUMP_ROOM // ANSWER):
            self.done[at].request = IOTLB_MSG
            self.done[at].flags = DONE_FLAGS
            self.done[at].length = 8
            self.done[at].value = 0
        self.unsent = b""

    def __dealloc__(self):
        free(self.room)
        free(self.done)

    cdef Py_ssize_t some(self, int fd, Answers answers, Py_ssize_t most) except -2:
        """Take what has come of plain messages out of the socket and answer them: their bytes; 0 for none.

        They are looked at before they are taken, so that a descriptor can come with none of them, and the first that is
        not plain stays there.
        """
        cdef Py_ssize_t size = look_in(fd, self.room, PUMP_ROOM, MSG_PEEK), taken, sent
        cdef uint64_t arrived, took
        cdef unsigned counts[4]
        if size < ANSWER:
            return 0
        arrived = vv_now()
        answers.run(self.room, size, most, counts)
        if not counts[0]:
            return 0
        taken = counts[0] * <Py_ssize_t>ANSWER
        if look_in(fd, self.room, taken, 0) != taken:
            raise ProtocolError("what was in the socket is not there any more")
        self.updates += counts[1]
        self.invalidates += counts[2]
        size = counts[3] * sizeof(vv_done)
        sent = sendto(fd, self.done, size, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0) if size else 0
        if sent < size:
            # Also if it failed: whoever tries again hears of it.
            self.unsent = (<char *>self.done)[(sent if sent > 0 else 0):size]
        if counts[2]:
            took = vv_now() - arrived
            if took > self.longest:
                self.longest = took
        return taken

    cdef object answer(self, int fd, answered):
        """Hand over what has come of answers: None if it is not for us, or whether there is something to do."""
        cdef Py_ssize_t size = look_in(fd, self.room, PUMP_ROOM, MSG_PEEK)
        if size <= 0 or look_in(fd, self.room, size, 0) != size:
            return None
        return answered((<char *>self.room)[:size])

    def wait(
        self,
        list fds not None,
        int milliseconds,
        Answers answers=None,
        Py_ssize_t most=0,
        heard=None,
        int channel=-1,
        answered=None,
    ):
        cdef Py_ssize_t count = len(fds), at, taken, second = -1
        cdef int found, runs = 0
        cdef bint todo
        cdef uint64_t now, end = 0
        if count > PUMP_FDS:
            raise ValueError(f"{count} descriptors, wanted at most {PUMP_FDS}")
        for at in range(count):
            self.polled[at].fd, self.polled[at].events = fds[at]
            if channel >= 0 and self.polled[at].fd == channel:
                second = at
        self.updates = self.invalidates = 0
        self.longest = 0
        self.unsent = b""
        if milliseconds > 0:
            end = vv_now() + <uint64_t>milliseconds * 1000000
        while True:
            with nogil:
                found = poll(self.polled, <unsigned long>count, milliseconds)
            if found < 0:
                if errno != EINTR:
                    raise OSError(errno, strerror(errno).decode("ascii", "replace"))
                check_signals()
                return []
            todo = False
            if answers is not None and count and self.polled[0].revents == POLLIN:
                taken = self.some(self.polled[0].fd, answers, most)
                if taken:
                    self.polled[0].revents = 0
                    found -= 1
                    todo = heard is not None and heard((<char *>self.room)[:taken])
            if second >= 0 and self.polled[second].revents == POLLIN:
                what = self.answer(channel, answered)
                if what is not None:
                    self.polled[second].revents = 0
                    found -= 1
                    todo = todo or what
            runs += 1
            if todo or found or self.unsent or runs == PUMP_RUNS or not milliseconds:
                break
            if end:
                now = vv_now()
                milliseconds = <int>((end - now + 999999) // 1000000) if now < end else 0
        return [
            (self.polled[at].fd, self.polled[at].revents) for at in range(count) if self.polled[at].revents
        ]
