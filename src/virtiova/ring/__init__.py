# SPDX-License-Identifier: Apache-2.0
"""Virtqueues: split and packed rings (virtio 1.4, 2.7 and 2.8), both ends, in either byte order, over any memory."""
