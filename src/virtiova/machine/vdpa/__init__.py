# SPDX-License-Identifier: Apache-2.0
"""vDPA devices, as the kernel hands them to user space (``/dev/vhost-vdpa-N``)."""
