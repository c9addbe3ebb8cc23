# SPDX-License-Identifier: Apache-2.0
"""Runs of IOTLB messages, as far as they are simple. Described in ``_core.pyi``.

Beside Python's way, which does the same and all the rest: the first message that is anything but plain is left to it,
with nothing of it done. So nothing here has a message for anybody.
"""

from cpython.buffer cimport PyBUF_SIMPLE

cdef extern from "Python.h":
    unsigned long long PyLong_AsUnsignedLongLongMask(object o) except? 0

cdef packed struct vv_answer:
    uint32_t request, flags, length
    uint64_t iova, size, user
    uint8_t allowed, kind
    uint8_t padding[6]

cdef enum:
    ANSWER = 44
    IOTLB_MSG = 22
    PAYLOAD = 32
    # Version 1, and no reply; and whether one is wanted.
    FLAGS = 7
    VERSION = 1
    NEED_REPLY = 8
    UPDATE = 2
    INVALIDATE = 3

cdef struct vv_place:
    uint64_t user, size, gpa


cdef Py_ssize_t up_to(list numbers, uint64_t what) except -1:
    """How many of them, in order, are not above ``what``."""
    cdef Py_ssize_t low = 0, high = len(numbers), middle
    while low < high:
        middle = (low + high) >> 1
        if <uint64_t>PyLong_AsUnsignedLongLongMask(numbers[middle]) <= what:
            low = middle + 1
        else:
            high = middle
    return low


@cython.final
cdef class Answers:
    cdef Radix radix
    cdef object intervals
    cdef object make
    cdef Py_ssize_t load
    cdef unsigned eager
    cdef vv_place *places
    cdef list windows
    # Those of the interval map, which it may replace.
    cdef list firsts, starts, lists

    def __cinit__(self, Radix radix not None, intervals, make, unsigned eager):
        self.radix = radix
        self.intervals = intervals
        self.make = make
        self.load = intervals.load
        self.eager = eager
        self.windows = []

    def __dealloc__(self):
        free(self.places)

    def memory(self, regions):
        cdef Py_ssize_t count = len(regions), at
        cdef vv_place *places = <vv_place *>malloc(count * sizeof(vv_place)) if count else NULL
        if count and places == NULL:
            raise MemoryError
        try:
            for at in range(count):
                places[at].user, places[at].size, places[at].gpa, window = regions[at]
                if not isinstance(window, Window):
                    raise TypeError("wanted a window")
            windows = [each[3] for each in regions]
        except BaseException:
            free(places)
            raise
        free(self.places)
        self.places = places
        self.windows = windows

    def take(self, data, Py_ssize_t room):
        cdef Py_buffer view
        cdef unsigned counts[4]
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.run(<char *>view.buf, view.len, room, counts)
        finally:
            PyBuffer_Release(&view)
        return counts[0], counts[1], counts[2], counts[3]

    cdef int run(self, const char *data, Py_ssize_t size, Py_ssize_t room, unsigned *counts) except -1:
        """As take; counts: messages done, updates, invalidations, and those that want a reply."""
        cdef Py_ssize_t at, before = len(self.intervals), now = before
        cdef int changed
        cdef vv_answer one
        counts[0] = counts[1] = counts[2] = counts[3] = 0
        self.firsts, self.starts, self.lists = self.intervals.rows()
        # One pause for all of them.
        self.radix.gate.shut()
        try:
            for at in range(0, size - ANSWER + 1, ANSWER):
                memcpy(&one, data + at, ANSWER)
                if one.request != IOTLB_MSG or one.flags & FLAGS != VERSION or one.length != PAYLOAD:
                    break
                if one.size == 0 or one.iova + (one.size - 1) < one.iova:
                    break
                if one.kind == UPDATE and now < room:
                    changed = self.update(&one)
                    if changed < 0:
                        break
                    counts[1] += 1
                    now += changed
                elif one.kind == INVALIDATE:
                    changed = self.invalidate(&one)
                    if changed < 0:
                        break
                    counts[2] += 1
                    now -= changed
                else:
                    break
                counts[0] += 1
                counts[3] += one.flags & NEED_REPLY != 0
        finally:
            self.radix.gate.let_in()
            self.intervals.changed(now - before)
        return 0

    cdef int exact(self, uint64_t first, uint64_t last, Py_ssize_t *row, Py_ssize_t *column) except -2:
        """Whether just that interval is there (1), nothing at all (0), or anything else (-1); 0: where it would be."""
        cdef list starts
        cdef tuple found
        cdef uint64_t start
        if not self.firsts:
            return -1
        row[0] = up_to(self.firsts, last) - 1
        if row[0] < 0:
            row[0] = column[0] = 0
            return 0
        starts = <list>self.starts[row[0]]
        column[0] = up_to(starts, last)
        found = <tuple>(<list>self.lists[row[0]])[column[0] - 1]
        # One that starts behind ``first`` is not there any more if the last one of all does not reach it.
        if <uint64_t>PyLong_AsUnsignedLongLongMask(found[1]) - 1 < first:
            return 0
        start = PyLong_AsUnsignedLongLongMask(found[0])
        if start == first and <uint64_t>PyLong_AsUnsignedLongLongMask(found[1]) - 1 == last:
            column[0] -= 1
            return 1
        return -1

    cdef int update(self, vv_answer *one) except -2:
        """How many intervals there are more now; -1: nothing was done."""
        cdef uint64_t last = one.iova + (one.size - 1), offset
        cdef Py_ssize_t row, column, low = 0, high = len(self.windows), middle
        cdef list starts
        cdef int there
        if not one.allowed or one.allowed & ~(VV_READ | VV_WRITE) or one.user + (one.size - 1) < one.user:
            return -1
        while low < high:
            middle = (low + high) >> 1
            if self.places[middle].user <= one.user:
                low = middle + 1
            else:
                high = middle
        if not low:
            return -1
        offset = one.user - self.places[low - 1].user
        if offset >= self.places[low - 1].size or one.size > self.places[low - 1].size - offset:
            return -1
        there = self.exact(one.iova, last, &row, &column)
        if there < 0:
            return -1
        starts = <list>self.starts[row]
        if not there and len(starts) >= self.load:
            return -1
        target = self.places[low - 1].gpa + offset
        # An end may be 2**64, which is none of 64 bits.
        end = <object>last + 1
        new = self.make(one.iova, end, target, one.allowed)
        if there:
            (<list>self.lists[row])[column] = new
            vv_radix_drop(&self.radix.table, one.iova, last)
        else:
            (<list>self.lists[row]).insert(column, new)
            starts.insert(column, new[0])
            if not column:
                self.firsts[row] = new[0]
        self.radix.enter(one.iova, last, <Window>self.windows[low - 1], offset, one.allowed, self.eager)
        return not there

    cdef int invalidate(self, vv_answer *one) except -2:
        """How many intervals there are less now; -1: nothing was done."""
        cdef uint64_t last = one.iova + (one.size - 1)
        cdef Py_ssize_t row, column
        cdef list starts
        cdef int there = self.exact(one.iova, last, &row, &column)
        if there < 0:
            return -1
        if there:
            starts = <list>self.starts[row]
            if len(starts) == 1:
                return -1
            del starts[column]
            del (<list>self.lists[row])[column]
            if not column:
                self.firsts[row] = starts[0]
        vv_radix_drop(&self.radix.table, one.iova, last)
        return there
