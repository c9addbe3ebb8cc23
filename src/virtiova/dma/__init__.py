# SPDX-License-Identifier: Apache-2.0
"""Two faces of memory: where bytes live (RAM), and what a driver or a device may touch of it."""
