# SPDX-License-Identifier: Apache-2.0
"""The smallest drivers that make a device do DMA in both directions."""
