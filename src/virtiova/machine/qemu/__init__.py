# SPDX-License-Identifier: Apache-2.0
"""QEMU as a machine: a plain process plays the CPU over the qtest protocol."""
