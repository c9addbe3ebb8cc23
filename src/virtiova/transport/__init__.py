# SPDX-License-Identifier: Apache-2.0
"""How a driver reaches a virtio device's registers: virtio-pci modern, transitional and legacy."""
