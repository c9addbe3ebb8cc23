# SPDX-License-Identifier: Apache-2.0
"""Bytes to values and back, without any I/O."""
