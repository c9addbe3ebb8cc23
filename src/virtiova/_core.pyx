# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False, autotestdict=False
"""The native half: memory accesses that Python cannot express. Described in ``_core.pyi``."""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize, PyBytes_Size
from libc.stdint cimport uint16_t, uint32_t, uintptr_t
from libc.string cimport memcpy

cdef extern from "Python.h":
    Py_ssize_t PyNumber_AsSsize_t(object o, object exc) except? -1

cdef extern from "atomics.h" nogil:
    uint16_t vv_load_acquire16(const void *at, int be) noexcept
    uint32_t vv_load_acquire32(const void *at, int be) noexcept
    void vv_store_release16(void *at, uint16_t value, int be) noexcept
    void vv_store_release32(void *at, uint32_t value, int be) noexcept
    void vv_load_pair(const void *at, char *out) noexcept
    void vv_fence() noexcept


@cython.final
cdef class Window:
    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, buffer):
        # A plain writable request, without strides, is granted for C-contiguous memory only.
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        self.held = True
        if <uintptr_t>self.view.buf % 8:
            # An aligned offset would not be an aligned address, and the access not a single one.
            raise ValueError("the buffer does not start at a multiple of 8 bytes")

    def __dealloc__(self):
        self.let_go()

    def __len__(self):
        if not self.held:
            raise ValueError("the window was released")
        return self.view.len

    cdef void let_go(self) noexcept:
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def release(self):
        self.let_go()

    cdef char *span(self, object offset, Py_ssize_t length, Py_ssize_t align) except NULL:
        """The address of ``length`` bytes at ``offset``, all inside of the buffer and aligned."""
        # First, because an __index__ of somebody else's may release the window.
        cdef Py_ssize_t start = PyNumber_AsSsize_t(offset, IndexError)
        if not self.held:
            raise ValueError("the window was released")
        if start < 0 or length < 0 or length > self.view.len or start > self.view.len - length:
            raise IndexError(f"{length:#x} bytes at offset {start:#x} are not inside of {self.view.len:#x} bytes")
        if start % align:
            raise IndexError(f"offset {start:#x} is not a multiple of {align}")
        return <char *>self.view.buf + start

    def read(self, offset, length):
        cdef Py_ssize_t size = PyNumber_AsSsize_t(length, IndexError)
        return PyBytes_FromStringAndSize(self.span(offset, size, 1), size)

    def write(self, offset, bytes data not None):
        cdef Py_ssize_t size = PyBytes_Size(data)
        memcpy(self.span(offset, size, 1), PyBytes_AsString(data), size)

    def load16(self, offset, bint swap=False):
        return vv_load_acquire16(self.span(offset, 2, 2), swap)

    def load32(self, offset, bint swap=False):
        return vv_load_acquire32(self.span(offset, 4, 4), swap)

    def load_pair(self, offset):
        cdef char pair[16]
        vv_load_pair(self.span(offset, 16, 8), pair)
        return PyBytes_FromStringAndSize(pair, 16)

    def store16(self, offset, uint16_t value, bint swap=False):
        vv_store_release16(self.span(offset, 2, 2), value, swap)

    def store32(self, offset, uint32_t value, bint swap=False):
        vv_store_release32(self.span(offset, 4, 4), value, swap)


def fence():
    vv_fence()
