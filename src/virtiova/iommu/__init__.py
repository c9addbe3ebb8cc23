# SPDX-License-Identifier: Apache-2.0
"""Platforms' IOMMUs, programmed from outside, one file each, behind one port."""
