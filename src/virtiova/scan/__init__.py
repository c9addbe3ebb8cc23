# SPDX-License-Identifier: Apache-2.0
"""What each virtio device is said to do, why, and what to change: rules over facts, and the joining of views."""

from virtiova.scan.engine import scan_view, scan_views

__all__ = ["scan_view", "scan_views"]
