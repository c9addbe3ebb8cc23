# SPDX-License-Identifier: Apache-2.0
"""Real kernels as guests: Debian's own, booted without KVM, seen from inside and from outside."""
