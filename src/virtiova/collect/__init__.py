# SPDX-License-Identifier: Apache-2.0
"""Facts about machines and their virtio devices, each with where it was read and how sure it is. No judging."""
