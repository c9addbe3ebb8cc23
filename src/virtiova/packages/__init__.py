# SPDX-License-Identifier: Apache-2.0
"""Debian's packages as a source of programs and kernels: fetched on demand, checked at each use, never installed."""
