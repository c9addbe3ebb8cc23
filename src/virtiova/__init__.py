# SPDX-License-Identifier: Apache-2.0
"""Virtio devices behind IOMMUs: what they declare, what the rule predicts, what is observed."""

__version__ = "0.1.0"
