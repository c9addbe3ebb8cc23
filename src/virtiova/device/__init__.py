# SPDX-License-Identifier: Apache-2.0
"""Devices: what users subclass. No I/O: any host can carry them, over any address space."""
