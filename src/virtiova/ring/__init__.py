# SPDX-License-Identifier: Apache-2.0
"""Virtqueues: the split ring (virtio 1.4, 2.7), both ends, in either byte order, over any memory."""
