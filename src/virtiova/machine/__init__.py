# SPDX-License-Identifier: Apache-2.0
"""Adapters that implement the ports: QEMU over qtest, and the in-process model."""
